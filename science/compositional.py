"""min f(g(x)) with g and f means of samples: SARAH-Compositional and its peers, costs counted.

    problem = CompositionalProblem(inner, outer, inner_count=m, outer_count=n)
    result = minimize_compositional(problem, x0, "sarah-c", lr=0.01, max_ifo=50 * (2 * m + n))

`compositional_examples` has problems, `compositional_optimizer` a torch optimizer for modules.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import OptimizeResult
from torch import Tensor

from sparring.launch.seeds import derive
from sparring.science.compositional_methods import METHODS, Method, Oracle, Rule, make
from sparring.science.compositional_problem import CompositionalProblem, Smoothness

__all__ = ["METHODS", "CompositionalProblem", "Iterate", "Smoothness", "minimize_compositional"]

Triple = tuple[int, int, int]
Schedule = float | Callable[[int], float]

# Entries of an L × D Jacobian estimate that are accepted; 400 MB of float64, and four are held.
JACOBIAN_LIMIT = 50_000_000


class Iterate(NamedTuple):
    """What a callback sees after F_t was formed and before the step.

    `estimates` has those of "g" (L,), "dg" (L, D) and "F" (D,) that the method keeps.
    """

    nit: int
    x: Tensor
    estimates: dict[str, Tensor]


@dataclass
class _History:
    """Rows of the monitor, at evenly spaced points of the budget."""

    evaluate: Callable[[Tensor], tuple[float, Tensor]]
    rows: list[tuple[float, ...]]

    def record(self, nit: int, calls: dict[str, int], x: Tensor) -> tuple[float, float]:
        """Φ(x) and ‖∇Φ(x)‖, which cost no IFO call."""
        value, gradient = self.evaluate(x)
        norm = float(gradient.norm())
        self.rows.append((nit, calls["g"], calls["dg"], calls["df"], value, norm))
        return value, norm

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays by name; "ifo" is the sum of the three counts."""
        table = np.asarray(self.rows, dtype=np.float64)
        columns: dict[str, npt.NDArray[Any]] = {
            name: table[:, k].astype(np.int64) for k, name in enumerate(("nit", "g", "dg", "df"))
        }
        columns["ifo"] = columns["g"] + columns["dg"] + columns["df"]
        return columns | {"fun": table[:, 4], "grad_norm": table[:, 5]}


def minimize_compositional(
    problem: CompositionalProblem,
    x0: npt.ArrayLike | Tensor,
    method: str = "sarah-c",
    *,
    lr: Schedule | None = None,
    q: int | None = None,
    batch: int | Triple = 1,
    anchor_batch: int | Triple | None = None,
    averaging: float | tuple[float, float, float] | Callable[[int], float] | None = None,
    normalize: float | None = None,
    max_iter: int | None = None,
    max_ifo: int | None = None,
    tol: float = 0.0,
    output: str = "last",
    records: int = 100,
    monitor_samples: int = 4096,
    seed: int = 0,
    callback: Callable[[Iterate], None] | None = None,
    jacobian_limit: int = JACOBIAN_LIMIT,
) -> OptimizeResult:
    """Minimise Φ(x) = f(g(x)) by x_{t+1} = x_t − lr F_t, F_t an estimate of ∇Φ(x_t).

    sarah-c   recursive estimates of g, ∂g and ∇Φ with an anchor every q steps (arXiv 1912.13515)
    vrsc-pg   the same three corrections against the last anchor (arXiv 1711.03590)
    scgd      moving average of g (arXiv 1411.3803)
    asc-pg    the same, with g asked for at an extrapolated point (arXiv 1607.07329)
    storm-c   recursive estimates that forget a little and need one anchor only
    gd        exact gradients

    Args:
        problem: Φ.
        x0: (D,); float64 unless it is a tensor of another floating type.
        lr: step length, or t ↦ step length. None: the finite-sum theorem's of sarah-c,
            1/√(6 (2m+n) (M_g⁴L_f² + M_f²L_g²)), where the problem has `smoothness`.
        q: steps from one anchor to the next; None: (2m+n) / (A2+B2+C2), at least 1 (the theorem's
            (2m+n)/3 for batches of 1), and A1 in place of m and n online.
        batch: samples a step, one number or (A2, B2, C2) for g, ∂g and ∇f.
        anchor_batch: samples of an anchor, likewise (A1, B1, C1). None: all of a finite sum.
        averaging: weight of the new sample in (0, 1]: β of scgd and asc-pg (default 0.9, or a
            function of t), (a_g, a_G, a_F) of storm-c (default 0.01 each).
        normalize: ε > 0 shortens steps to lr · min(½, ε/‖F‖) · F, the follow-up's rule.
        max_iter, max_ifo: budgets of steps and of IFO calls of all kinds; one is needed. A step
            that would go over max_ifo is not begun.
        tol: stop when the monitored ‖∇Φ(x)‖ is at most this.
        output: "last", or "random" for one of x_0 to x_{T-1}, drawn uniformly, of which the theorem
            speaks.
        records: how often Φ is monitored, evenly over the budget. The monitor is no IFO call: in a
            finite sum it is exact, online it takes `monitor_samples` fixed samples.
        seed: equal seeds give equal results.
        callback: called at every step.
        jacobian_limit: largest L · D for methods that hold a Jacobian.

    Returns:
        scipy's OptimizeResult: x (D,) float64, fun, grad_norm, nit, n_ifo {"g", "dg", "df"},
        history (a dictionary of arrays nit, g, dg, df, ifo, fun, grad_norm), success, message.
        `success` is whether tol was reached, or with tol = 0 whether the budget was spent without
        leaving the finite numbers.

    Raises:
        ValueError: a bad argument or value of a schedule, a callable of the wrong shape, L · D over
            the limit, max_ifo below what the first step takes, or "gd" or default anchors for an
            online problem.
    """
    point = _start(x0)
    rule = _rule(problem, method, q, batch, anchor_batch, averaging)
    _check_budget(max_iter, max_ifo, tol, normalize, output, records)
    rate = _rate(problem, method, lr)
    generator = torch.Generator().manual_seed(derive(seed, "compositional", "samples"))
    check_jacobian(problem, point, method, jacobian_limit)
    oracle = Oracle(problem, generator)
    history = _History(problem.monitor(monitor_samples, derive(seed, "monitor")), [])
    run = _Run(make(rule, oracle), rate, normalize, callback)
    if max_ifo is not None and max_ifo < run.method.cost(0):
        raise ValueError(
            f"max_ifo = {max_ifo} does not hold the first step of {method!r}, which takes "
            f"{run.method.cost(0)} IFO calls; raise it, or give a smaller anchor_batch or batch"
        )
    chooser = np.random.default_rng(derive(seed, "output")) if output == "random" else None
    return _drive(run, point, history, max_iter, max_ifo, tol, records, chooser)


@dataclass
class _Run:
    """A method with its step rule."""

    method: Method
    rate: Callable[[int], float]
    normalize: float | None
    callback: Callable[[Iterate], None] | None

    def step(self, t: int, x: Tensor) -> Tensor:
        """x_{t+1}."""
        direction = self.method.direction(t, x)
        if self.callback is not None:
            self.callback(Iterate(t, x, self.method.estimates()))
        scale = self.rate(t)
        if self.normalize is not None:
            scale *= min(0.5, self.normalize / max(float(direction.norm()), 1e-300))
        return x - scale * direction


def _drive(
    run: _Run,
    x: Tensor,
    history: _History,
    max_iter: int | None,
    max_ifo: int | None,
    tol: float,
    records: int,
    chooser: np.random.Generator | None,
) -> OptimizeResult:
    oracle, t, due, chosen = run.method.oracle, 0, 1, x
    steps, calls = max_iter or math.inf, max_ifo or math.inf
    value, norm = history.record(0, oracle.calls, x)
    budgets = ((max_iter, "steps"), (max_ifo, "IFO calls"))
    spent = " or ".join(f"{size} {unit}" for size, unit in budgets if size is not None)
    message = f"the budget is spent: {spent}"
    if not (math.isfinite(value) and math.isfinite(norm)):
        message = f"Φ = {value} and ‖∇Φ‖ = {norm} at x0: start where both are finite"
        steps = 0
    while norm > tol and t < steps and oracle.total + run.method.cost(t) <= calls:
        if chooser is not None and chooser.random() < 1 / (t + 1):  # a uniform choice in one pass
            chosen = x
        x = run.step(t, x)
        t += 1
        if max(t / steps, oracle.total / calls) * records >= due:
            due = math.floor(max(t / steps, oracle.total / calls) * records) + 1
            value, norm = history.record(t, oracle.calls, x)
            if not (math.isfinite(value) and math.isfinite(norm)):
                message = f"Φ left the finite numbers by step {t}; take a smaller lr"
                break
    if history.rows[-1][0] != t:
        value, norm = history.record(t, oracle.calls, x)
    finite = math.isfinite(value) and math.isfinite(norm)
    reached = finite and norm <= tol
    if reached:
        message = f"‖∇Φ‖ = {norm:.3g} is at most tol = {tol:g}"
    if chooser is not None:
        x = chosen
        value, gradient = history.evaluate(x)
        norm = float(gradient.norm())
    return OptimizeResult(
        x=x.detach().to("cpu", torch.float64).numpy(),
        fun=value,
        grad_norm=norm,
        nit=t,
        n_ifo=dict(oracle.calls),
        history=history.columns(),
        success=bool(reached or (finite and tol == 0)),
        message=message,
    )


def _start(x0: npt.ArrayLike | Tensor) -> Tensor:
    if isinstance(x0, Tensor) and x0.is_floating_point():
        point = x0.detach().clone()
    else:
        point = torch.tensor(np.asarray(x0, dtype=np.float64))
    if point.ndim != 1 or not len(point):
        raise ValueError(f"x0 must be a vector, got shape {tuple(point.shape)}; flatten it")
    if not bool(torch.isfinite(point).all()):
        raise ValueError("x0 must be finite")
    return point


def _triple(name: str, value: int | Triple) -> Triple:
    """Sizes of batches of g, ∂g and ∇f out of one number or three."""
    parts = value if isinstance(value, tuple | list) else (value,) * 3
    try:
        sizes = tuple(operator.index(size) for size in parts)
    except TypeError:
        sizes = ()
    if len(sizes) != 3 or min(sizes) < 1:
        raise ValueError(
            f"{name} must be one whole number or three, at least 1 sample of each kind, got "
            f"{value!r}"
        )
    return sizes[0], sizes[1], sizes[2]


def _rule(
    problem: CompositionalProblem,
    method: str,
    q: int | None,
    batch: int | Triple,
    anchor_batch: int | Triple | None,
    averaging: float | tuple[float, float, float] | Callable[[int], float] | None,
) -> Rule:
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "gd" and not problem.finite:
        raise ValueError("method 'gd' needs a finite sum; this problem is online, take 'sarah-c'")
    if method == "gd" and anchor_batch is not None:
        raise ValueError("method 'gd' always takes all samples; leave anchor_batch out")
    inner = _triple("batch", batch)
    if anchor_batch is not None:
        anchor = _triple("anchor_batch", anchor_batch)
    elif problem.inner_count is not None and problem.outer_count is not None:
        anchor = (problem.inner_count, problem.inner_count, problem.outer_count)
    elif method in ("scgd", "asc-pg"):
        anchor = inner
    else:
        raise ValueError(
            f"an online problem has no full batch; give anchor_batch= for {method!r} (in theory "
            "σ²/ε², for a gradient norm of ε and samples of variance σ²)"
        )
    length = max(1, sum(anchor) // sum(inner)) if q is None else q
    if length < 1:
        raise ValueError(f"q must be at least 1, got {q}")
    weights = _weights(method, averaging)
    return Rule(method=method, q=length, batch=inner, anchor_batch=anchor, averaging=weights)


def _weights(
    method: str, averaging: float | tuple[float, float, float] | Callable[[int], float] | None
) -> Callable[[int], tuple[float, float, float]]:
    if method in ("sarah-c", "vrsc-pg", "gd"):
        if averaging is not None:
            raise ValueError(f"averaging does nothing in {method!r}; leave it out")
        return lambda t: (0.0, 0.0, 0.0)
    if callable(averaging):
        schedule = averaging

        def weights(t: int) -> tuple[float, float, float]:
            weight = float(schedule(t))
            if not 0 < weight <= 1:
                raise ValueError(f"averaging({t}) must be in (0, 1], got {weight!r}")
            return (weight,) * 3

        return weights
    if averaging is None:
        averaging = 0.01 if method == "storm-c" else 0.9
    values = averaging if isinstance(averaging, tuple) else (averaging,) * 3
    if len(values) != 3 or not all(0 < value <= 1 for value in values):
        raise ValueError(f"averaging must be in (0, 1], one number or three, got {averaging!r}")
    return lambda t: values


def _rate(
    problem: CompositionalProblem, method: str, lr: Schedule | None
) -> Callable[[int], float]:
    if callable(lr):
        schedule = lr

        def rate_at(t: int) -> float:
            length = float(schedule(t))
            if not (math.isfinite(length) and length >= 0):
                raise ValueError(f"lr({t}) must be finite and at least 0, got {length!r}")
            return length

        return rate_at
    if lr is None:
        if method != "sarah-c" or problem.smoothness is None or not problem.finite:
            raise ValueError(
                f"give lr= for {method!r}: a default exists for 'sarah-c' on a finite sum whose "
                "problem has smoothness="
            )
        calls = 2 * (problem.inner_count or 0) + (problem.outer_count or 0)
        lr = 1 / math.sqrt(6 * calls * problem.smoothness.squared)
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"lr must be positive and finite, got {lr!r}")
    rate = lr
    return lambda t: rate


def _check_budget(
    max_iter: int | None,
    max_ifo: int | None,
    tol: float,
    normalize: float | None,
    output: str,
    records: int,
) -> None:
    if max_iter is None and max_ifo is None:
        raise ValueError("give a budget: max_iter= steps or max_ifo= IFO calls")
    for name, value in (("max_iter", max_iter), ("max_ifo", max_ifo), ("records", records)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not tol >= 0:
        raise ValueError(f"tol must not be negative, got {tol!r}")
    if normalize is not None and not normalize > 0:
        raise ValueError(f"normalize must be positive, got {normalize!r}")
    if output not in ("last", "random"):
        raise ValueError(f"output must be 'last' or 'random', got {output!r}")


def check_jacobian(problem: CompositionalProblem, x: Tensor, method: str, limit: int) -> None:
    """Refuse a method that would hold an L × D Jacobian with more than `limit` entries.

    Raises:
        ValueError: it would.
    """
    if method in ("scgd", "asc-pg", "gd"):
        return
    probe = problem.draw(0, 1, torch.Generator().manual_seed(0))
    width = len(problem.value(x, probe))
    if width * len(x) > limit:
        raise ValueError(
            f"{method!r} holds estimates of ∂g with L · D = {width} · {len(x)} = "
            f"{width * len(x)} entries, over jacobian_limit = {limit}; raise the limit, or take "
            "'scgd' or 'asc-pg', which need products with ∂g only"
        )
