"""DNDM as a diffusers scheduler, in loops as pipelines have them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

diffusers = pytest.importorskip("diffusers", reason="needs diffusers")

from sparring.diffusion.dndm import DNDMScheduler, absorbing, dndm, dndm_k  # noqa: E402

V, MASK, N = 6, 5, 7
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counting:
    """A denoiser that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        t = t.double().expand(len(x))
        return TABLE[x] + 0.5 * TABLE[x.roll(1, 1)] + t[:, None, None] * TABLE[0]


def pipeline(scheduler: DNDMScheduler, model: Counting, rows: int, steps: float) -> Tensor:
    """The loop of a stock pipeline, which knows nothing of DNDM."""
    generator = seeded(9)
    sample = scheduler.init_noise((rows, N), generator)
    for t in scheduler.timesteps:
        sample = scheduler.step(
            model(scheduler.scale_model_input(sample, t), t), t, sample, generator=generator
        ).prev_sample
    return sample


def test_a_stock_loop_skips_calls() -> None:
    """1000 steps, at most N calls, whatever the batch; all masks gone."""
    for rows in (1, 30):
        scheduler, model = DNDMScheduler(V, N, mask_token_id=MASK), Counting()
        scheduler.set_timesteps(1000, device="cpu", generator=seeded(1))
        assert scheduler.timesteps.shape == (len(scheduler.timesteps),)
        assert len(scheduler.timesteps) <= N
        assert bool((scheduler.timesteps.diff() < 0).all())
        assert 0 < float(scheduler.timesteps[-1]) <= float(scheduler.timesteps[0]) <= 1
        sample = pipeline(scheduler, model, rows, 1000)
        assert sample.shape == (rows, N)
        assert not bool((sample == MASK).any())
        assert model.calls == len(scheduler.timesteps)


def test_timesteps_are_unique_transition_times_of_the_sampler() -> None:
    scheduler = DNDMScheduler(V, N, mask_token_id=MASK, schedule="beta", schedule_parameters=[5, 3])
    scheduler.set_timesteps(12, batch_size=4, generator=seeded(3))
    state = dndm(12, "cosine").begin(
        torch.full((4, N), MASK),
        torch.ones(4, N, dtype=torch.bool),
        noise=absorbing(V, MASK),
        generator=seeded(3),
    )
    from sparring.diffusion.dndm import BetaSchedule

    tau = BetaSchedule(5, 3).times(state.plan.priority_BN, 12)
    assert scheduler.timesteps.shape[1] == 4
    for row in range(4):
        unique = sorted(set(tau[row].tolist()), reverse=True)
        found = [t for t in scheduler.timesteps[:, row].tolist() if t > 0]
        assert found == pytest.approx(unique)


@pytest.mark.parametrize("position", ["random", "confidence"])
@pytest.mark.parametrize("mask", [MASK, None])
def test_the_loop_is_the_sampler(position: str, mask: int | None) -> None:
    """With argmax tokens and equal times the scheduler and `Reveal.sample` agree token by token."""
    scheduler = DNDMScheduler(V, N, mask_token_id=mask, position=position, token="argmax")
    scheduler.set_timesteps(20, batch_size=5, generator=seeded(4))
    make = dndm if position == "random" else dndm_k
    sampler, model = make(20, token="argmax"), Counting()
    free = torch.ones(5, N, dtype=torch.bool)
    x = torch.zeros(5, N, dtype=torch.long)
    made = sampler.sample(
        model, x, free, noise=scheduler.noise, generator=seeded(4), output_history=True
    )
    assert made.history is not None
    sample = made.history[0]
    for n, t in enumerate(scheduler.timesteps):
        assert t.shape == (5,)
        out = scheduler.step(Counting()(sample, t), t, sample)
        assert torch.equal(out.prev_sample, made.history[n + 1])
        assert torch.equal(
            out.prev_sample[out.transfer_index], out.sampled_tokens[out.transfer_index]
        )
        assert torch.equal(out.prev_sample[~out.transfer_index], sample[~out.transfer_index])
        sample = out.prev_sample
    assert torch.equal(sample, made.sequences)
    assert len(scheduler.timesteps) == made.nfe == model.calls


def test_infinitely_many_steps_and_free_positions() -> None:
    free = torch.tensor([[False, True, True, False, True, True, True]])
    scheduler, model = DNDMScheduler(V, mask_token_id=MASK), Counting()
    scheduler.set_timesteps(math.inf, free_mask=free, generator=seeded())
    assert len(scheduler.timesteps) == 5
    sample = torch.where(free, MASK, 1).repeat(3, 1)
    for t in scheduler.timesteps:
        sample = scheduler.step(model(sample, t), t, sample, generator=seeded(1)).prev_sample
        assert bool((sample[:, [0, 3]] == 1).all())
    assert not bool((sample == MASK).any())


def test_what_a_pipeline_changes_stays_changed() -> None:
    """At clean, fixed and noisy positions; with multinomial noise, where it shows."""
    scheduler = DNDMScheduler(V, N)
    scheduler.set_timesteps(math.inf, generator=seeded())
    sample = scheduler.init_noise((2, N), seeded(1))
    for n, t in enumerate(scheduler.timesteps):
        sample = torch.full_like(sample, n % V)
        out = scheduler.step(Counting()(sample, t), t, sample, generator=seeded(1))
        sample = out.prev_sample
        assert bool((sample[~out.transfer_index] == n % V).all())


def test_streams_of_rows() -> None:
    """The same generator gives a row the same tokens in any batch, and reproduces them."""
    made = []
    for rows in (3, 1, 3):
        scheduler = DNDMScheduler(V, N, mask_token_id=MASK)
        scheduler.set_timesteps(50, generator=seeded(2))
        sample, generator = torch.full((rows, N), MASK), seeded(5)
        for t in scheduler.timesteps:
            sample = scheduler.step(
                Counting()(sample, t), t, sample, generator=generator
            ).prev_sample
        made.append(sample)
    assert torch.equal(made[0], made[2])
    assert torch.equal(made[0][:1], made[1])
    assert not torch.equal(made[0][0], made[0][1])


@pytest.mark.parametrize("t", [500, math.nan, -1.0, [0.5, 0.5, 0.5], [0.5, 1.5]])
def test_times_that_are_none_are_refused_by_add_noise(t: object) -> None:
    scheduler = DNDMScheduler(V, N, mask_token_id=MASK)
    x = torch.zeros(2, N, dtype=torch.long)
    with pytest.raises(ValueError, match=r"lie in \[0, 1\].*divide steps by T"):
        scheduler.add_noise(x, scheduler.init_noise((2, N)), torch.tensor(t))


def test_timesteps_near_0_are_positive_and_do_not_depend_on_the_default_type() -> None:
    """Beta(.001, .001) has times below the least float32; a row that is done has 0."""
    scheduler = DNDMScheduler(
        V, mask_token_id=MASK, schedule="beta", schedule_parameters=[0.001, 0.001]
    )
    free = torch.ones(2, 10, dtype=torch.bool)
    free[1, 6:] = False
    before = torch.get_default_dtype()
    try:
        for default in (torch.float32, torch.bfloat16):
            torch.set_default_dtype(default)
            scheduler.set_timesteps(math.inf, batch_size=2, free_mask=free, generator=seeded())
            assert scheduler.timesteps.dtype == torch.float32
            assert bool((scheduler.timesteps[:, 0] > 0).all())
            assert (scheduler.timesteps[:, 1] > 0).tolist() == [True] * 6 + [False] * 4
    finally:
        torch.set_default_dtype(before)


def test_a_network_that_is_told_the_noise_in_a_loop() -> None:
    """Multinomial noise by `noisy_mask`: the sampler with schedule conditioning, token by token."""

    def net(x: Tensor, t: Tensor, noisy: Tensor) -> Tensor:
        return Counting()(x, t) + 2 * TABLE[1] * noisy[..., None]

    scheduler = DNDMScheduler(V, N, token="argmax")
    with pytest.raises(ValueError, match="call set_timesteps before noisy_mask"):
        _ = scheduler.noisy_mask
    scheduler.set_timesteps(20, batch_size=5, generator=seeded(4))
    sampler = dndm(20, token="argmax", schedule_conditioning=True)
    free = torch.ones(5, N, dtype=torch.bool)
    made = sampler.sample(
        net,
        torch.zeros(5, N, dtype=torch.long),
        free,
        noise=scheduler.noise,
        generator=seeded(4),
        output_history=True,
    )
    assert made.history is not None
    sample = made.history[0].int()  # of any integer type
    for n, t in enumerate(scheduler.timesteps):
        noisy = scheduler.noisy_mask
        assert bool(noisy.all()) is (n == 0)
        sample = scheduler.step(net(sample.long(), t, noisy), t, sample).prev_sample
        assert torch.equal(sample, made.history[n + 1])
    assert not bool(scheduler.noisy_mask.any())


def test_config_is_saved_and_loaded(tmp_path: Path) -> None:
    scheduler = DNDMScheduler(
        V, N, noise_token_ids=[0, 2], schedule="beta", schedule_parameters=[17, 4], token="argmax"
    )
    scheduler.save_config(tmp_path)
    again = DNDMScheduler.from_pretrained(tmp_path)
    saved, loaded = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (scheduler, again))
    assert loaded == saved
    for each in (scheduler, again):
        each.set_timesteps(30, generator=seeded())
    assert torch.equal(scheduler.timesteps, again.timesteps)
    assert again.noise.law_K.tolist() == [0.5, 0, 0.5, 0, 0, 0]


def test_tuple_output() -> None:
    scheduler = DNDMScheduler(V, N, mask_token_id=MASK)
    scheduler.set_timesteps(3)
    sample, t = torch.full((2, N), MASK), scheduler.timesteps[0]
    logits = Counting()(sample, t)
    out = scheduler.step(logits, t, sample, return_dict=False)
    assert isinstance(out, tuple)
    assert len(out) == 4
    assert out[3] is logits


def test_add_noise() -> None:
    """The marginal of the forward process, by chi-squared; t = 0 and t = 1 are certain."""
    scheduler = DNDMScheduler(4, schedule="cosine")
    rows = 8000
    x0 = torch.zeros(rows, 1, dtype=torch.long)
    noise = scheduler.init_noise((rows, 1), seeded())
    x = scheduler.add_noise(x0, noise, torch.full((rows,), 0.5), generator=seeded(1))
    alpha = math.cos(math.pi / 4)
    law = np.full(4, (1 - alpha) / 4) + np.eye(4)[0] * alpha
    assert stats.chisquare(np.bincount(x[:, 0].numpy(), minlength=4), law * rows).pvalue > 1e-3
    assert torch.equal(scheduler.add_noise(x0, noise, torch.tensor(0.0)), x0)
    assert torch.equal(scheduler.add_noise(x0, noise, torch.tensor(1.0)), noise)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="set one of them"):
        DNDMScheduler(V, mask_token_id=MASK, noise_token_ids=[1])
    with pytest.raises(ValueError, match="position must be one of"):
        DNDMScheduler(V, position="best")
    scheduler = DNDMScheduler(V, N, mask_token_id=MASK)
    sample = torch.full((2, N), MASK)
    logits = torch.zeros(2, N, V)
    with pytest.raises(ValueError, match="call set_timesteps before step"):
        scheduler.step(logits, 1.0, sample)
    for steps in (0, -3, 0.5, 2.5):
        with pytest.raises(ValueError, match=f"steps must be .* not {steps}"):
            scheduler.set_timesteps(steps)
    with pytest.raises(ValueError, match="True in each row"):
        scheduler.set_timesteps(5, free_mask=torch.zeros(1, N, dtype=torch.bool))
    with pytest.raises(ValueError, match="at least one position, not 0"):
        scheduler.set_timesteps(5, sequence_length=0)
    scheduler.set_timesteps(1000, generator=seeded())
    first, second = scheduler.timesteps[:2]
    with pytest.raises(ValueError, match="go through"):
        scheduler.step(logits, second, sample)
    with pytest.raises(ValueError, match="shape"):
        scheduler.step(logits[..., :-1], first, sample)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="set_timesteps was for"):
        scheduler.step(
            torch.zeros(2, N + 1, V), scheduler.timesteps[0], torch.zeros(2, N + 1).long()
        )
    with pytest.raises(ValueError, match=r"integer tokens, not torch\.float32"):
        scheduler.step(logits, scheduler.timesteps[0], sample.float())
    scheduler.set_timesteps(1)
    scheduler.step(logits, 1.0, sample)
    with pytest.raises(ValueError, match="all 1 timesteps are done"):
        scheduler.step(logits, 1.0, sample)
