"""From noise to conformations, by the reverse of the diffusion.

One step from t to s < t, with dt = t - s, a score (s_T, s_R) and standard normal z:

    sde     T + (b T / 2 + b s_T) dt + sqrt(b dt) P z     R exp(g^2 s_R dt + g sqrt(dt) z)
    ode     T + (b T / 2 + b s_T / 2) dt                  R exp(g^2 s_R dt / 2)
    heun    two scores a step, for 50 to 100 steps: the ODE with the scores of both ends,

            T_s = std_s / std_t T_t + alpha_s (d T0_t + (1 - d / h) (T0_s - T0_t))
            R_s = R_t exp((sigma_t - sigma_s) (sigma_t s_R(t) + sigma_s s_R(s)) / 2)

sde is the paper's (FrameDiff, arXiv 2302.02277, algorithm 1). heun takes the linear part of
translations exactly, as DPM-Solver++ does (arXiv 2211.01095), and the denoised T0 = (T + std^2 s_T)
/ alpha as a linear function of log(alpha / std), which changes by h; d = 1 - e^-h. Rotations go
along sigma, in which the path to a narrow distribution is straight.

Shape legend: B samples, N residues, K steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from sparring.launch.errors import SparringError
from sparring.launch.seeds import derive
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.tangent import Score, Tangent, moved_along

ScoreFunction = Callable[[Frames, float], Score]
"""(x_t, t) -> grad log p_t(x_t), for (B, N) frames at one time."""
Solver = Literal["sde", "ode", "heun"]
SOLVERS: tuple[Solver, ...] = get_args(Solver)
Grid = Literal["uniform", "quadratic"]
GRIDS: tuple[Grid, ...] = get_args(Grid)


class Noise(Protocol):
    """Standard normal numbers for B samples of N residues, new ones at each call."""

    def draw(self) -> Tangent: ...


class SampleNoise:
    """Noise of which sample i's depends on (seed, i) alone: not on its batch, rank or padding.

    Each sample has its own generator on the CPU, and draws as many numbers as it has residues, in
    float64, so that neither the device nor the number type changes them.

    Args:
        seed: of the run.
        numbers: i of each of the B samples.
        lengths: residues of each; they come first, what follows is padding.
        padded: N; None for the longest.
        device, dtype: of what is returned. float64 is advised for states too: rotations multiplied
            a thousand times in float32 drift by 1e-5, and it costs nothing beside a network.

    Raises:
        ValueError: as many numbers as lengths are wanted, and no length above N or below 1.
    """

    def __init__(
        self,
        seed: int,
        numbers: Sequence[int],
        lengths: Sequence[int],
        *,
        padded: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self._padded = max(lengths, default=0) if padded is None else padded
        if len(numbers) != len(lengths):
            raise ValueError(f"{len(numbers)} samples need as many lengths, not {len(lengths)}")
        if not all(1 <= length <= self._padded for length in lengths):
            raise ValueError(f"lengths must be 1 to {self._padded}, not {list(lengths)}")
        self._lengths, self._device, self._dtype = list(lengths), device, dtype
        self._streams = [
            torch.Generator().manual_seed(derive(seed, "conformation", number))
            for number in numbers
        ]

    @property
    def mask(self) -> Tensor:
        """(B, N) bool: which residues are there."""
        places = torch.arange(self._padded, device=self._device)
        return places < torch.tensor(self._lengths, device=self._device)[:, None]

    def draw(self) -> Tangent:
        """(B, N, 3) twice, zero on padding."""
        drawn = torch.zeros(len(self._lengths), self._padded, 6, dtype=torch.float64)
        for row, length, stream in zip(drawn, self._lengths, self._streams, strict=True):
            row[:length] = torch.randn(length, 6, generator=stream, dtype=torch.float64)
        drawn = drawn.to(self._device, self._dtype)
        return Tangent(drawn[..., :3], drawn[..., 3:])


@dataclass(frozen=True)
class Solution:
    """What :func:`solve` returns."""

    x: Frames
    """(B, N) frames at the last time."""
    score: Score
    """There; its x0 and torsions are the network's last word, if the score is a network's."""
    history: list[tuple[float, Frames]]
    """(t, x_t) from the start to the end, if it was asked for."""


def times(
    process: Process, steps: int, grid: Grid = "quadratic", *, start: float = 1.0
) -> list[float]:
    """K + 1 times from `start` to t_min.

    Args:
        process: whose t_min.
        steps: K.
        grid: quadratic, t_min + (start - t_min) u^2, finer towards t_min; or uniform, the paper's.
            For data on one point, 100 uniform steps of sde leave 1.6 times the noise of
            t_min = 0.01, 1000 leave 1.04 times, 100 quadratic ones 1.06 times.
        start: the first, in (t_min, 1].

    Raises:
        ValueError: there is no such grid or start, or no step.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {list(GRIDS)}, not {grid!r}")
    if not process.t_min < start <= 1:
        raise ValueError(f"start must be above t_min = {process.t_min} and at most 1, not {start}")
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    fractions = even if grid == "uniform" else even**2
    found: list[float] = (process.t_min + (start - process.t_min) * fractions).tolist()
    return [start, *found[1:-1], process.t_min]


@torch.no_grad()
def solve(
    score: ScoreFunction,
    process: Process,
    mask: Tensor,
    noise: Noise,
    *,
    solver: Solver = "sde",
    steps: int = 1000,
    grid: Grid = "quadratic",
    noise_scale: float = 1.0,
    start: Frames | None = None,
    start_time: float = 1.0,
    record: bool = False,
) -> Solution:
    """Samples at t_min.

    Args:
        score: of x_t; called K + 1 times, or 2 K times by heun.
        process: that it is of.
        mask: (B, N) bool.
        noise: `SampleNoise`; draws once for the prior, whatever `start`, and by sde for each step.
        solver: sde, ode or heun.
        steps: K; the paper's sde has 1000 uniform ones, heun wants 50 to 100.
        grid: of times.
        noise_scale: factor of sde's noise; below 1 the samples are not p_0's, but colder.
        start: (B, N) frames to start from instead of the prior's.
        start_time: their t; below 1 to noise a structure in part and come back to others near it.
        record: keep the path.

    Raises:
        ValueError: unknown solver or grid, steps < 1, or a start_time without start.
        SparringError: a state is no longer finite.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {list(SOLVERS)}, not {solver!r}")
    if start is None and start_time != 1:
        raise ValueError(f"start_time is {start_time}, but there are no frames to start from")
    path = times(process, steps, grid, start=start_time)
    first = process.prior(mask, noise.draw())
    x = first if start is None else start
    history = [(path[0], x)] if record else []
    for t, s in pairwise(path):
        now = score(x, t)
        if solver == "sde":
            drift, scale = sde_step(process, x, now, t, s)
            step = drift.plus(scale_each(noise.draw().projected(mask), scale), noise_scale)
            x = moved_along(x, step)
        elif solver == "ode":
            x = moved_along(x, _ode_step(process, x, now, t, s))
        else:
            x = _heun_step(process, score, x, now, t, s)
        check_finite(x, mask, s)
        if record:
            history.append((s, x))
    return Solution(x, score(x, path[-1]), history)


def sde_step(
    process: Process, x: Frames, score: Tangent, t: float, s: float
) -> tuple[Tangent, tuple[float, float]]:
    """Drift of the reverse SDE's step from t to s, and its noise's standard deviations.

    Returns:
        (B, N, 3) nm and radians, and (sqrt(b dt) in nm, g sqrt(dt) in radians).
    """
    dt = t - s
    beta, rate = float(process.beta(t)), float(process.rotation_rate(t))
    translation = (x.translations / 2 + score.translation) * (beta * dt)
    drift = Tangent(translation, score.rotation * (rate * dt))
    return drift, (math.sqrt(beta * dt), math.sqrt(rate * dt))


def scale_each(tangent: Tangent, scale: tuple[float, float]) -> Tangent:
    """With one factor for translations and one for rotations."""
    return Tangent(tangent.translation * scale[0], tangent.rotation * scale[1])


def _ode_step(process: Process, x: Frames, score: Tangent, t: float, s: float) -> Tangent:
    dt = t - s
    beta, rate = float(process.beta(t)), float(process.rotation_rate(t))
    translation = (x.translations + score.translation) * (beta * dt / 2)
    return Tangent(translation, score.rotation * (rate * dt / 2))


def _heun_step(
    process: Process, score: ScoreFunction, x: Frames, now: Score, t: float, s: float
) -> Frames:
    alpha_t, alpha_s = float(process.alpha(t)), float(process.alpha(s))
    std_t, std_s = float(process.std(t)), float(process.std(s))
    sigma_t, sigma_s = float(process.sigma(t)), float(process.sigma(s))
    step = math.log(alpha_s * std_t / (std_s * alpha_t))
    decay = -math.expm1(-step)

    def advance(clean: Tensor, direction: Tensor) -> Frames:
        kept = Frames(x.rotations, x.translations * (std_s / std_t))
        return moved_along(kept, Tangent(alpha_s * clean, (sigma_t - sigma_s) * direction))

    clean = (x.translations + std_t**2 * now.translation) / alpha_t
    direction = sigma_t * now.rotation
    guess = advance(decay * clean, direction)
    then = score(guess, s)
    change = (guess.translations + std_s**2 * then.translation) / alpha_s - clean
    return advance(
        decay * clean + (1 - decay / step) * change, (direction + sigma_s * then.rotation) / 2
    )


def check_finite(x: Frames, mask: Tensor, t: float) -> None:
    """Raise SparringError if a frame (B, N) that is there is not finite; t is for the message."""
    finite = x.translations.isfinite().all(-1) & x.rotations.isfinite().all(-1).all(-1)
    bad = ~(finite | ~mask).all(-1)
    if bool(bad.any()):
        raise SparringError(
            f"{int(bad.sum())} of {len(bad)} samples are not finite at t = {t:.4g}; "
            "train the networks longer, or lower eta"
        )
