"""STORM-PG (arXiv 2003.04302): one large batch, then small ones, and no inner loop."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from sparring.optimizers.recursive import RecursiveEstimator
from sparring.rl.environments import Environment
from sparring.rl.method import Plan, PolicyGradient
from sparring.rl.ranges import check_count, check_range
from sparring.rl.ranks import check_share


class StormPG(PolicyGradient):
    """STORM-PG, Algorithm 1 of arXiv 2003.04302.

        g_0 = mean_i d_i(xi_0) over S_0 trajectories;  xi_{t+1} = xi_t + eta g_t
        g_{t+1} = mean_i d_i(xi_{t+1}) + (1 - alpha) (g_t - mean_i d_i^{xi_{t+1}}(xi_t))

    over B trajectories of xi_{t+1}, d_i^{xi_{t+1}}(xi_t) being the estimate at the OLD parameters
    on the new trajectories, with weights (`importance_weights`). alpha = 1 is GPOMDP, alpha = 0
    SARAH's recursion. For small steps E|g - grad J|^2 settles at alpha / (2 - alpha) sigma^2 / B,
    sigma^2 being the variance of one d_i.

    Small steps are what it needs: weights grow with |xi_{t+1} - xi_t|, and a run whose `max_weight`
    reaches hundreds is lost. Then lower lr, raise alpha, or use clip, defensive or "normalised".

    Args:
        policy, env: as of `PolicyGradient`.
        alpha: weight of the new estimate, in [0, 1]; the paper's is in (0, 1].
        init_batch: S_0, trajectories of the first iteration.
        batch: B, trajectories of the others.
        restart: iterations from one batch of S_0 to the next, which forgets the past; None, as in
            the paper, for never. With alpha = 0 this is SRVR-PG.
        settings: the other arguments of `PolicyGradient`.

    Raises:
        ValueError: as `PolicyGradient`; alpha or a batch outside its range.
    """

    name: ClassVar[str] = "storm-pg"

    def __init__(
        self,
        policy: nn.Module,
        env: Environment,
        *,
        alpha: float,
        init_batch: int,
        restart: int | None = None,
        **settings: Any,
    ) -> None:
        check_range("alpha", alpha, 0, 1)
        self.alpha, self.init_batch = alpha, check_count("init_batch", init_batch)
        check_share("init_batch", init_batch, self.init_batch)
        self.restart = None if restart is None else check_count("restart", restart)
        super().__init__(policy, env, **settings)

    def _make_recursion(self) -> RecursiveEstimator:
        # With alpha = 1 the correction has weight 0, and its cost can be saved.
        return RecursiveEstimator(1 - self.alpha, gamma=float(self.alpha < 1))

    def _plan(self) -> Plan:
        begins = self.iteration == 0
        if self.restart is not None:
            begins = self.iteration % self.restart == 0
        if begins:
            return Plan(self.init_batch, corrects=False)
        return Plan(self.batch, corrects=self.alpha < 1)

    def _combine(self, present: Any, reference: Any) -> Any:
        if self.restart is not None and self.iteration % self.restart == 0:
            self.recursion.restart()
        return super()._combine(present, reference)

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "alpha": self.alpha,
            "init_batch": self.init_batch,
            "restart": self.restart,
        }
