"""The bound on -log p of a network, against enumeration of all x_t."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from tiny_law import bayes
from toy_text import TINY

from sparring.diffusion.dndm.config import ProcessConfig, TextModelConfig
from sparring.diffusion.dndm.likelihood import bound, stratified_times
from sparring.diffusion.dndm.network import TextDenoiser, TextDenoiserConfig
from sparring.diffusion.dndm.schedules import BetaSchedule, CosineSchedule, LinearSchedule, Schedule
from sparring.launch.config import plain

V, TEXT, ROWS = 6, [3, 5], 4000


def network(noise: Any, *, told: bool = False) -> TextDenoiser:
    """Of three symbols beside the special ones, with weights that make it sure of something."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shape = TextModelConfig(**{**vars(TINY), "hidden": 16, "schedule_conditioning": told})
        config = TextDenoiserConfig(
            vocab_size=V,
            max_target=2,
            network=plain(shape),
            process=plain(ProcessConfig(noise=noise)),
        )
        return TextDenoiser(config).eval()


def law(net: TextDenoiser, x: torch.Tensor, t: float, noisy: torch.Tensor) -> Any:
    """(rows, 2, V) p(x_0 | x_t), the mask left out if it is noise."""
    told = {"noisy": noisy} if net.config.shape.schedule_conditioning else {}
    with torch.no_grad():
        logits = net(x, torch.full((len(x),), t), **told).logits.double()
    if net.config.noise.mask_id is not None:
        logits[..., 1] = -math.inf
    return logits.softmax(-1).numpy()


def exact(net: TextDenoiser, steps: int, schedule: Schedule) -> float:
    """sum_t E KL(q(x_{t-1} | x_t, x_0) || p), by Bayes' rule over every x_t and every noise.

    Told which tokens are noise, the chain is over pairs of a token and its being noise: the KL is
    then that of masks, (alpha_s - alpha_t) / (1 - alpha_t) log 1 / p(x_0) a noisy token.
    """
    q, alphas = net.config.noise.law_K.numpy(), schedule.grid(steps).tolist()
    told, total = net.config.shape.schedule_conditioning, 0.0
    states = [k for k in range(V) if q[k] > 0]
    for step in range(1, steps + 1):
        s, t = alphas[step - 1], alphas[step]
        post = np.nan_to_num(bayes(s, t, q))
        for noisy in itertools.product([False, True], repeat=2):
            for w in itertools.product(states, repeat=sum(noisy)):
                drawn = iter(w)
                x = [next(drawn) if hit else token for hit, token in zip(noisy, TEXT, strict=True)]
                chance = math.prod((1 - t) if hit else t for hit in noisy)
                chance *= math.prod(q[k] for k in w)
                p = law(net, torch.tensor([x]), step / steps, torch.tensor([noisy]))[0]
                for n, (token, hit) in enumerate(zip(TEXT, noisy, strict=True)):
                    if told:
                        total -= chance * hit * (s - t) / (1 - t) * math.log(p[n, token])
                        continue
                    true, mean = post[x[n], token], p[n] @ post[x[n]]
                    if net.config.noise.mask_id is not None and x[n] != 1:
                        continue  # a token that is no mask is clean, and stays
                    seen = true > 0
                    total += chance * float((true[seen] * np.log(true[seen] / mean[seen])).sum())
    return total


@pytest.mark.parametrize(
    ("noise", "told"), [("absorbing", False), ("uniform", False), ("uniform", True)]
)
@pytest.mark.parametrize(("steps", "schedule"), [(1, LinearSchedule()), (4, CosineSchedule())])
def test_its_mean_is_the_bound(noise: str, told: bool, steps: int, schedule: Schedule) -> None:
    net = network(noise, told=told)
    found = bound(net, [TEXT] * ROWS, [], steps=steps, schedule=schedule, seed=0, batch=1000)
    assert found.shape == (ROWS,)
    error = float(found.std()) / math.sqrt(ROWS)
    wanted = exact(net, steps, schedule)
    assert wanted > 1
    assert abs(float(found.mean()) - wanted) < 4 * error + 1e-6


@pytest.mark.parametrize(("noise", "told"), [("absorbing", False), ("uniform", False)])
def test_infinitely_many_steps_are_the_limit(noise: str, told: bool) -> None:
    """The bound falls with T; 24 steps are near its limit, and a Beta gives no NaN."""
    net = network(noise, told=told)
    schedule = LinearSchedule()
    limit = bound(net, [TEXT] * ROWS, [], steps=math.inf, schedule=schedule, seed=0, batch=1000)
    near = exact(net, 24, schedule)
    assert abs(float(limit.mean()) - near) < 4 * float(limit.std()) / math.sqrt(ROWS) + 0.06
    beta = bound(net, [TEXT] * 200, [], steps=math.inf, schedule=BetaSchedule(17, 4), seed=0)
    assert bool((beta.isfinite() & (beta >= -1e-9)).all())


def test_texts_of_several_lengths() -> None:
    """One step masks all, so the estimate is exact; padding counts for nothing."""
    net = network("absorbing")
    texts = [[3], [4, 5], [5, 5], [3]]
    found = bound(net, texts, [], steps=1, schedule=LinearSchedule(), seed=2, batch=3)
    for text, nats in zip(texts, found.tolist(), strict=True):
        x = torch.ones(1, len(text), dtype=torch.long)
        p = law(net, x, 1.0, x == 1)[0]
        wanted = -sum(math.log(p[n, token]) for n, token in enumerate(text))
        assert nats == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("steps", [4, math.inf])
def test_times_are_spread_evenly(steps: float) -> None:
    t = stratified_times(400, steps, torch.Generator().manual_seed(0))
    assert bool(((t > 0) & (t <= 1)).all())
    if steps == 4:
        assert torch.bincount((t * 4).long()).tolist() == [0, 100, 100, 100, 100]
    else:
        ordered = t.sort().values * 400
        assert bool(((ordered > torch.arange(400)) & (ordered <= torch.arange(1, 401))).all())
    assert not bool((t.diff() >= 0).all())
