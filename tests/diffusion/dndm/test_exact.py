"""Samplers' exact laws: where DNDM is ancestral sampling, and where it is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_law import (
    ABSORBING,
    FIGURES,
    UNIFORM,
    K,
    Net,
    absorbing_net,
    all_times,
    ancestral_law,
    conditioned_net,
    data_law,
    enumerate_law,
    product_of_marginals,
    timed_net,
    total_variation,
    uniform_net,
)

from sparring.diffusion.dndm import (
    BetaSchedule,
    CosineSchedule,
    LinearSchedule,
    Noise,
    Reveal,
    Schedule,
    algorithm,
    dndm,
    dndm_c,
)

LAW = data_law()


@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_absorbing_dndm_is_ancestral_sampling(steps: int) -> None:
    """Oracle 5: to 1e-12, and with a bias that is exactly TV(data, product) / T."""
    u, chance = all_times(steps, LinearSchedule().pmf(steps))
    net = absorbing_net(LAW)
    ours = enumerate_law(dndm(steps), net, ABSORBING, u, chance)
    alphas = [1 - t / steps for t in range(steps + 1)]
    assert np.abs(ours - ancestral_law(net, ABSORBING, alphas)).max() < 1e-12
    ties = total_variation(LAW, product_of_marginals(LAW))
    assert ties > 0.2
    assert total_variation(ours, LAW) == pytest.approx(ties / steps, abs=1e-12)


@pytest.mark.parametrize("net", [absorbing_net(LAW), timed_net(LAW)], ids=["blind", "sees t"])
@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule(), BetaSchedule(3, 2)])
def test_absorbing_dndm_is_ancestral_for_other_schedules_and_networks_that_see_t(
    schedule: Schedule, net: Net
) -> None:
    u, chance = all_times(8, schedule.pmf(8))
    ours = enumerate_law(dndm(8, schedule), net, ABSORBING, u, chance)
    theirs = ancestral_law(net, ABSORBING, schedule.grid(8).tolist())
    assert np.abs(ours - theirs).max() < 1e-12
    assert total_variation(ours, LAW) > 0.02


def test_one_step_is_the_product_of_marginals() -> None:
    """Oracle 10."""
    u, chance = all_times(1, torch.ones(1, dtype=torch.float64))
    for noise, net in ((ABSORBING, absorbing_net(LAW)), (UNIFORM, uniform_net(LAW))):
        ours = enumerate_law(dndm(1), net, noise, u, chance)
        assert np.abs(ours - product_of_marginals(LAW)).max() < 1e-12


@pytest.mark.parametrize(
    ("noise", "net", "conditioned"),
    [(ABSORBING, absorbing_net(LAW), False), (UNIFORM, conditioned_net(LAW), True)],
)
def test_dndm_c_is_exact(noise: object, net: object, conditioned: bool) -> None:
    """Oracle 5: a perfect network and infinitely many steps give the data."""
    u = torch.tensor([[0.2, 0.7], [0.6, 0.1]], dtype=torch.float64)  # both orders
    sampler = dndm_c(schedule_conditioning=conditioned)
    ours = enumerate_law(sampler, net, noise, u, torch.full((2,), 0.5, dtype=torch.float64))  # type: ignore[arg-type]
    assert np.abs(ours - LAW).max() < 1e-12


@pytest.mark.parametrize("steps", FIGURES)
def test_multinomial_dndm_is_biased_and_conditioning_mends_it(steps: int) -> None:
    """Oracle 6: the bias does not vanish with T; told the noise, the network is the mask's."""
    pmf = LinearSchedule().pmf(steps)
    u, chance = all_times(steps, pmf)
    blind = enumerate_law(dndm(steps), uniform_net(LAW), UNIFORM, u, chance)
    told = enumerate_law(
        dndm(steps, schedule_conditioning=True), conditioned_net(LAW), UNIFORM, u, chance
    )
    masked = enumerate_law(dndm(steps), absorbing_net(LAW), ABSORBING, u, chance)
    assert blind.sum() == pytest.approx(1, abs=1e-12)
    assert total_variation(blind, LAW) > 0.05
    assert np.abs(told - masked).max() < 1e-12
    alphas = [1 - t / steps for t in range(steps + 1)]
    markov = ancestral_law(uniform_net(LAW), UNIFORM, alphas)
    found = [total_variation(law, LAW) for law in (masked, blind, markov)]
    assert found == pytest.approx(FIGURES[steps], abs=5.1e-5)


def test_multinomial_ancestral_sampling_is_not_biased_like_that() -> None:
    """D3PM's error falls with T where DNDM's stays."""
    errors = [
        total_variation(
            ancestral_law(uniform_net(LAW), UNIFORM, [1 - t / T for t in range(T + 1)]), LAW
        )
        for T in (8, 64)
    ]
    assert errors[1] < errors[0] / 4
    assert errors[1] < 0.02


@pytest.mark.parametrize(
    ("name", "noise"),
    [
        *((name, ABSORBING) for name in ("d3pm", "mdlm-cache", "rdm", "dndm", "first-hitting")),
        *((name, UNIFORM) for name in ("d3pm", "rdm", "dndm", "first-hitting")),
    ],
)
def test_samples_have_the_enumerated_law(name: str, noise: Noise) -> None:
    """6000 samples through `sample` against enumeration, by chi-squared."""
    steps, rows, law = 3, 6000, data_law(2, 1.0)
    net = absorbing_net(law) if noise is ABSORBING else uniform_net(law)
    if name in ("rdm", "first-hitting") and noise is UNIFORM:
        net = conditioned_net(law)  # with the mask of noise: the law of masks
    sampler = algorithm(name, **({} if name == "first-hitting" else {"steps": steps}))
    if isinstance(sampler, Reveal):
        sampler = replace(sampler, schedule_conditioning=True)
    made = sampler.sample(
        lambda x, t, noisy=None: net(x, t, x == 3 if noisy is None else noisy),
        torch.zeros(rows, 2, dtype=torch.long),
        torch.ones(rows, 2, dtype=torch.bool),
        noise=noise,
        generator=torch.Generator().manual_seed(0),
    )
    if name == "first-hitting":
        expected = law
    elif name == "rdm":
        expected = ancestral_law(absorbing_net(law), ABSORBING, [1, 2 / 3, 1 / 3, 0])
    elif name == "dndm":
        u, chance = all_times(steps, LinearSchedule().pmf(steps))
        expected = enumerate_law(dndm(steps), net, noise, u, chance)
    else:
        expected = ancestral_law(net, noise, [1, 2 / 3, 1 / 3, 0])
    counts = np.bincount((made.sequences[:, 0] * K + made.sequences[:, 1]).numpy(), minlength=K**2)
    assert stats.chisquare(counts, expected.flatten() * rows).pvalue > 1e-3
