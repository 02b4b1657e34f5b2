"""Named algorithms: scores, noise that is renewed, the cache, conditions, names."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from watched import ABSORBING, FREE, MASK, NAMED, PROMPT, TABLE, UNIFORM, V, Watching, seeded

from sparring.diffusion.dndm import (
    ALGORITHMS,
    Ancestral,
    CosineCounts,
    CosineSchedule,
    EntropyBoundCounts,
    Reveal,
    TransitionTimes,
    algorithm,
    d3pm,
    dndm,
    dndm_c,
    entropy_bound,
    maskgit,
    mdlm_cache,
    rdm,
    uniform,
)
from sparring.diffusion.dndm.algorithms import settings_of


@pytest.mark.parametrize("name", ["dndm", "dndm-v2", "dndm-k", "rdm", "rdm-k", "threshold"])
def test_scores_are_of_the_tokens_as_they_were_written(name: str) -> None:
    """Against a record of the writes that is read off the history: a mask that became a token.

    Clean positions are predicted again by rdm-k and not written; by dndm-v2 they are.
    """
    net, sampler = Watching(2.0), NAMED[name]
    made = sampler.sample(
        net, PROMPT, FREE, noise=ABSORBING, generator=seeded(), output_history=True
    )
    assert made.history is not None
    wanted, rewrites = torch.zeros(PROMPT.shape, dtype=torch.float64), 0
    for call, (before, after) in enumerate(itertools.pairwise(made.history)):
        rows = [r for r in range(2) if call < int(made.evaluations[r])]
        logits = torch.zeros(*PROMPT.shape, V, dtype=torch.float64)
        logits[rows] = Watching(2.0)(before[rows], net.t[call])
        logits[..., MASK] = -torch.inf
        logp = logits.log_softmax(-1).gather(-1, after[..., None])[..., 0]
        written = (before == MASK) & (after != MASK)
        if name == "dndm-v2":
            written |= FREE & (after != MASK)
            written[[r for r in range(2) if r not in rows]] = False
        rewrites += int((written & (wanted != 0)).sum())
        wanted = torch.where(written, logp, wanted)
    assert made.logp_BN is not None
    torch.testing.assert_close(made.logp_BN, wanted, rtol=0, atol=1e-12)
    assert bool((made.logp_BN[~FREE] == 0).all())
    assert (rewrites > 0) is (name in ("rdm-k", "dndm-v2"))


def test_renewed_noise_changes_at_the_rate_of_the_markov_chain() -> None:
    rows, steps = 4000, 4
    sampler = rdm(steps)
    x = torch.zeros(rows, 1, dtype=torch.long)
    noise = uniform(V)
    state = sampler.begin(x, torch.ones_like(x, dtype=torch.bool), noise=noise, generator=seeded())
    logits = torch.zeros(rows, 1, V)
    for t in range(steps, 1, -1):
        before, noisy = state.x_BN.clone(), state.noisy
        sampler.advance(state, logits)
        still = noisy & state.noisy
        kept = (1 - t / steps) / (1 - (t - 1) / steps)
        same = float((state.x_BN == before)[still].double().mean())
        share = kept + (1 - kept) / V
        error = 4 * math.sqrt(share * (1 - share) / int(still.sum()))
        assert abs(same - share) < error
        # The share of noisy tokens that become clean is (alpha_{t-1} - alpha_t) / (1 - alpha_t).
        shown = float((noisy & ~state.noisy).sum() / noisy.sum())
        assert abs(shown - 1 / t) < 4 * math.sqrt(1 / t / int(noisy.sum()))


def test_steps_that_are_not_skipped_cost_calls_and_change_nothing() -> None:
    x = torch.full((3, 5), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    every = Reveal(counts=TransitionTimes(30, skip=False))
    slow = every.sample(Watching(), x, free, noise=ABSORBING, generator=seeded())
    fast = dndm(30).sample(Watching(), x, free, noise=ABSORBING, generator=seeded())
    assert slow.nfe == 30
    assert slow.row_evaluations == 90
    assert fast.nfe <= 5
    assert torch.equal(slow.sequences, fast.sequences)


def test_the_cache_changes_no_token_and_fades_with_the_batch() -> None:
    def timeless(x: Tensor, t: Tensor) -> Tensor:
        return TABLE[x] - 0.5 * TABLE[x.roll(1, 1)]

    calls = []
    for rows in (1, 16):
        x = torch.full((rows, 6), MASK)
        free = torch.ones_like(x, dtype=torch.bool)
        plain, cached = (
            make(100).sample(timeless, x, free, noise=ABSORBING, generator=seeded())
            for make in (d3pm, mdlm_cache)
        )
        assert torch.equal(plain.sequences, cached.sequences)
        assert plain.nfe == 100
        calls.append(cached.nfe)
    assert calls[0] <= 7  # one more than DNDM's, unless a token changes at the first step
    assert calls[1] > 40


def test_conditions_are_cut_to_the_rows_of_a_call() -> None:
    seen = []

    def net(x: Tensor, t: Tensor, source: Tensor, scale: float, noisy: Tensor) -> Tensor:
        assert len(source) == len(x) == len(noisy)
        assert scale == 2.0
        assert torch.equal(noisy, x == MASK)
        seen.append(source.flatten().tolist())
        return TABLE[x]

    x = torch.full((3, 4), MASK)
    x[1, 1:] = 0
    free = x == MASK
    cond = {"source": torch.arange(3)[:, None], "scale": 2.0}
    sampler = dndm_c(schedule_conditioning=True)
    made = sampler.sample(net, x, free, noise=ABSORBING, generator=seeded(), cond=cond)
    assert seen == [[0, 1, 2], [0, 2], [0, 2], [0, 2]]
    assert made.evaluations.tolist() == [4, 1, 4]
    assert made.row_evaluations == 9


def test_names() -> None:
    assert isinstance(algorithm("d3pm", steps=3), Ancestral)
    assert algorithm("dndm", steps=3, schedule="cosine") == dndm(3, "cosine")
    assert set(ALGORITHMS) >= {"dndm", "dndm-v2", "dndm-k", "dndm-c", "first-hitting", "rdm-k"}
    assert maskgit(4, "cosine") == Reveal(
        counts=CosineCounts(4, CosineSchedule()), position="confidence"
    )
    assert entropy_bound(bound=0.5) == Reveal(counts=EntropyBoundCounts(0.5), position="entropy")


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) - {"d3pm", "mdlm-cache"}))
def test_every_composed_sampler_can_tell_the_network_what_is_noise(name: str) -> None:
    """Multinomial noise: the network gets the mask of noisy tokens, at first all that are free."""
    settings = {"steps": 6} if "steps" in settings_of(name) else {}
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        seen.append(noisy)
        return Watching()(x, t)

    sampler = algorithm(name, schedule_conditioning=True, **settings)
    sampler.sample(net, PROMPT, FREE, noise=UNIFORM, generator=seeded())
    assert torch.equal(seen[0], FREE)
    assert int(seen[-1].sum()) < int(FREE.sum())
