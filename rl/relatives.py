"""What STORM-PG is compared with: GPOMDP, SVRPG, SRVR-PG and PAGE-PG, on the same machinery."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from sparring.launch.seeds import derive
from sparring.optimizers.recursive import RecursiveEstimator
from sparring.rl.environments import Environment
from sparring.rl.method import Gradients, Plan, PolicyGradient
from sparring.rl.ranges import check_count, check_range
from sparring.rl.ranks import check_share


class GPOMDP(PolicyGradient):
    """Plain policy gradient, g_t = mean_i d_i(xi_t), with whatever `estimator` says.

    Baxter and Bartlett, 2001 (JAIR 15). Arguments are those of `PolicyGradient`.
    """

    name: ClassVar[str] = "gpomdp"

    def _make_recursion(self) -> RecursiveEstimator:
        return RecursiveEstimator(0.0, gamma=0.0)

    def _plan(self) -> Plan:
        return Plan(self.batch, corrects=False)


class _Anchored(PolicyGradient):
    """Methods that take a large batch now and then; a subclass says when."""

    def __init__(
        self, policy: nn.Module, env: Environment, *, init_batch: int, **settings: Any
    ) -> None:
        self.init_batch = check_count("init_batch", init_batch)
        check_share("init_batch", init_batch, self.init_batch)
        super().__init__(policy, env, **settings)

    def _make_recursion(self) -> RecursiveEstimator:
        return RecursiveEstimator(1.0)

    def _anchors(self) -> bool:
        """Whether the next iteration takes the large batch."""
        raise NotImplementedError

    def _plan(self) -> Plan:
        if self._anchors():
            return Plan(self.init_batch, corrects=False)
        return Plan(self.batch, corrects=True)

    def _combine(self, present: Gradients, reference: Gradients | None) -> Gradients:
        if reference is None:
            self.recursion.restart()
        return super()._combine(present, reference)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "init_batch": self.init_batch}


class SRVRPG(_Anchored):
    """SRVR-PG (arXiv 1909.08610): SARAH's recursion, begun anew every `period` iterations.

        g_t = mean_i d_i(xi_t)                                      S_0 trajectories, at an anchor
        g_t = g_{t-1} + mean_i [d_i(xi_t) - d_i^{xi_t}(xi_{t-1})]   B trajectories, between

    Args:
        policy, env: as of `PolicyGradient`.
        init_batch: S_0, trajectories of an anchor.
        batch: B.
        period: iterations from one anchor to the next, at least 1.
        settings: the other arguments of `PolicyGradient`.

    Raises:
        ValueError: as `PolicyGradient`; a number below 1.
    """

    name: ClassVar[str] = "srvr-pg"

    def __init__(
        self, policy: nn.Module, env: Environment, *, period: int, **settings: Any
    ) -> None:
        self.period = check_count("period", period)
        super().__init__(policy, env, **settings)

    def _anchors(self) -> bool:
        return self.iteration % self.period == 0

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "period": self.period}


class SVRPG(SRVRPG):
    """SVRPG (arXiv 1806.05618): corrections against a snapshot xi~, renewed every `period`.

        g_t = u + mean_i [d_i(xi_t) - d_i^{xi_t}(xi~)],  u = mean_i d_i(xi~) over S_0 trajectories

    The iteration of a snapshot steps along u itself, where the authors sample B more trajectories
    for a correction that is 0. Weights are per step here; theirs are of whole trajectories.
    Arguments are those of `SRVRPG`.
    """

    name: ClassVar[str] = "svrpg"

    def _combine(self, present: Gradients, reference: Gradients | None) -> Gradients:
        if reference is None:
            return super()._combine(present, None)
        assert self.recursion.estimate is not None
        step = RecursiveEstimator(1.0)  # one step of the recursion, always from the anchor
        step.update(self.recursion.estimate)
        return step.update(present, reference)

    def _becomes_reference(self, plan: Plan) -> bool:
        return not plan.corrects


class PAGEPG(_Anchored):
    """PAGE-PG (arXiv 2202.00308): SRVR-PG whose anchors come at random, without a loop.

    The first iteration, and each later one with a probability, takes S_0 trajectories and forgets
    the past; the others take B and SARAH's recursion. The coin is a function of seed and iteration.

    Args:
        policy, env: as of `PolicyGradient`.
        init_batch: S_0, trajectories of an anchor.
        batch: B.
        probability: of an anchor, in [0, 1].
        settings: the other arguments of `PolicyGradient`.

    Raises:
        ValueError: as `PolicyGradient`; a number outside its range.
    """

    name: ClassVar[str] = "page-pg"

    def __init__(
        self, policy: nn.Module, env: Environment, *, probability: float, **settings: Any
    ) -> None:
        check_range("probability", probability, 0, 1)
        self.probability = probability
        super().__init__(policy, env, **settings)

    def _anchors(self) -> bool:
        coin = derive(self.seed, "coin", self.iteration) / 2**62
        return self.iteration == 0 or coin < self.probability

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "probability": self.probability}
