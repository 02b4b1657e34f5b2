"""The composed sampler: calls, ranks, rows, fixed tokens, revisions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparring.diffusion.dndm import (
    ALGORITHMS,
    Ancestral,
    BetaSchedule,
    CosineCounts,
    EntropyBoundCounts,
    LinearCounts,
    Noise,
    Reveal,
    ThresholdCounts,
    TransitionTimes,
    absorbing,
    algorithm,
    autoregressive,
    d3pm,
    dndm,
    dndm_c,
    dndm_k,
    dndm_v2,
    first_hitting,
    mdlm_cache,
    rdm,
    rdm_k,
    uniform,
)

V, MASK = 6, 5
ABSORBING, UNIFORM = absorbing(V, MASK), uniform(V, [1, 2, 3, 4])
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Watching:
    """A denoiser whose rows are computed one by one, and which remembers what it was asked."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale
        self.x: list[Tensor] = []
        self.t: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.x.append(x)
        self.t.append(t)
        near = TABLE[x] + 0.5 * TABLE[x.roll(1, 1)] - 0.5 * TABLE[x.roll(-1, 1)]
        return self.scale * (near + t.double()[:, None, None] * TABLE[0])


def constant(tokens: Tensor) -> object:
    """A denoiser that is sure of the same tokens whatever it sees."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(tokens.expand_as(x), V).double() * 1e4

    return denoiser


NAMED = {
    "dndm": dndm(20),
    "dndm argmax": dndm(20, "cosine", token="argmax"),
    "dndm-v2": dndm_v2(20),
    "dndm-k": dndm_k(20, BetaSchedule(5, 3)),
    "dndm-c": dndm_c(),
    "dndm-c-k": dndm_c("cosine2", position="confidence"),
    "first-hitting": first_hitting(),
    "d3pm": d3pm(20),
    "mdlm-cache": mdlm_cache(20),
    "rdm": rdm(20),
    "rdm-k": rdm_k(20),
    "autoregressive": autoregressive(),
    "maskgit": Reveal(counts=CosineCounts(4), position="confidence"),
    "threshold": Reveal(counts=ThresholdCounts(0.6), position="confidence"),
    "entropy-bound": Reveal(counts=EntropyBoundCounts(0.5), position="entropy"),
    "margin": Reveal(counts=LinearCounts(3), position="margin", token="argmax"),
}
PROMPT = torch.tensor([[0, 1, MASK, MASK, 2, MASK, MASK, 0], [0, MASK, MASK, 3, MASK, 1, 1, 0]])
FREE = PROMPT == MASK


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
