"""A sampler that reveals tokens, as a composition of three choices.

    counts      how many tokens a call reveals, and at which time        (counts.py)
    position    which ones come first                                    (choices.py)
    token       what they become                                         (choices.py)

DNDM and its variants, RDM, threshold, entropy-bound and autoregressive decoding differ in these and
in what becomes of tokens that are clean already; none of them has code of its own.

Shape legend: B rows, A active rows, N positions, M predicted positions, K tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from sparring.diffusion.dndm.choices import (
    ORDERS,
    SCORES,
    TOKENS,
    Order,
    Position,
    Prediction,
    Token,
    look_up,
    rank,
)
from sparring.diffusion.dndm.counts import Counts
from sparring.diffusion.dndm.denoisers import Denoiser, Network, Sampled, check_input
from sparring.diffusion.dndm.draws import Draws, Generators
from sparring.diffusion.dndm.noise import Noise
from sparring.diffusion.dndm.plans import Plan, Ranked

Revise = Literal["keep", "rewrite", "rerank"]
Path = Literal["frozen", "renewed"]


@dataclass(frozen=True)
class Revision:
    """What becomes of clean tokens at a call."""

    reranks: bool
    """They compete with the noisy ones for being clean, and the losers become noise again."""
    rewrites: bool
    """They are predicted anew."""


REVISIONS: dict[str, Revision] = {
    "keep": Revision(reranks=False, rewrites=False),
    "rewrite": Revision(reranks=False, rewrites=True),
    "rerank": Revision(reranks=True, rewrites=False),
}


@dataclass
class State:
    """A batch on its way from noise to data."""

    x_BN: Tensor
    noise_BN: Tensor
    """w: what each position is while it is noisy."""
    free_BN: Tensor
    clean_BN: Tensor
    """bool, among the free positions."""
    plan: Plan
    noise: Noise
    draws: Draws
    call: int = 0
    logp_BN: Tensor = field(init=False)
    """log p of each token at the call that wrote it; 0 where none was written."""

    def __post_init__(self) -> None:
        self.logp_BN = torch.zeros_like(self.x_BN, dtype=torch.float64)

    @property
    def noisy(self) -> Tensor:
        """bool: free and not clean."""
        return self.free_BN & ~self.clean_BN

    @property
    def active(self) -> Tensor:
        """bool: rows of the next call."""
        return self.plan.active(self.call, self.clean_BN.sum(1))

    @property
    def times(self) -> Tensor:
        """float64, each row's time of the next call."""
        return self.plan.time(self.call, self.clean_BN.sum(1))


@dataclass(frozen=True, kw_only=True)
class Reveal:
    """A sampler. At a call each row has a time t of its own (see counts.py), and

        x~_0 ~ p_theta(. | x_t, t) by `token`,  scores by `position`,
        the K_t best positions are clean after it and get x~_0, the others stay what they are.

    Args:
        counts: a `Counts`.
        position: "random" (the order of the transition times), "confidence", "margin", "entropy",
            "left-to-right", or a function as in choices.py.
        token: "sample", "argmax", or a function as in choices.py.
        revise: "keep" clean tokens (DNDM, Algorithm 1); "rewrite" them with the new prediction
            (its version 2); or "rerank" all positions, those that drop out turning into their
            noise again (RDM-k).
        schedule_conditioning: the denoiser also gets `noisy=`, bool (A, N). With multinomial noise
            it cannot know otherwise which tokens are noise; it must have been trained with it.
        path: "frozen" noise, the de-randomised process; or "renewed": between t and s a noisy
            token is drawn anew with chance 1 - alpha_t / alpha_s (D3PM, RDM). The same for the
            mask.

    Raises:
        ValueError: an unknown name; or "rerank" with counts that are decided at each call.
    """

    counts: Counts
    position: str | Position = "random"
    token: str | Token = "sample"
    revise: Revise = "keep"
    schedule_conditioning: bool = False
    path: Path = "frozen"

    def __post_init__(self) -> None:
        look_up("position", self.position, {**ORDERS, **SCORES})
        look_up("token", self.token, TOKENS)
        if self.revise not in REVISIONS:
            raise ValueError(f"revise must be one of {list(REVISIONS)}, not {self.revise!r}")
        if self.path not in ("frozen", "renewed"):
            raise ValueError(f"path must be 'frozen' or 'renewed', not {self.path!r}")
        if REVISIONS[self.revise].reranks and not self.counts.drawn:
            raise ValueError(
                f"revise='rerank' needs counts that are drawn beforehand; "
                f"{type(self.counts).__name__} only says how many more: use revise='keep'"
            )

    @torch.no_grad()
    def sample(
        self,
        denoiser: Denoiser,
        x_BN: Tensor,
        free_BN: Tensor,
        *,
        noise: Noise,
        generator: Generators,
        cond: Mapping[str, Any] | None = None,
        output_history: bool = False,
    ) -> Sampled:
        """Generate the free positions.

        Args:
            denoiser: `denoiser(x, t, **cond) -> logits`, see denoisers.py.
            x_BN: integer tokens; what stands at free positions does not matter.
            free_BN: bool, at least one True a row. The other tokens never change.
            noise: what the network was trained with.
            generator: one, or one a row; see `Draws`. A row depends on its own stream only, as far
                as the network's answer for a row does not depend on the other rows.
            cond: for the denoiser; tensors with the batch as first axis.
            output_history: keep x before the first call and after each.

        Raises:
            ValueError: input that cannot be, or a denoiser whose logits are not as they should be.
        """
        state = self.begin(x_BN, free_BN, noise=noise, generator=generator)
        network = Network(denoiser, noise, cond or {}, len(x_BN), x_BN.device)
        history = [state.x_BN] if output_history else None
        while bool((active_B := state.active).any()):
            also = {"noisy": state.noisy} if self.schedule_conditioning else {}
            self.advance(state, network(state.x_BN, state.times, active_B, **also))
            if history is not None:
                history.append(state.x_BN)
        return Sampled(state.x_BN, network.nfe, network.evaluations, history, state.logp_BN)

    def begin(self, x_BN: Tensor, free_BN: Tensor, *, noise: Noise, generator: Generators) -> State:
        """x_T and the plans; arguments as of `sample`."""
        check_input(x_BN, free_BN, noise)
        draws = Draws(generator, len(x_BN), x_BN.device)
        plan = self.counts.plan(free_BN, draws)
        x = noise.fill(x_BN, free_BN, draws)
        return State(x, x, free_BN, torch.zeros_like(free_BN), plan, noise, draws)

    def advance(self, state: State, logits_ANK: Tensor) -> Tensor:
        """One call's answer: moves the state on and returns x~_0, (B, N), x where not predicted.

        Args:
            state: is changed.
            logits_ANK: of the active rows.
        """
        active, noisy, revision = state.active, state.noisy, REVISIONS[self.revise]
        contend = active[:, None] & (state.free_BN if revision.reranks else noisy)
        if self._order is not None and self.counts.drawn:
            # Positions do not wait for the answer, so only tokens that are written are drawn.
            clean = self._choose(state, self._order(state.plan.priority_BN), contend)
            where = active[:, None] & clean & (clean if revision.rewrites else noisy)
            prediction, tokens = self._predict(state, logits_ANK, where)
        else:
            where = contend | (active[:, None] & state.clean_BN & revision.rewrites)
            prediction, tokens = self._predict(state, logits_ANK, where)
            said = prediction, tokens
            clean = self._choose(state, self._score(state, *said), contend, said)
        tokens_BN = state.x_BN.masked_scatter(where, tokens)
        written = where & clean & (clean if revision.rewrites else noisy)
        x = torch.where(written, tokens_BN, state.x_BN)
        logp_BN = prediction.spread(prediction.logp_of(tokens), 0.0)
        state.logp_BN = torch.where(written, logp_BN, state.logp_BN)
        if self.path == "renewed":
            self._renew(state, clean)
        state.x_BN = torch.where(state.free_BN & ~clean, state.noise_BN, x)
        state.clean_BN = clean
        state.call += 1
        return tokens_BN

    @property
    def _order(self) -> Order | None:
        """Of positions that are chosen without the network's answer."""
        return ORDERS.get(self.position) if isinstance(self.position, str) else None

    def _predict(
        self, state: State, logits_ANK: Tensor, where_BN: Tensor
    ) -> tuple[Prediction, Tensor]:
        """The law of x_0 at some positions of active rows, and a token of each."""
        logits = logits_ANK[where_BN[state.active]]
        prediction = Prediction(state.noise.log_probabilities(logits), where_BN)
        return prediction, look_up("token", self.token, TOKENS)(prediction, state.draws)

    def _score(self, state: State, prediction: Prediction, tokens_M: Tensor) -> Tensor:
        """(B, N) scores, float64."""
        if self._order is not None:
            return self._order(state.plan.priority_BN)
        scores = look_up("position", self.position, SCORES)(prediction, tokens_M)
        return prediction.spread(scores.double(), -torch.inf)

    def _choose(
        self,
        state: State,
        score_BN: Tensor,
        contend_BN: Tensor,
        said: tuple[Prediction, Tensor] | None = None,
    ) -> Tensor:
        """(B, N) bool: what is clean after the call. Rows that take no part keep what they have."""
        order = rank(score_BN, state.plan.priority_BN, contend_BN)
        ranked = None if said is None else Ranked(*said, order)
        held = state.clean_BN & ~contend_BN
        return held | (state.plan.choose(state.call, held.sum(1), order, ranked) & contend_BN)

    def _renew(self, state: State, clean_BN: Tensor) -> None:
        """w stays with chance alpha_t / alpha_s, s being the row's next time."""
        mask = state.free_BN & ~clean_BN & state.active[:, None]
        after = state.plan.time(state.call + 1, clean_BN.sum(1))
        alpha_s, alpha_t = state.plan.schedule.alpha(after), state.plan.schedule.alpha(state.times)
        a = torch.where(alpha_s > 0, alpha_t / alpha_s.clamp(min=1e-300), 1.0)
        hit = state.draws.uniform(mask) >= a[:, None].expand_as(mask)[mask]
        fresh = state.noise.draw(state.draws, mask)
        old = state.noise_BN[mask]
        state.noise_BN = state.noise_BN.masked_scatter(mask, torch.where(hit, fresh, old))
