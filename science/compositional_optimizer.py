"""A torch optimizer for losses f(mean_j g_j(parameters)) of a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparring.launch.seeds import derive
from sparring.science.compositional import JACOBIAN_LIMIT, _rate, _rule, check_jacobian
from sparring.science.compositional_methods import Oracle, make
from sparring.science.compositional_problem import Batch, CompositionalProblem


class _ModuleProblem(CompositionalProblem):
    """The closure's problem: derivatives by autograd through the module, not by torch.func."""

    def __init__(
        self,
        owner: CompositionalOptimizer,
        outer: Callable[[Tensor, Tensor], Tensor],
        inner_count: int,
        outer_count: int,
    ) -> None:
        super().__init__(
            owner._inner,
            outer,
            inner_count=inner_count,
            outer_count=outer_count,
            inner_jacobian=owner._inner_jacobian,
        )
        self._owner = owner

    def pullback(self, x: Tensor, batch: Batch, cotangent: Tensor) -> Tensor:
        """(D,) ∂gᵀv in one backward pass."""
        return self._owner._transposed(x, batch.rows, cotangent[None])[0]


class CompositionalOptimizer(torch.optim.Optimizer):
    """SARAH-C and its peers on the parameters of a module (arXiv 1912.13515).

        optimizer = CompositionalOptimizer(model.parameters(), outer, inner_count=m,
                                           outer_count=n, lr=0.01)
        for _ in range(steps):
            optimizer.step(lambda rows: model(data[rows]))

    The closure gives g_j of the samples that the optimizer draws, (B, L), with the parameters that
    are in the module when it is called; a step calls it at the present and at the previous point,
    so it must not depend on anything else that changes (dropout, batch norm in train mode). One
    group of parameters, of one floating type and device.

    Args:
        params: parameters.
        outer: (y (L,), rows) ↦ (B,), the values f_i(y).
        inner_count, outer_count: m and n.
        lr: step length, as in `minimize_compositional`, with which the rest is shared.
        method, q, batch, anchor_batch, averaging, seed, jacobian_limit: as there.

    Raises:
        ValueError: as `minimize_compositional`, several groups, or parameters of different types.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        outer: Callable[[Tensor, Tensor], Tensor],
        *,
        inner_count: int,
        outer_count: int,
        lr: float,
        method: str = "sarah-c",
        q: int | None = None,
        batch: int | tuple[int, int, int] = 1,
        anchor_batch: int | tuple[int, int, int] | None = None,
        averaging: float | tuple[float, float, float] | None = None,
        seed: int = 0,
        jacobian_limit: int = JACOBIAN_LIMIT,
    ) -> None:
        super().__init__(params, {"lr": lr})
        if len(self.param_groups) != 1:
            raise ValueError(
                f"one group of parameters is needed, got {len(self.param_groups)}: the estimate "
                "is of the gradient in all of them"
            )
        self._params: list[nn.Parameter] = self.param_groups[0]["params"]
        kinds = {(p.dtype, p.device) for p in self._params}
        if len(kinds) != 1:
            raise ValueError(
                f"parameters must share one type and device, got {sorted(map(str, kinds))}"
            )
        self._closure: Callable[[Tensor], Tensor] | None = None
        self._problem = _ModuleProblem(self, outer, inner_count, outer_count)
        _rate(self._problem, method, lr)
        rule = _rule(self._problem, method, q, batch, anchor_batch, averaging)
        generator = torch.Generator().manual_seed(derive(seed, "compositional", "samples"))
        self._oracle = Oracle(self._problem, generator)
        self._method = make(rule, self._oracle)
        self._limit, self._steps = jacobian_limit, 0

    @property
    def n_ifo(self) -> dict[str, int]:
        """IFO calls so far, of g, ∂g and ∇f."""
        return dict(self._oracle.calls)

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self._params])

    def _load(self, x: Tensor) -> None:
        at = 0
        for parameter in self._params:
            size = parameter.numel()
            parameter.detach().copy_(x[at : at + size].view_as(parameter))
            at += size

    def _inner(self, x: Tensor, rows: Tensor) -> Tensor:
        assert self._closure is not None
        self._load(x)
        return self._closure(rows)

    def _transposed(self, x: Tensor, rows: Tensor, cotangents: Tensor) -> Tensor:
        """(K, D) products of the mean Jacobian's transpose with K cotangents (K, L)."""
        with torch.enable_grad():
            mean = self._inner(x, rows).mean(0)
            rowwise = torch.autograd.grad(
                mean, self._params, cotangents, is_grads_batched=True, materialize_grads=True
            )
        return torch.cat([part.reshape(len(cotangents), -1) for part in rowwise], 1)

    def _inner_jacobian(self, x: Tensor, rows: Tensor) -> Tensor:
        with torch.no_grad():
            width = self._inner(x, rows[:1]).shape[1]
        return self._transposed(x, rows, torch.eye(width, dtype=x.dtype, device=x.device))

    @torch.no_grad()
    def step(self, closure: Callable[[Tensor], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One step; returns the estimate of the gradient, flat (D,).

        Args:
            closure: rows (B,) int64 ↦ (B, L), the values g_j of the module.

        Raises:
            ValueError: no closure, or values of the wrong shape.
        """
        if closure is None:
            raise ValueError("step needs closure(rows), which returns g_j of those samples (B, L)")
        self._closure = closure
        x = self._flat()
        try:
            if self._steps == 0:
                check_jacobian(self._problem, x, self._method.rule.method, self._limit)
            direction = self._method.direction(self._steps, x)
        finally:
            self._load(x)
            self._closure = None
        self._load(x - self.param_groups[0]["lr"] * direction)
        self._steps += 1
        return direction.clone()

    @property
    def _rule(self) -> dict[str, Any]:
        """What a state must agree on, but for the averaging, which is a function."""
        rule = self._method.rule
        return {name: getattr(rule, name) for name in ("method", "q", "batch", "anchor_batch")}

    def state_dict(self) -> dict[str, Any]:
        """Torch's, and under "compositional" what the estimates and the sampling need to go on."""
        own = {
            "rule": self._rule,
            "steps": self._steps,
            "memory": {name: value.clone() for name, value in self._method.memory.items()},
            "calls": dict(self._oracle.calls),
            "generator": self._oracle.generator.get_state(),
        }
        return super().state_dict() | {"compositional": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state of the same method and sizes of batches.

        Raises:
            ValueError: the state is another method's, or of other sizes.
        """
        own = state_dict["compositional"]
        for name, mine in self._rule.items():
            if own["rule"][name] != mine:
                raise ValueError(
                    f"the state is of {name} {own['rule'][name]!r}, this optimizer of {mine!r}"
                )
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "compositional"})
        self._params = self.param_groups[0]["params"]
        self._steps = own["steps"]
        # torch moves its own state to the parameters, and the generator's lies on the CPU.
        device = self._params[0].device
        self._method.memory = {
            name: value.to(device, copy=True) for name, value in own["memory"].items()
        }
        self._oracle.calls.update(own["calls"])
        self._oracle.generator.set_state(own["generator"].cpu())
