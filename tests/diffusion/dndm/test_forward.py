"""The forward process and its posterior."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_law import bayes
from torch.utils._python_dispatch import TorchDispatchMode

from sparring.diffusion.dndm import (
    BetaSchedule,
    CosineSchedule,
    LinearSchedule,
    Noise,
    absorbing,
    corrupt,
    frozen_path,
    markov_path,
    posterior,
    posterior_mean,
    uniform,
    unigram,
)
from sparring.diffusion.dndm.draws import Draws, inverse_cdf

NOISES = {
    "absorbing": absorbing(4, 3),
    "uniform": uniform(4),
    "allowed": uniform(4, [0, 2]),
    "unigram": unigram(torch.tensor([5, 1, 0, 4])),
}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("path", [frozen_path, markov_path])
def test_marginals(name: str, path: object) -> None:
    """Oracle 2: q(x_t | x_0) at all t, by chi-squared."""
    noise, steps, rows, schedule = NOISES[name], 6, 6000, CosineSchedule()
    x0 = torch.tensor([[0]]).expand(rows, 1)
    xs = path(x0, steps, schedule=schedule, noise=noise, generator=seeded())  # type: ignore[operator]
    assert xs.shape == (steps + 1, rows, 1)
    for t in range(steps + 1):
        alpha = np.cos(np.pi / 2 * t / steps) if t < steps else 0.0
        law = alpha * np.eye(4)[0] + (1 - alpha) * noise.law_K.numpy()
        counts = np.bincount(xs[t, :, 0].numpy(), minlength=4)
        assert counts[law == 0].sum() == 0
        seen = law > 0
        if seen.sum() > 1:
            assert stats.chisquare(counts[seen], law[seen] * rows).pvalue > 1e-4


def test_laws_over_two_times_differ_for_multinomial_noise_only() -> None:
    """Oracle 2: after tau the de-randomised token is frozen; the Markov one is drawn again."""
    rows, steps = 4000, 10
    x0 = torch.zeros(rows, 1, dtype=torch.long)
    settings = {"schedule": LinearSchedule(), "generator": seeded(1)}
    frozen = frozen_path(x0, steps, noise=uniform(4), **settings)
    markov = markov_path(x0, steps, noise=uniform(4), **settings)
    hit = frozen[5] != 0  # so tau <= 5
    assert torch.equal(frozen[9][hit], frozen[5][hit])
    hit = markov[5] != 0
    same = float((markov[9][hit] == markov[5][hit]).double().mean())
    kept = 0.1 / 0.5
    assert same == pytest.approx(kept + (1 - kept) / 4, abs=0.05)
    # Masks: the chance of each pair of states is the same for both.
    pairs = []
    for path in (frozen_path, markov_path):
        xs = path(x0, steps, noise=absorbing(4, 3), **settings)
        pairs.append(np.bincount((xs[3] * 4 + xs[8])[:, 0].numpy(), minlength=16))
    seen = pairs[0] + pairs[1] > 0
    assert stats.chi2_contingency(np.array(pairs)[:, seen]).pvalue > 1e-3


def test_pairs_lie_on_one_path() -> None:
    x0 = torch.randint(0, 4, (500, 3), generator=seeded())
    late, early = (torch.full((500,), t, dtype=torch.float64) for t in (0.8, 0.4))
    free = torch.tensor([[True, True, False]]).expand(500, 3)
    made = corrupt(
        x0,
        late,
        early,
        schedule=LinearSchedule(),
        noise=uniform(5),
        generator=seeded(2),
        free_BN=free,
    )
    assert bool((made[0].noisy_BN | ~made[1].noisy_BN).all())
    both = made[1].noisy_BN
    assert torch.equal(made[0].x_BN[both], made[1].x_BN[both])
    for each, share in zip(made, (0.8, 0.4), strict=True):
        assert torch.equal(each.x_BN[:, 2], x0[:, 2])
        assert torch.equal(each.x_BN[~each.noisy_BN], x0[~each.noisy_BN])
        assert float(each.noisy_BN[:, :2].double().mean()) == pytest.approx(share, abs=0.05)


@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize(("s", "t"), [(0.0, 0.3), (0.3, 0.4), (0.2, 0.9), (0.7, 1.0)])
def test_posterior_is_bayes_rule(name: str, s: float, t: float) -> None:
    """Oracle 3, for every x_t and x_0 that can go together."""
    noise = NOISES[name]
    truth = bayes(1 - s, 1 - t, noise.law_K.numpy())
    x, x0 = torch.tensor(list(itertools.product(range(4), repeat=2))).T
    alphas = (torch.full((16,), 1 - each, dtype=torch.float64) for each in (s, t))
    found = posterior(x, x0, *alphas, noise).view(4, 4, 4).numpy()
    checked = 0
    for i, j in itertools.product(range(4), repeat=2):
        if noise.mask_id == j or not np.isfinite(truth[i, j]).all():
            continue  # x_0 is no mask; x_t cannot come from x_0
        if noise.law_K[i] == 0 and i != j:
            continue
        np.testing.assert_allclose(found[i, j], truth[i, j], rtol=0, atol=1e-14)
        checked += 1
    assert checked >= 3


def test_posterior_mean_is_the_mean_of_posteriors() -> None:
    noise, p = NOISES["unigram"], torch.rand(4, 4, generator=seeded(), dtype=torch.float64)
    p = p / p.sum(1, keepdim=True)
    truth = np.nan_to_num(bayes(0.6, 0.25, noise.law_K.numpy()))
    x = torch.arange(4)
    alphas = (torch.full((4,), a, dtype=torch.float64) for a in (0.6, 0.25))
    found = posterior_mean(p, x, *alphas, noise).numpy()
    for i in (0, 1, 3):
        np.testing.assert_allclose(found[i], p[i].numpy() @ truth[i], rtol=0, atol=1e-14)
    assert found[2].tolist() == [0, 0, 1, 0]  # noise is never 2, so it is clean and stays


def test_posterior_against_diffusers() -> None:
    """Oracle 3: the law of DiscreteDDIMScheduler's steps, by chi-squared."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DiscreteDDIMScheduler(num_inference_steps=5)
    rows, size = 20000, 4
    for step, x_t, x_0 in ((1, 2, 0), (3, 1, 1)):
        logits = torch.full((1, rows, size), -1e4)
        logits[..., x_0] = 0
        sample = torch.full((1, rows), x_t)
        out = scheduler.step(logits, step, sample, temperature=1.0, generator=seeded(step))
        counts = np.bincount(out.prev_sample[0].numpy(), minlength=size)
        alphas = (torch.tensor([a], dtype=torch.float64) for a in ((step + 1) / 5, step / 5))
        law = posterior(torch.tensor([x_t]), torch.tensor([x_0]), *alphas, uniform(size))[0]
        assert stats.chisquare(counts, law.numpy() * rows).pvalue > 1e-3


def test_a_flat_piece_and_an_early_end_of_alpha() -> None:
    """alpha_s = alpha_t changes nothing; alpha_s = 0 keeps pure noise as it is."""
    ones = torch.ones(3, dtype=torch.float64)
    x, x0 = torch.tensor([0, 1, 2]), torch.tensor([1, 1, 1])
    for alpha in (0.5, 0.0):
        law = posterior(x, x0, alpha * ones, alpha * ones, uniform(3))
        torch.testing.assert_close(law, torch.eye(3, dtype=torch.float64))


def test_inverse_cdf() -> None:
    weights = torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0]], dtype=torch.float64)
    u = torch.tensor([0.0, 0.19999, 0.2, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert inverse_cdf(weights.expand(5, -1), u).tolist() == [1, 1, 3, 3, 3]
    # Small chances survive: float32 cannot hold 1 + 1e-9.
    small = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    assert inverse_cdf(small, torch.tensor([1 - 5e-10], dtype=torch.float64)).tolist() == [1]


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made meanwhile had."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else (made,):
            if isinstance(each, torch.Tensor):
                self.numbers = max(self.numbers, each.numel())
        return made


@pytest.mark.parametrize("noise", [absorbing(5000, 3), uniform(5000)], ids=["masks", "uniform"])
def test_noise_takes_no_law_a_token(noise: Noise) -> None:
    """5000 symbols and 512 tokens: never 5000 x 512 numbers, and for masks not even 5000."""
    x0 = torch.randint(4, 5000, (8, 64), generator=seeded())
    with Largest() as largest:
        (made,) = corrupt(
            x0,
            torch.full((8,), 0.5),
            schedule=LinearSchedule(),
            noise=noise,
            generator=seeded(),
        )
    assert largest.numbers <= (512 if noise.mask_id is not None else 5000)
    assert 0.3 < float((made.x_BN != x0).double().mean()) < 0.7


def test_streams_belong_to_rows() -> None:
    device = torch.device("cpu")
    mask = torch.tensor([[True, False, True], [True, True, True]])
    together = Draws(seeded(5), 2, device).uniform(mask)
    alone = Draws(seeded(5), 1, device).uniform(mask[:1])
    assert torch.equal(together[:2], alone)
    padded = torch.cat([torch.zeros(2, 1, dtype=torch.bool), mask], 1)
    assert torch.equal(Draws(seeded(5), 2, device).uniform(padded), together)
    with pytest.raises(ValueError, match="2 rows need one generator, or one each, not 3"):
        Draws([seeded(n) for n in range(3)], 2, device)


BAD = [
    (lambda: absorbing(1, 0), "vocab_size must be at least 2, not 1"),
    (lambda: absorbing(4, 4), r"mask_id must lie in 0..3, not \[4\]"),
    (lambda: uniform(4, []), "allowed is empty"),
    (lambda: uniform(4, [0, -1]), r"allowed must lie in 0..3, not \[-1\]"),
    (lambda: unigram(torch.zeros(3)), "not all 0"),
    (lambda: unigram(torch.tensor([1.0, -1.0])), "non-negative"),
    (lambda: unigram(torch.ones(2, 2)), "shape"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_noise(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("t", [torch.tensor([3.0]), torch.tensor([0.5, 0.5])])
def test_bad_times(t: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="divide steps by T"):
        corrupt(
            torch.zeros(1, 2, dtype=torch.long),
            t,
            schedule=BetaSchedule(2, 2),
            noise=uniform(3),
            generator=seeded(),
        )


def test_noise_knows_what_can_be_predicted() -> None:
    noise: Noise = absorbing(4, 3)
    assert noise.predictable.tolist() == [True, True, True, False]
    logp = noise.log_probabilities(torch.zeros(1, 4))
    torch.testing.assert_close(logp.exp(), torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0]]).double())
    assert bool(uniform(4, [0]).predictable.all())
