"""The forward process against diffusers' own schedulers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from sparring.diffusion.spin.losses import denoising_error
from sparring.diffusion.spin.process import Process, retargeted
from sparring.launch.errors import SparringError

TIMES = torch.tensor([0, 1, 250, 700, 999])


def images(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((len(TIMES), 2, 3, 3), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_target_are_those_of_the_scheduler(prediction: str) -> None:
    scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule="squaredcos_cap_v2")
    clean, noise = images(0), images(1)
    x, target = Process.of(scheduler).corrupt(clean, noise, TIMES)
    torch.testing.assert_close(x, scheduler.add_noise(clean, noise, TIMES))
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(clean, noise, TIMES)
    torch.testing.assert_close(target, expected)


def test_a_flow_leads_from_noise_to_the_image() -> None:
    """The target is what FlowMatchEuler must be given to arrive at x_0 in one step."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    process = Process.of(scheduler)
    clean, noise = images(0)[:1].float(), images(1)[:1].float()
    scheduler.set_timesteps(sigmas=[0.6])
    t = scheduler.timesteps
    x, target = process.corrupt(clean, noise, t)
    torch.testing.assert_close(x, scheduler.scale_noise(clean, t, noise))
    torch.testing.assert_close(scheduler.step(target, t[0], x).prev_sample, clean)
    times = process.times(torch.tensor([0.0, 0.25, 1 - 1e-9], dtype=torch.float64))
    assert times[:2].tolist() == [1000, 750]
    assert 0 < float(times[2]) < 1e-3


def test_errors_of_v_are_those_of_noise_over_alpha_bar() -> None:
    """Oracle 15: |v - v'|^2 = |eps - eps'|^2 / alpha_bar_t at the same x_t."""
    options = {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": False}
    forms = {
        kind: Process.of(DDIMScheduler(prediction_type=kind, **options))
        for kind in ("epsilon", "v_prediction")
    }
    t = torch.tensor([5, 120, 300, 500, 700])
    clean, noise, guess = images(0), images(1), images(2)
    x, eps = forms["epsilon"].corrupt(clean, noise, t)
    _, v = forms["v_prediction"].corrupt(clean, noise, t)
    bar = forms["epsilon"].alphas_cumprod[t].double()  # type: ignore[index]
    a = bar.view(-1, 1, 1, 1)
    guessed_image = (x - (1 - a).sqrt() * guess) / a.sqrt()
    guessed_v = a.sqrt() * guess - (1 - a).sqrt() * guessed_image
    torch.testing.assert_close(
        denoising_error(guessed_v, v), denoising_error(guess, eps) / bar, rtol=1e-5, atol=0
    )


def test_times_are_uniform_over_all_steps() -> None:
    process = Process.of(DDIMScheduler())
    u = torch.tensor([0.0, 0.5, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert process.times(u).tolist() == [0, 500, 999]


def test_another_target_is_written_into_the_scheduler() -> None:
    start = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    assert retargeted(start, "epsilon") is start
    v = retargeted(start, "v")
    assert Process.of(v).target == "v"
    assert (v.config.beta_schedule, v.config.clip_sample) == ("squaredcos_cap_v2", False)
    flow = retargeted(start, "flow")
    assert isinstance(flow, DPMSolverMultistepScheduler)
    assert Process.of(flow).target == "flow"
    with pytest.raises(SparringError, match=r"model.target = 'v', but FlowMatchEuler"):
        retargeted(FlowMatchEulerDiscreteScheduler(), "v")


def test_processes_that_are_not_known_are_refused() -> None:
    with pytest.raises(SparringError, match="EDMEulerScheduler has no alphas_cumprod"):
        Process.of(EDMEulerScheduler())
    with pytest.raises(SparringError, match="prediction_type is 'sample'; known are epsilon"):
        Process.of(DDPMScheduler(prediction_type="sample"))
