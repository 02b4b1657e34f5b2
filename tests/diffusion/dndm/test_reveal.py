"""The composed sampler: calls, ranks, rows, fixed tokens, revisions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from watched import (
    ABSORBING,
    FREE,
    MASK,
    NAMED,
    PROMPT,
    TABLE,
    UNIFORM,
    V,
    Watching,
    constant,
    seeded,
)

from sparring.diffusion.dndm import (
    BetaSchedule,
    LinearCounts,
    Noise,
    Reveal,
    TransitionTimes,
    dndm,
    dndm_c,
    dndm_k,
    dndm_v2,
    rdm,
)


@pytest.mark.parametrize("noise", [ABSORBING, UNIFORM], ids=["absorbing", "uniform"])
@pytest.mark.parametrize("name", NAMED)
def test_every_sampler(name: str, noise: Noise) -> None:
    """Oracles 9 and 10: fixed tokens stay at every call, seeds reproduce, certainty is obeyed."""
    sampler = NAMED[name]
    made = [
        sampler.sample(
            Watching(), PROMPT, FREE, noise=noise, generator=seeded(n), output_history=True
        )
        for n in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(made[0].sequences, made[1].sequences)
    # Likeliest tokens from left to right or by margin leave masks nothing to chance.
    chance = noise is UNIFORM or name not in ("autoregressive", "margin")
    assert any(not torch.equal(made[0].sequences, m.sequences) for m in made[2:]) is chance
    history = made[0].history
    assert history is not None
    for x in history:
        assert torch.equal(x[~FREE], PROMPT[~FREE])
    assert torch.equal(history[-1], made[0].sequences)
    if noise is ABSORBING:
        assert bool((history[0][FREE] == MASK).all())
        assert not bool((made[0].sequences == MASK).any())
    wanted = torch.tensor([4, 3, 2, 1, 4, 3, 2, 1])
    sure = sampler.sample(constant(wanted), PROMPT, FREE, noise=noise, generator=seeded())  # type: ignore[arg-type]
    assert torch.equal(sure.sequences[FREE], wanted.expand_as(PROMPT)[FREE])


@pytest.mark.parametrize("name", [n for n in NAMED if n not in ("mdlm-cache",)])
def test_rows_do_not_depend_on_the_batch(name: str) -> None:
    """Alone and in a batch: the same tokens from the same stream."""
    sampler, rows, length = NAMED[name], 5, 7
    x = torch.full((rows, length), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    free[3, 4:] = False
    x[3, 4:] = 1
    together = sampler.sample(Watching(), x, free, noise=UNIFORM, generator=seeded(4))
    alone = []
    source = seeded(4)
    for row in range(rows):
        made = sampler.sample(
            Watching(), x[row : row + 1], free[row : row + 1], noise=UNIFORM, generator=source
        )
        alone.append(made)
    assert torch.equal(together.sequences, torch.cat([each.sequences for each in alone]))
    assert together.evaluations.tolist() == [each.nfe for each in alone]
    assert together.nfe == max(each.nfe for each in alone)
    assert together.row_evaluations == sum(each.nfe for each in alone)


def test_padding_does_not_change_a_row() -> None:
    def local(x: Tensor, t: Tensor) -> Tensor:
        return TABLE[x] * (1 + t.double()[:, None, None])

    x = torch.full((2, 5), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    for sampler in (dndm(9), dndm_k(9), rdm(9)):
        plain = sampler.sample(local, x, free, noise=UNIFORM, generator=seeded())
        wide = sampler.sample(
            local,
            torch.nn.functional.pad(x, (2, 1), value=0),
            torch.nn.functional.pad(free, (2, 1), value=False),
            noise=UNIFORM,
            generator=seeded(),
        )
        assert torch.equal(wide.sequences[:, 2:-1], plain.sequences)
        assert wide.nfe == plain.nfe


def test_times_never_round_to_zero() -> None:
    net = Watching()
    x = torch.full((1, 6), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    tiny = dndm_c(BetaSchedule(0.001, 0.001))
    tiny.sample(net, x, free, noise=ABSORBING, generator=seeded())
    times = torch.cat(net.t)
    assert bool(((times > 0) & (times <= 1)).all())
    assert float(times.min()) < 1e-30


def test_the_stream_of_a_row_is_the_same_in_a_long_batch() -> None:
    x = torch.full((70, 3), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    long, short = (
        dndm(5).sample(Watching(), x[:n], free[:n], noise=ABSORBING, generator=seeded()).sequences
        for n in (70, 33)
    )
    assert torch.equal(long[:33], short)


def test_one_generator_a_row() -> None:
    x = torch.full((2, 5), MASK)
    free = torch.ones_like(x, dtype=torch.bool)

    def draw(*seeds: int) -> Tensor:
        generators = [seeded(s) for s in seeds]
        return dndm(9).sample(Watching(), x, free, noise=ABSORBING, generator=generators).sequences

    assert torch.equal(draw(1, 2)[1], draw(8, 2)[1])
    assert torch.equal(draw(1, 2), draw(2, 1).flip(0))


@settings(max_examples=40)
@given(
    steps=st.one_of(st.integers(1, 40), st.just(math.inf)),
    rows=st.integers(1, 6),
    length=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_calls_are_the_unique_transition_times(
    steps: float, rows: int, length: int, seed: int
) -> None:
    """Oracle 4, with each row's own times, aligned by rank: max_b, and at most N."""
    free = torch.rand(rows, length, generator=seeded(seed)) < 0.7
    free[:, 0] = True
    x = torch.zeros(rows, length, dtype=torch.long)
    net, sampler = Watching(), dndm(steps)
    state = sampler.begin(x, free, noise=ABSORBING, generator=seeded(seed))
    tau = sampler.counts.schedule.times(state.plan.priority_BN.clamp(min=0), steps)  # type: ignore[attr-defined]
    made = sampler.sample(net, x, free, noise=ABSORBING, generator=seeded(seed))
    unique = [sorted(set(tau[b][free[b]].tolist()), reverse=True) for b in range(rows)]
    assert made.evaluations.tolist() == [len(times) for times in unique]
    assert made.nfe == max(map(len, unique)) == len(net.t) <= length
    if steps == math.inf:
        assert made.evaluations.tolist() == free.sum(1).tolist()
    for call, seen in enumerate(net.t):
        expected = [times[call] for times in unique if len(times) > call]
        torch.testing.assert_close(seen.double(), torch.tensor(expected).double())
        assert float(seen.max()) <= 1


def test_a_call_reveals_exactly_the_tokens_of_its_time() -> None:
    x = torch.full((4, 9), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    sampler = dndm(6)
    state = sampler.begin(x, free, noise=ABSORBING, generator=seeded(3))
    tau = (sampler.counts.schedule.times(state.plan.priority_BN, 6) * 6).round()  # type: ignore[attr-defined]
    net = Watching()
    while bool((active := state.active).any()):
        t = (state.times * 6).round()
        before, x_before = state.clean_BN, state.x_BN
        sampler.advance(state, net(state.x_BN[active], state.times[active]))
        shown = state.clean_BN & ~before
        assert torch.equal(shown, (tau == t[:, None]) & active[:, None])
        assert torch.equal(state.x_BN[~shown], x_before[~shown])


NEAR_ZERO = torch.tensor([-5e-4, -1e-4, -5e-5, -1e-12, 0.0, 0.0, -1e-7, -3e-4])


@pytest.mark.parametrize("revise", ["keep", "rerank"])
@pytest.mark.parametrize("scores", [NEAR_ZERO, torch.zeros(8), torch.full((8,), -1e-9)])
def test_top_k_is_exact_for_scores_near_zero(revise: str, scores: Tensor) -> None:
    """Oracle 8: K_t clean positions after the call at t, in every row, also for equal scores."""
    counts = TransitionTimes(12)
    sampler = Reveal(
        counts=counts,
        position=lambda prediction, tokens: scores[prediction.where_BN.nonzero()[:, 1]].float(),
        revise=revise,  # type: ignore[arg-type]
    )
    x = torch.full((16, 8), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    state = sampler.begin(x, free, noise=ABSORBING, generator=seeded())
    tau = (counts.schedule.times(state.plan.priority_BN, 12) * 12).round()
    net = Watching()
    while bool((active := state.active).any()):
        t = (state.times * 12).round()
        sampler.advance(state, net(state.x_BN[active], state.times[active]))
        wanted = (tau >= t[:, None]).sum(1)
        assert torch.equal(state.clean_BN.sum(1)[active], wanted[active])
        assert torch.equal(state.x_BN == MASK, ~state.clean_BN)
    assert bool(state.clean_BN.all())


def test_equal_scores_make_dndm_k_dndm() -> None:
    """Oracle 8: ties go by transition time, so constant scores give the very tokens of DNDM."""
    x = torch.full((8, 6), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    flat = dndm_k(9, position=lambda prediction, tokens: torch.zeros(len(tokens)), token="argmax")
    made = [
        s.sample(Watching(), x, free, noise=ABSORBING, generator=seeded()).sequences
        for s in (flat, dndm(9, token="argmax"), dndm_k(9, token="argmax"))
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[1], made[2])


def test_the_most_confident_positions_come_first() -> None:
    """Against a sort in plain Python."""
    x = torch.full((5, 7), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    for position in ("confidence", "margin", "entropy", "left-to-right"):
        sampler = Reveal(counts=LinearCounts(3), position=position, token="argmax")
        state = sampler.begin(x, free, noise=UNIFORM, generator=seeded(2))
        logits = torch.randn(5, 7, V, generator=seeded(3), dtype=torch.float64)
        p = logits.softmax(2)
        best = p.sort(2, descending=True).values
        score = {
            "confidence": best[..., 0],
            "margin": best[..., 0] - best[..., 1],
            "entropy": (p * p.log()).sum(2),
            "left-to-right": -torch.arange(7.0).expand(5, 7),
        }[position].tolist()
        sampler.advance(state, logits)
        for row in range(5):
            wanted = sorted(range(7), key=lambda n, r=row: -score[r][n])[:3]
            assert state.clean_BN[row].nonzero()[:, 0].tolist() == sorted(wanted)


def carrying(x: Tensor, t: Tensor) -> Tensor:
    """Watching, but sure of every token that is no mask."""
    sure = torch.nn.functional.one_hot(x, V).double() * 1e4
    return torch.where((x == MASK)[..., None], Watching()(x, t), sure)


def test_version_2_is_version_1_for_masks_and_a_network_that_carries_over() -> None:
    """Oracle 9; a network that does not carry over changes clean tokens, and so does it."""
    x = torch.full((20, 6), MASK)
    free = torch.ones_like(x, dtype=torch.bool)
    for net, same in ((carrying, True), (Watching(), False)):
        first, second = (
            make(8, token="argmax").sample(net, x, free, noise=ABSORBING, generator=seeded())
            for make in (dndm, dndm_v2)
        )
        assert torch.equal(first.sequences, second.sequences) is same
        assert first.nfe == second.nfe


def test_a_dropped_token_is_its_own_noise_again() -> None:
    """Reranking: the position that lost turns into the w that it had."""
    x = torch.zeros(1, 3, dtype=torch.long)
    free = torch.ones_like(x, dtype=torch.bool)
    order = itertools.cycle([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]])
    sampler = Reveal(
        counts=LinearCounts(3),
        position=lambda prediction, tokens: torch.tensor(next(order)),
        token=lambda prediction, draws: torch.full((len(prediction.logp_MK),), 5),
        revise="rerank",
    )
    state = sampler.begin(x, free, noise=UNIFORM, generator=seeded())
    w = state.x_BN.clone()
    logits = torch.zeros(1, 3, V)
    sampler.advance(state, logits)
    assert state.x_BN.tolist() == [[5, int(w[0, 1]), int(w[0, 2])]]
    sampler.advance(state, logits)
    assert state.x_BN.tolist() == [[int(w[0, 0]), 5, 5]]
    sampler.advance(state, logits)
    assert state.x_BN.tolist() == [[5, 5, 5]]


def test_reranking_keeps_the_token_of_a_position_that_stays_clean() -> None:
    x = torch.zeros(1, 3, dtype=torch.long)
    scores = iter([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    tokens = iter([4, 5, 3])
    sampler = Reveal(
        counts=LinearCounts(3),
        position=lambda prediction, tokens: torch.tensor(next(scores)),
        token=lambda prediction, draws: torch.full((len(prediction.logp_MK),), next(tokens)),
        revise="rerank",
    )
    made = sampler.sample(
        lambda x, t: torch.zeros(*x.shape, V),
        x,
        torch.ones_like(x, dtype=torch.bool),
        noise=UNIFORM,
        generator=seeded(),
    )
    assert made.sequences.tolist() == [[4, 5, 3]]
