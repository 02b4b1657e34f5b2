"""The methods for min f(g(x)), as rules that turn a point into an estimate of ∇Φ.

SARAH-Compositional (arXiv 1912.13515), VRSC-PG (Huo et al., arXiv 1711.03590, as compared with in
1912.13515), SCGD (Wang, Fang, Liu, arXiv 1411.3803), ASC-PG (Wang, Liu, Fang, arXiv 1607.07329),
STORM-Compositional (the follow-up of 1912.13515's authors) and gradient descent. An IFO call gives
one g_j(x), one ∂g_j(x) or one ∇f_i(y); every rule counts those it makes, and says beforehand what
its next step costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparring.optimizers.recursive import RecursiveEstimator
from sparring.science.compositional_problem import Batch, CompositionalProblem

METHODS = ("sarah-c", "vrsc-pg", "scgd", "asc-pg", "storm-c", "gd")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What a method does.

    Args:
        method: one of METHODS.
        q: steps from one anchor to the next, the anchor among them.
        batch: A2, B2, C2: samples of g, ∂g, ∇f in a step.
        anchor_batch: A1, B1, C1: those of an anchor.
        averaging: t ↦ weights of the new sample for g, ∂g and F (SCGD, ASC-PG: the first only).
    """

    method: str
    q: int
    batch: tuple[int, int, int]
    anchor_batch: tuple[int, int, int]
    averaging: Callable[[int], tuple[float, float, float]]


@dataclass
class Oracle:
    """A problem whose IFO calls are counted, with the stream of its samples."""

    problem: CompositionalProblem
    generator: torch.Generator
    calls: dict[str, int] = field(default_factory=lambda: {"g": 0, "dg": 0, "df": 0})

    @property
    def total(self) -> int:
        """Calls of all kinds."""
        return sum(self.calls.values())

    def draw(self, sizes: tuple[int, int, int]) -> tuple[Batch, Batch, Batch]:
        """Independent samples for g, for ∂g and for ∇f."""
        a, b, c = sizes
        return (
            self.problem.draw(0, a, self.generator),
            self.problem.draw(0, b, self.generator),
            self.problem.draw(1, c, self.generator),
        )

    def g(self, x: Tensor, batch: Batch) -> Tensor:
        """(L,)"""
        self.calls["g"] += batch.size
        return self.problem.value(x, batch)

    def dg(self, x: Tensor, batch: Batch) -> Tensor:
        """(L, D)"""
        self.calls["dg"] += batch.size
        return self.problem.jacobian(x, batch)

    def pullback(self, x: Tensor, batch: Batch, cotangent: Tensor) -> Tensor:
        """(D,) ∂gᵀv; as many calls as the Jacobian."""
        self.calls["dg"] += batch.size
        return self.problem.pullback(x, batch, cotangent)

    def df(self, y: Tensor, batch: Batch) -> Tensor:
        """(L,)"""
        self.calls["df"] += batch.size
        return self.problem.outer_gradient(y, batch)


class Method:
    """Base: `direction` is called with t = 0, 1, 2, ... and the point of that step.

    `memory` holds all that a later call needs, so that saving it is enough to go on.
    """

    def __init__(self, rule: Rule, oracle: Oracle) -> None:
        self.rule, self.oracle = rule, oracle
        self.memory: dict[str, Tensor] = {}

    def direction(self, t: int, x: Tensor) -> Tensor:
        """(D,) the estimate F_t of ∇Φ(x_t)."""
        raise NotImplementedError

    def cost(self, t: int) -> int:
        """IFO calls of `direction(t, ...)`."""
        raise NotImplementedError

    def estimates(self) -> dict[str, Tensor]:
        """The estimates of g(x_t), ∂g(x_t) and ∇Φ(x_t) that the method keeps, as "g", "dg", "F"."""
        return {name: self.memory[name] for name in ("g", "dg", "F") if name in self.memory}

    def _sizes(self, batch: tuple[int, int, int]) -> int:
        m, n = self.oracle.problem.inner_count, self.oracle.problem.outer_count
        a, b, c = batch
        return a + b + c if m is None or n is None else min(a, m) + min(b, m) + min(c, n)

    def _anchor(self, x: Tensor) -> None:
        """g_t, G_t and F_t = G_tᵀ ∇f(g_t) on A1, B1 and C1 samples."""
        for_g, for_dg, for_df = self.oracle.draw(self.rule.anchor_batch)
        g, dg = self.oracle.g(x, for_g), self.oracle.dg(x, for_dg)
        self.memory |= {"g": g, "dg": dg, "F": dg.T @ self.oracle.df(g, for_df)}


class GradientDescent(Method):
    """F_t = ∇Φ(x_t), from all samples."""

    def direction(self, t: int, x: Tensor) -> Tensor:
        """(D,)"""
        for_g, for_dg, for_df = self.oracle.draw(self.rule.anchor_batch)
        g = self.oracle.g(x, for_g)
        self.memory["g"] = g
        self.memory["F"] = self.oracle.pullback(x, for_dg, self.oracle.df(g, for_df))
        return self.memory["F"]

    def cost(self, t: int) -> int:
        """2m + n."""
        return self._sizes(self.rule.anchor_batch)


class Recursive(Method):
    """SARAH-C and STORM-C: each estimate moves by the difference of two points on one sample.

        g_t = g_j(x_t) + (1 − a_g) (g_{t−1} − g_j(x_{t−1})),
        G_t = ∂g_j'(x_t) + (1 − a_G) (G_{t−1} − ∂g_j'(x_{t−1})),
        F_t = G_tᵀ∇f_i(g_t) + (1 − a_F) (F_{t−1} − G_{t−1}ᵀ∇f_i(g_{t−1})),

    SARAH-C with all a = 0 and a fresh anchor every q steps; STORM-C with a > 0 and one anchor.
    """

    def direction(self, t: int, x: Tensor) -> Tensor:
        """(D,)"""
        if t == 0 or (self.rule.method == "sarah-c" and t % self.rule.q == 0):
            self._anchor(x)
        else:
            self._move(t, x)
        self.memory["x"] = x.clone()
        return self.memory["F"]

    def _move(self, t: int, x: Tensor) -> None:
        old, oracle = self.memory, self.oracle
        for_g, for_dg, for_df = oracle.draw(self.rule.batch)
        a_g, a_dg, a_f = self.rule.averaging(t)
        g = _recur(1 - a_g, old["g"], oracle.g(x, for_g), oracle.g(old["x"], for_g))
        dg = _recur(1 - a_dg, old["dg"], oracle.dg(x, for_dg), oracle.dg(old["x"], for_dg))
        new = dg.T @ oracle.df(g, for_df)
        before = old["dg"].T @ oracle.df(old["g"], for_df)
        self.memory = {"g": g, "dg": dg, "F": _recur(1 - a_f, old["F"], new, before)}

    def cost(self, t: int) -> int:
        """A1 + B1 + C1 at an anchor, else 2 (A2 + B2 + C2)."""
        if t == 0 or (self.rule.method == "sarah-c" and t % self.rule.q == 0):
            return self._sizes(self.rule.anchor_batch)
        return 2 * self._sizes(self.rule.batch)


def _recur(beta: float, estimate: Tensor, new: Tensor, previous: Tensor) -> Tensor:
    """One step of the recursion that all variance-reduced methods of the house share."""
    estimator = RecursiveEstimator(beta=beta)
    estimator.update([estimate])
    return estimator.update([new], [previous])[0]


class Anchored(Method):
    """VRSC-PG: the corrections of SARAH-C, each against the epoch's anchor x̃ (as in SVRG).

    g_t = g_j(x_t) − g_j(x̃) + g̃, likewise G_t, and F_t = G_tᵀ∇f_i(g_t) − G̃ᵀ∇f_i(g̃) + F̃.
    """

    def direction(self, t: int, x: Tensor) -> Tensor:
        """(D,)"""
        if t % self.rule.q == 0:
            self._anchor(x)
            self.memory |= {f"anchor_{name}": self.memory[name] for name in ("g", "dg", "F")}
            self.memory["anchor_x"] = x.clone()
            return self.memory["F"]
        memory, oracle = self.memory, self.oracle
        for_g, for_dg, for_df = oracle.draw(self.rule.batch)
        anchor = memory["anchor_x"]
        memory["g"] = oracle.g(x, for_g) - oracle.g(anchor, for_g) + memory["anchor_g"]
        memory["dg"] = oracle.dg(x, for_dg) - oracle.dg(anchor, for_dg) + memory["anchor_dg"]
        new = memory["dg"].T @ oracle.df(memory["g"], for_df)
        before = memory["anchor_dg"].T @ oracle.df(memory["anchor_g"], for_df)
        memory["F"] = new - before + memory["anchor_F"]
        return memory["F"]

    def cost(self, t: int) -> int:
        """A1 + B1 + C1 at an anchor, else 2 (A2 + B2 + C2)."""
        if t % self.rule.q == 0:
            return self._sizes(self.rule.anchor_batch)
        return 2 * self._sizes(self.rule.batch)


class Averaging(Method):
    """SCGD and ASC-PG: y ← (1 − β) y + β g_j(z), F = ∂g_j'(x)ᵀ ∇f_i(y).

    z = x for SCGD; ASC-PG extrapolates, z_t = (1 − 1/β) x_{t−1} + x_t / β, which makes
    the lag of y behind g(x) second order. No anchor, and no L × D Jacobian.
    """

    def direction(self, t: int, x: Tensor) -> Tensor:
        """(D,)"""
        memory, oracle = self.memory, self.oracle
        for_g, for_dg, for_df = oracle.draw(self.rule.batch)
        beta = self.rule.averaging(t)[0]
        if "g" not in memory:
            memory["g"] = oracle.g(x, for_g)
        else:
            ahead = self.rule.method == "asc-pg"
            z = x + (1 / beta - 1) * (x - memory["x"]) if ahead else x
            memory["g"] = torch.lerp(memory["g"], oracle.g(z, for_g), beta)
        memory["F"] = oracle.pullback(x, for_dg, oracle.df(memory["g"], for_df))
        memory["x"] = x.clone()
        return memory["F"]

    def cost(self, t: int) -> int:
        """A2 + B2 + C2."""
        return self._sizes(self.rule.batch)


_CLASSES: dict[str, type[Method]] = {
    "sarah-c": Recursive,
    "storm-c": Recursive,
    "vrsc-pg": Anchored,
    "scgd": Averaging,
    "asc-pg": Averaging,
    "gd": GradientDescent,
}


def make(rule: Rule, oracle: Oracle) -> Method:
    """The method of the rule."""
    return _CLASSES[rule.method](rule, oracle)
