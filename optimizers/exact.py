"""Exact mode's protocol: two gradients a batch, and which of them a step takes in."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from sparring.optimizers.originals import Originals

logger = logging.getLogger(__name__)

States = Mapping[Tensor, dict[str, Any]]


def is_pending(state: Mapping[str, Any]) -> bool:
    """Whether a tensor has moments whose update is still to be made."""
    return state.get("pending_lr") is not None


class ExactMode:
    """Whose turn it is: the moments of a batch, or the update that they lead to.

    A batch has a step that keeps its gradient as h and makes the update before it, then one inside
    `moments` that corrects by h (see `MARS.moments`). A tensor's `pending_lr` is the learning rate
    of an update that is still to be made; while it is set, `last_grad` holds c.

    An update may be lost only to an overflow, which skips the step that was to make it. Then h is
    not known, and the next c is g.
    """

    def __init__(self) -> None:
        self.in_moments = False
        # Since the last moments; a dictionary, for the compiler has no sets of tensors.
        self._stepped: dict[Tensor, bool] = {}
        self._skipped = False

    @contextmanager
    def moments(self) -> Iterator[None]:
        """Steps inside take in a gradient."""
        self._stepped.clear()
        self.in_moments = True
        try:
            yield
        finally:
            self.in_moments = False
            self._skipped = False

    def skip(self) -> None:
        """A GradScaler found an overflow and skips a step."""
        self._skipped |= not self.in_moments

    def restart(self) -> None:
        """Another state was loaded: nothing has stepped since."""
        self._stepped.clear()
        self._skipped = False

    def drop_pending(self, states: States) -> None:
        """Forget updates that are still to be made."""
        for state in states.values():
            if is_pending(state):
                state["pending_lr"] = None
                state.pop("last_grad", None)  # it holds c

    def begin(self, tensors: Sequence[Tensor], states: States, originals: Originals) -> None:
        """Refuse, or say, that a step inside `moments` would lose an update.

        Args:
            tensors: those with a gradient.

        Raises:
            RuntimeError: the step between two moments was forgotten.
        """
        if not self.in_moments:
            return
        lost = {t: states[t] for t in tensors if is_pending(states.get(t, {}))}
        if not lost:
            return
        # DeepSpeed skips overflows without telling the optimizer (`take_moments` asks its engine).
        if not self._skipped and not originals.replaced(tensors):
            raise RuntimeError(
                "exact mode: moments were taken again while their update is still to be made; call "
                "step() outside of moments() in between (see MARS.moments), or drop_pending() "
                "when other weights were loaded"
            )
        logger.warning(
            "MARS: the update of a batch is lost. An overflow does that; if there was none, the "
            "step between two moments() was forgotten (see MARS.moments)"
        )
        self.drop_pending(lost)

    def settle(
        self, tensor: Tensor, state: dict[str, Any], *, maximize: bool
    ) -> float | Tensor | None:
        """Outside `moments`: the learning rate of the update to make, if any.

        Raises:
            RuntimeError: steps without moments.
        """
        if tensor in self._stepped:
            raise RuntimeError(
                "exact mode takes two gradients a batch: between two calls of step(), call it once "
                "`with optimizer.moments():` (see MARS.moments)"
            )
        self._stepped[tensor] = True
        lr: float | Tensor | None = state.get("pending_lr")
        state["pending_lr"] = None
        if tensor.grad is None:
            state.pop("last_grad", None)  # not known for the next batch
        elif lr is None and "last_grad" in state and state["step"] > 0:
            state["last_grad"].copy_(-tensor.grad if maximize else tensor.grad)
        return lr
