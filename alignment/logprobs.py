"""Log-probabilities of responses, the same code for the reference and for training.

Legend: B rows, T positions, H hidden size, V vocabulary, N response tokens of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from sparring.alignment.models import place_policy
from sparring.alignment.stages import Scoring
from sparring.launch.errors import SparringError


@dataclass(frozen=True)
class Batch:
    """Right-padded rows."""

    ids_BT: Tensor
    attention_BT: Tensor
    response_BT: Tensor
    """1 where the token belongs to the response and is scored."""

    def to(self, device: Any) -> Batch:
        return Batch(
            self.ids_BT.to(device), self.attention_BT.to(device), self.response_BT.to(device)
        )


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad: int) -> Batch:
    """Pad (prompt ids, response ids) rows to the longest."""
    width = max(len(prompt) + len(response) for prompt, response in rows)
    ids = torch.full((len(rows), width), pad)
    attention = torch.zeros_like(ids)
    scored = torch.zeros_like(ids)
    for n, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids[n, :end] = torch.tensor([*prompt, *response])
        attention[n, :end] = 1
        scored[n, len(prompt) : end] = 1
    return Batch(ids, attention, scored)


class ScoredPolicy(nn.Module):
    """A causal language model whose forward pass gives log-probabilities of responses.

    Wrapping makes the whole computation one forward call, which is what DeepSpeed and FSDP hook.

    Args:
        precision: "bfloat16" for forward passes as under a trainer's autocast. Where a trainer
            drives this, that is its own affair.
    """

    def __init__(self, model: Any, *, logits_chunk: int = 1024, precision: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.logits_chunk = logits_chunk
        self.precision = precision

    def forward(self, ids_BT: Tensor, attention_BT: Tensor, response_BT: Tensor) -> Tensor:
        """Sum of log π(token | before) over each row's response tokens.

        Args:
            ids_BT: token ids, (B, T).
            attention_BT: 1 on tokens, 0 on padding, (B, T); padding may be on either side.
            response_BT: 1 on scored tokens, (B, T). The first position is never scored.

        Returns:
            (B,) float32, in nats.
        """
        positions = (attention_BT.cumsum(1) - 1).clamp(min=0)
        hidden_BTH = self.hidden(ids_BT, attention_mask=attention_BT, position_ids=positions)
        scored_BT = response_BT[:, 1:].bool()
        hidden_NH = hidden_BTH[:, :-1][scored_BT]
        target_N = ids_BT[:, 1:][scored_BT]
        row_N = scored_BT.nonzero()[:, 0]
        chunks = self._chunks(len(target_N), target_N.device)
        # Logits are V times larger than anything else here: where they do not fit into one chunk
        # they are computed again going backward, instead of kept.
        recompute = torch.is_grad_enabled() and chunks > 1
        size = self.logits_chunk
        logp_N = torch.cat(
            [
                self._token_logps(hidden_NH[n : n + size], target_N[n : n + size], recompute)
                for n in range(0, chunks * size, size)
            ]
        )
        total_B = torch.zeros(len(ids_BT), dtype=torch.float32, device=logp_N.device)
        return total_B.index_add(0, row_N, logp_N)

    def _chunks(self, count: int, device: torch.device) -> int:
        """Calls of the head for so many tokens.

        Under ZeRO-3 every call gathers the head's weights from all ranks, so they all make as many
        as the rank with most tokens; the last are of no token.
        """
        own = max(1, math.ceil(count / self.logits_chunk))
        if not any(hasattr(weight, "ds_id") for weight in self._head.parameters()):
            return own
        most = torch.tensor(own, device=device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
        return int(most)

    def hidden(self, ids_BT: Tensor, **inputs: Tensor) -> Tensor:
        """Last hidden states, (B, T, H), on the device of the ids even where layers have others."""
        with self._numbers(ids_BT):
            found = self.model.base_model(input_ids=ids_BT, use_cache=False, **inputs)
        return found.last_hidden_state.to(ids_BT.device)  # type: ignore[no-any-return]

    def _numbers(self, where: Tensor) -> AbstractContextManager[object]:
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(where.device.type, getattr(torch, self.precision))

    @property
    def _head(self) -> nn.Module:
        return self.model.get_output_embeddings()  # type: ignore[no-any-return]

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """What the whole model makes of last hidden states, (N, H) -> (N, V) float32."""
        with self._numbers(hidden_NH):
            logits: Tensor = self._head(hidden_NH).to(hidden_NH.device).float()
        config = self.model.config.get_text_config()
        # Between the head and the logits some families scale (Cohere; Granite divides) or cap
        # (Gemma 2 and later).
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if divisor := getattr(config, "logits_scaling", None):
            logits = logits / divisor
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    @torch.no_grad()
    def verify(self, ids: Sequence[int]) -> None:
        """Check on one text that `logits` are the model's own.

        Raises:
            SparringError: this model does more behind its head than is known here.
        """
        ids_1T = torch.tensor([list(ids)], device=self.model.device)
        ours = self.logits(self.hidden(ids_1T)[0])
        with self._numbers(ids_1T):
            theirs = self.model(input_ids=ids_1T).logits[0].to(ours)
        difference = float((ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max())
        # Half precision rounds a cap's or a scale's result, which stays in float32 here.
        if not difference <= (0.01 if self.precision == "float32" else 0.5):
            raise SparringError(
                f"{type(self.model).__name__} does something between its head and its logits that "
                f"log-probabilities here leave out (they differ by {difference:.2g}); such models "
                "cannot be trained yet"
            )

    def _token_logps(self, hidden_NH: Tensor, target_N: Tensor, recompute: bool) -> Tensor:
        def score(hidden: Tensor, target: Tensor) -> Tensor:
            logits = self.logits(hidden)
            return -F.cross_entropy(logits, target, reduction="none")

        if recompute:
            return torch.utils.checkpoint.checkpoint(  # type: ignore[no-any-return]
                score, hidden_NH, target_N, use_reentrant=False
            )
        return score(hidden_NH, target_N)


def scored_policy(path: Path, config: Scoring) -> ScoredPolicy:
    """A policy that is only read, on this rank's accelerators."""
    model = place_policy(path, "float32", config.devices)
    return ScoredPolicy(model, precision=config.precision)


@torch.no_grad()
def sampling_logps(
    policy: ScoredPolicy,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """What a sampler should report: each token's log-probability after temperature and top_p.

    log q(y_n) = log p_T(y_n) − log p_T(nucleus), where p_T = softmax(logits/T) and the nucleus is
    the fewest most likely tokens that together reach top_p (arXiv 1904.09751).

    Args:
        policy: on its device; one row needs no padding.
        prompt_ids, response_ids: token ids.
        temperature: T > 0; of greedy samples take 1, which is what engines report.
        top_p: in (0, 1].

    Returns:
        (N,) float32 log-probabilities in nats, and (N,) float32: the probability of all tokens that
        are more likely. A token is in the nucleus where that is below `top_p`; where it is not, the
        first value is log p_T(y_n) − log p_T(nucleus) all the same.
    """
    model = policy.model
    device = model.device
    ids_1T = torch.tensor([[*prompt_ids, *response_ids]], device=device)
    hidden_1TH = policy.hidden(ids_1T)
    first = len(prompt_ids)
    hidden_NH = hidden_1TH[0, first - 1 : -1]
    logps, above = [], []
    for n in range(0, len(hidden_NH), policy.logits_chunk):
        part = slice(n, n + policy.logits_chunk)
        logits = policy.logits(hidden_NH[part]) / temperature
        logp_NV = logits.log_softmax(-1)
        chosen_N1 = logp_NV.gather(1, ids_1T[0, first:][part].unsqueeze(1))
        above.append(logp_NV.exp().masked_fill(logp_NV <= chosen_N1, 0).sum(1))
        if top_p < 1:
            sorted_NV = logp_NV.exp().sort(descending=True).values
            before_NV = sorted_NV.cumsum(1) - sorted_NV
            nucleus_N1 = sorted_NV.masked_fill(before_NV >= top_p, 0).sum(1, keepdim=True)
            chosen_N1 = chosen_N1 - nucleus_N1.log()
        logps.append(chosen_N1.squeeze(1))
    return torch.cat(logps).cpu(), torch.cat(above).cpu()


@torch.no_grad()
def response_logps(
    policy: ScoredPolicy,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    pad: int,
    batch: int,
    device: Any,
) -> list[float]:
    """Summed log-probabilities of many rows, batched by similar length, in the rows' order."""
    order = sorted(range(len(rows)), key=lambda n: len(rows[n][0]) + len(rows[n][1]))
    found = [0.0] * len(rows)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        one = collate([rows[n] for n in chosen], pad=pad).to(device)
        values = policy(one.ids_BT, one.attention_BT, one.response_BT).tolist()
        for n, value in zip(chosen, values, strict=True):
            found[n] = value
    return found
