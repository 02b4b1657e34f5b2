"""The arithmetic of a MARS step on batches: correction and clip, moments, updates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparring.optimizers.adamw import adamw_apply, adamw_moments
from sparring.optimizers.batches import Batch, Part
from sparring.optimizers.kernel import Kernel, NormCache, kernel
from sparring.optimizers.layouts import Layout, Original, collective_device
from sparring.optimizers.orthogonal import MatrixExchange, orthogonalise
from sparring.optimizers.recursive import correct_, correction_coefficient
from sparring.optimizers.rules import rule_of


def correct(parts: Sequence[Part]) -> None:
    """c, in the memory of `last_grad`, scaled to a norm of at most 1 a parameter.

    The kernel's batches keep `last_grad`, and get the scale alone where that needs other ranks.
    """
    clipped: list[Batch] = []
    for part in parts:
        for batch in part.batches:
            if batch.rule == "AdamW":
                continue
            if batch.kernel is None:
                correct_(batch.last_grads, batch.grads, _kappa(batch))
            elif all(layout.whole for layout in batch.layouts):
                continue
            if part.group["clip_c"]:
                clipped.append(batch)
    layouts = [x for part in parts if part.group["clip_c"] for x in part.layouts]
    norms = _norms(clipped, layouts)
    for batch in clipped:
        own = [norms[id(c)] for c in batch.last_grads]
        if batch.kernel:
            batch.scales = [1 / max(1.0, float(norm)) for norm in own]
        elif batch.last_grads[0].device.type == "cpu" and not torch.compiler.is_compiling():
            for c, norm in zip(batch.last_grads, own, strict=True):
                if norm > 1:  # rare after the first steps, and a pass over memory
                    c.div_(norm)
        else:
            torch._foreach_maximum_(own, 1.0)
            torch._foreach_div_(batch.last_grads, own)


def _kappa(batch: Batch) -> float:
    return correction_coefficient(batch.group["gamma"], batch.settings.beta1)


def _norms(batches: Sequence[Batch], layouts: Sequence[Layout]) -> dict[int, Tensor]:
    """Euclidean norm of the parameter behind every c, by the id of `last_grad`."""
    norms: dict[int, Tensor] = {}
    split: dict[tuple[Any, ...], list[tuple[int, Tensor]]] = {}
    for batch in batches:
        for c, norm, layout, index in zip(
            batch.last_grads,
            _own_norms(batch),
            batch.layouts,
            batch.indices,
            strict=True,
        ):
            norms[id(c)] = norm
            if layout.groups:
                split.setdefault(layout.groups, []).append((index, norm))
    # Ranks that hold nothing of a parameter still take part in the sum.
    for groups in dict.fromkeys(x.groups for x in layouts if x.groups):
        members = sorted({i for x in layouts if x.groups == groups for i in x.members})
        place = {index: number for number, index in enumerate(members)}
        device = collective_device(groups[0])
        squares = torch.zeros(len(members), dtype=torch.float32, device=device)
        mine = split.get(groups, [])
        if mine:
            squares = squares.to(mine[0][1].dtype)
            where = torch.tensor([place[index] for index, _ in mine], device=device)
            values = torch.stack([norm for _, norm in mine]).to(device) ** 2
            squares.index_add_(0, where, values)
        for group in groups:
            dist.all_reduce(squares, group=group)
        for index, norm in mine:
            norm.copy_(squares[place[index]].sqrt())
    return norms


def _own_norms(batch: Batch) -> Sequence[Tensor]:
    """Norms of this rank's parts of every c."""
    if batch.kernel is None:
        return torch._foreach_norm(batch.last_grads)
    norms = [
        batch.kernel.norms(grad, last, _kappa(batch))[1]
        for grad, last in zip(batch.grads, batch.last_grads, strict=True)
    ]
    return list(torch.tensor(norms, dtype=batch.params[0].dtype))


def take_in(batch: Batch) -> None:
    """The moments, from the corrected gradient (`correct`) or for AdamW from the gradient."""
    corrected = batch.grads if batch.rule == "AdamW" else batch.last_grads
    if batch.rule in ("AdamW", "MARS-AdamW"):
        adamw_moments(
            corrected,
            batch.exp_avgs,
            batch.exp_avg_sqs,
            batch.max_exp_avg_sqs,
            batch.settings,
        )
    else:
        torch._foreach_lerp_(batch.exp_avgs, corrected, 1 - batch.settings.beta1)


def apply(batch: Batch) -> None:
    """Update the parameters from the moments: AdamW, MARS-AdamW and MARS-Lion."""
    if batch.rule == "MARS-Lion":
        lr, decay = batch.settings.lr, batch.settings.weight_decay
        updates = torch._foreach_sign(batch.exp_avgs)
        torch._foreach_mul_(updates, -lr)
        if decay:
            torch._foreach_mul_(batch.params, 1 - lr * decay)
        torch._foreach_add_(batch.params, updates)
        return
    on_device = batch.group["capturable"] or torch.compiler.is_compiling()
    steps = batch.steps if on_device else [step.item() for step in batch.steps]
    denominators = batch.max_exp_avg_sqs or batch.exp_avg_sqs
    adamw_apply(batch.params, batch.exp_avgs, denominators, steps, batch.settings)


def apply_shampoo(
    part: Part,
    originals: Sequence[Original],
    exchanges: dict[tuple[int, ...], MatrixExchange],
) -> None:
    """Update a group's matrices from the orthogonal factors of their momenta.

    Collective over the ranks that share them; `exchanges` is kept from call to call.
    """
    group = part.group
    batches = [batch for batch in part.batches if batch.rule == "MARS-Shampoo"]

    def factor(momentum: Tensor) -> Tensor:
        # The authors' code divides by 1 - beta1: a matter of the norm's epsilon alone.
        scaled = momentum / (1 - group["betas"][0])
        return orthogonalise(scaled, group["orthogonaliser"], group["ns_steps"])

    pieces = {
        index: exp_avg
        for batch in batches
        for index, exp_avg in zip(batch.indices, batch.exp_avgs, strict=True)
    }
    factors: dict[int, Tensor] = {}
    for exchange in _exchanges(part, originals, exchanges):
        held = {i: pieces.pop(i).reshape(-1) for i in exchange.members if i in pieces}
        factors |= exchange(held, factor)
    factors |= {index: factor(piece) for index, piece in pieces.items()}
    for batch in batches:
        lr, decay = batch.settings.lr, batch.settings.weight_decay
        for index, parameter in zip(batch.indices, batch.params, strict=True):
            if decay:
                parameter.mul_(1 - lr * decay)
            parameter.sub_(factors[index].view_as(parameter) * lr)


def _exchanges(
    part: Part, originals: Sequence[Original], known: dict[tuple[int, ...], MatrixExchange]
) -> Iterator[MatrixExchange]:
    """One for every mesh over which matrices of a group are split."""
    for groups in dict.fromkeys(layout.groups for layout in part.layouts if layout.groups):
        layouts = [layout for layout in part.layouts if layout.groups == groups]
        members = tuple(
            sorted(
                index
                for layout in layouts
                for index in layout.members
                if rule_of(originals[index].kind, part.group) == "MARS-Shampoo"
            )
        )
        if members and members not in known:
            known[members] = MatrixExchange(layouts, originals, members)
        if members:
            yield known[members]


def can_fuse(batch: Batch) -> bool:
    """Whether torch's fused AdamW can make this update."""
    return batch.rule in ("AdamW", "MARS-AdamW") and _may_fuse(batch)


def _may_fuse(batch: Batch) -> bool:
    """Whether settings, devices and types are for one call that does it all."""
    fused = batch.group["fused"]
    if fused is False:
        return False
    if torch.compiler.is_compiling():
        return False  # the compiler fuses the plain operations itself
    if fused is None and batch.group["foreach"] is not None:
        return False
    # The kernel wants steps on the tensors' device, and one type of 32 or 64 bits.
    tensors = (*batch.params, *batch.grads)
    return batch.steps[0].device == batch.params[0].device and all(
        t.dtype in (torch.float32, torch.float64) and t.dtype == batch.exp_avgs[0].dtype
        for t in tensors
    )


def kernel_for(batch: Batch) -> Kernel | None:
    """The kernel, where it can make the whole step of a batch."""
    if batch.rule not in ("MARS-AdamW", "MARS-Lion") or not _may_fuse(batch):
        return None
    held = (batch.params, batch.grads, batch.last_grads, batch.exp_avgs, batch.exp_avg_sqs)
    tensors = [t for array in (*held, batch.max_exp_avg_sqs) for t in array]
    dtype = batch.params[0].dtype
    fits = all(t.is_contiguous() and t.device.type == "cpu" and t.dtype == dtype for t in tensors)
    return kernel(dtype) if fits else None


def kernel_step(batch: Batch, known: NormCache) -> None:
    """The whole step of a batch that has a kernel.

    Args:
        known: norms of `last_grad`s.
    """
    assert batch.kernel is not None
    kappa, clip = _kappa(batch), batch.group["clip_c"]
    for n, (grad, last) in enumerate(zip(batch.grads, batch.last_grads, strict=True)):
        scale, norm = 1.0, 0.0
        if clip and batch.scales:
            scale = batch.scales[n]
        elif clip:
            scale, norm = _scale_and_norm(batch.kernel, grad, last, kappa, known.get(last))
        held = (batch.params[n], grad, last, batch.exp_avgs[n])
        if batch.rule == "MARS-Lion":
            batch.kernel.lion(*held, batch.settings, coefficient=kappa, scale=scale)
        else:
            batch.kernel.adamw(
                *held,
                batch.exp_avg_sqs[n],
                batch.max_exp_avg_sqs[n] if batch.max_exp_avg_sqs else None,
                batch.steps[n].item(),
                batch.settings,
                coefficient=kappa,
                scale=scale,
            )
        if clip and not batch.scales:
            known.put(last, norm)


def _scale_and_norm(
    kernel: Kernel, grad: Tensor, last: Tensor, kappa: float, last_norm: float
) -> tuple[float, float]:
    """1 / max(1, |c|), and |g|, by reading as little as will do."""
    # |c| <= (1 + kappa) |g| + kappa |h|, mostly far below one, and |g| is mostly near |h|.
    if (1 + 2 * kappa) * last_norm < 0.999:
        norm = kernel.norm(grad)
        if (1 + kappa) * norm + kappa * last_norm < 0.999:
            return 1.0, norm
    norm, corrected = kernel.norms(grad, last, kappa)
    return 1 / max(1.0, corrected), norm


def fused_adamw(batch: Batch) -> None:
    """Moments and update of a batch that `can_fuse`."""
    lr, beta1, beta2, weight_decay, eps = batch.settings
    torch._fused_adamw_(
        batch.params,
        batch.grads if batch.rule == "AdamW" else batch.last_grads,
        batch.exp_avgs,
        batch.exp_avg_sqs,
        batch.max_exp_avg_sqs,
        batch.steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=batch.group["amsgrad"],
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )
