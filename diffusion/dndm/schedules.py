"""Noise schedules alpha(t) on [0, 1], and the exact laws of transition times that they imply.

alpha(t) is the chance that a token is still clean at time t; alpha(0) = 1 and alpha(1) = 0. With
T steps the grid is alpha_t = alpha(t / T). A token's transition time tau has

    P(tau = t) = alpha_{t-1} - alpha_t, t = 1..T        (arXiv 2312.09193, its theorem on tau)
    density -alpha'(t) on [0, 1] for T = infinity, so 1 - alpha is its distribution function.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def check_steps(steps: float) -> None:
    """Raises ValueError: steps is neither a whole number of at least 1 nor infinity."""
    whole = isinstance(steps, int) and not isinstance(steps, bool)
    if not ((whole and steps >= 1) or steps == math.inf):
        raise ValueError(
            f"steps must be a whole number of at least 1, or math.inf, not {steps!r}; with 1 all "
            "tokens are revealed by one call"
        )


class Schedule(ABC):
    """alpha and what follows from it; all tensors are float64."""

    @abstractmethod
    def _alpha(self, t: Tensor) -> Tensor:
        """alpha inside (0, 1)."""

    def _cdf(self, t: Tensor) -> Tensor:
        """1 - alpha inside (0, 1); to be given without cancellation where that is known."""
        return 1 - self._alpha(t)

    @abstractmethod
    def density(self, t: Tensor) -> Tensor:
        """-alpha'(t), the density of tau for T = infinity; may be infinite at 0 and 1."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The time t in [0, 1] with 1 - alpha(t) = u, for u in [0, 1]."""

    def alpha(self, t: Tensor) -> Tensor:
        """The chance that a token is still clean at t; exactly 1 up to 0, and 0 from 1 on.

        Args:
            t: any shape, a share of the whole time.
        """
        t = t.double()
        inside = self._alpha(t.clamp(0, 1)).clamp(0, 1)
        return inside.masked_fill(t <= 0, 1.0).masked_fill(t >= 1, 0.0)

    def cdf(self, t: Tensor) -> Tensor:
        """1 - alpha(t) = P(tau <= t); for named schedules to full relative precision near 0.

        Args:
            t: any shape, a share of the whole time.
        """
        t = t.double()
        inside = self._cdf(t.clamp(0, 1)).clamp(0, 1)
        return inside.masked_fill(t <= 0, 0.0).masked_fill(t >= 1, 1.0)

    def grid(self, steps: int) -> Tensor:
        """(steps + 1,) alpha_0 = 1 .. alpha_T = 0.

        Raises:
            ValueError: steps < 1, or alpha increases somewhere on this grid.
        """
        check_steps(steps)
        if steps == math.inf:
            raise ValueError("a grid needs finitely many steps: the law at math.inf is density()")
        alpha = self.alpha(torch.arange(steps + 1, dtype=torch.float64) / steps)
        check_decreasing(alpha)
        return alpha

    def pmf(self, steps: int) -> Tensor:
        """(steps,) P(tau = t) = alpha_{t-1} - alpha_t for t = 1..steps; sums to 1.

        Differences of alpha, never a density on a grid: finite where a Beta's density is not.

        Raises:
            ValueError: as `grid`.
        """
        alpha = self.grid(steps)
        return (alpha[:-1] - alpha[1:]).clamp(min=0)

    def times(self, u: Tensor, steps: float) -> Tensor:
        """tau / T by inversion, non-decreasing in u: U(0, 1) gives the exact law.

        Args:
            u: any shape, in [0, 1).
            steps: T, or math.inf.

        Returns:
            The shape of u, in {1/T, .., 1}, or in [0, 1] for infinitely many steps.

        Raises:
            ValueError: as `check_steps` and `grid`.
        """
        check_steps(steps)
        if steps == math.inf:
            return self.quantile(u.double())
        cdf = 1 - self.grid(int(steps)).to(u.device)
        inner = cdf[1:-1].contiguous()
        step = torch.searchsorted(inner, u.double().contiguous(), right=True) + 1
        return step.double() / steps


def check_decreasing(alpha: Tensor) -> None:
    """Raises ValueError: values on a grid that are not finite, or increase."""
    if not bool(alpha.isfinite().all()):
        raise ValueError("alpha must be finite on [0, 1]; this schedule gives NaN or infinity")
    rise = alpha[1:] - alpha[:-1]
    if float(rise.max()) > 1e-9:
        where = int(rise.argmax())
        raise ValueError(
            f"alpha must not increase, but it goes from {float(alpha[where]):.6g} to "
            f"{float(alpha[where + 1]):.6g} at t = {(where + 1) / (len(alpha) - 1):.4g}: alpha is "
            "the chance that a token is still clean; pass 1 - alpha if yours is the noise"
        )


@dataclass(frozen=True)
class LinearSchedule(Schedule):
    """alpha(t) = 1 - t: tau is uniform."""

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _cdf(self, t: Tensor) -> Tensor:
        return t

    def density(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t, dtype=torch.float64)

    def quantile(self, u: Tensor) -> Tensor:
        """u."""
        return u.double()


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """alpha(t) = cos(pi t / 2), without the offset that some training code adds."""

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def _cdf(self, t: Tensor) -> Tensor:
        return 2 * torch.sin(math.pi / 4 * t) ** 2

    def density(self, t: Tensor) -> Tensor:
        """pi / 2 sin(pi t / 2)."""
        return math.pi / 2 * torch.sin(math.pi / 2 * t.double())

    def quantile(self, u: Tensor) -> Tensor:
        """2 / pi arccos(1 - u)."""
        return 2 / math.pi * torch.arccos((1 - u.double()).clamp(0, 1))


@dataclass(frozen=True)
class CosineSquaredSchedule(Schedule):
    """alpha(t) = cos(pi t / 2)^2."""

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t) ** 2

    def _cdf(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t) ** 2

    def density(self, t: Tensor) -> Tensor:
        """pi / 2 sin(pi t)."""
        return math.pi / 2 * torch.sin(math.pi * t.double())

    def quantile(self, u: Tensor) -> Tensor:
        """2 / pi arcsin(sqrt(u))."""
        return 2 / math.pi * torch.arcsin(u.double().clamp(0, 1).sqrt())


@dataclass(frozen=True)
class BetaSchedule(Schedule):
    """tau ~ Beta(a, b) on [0, 1], so alpha(t) = 1 - I_t(a, b).

    arXiv 2312.09193 draws sampling times from it whatever schedule the network was trained with:
    mass near 1 (a well above b) reveals many tokens early, by fewer calls.

    Args:
        a, b: positive.

    Raises:
        ValueError: a or b is not positive.
    """

    a: float
    b: float

    def __post_init__(self) -> None:
        for name, value in (("a", self.a), ("b", self.b)):
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"Beta's {name} must be positive, not {value!r}; (1, 1) is the linear schedule"
                )

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.as_tensor(special.betaincc(self.a, self.b, t.cpu().numpy())).to(t)

    def _cdf(self, t: Tensor) -> Tensor:
        return torch.as_tensor(special.betainc(self.a, self.b, t.cpu().numpy())).to(t)

    def density(self, t: Tensor) -> Tensor:
        """t^(a-1) (1-t)^(b-1) / B(a, b)."""
        t = t.double()
        log = torch.xlogy(torch.full_like(t, self.a - 1), t)
        log = log + torch.special.xlog1py(torch.full_like(t, self.b - 1), -t)
        return torch.exp(log - float(special.betaln(self.a, self.b)))

    def quantile(self, u: Tensor) -> Tensor:
        """The inverse of the regularised incomplete beta function."""
        u = u.double()
        return torch.as_tensor(special.betaincinv(self.a, self.b, u.cpu().numpy())).to(u)


_CHECKED = 1000
_HALVINGS = 60


@dataclass(frozen=True)
class CustomSchedule(Schedule):
    """A schedule of your own.

    Args:
        function: alpha, a float64 tensor of times in [0, 1] to one of the same shape, by torch
            operations (the density is its derivative by autograd).

    Raises:
        ValueError: alpha(0) is not 1, alpha(1) is not 0, or it is not finite, or it increases
            between neighbours of 1001 times.
    """

    function: Function

    def __post_init__(self) -> None:
        alpha = self.function(torch.linspace(0, 1, _CHECKED + 1, dtype=torch.float64))
        if alpha.shape != (_CHECKED + 1,):
            raise ValueError(
                f"alpha must return the shape of its argument, ({_CHECKED + 1},), not "
                f"{tuple(alpha.shape)}"
            )
        check_decreasing(alpha)
        for at, wanted in ((0, 1.0), (1, 0.0)):
            if abs(float(alpha[at * _CHECKED]) - wanted) > 1e-6:
                raise ValueError(
                    f"alpha({at}) must be {wanted:g}, not {float(alpha[at * _CHECKED]):.6g}; "
                    "rescale it as (alpha(t) - alpha(1)) / (alpha(0) - alpha(1))"
                )

    def _alpha(self, t: Tensor) -> Tensor:
        return self.function(t)

    def density(self, t: Tensor) -> Tensor:
        """-alpha'(t) by autograd."""
        with torch.enable_grad():
            t = t.double().detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.function(t).sum(), t)
        return -slope

    def quantile(self, u: Tensor) -> Tensor:
        """By bisection, to 2^-60."""
        u = u.double()
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            before = self.cdf(middle) < u
            low, high = torch.where(before, middle, low), torch.where(before, high, middle)
        return (low + high) / 2


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "cosine2": CosineSquaredSchedule,
    "beta": BetaSchedule,
}


def as_schedule(schedule: Schedule | str | Function, *parameters: float) -> Schedule:
    """A schedule from a name ("linear", "cosine", "cosine2", "beta"), a function, or itself.

    Args:
        schedule: what to use.
        parameters: of the named one: a and b of "beta".

    Raises:
        ValueError: no such name, parameters that it does not take, or what the schedule raises.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if callable(schedule):
        return CustomSchedule(schedule)
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule must be one of {sorted(SCHEDULES)}, a Schedule or a function of t, not "
            f"{schedule!r}"
        )
    wanted = 2 if schedule == "beta" else 0
    if len(parameters) != wanted:
        raise ValueError(
            f"schedule {schedule!r} takes {wanted} parameters, got {list(parameters)}; "
            "BetaSchedule(17, 4) is one with two"
        )
    return SCHEDULES[schedule](*parameters)


def expected_calls(schedule: Schedule, steps: float, tokens: int) -> float:
    """E|unique transition times| = sum_t 1 - (1 - p_t)^N, the calls of DNDM for one sequence.

    At most T (1 - (1 - 1/T)^N), with equality iff tau is uniform; N for infinitely many steps.

    Args:
        schedule: of the transition times.
        steps: T, or math.inf.
        tokens: N, free positions, at least 1.

    Raises:
        ValueError: an argument outside its range.
    """
    check_steps(steps)
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, not {tokens}: a call reveals something")
    if steps == math.inf:
        return float(tokens)
    missed = torch.log1p(-schedule.pmf(int(steps))) * tokens
    return float(-torch.expm1(missed).sum())
