"""The recipes of solvers that are compared over seeds. Imports neither torch nor scipy."""

from __future__ import annotations

import math
from typing import Literal

from sparring.launch.arms import check_names
from sparring.launch.config import config
from sparring.launch.stages import LaunchConfig

SOLVERS = {
    "sarah-c": "SARAH-Compositional: recursive estimates of both levels (arXiv 1912.13515)",
    "vrsc-pg": "the same corrections against an anchor (arXiv 1711.03590)",
    "storm-c": "recursive estimates that forget a little, one anchor",
    "scgd": "moving average of the inner level (arXiv 1411.3803)",
    "asc-pg": "the same, extrapolated (arXiv 1607.07329)",
    "gd": "exact gradients",
    "admm": "stochastic ADMM: standard, relaxed, linearised, gradient-based (arXiv 2003.03532)",
    "consensus": "ADMM whose rows are dealt out to ranks (Boyd et al. 2011)",
}


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive, not {value}")


@config
class PortfolioConfig:
    """min over x of -mean return + variance of a portfolio x, from real returns in percent."""

    returns: Literal["monthly", "daily"] = "monthly"
    """"monthly": 30 Ken French portfolios, 819 months (package linearmodels); "daily": 20 stocks of
    the S&P 500, 8312 days (package skfolio)."""
    passes: float = 12
    """Budget of IFO calls, in passes of 2m + n."""
    batch: int = 5
    """Samples of each kind in a step."""

    def __post_init__(self) -> None:
        _positive("portfolio.passes", self.passes)
        _positive("portfolio.batch", self.batch)


@config
class CompositionalConfig:
    """One solver of min f(g(x)) with its settings."""

    method: Literal["sarah-c", "vrsc-pg", "storm-c", "scgd", "asc-pg", "gd"] = "sarah-c"
    """sarah-c, vrsc-pg, storm-c, scgd, asc-pg or gd."""
    label: str = ""
    """Name in tables and folders; the method's if empty."""
    lr: float
    """Step length."""
    q: int | None = None
    """sarah-c, vrsc-pg: steps from one anchor to the next; the theory's if left out."""
    averaging: float | None = None
    """storm-c, scgd, asc-pg: weight of a new sample, in (0, 1]."""

    def __post_init__(self) -> None:
        name = self.label or self.method
        _positive(f"compositional: lr of {name}", self.lr)
        if self.q is not None:
            if self.method not in ("sarah-c", "vrsc-pg"):
                raise ValueError(f"compositional: {name} has no anchors; leave q out")
            _positive(f"compositional: q of {name}", self.q)
        if self.averaging is not None:
            if self.method in ("sarah-c", "vrsc-pg", "gd"):
                raise ValueError(f"compositional: {name} does not average; leave averaging out")
            if not 0 < self.averaging <= 1:
                raise ValueError(
                    f"compositional: averaging of {name} must be in (0, 1], not {self.averaging}"
                )


@config
class LassoConfig:
    """The lasso on scikit-learn's diabetes data, standardised, by sampled ADMM."""

    penalty: float = 0.1
    """Weight of the l1 norm; the loss is half the mean square."""
    rho: float = 200.0
    """ADMM's penalty; one iteration is a time of 1/rho. Consensus gives each part its share."""
    batch: int = 64
    """Rows an iteration, over all parts."""
    iterations: int = 6000
    """Of each run; the second half is taken for the measured standard deviation."""

    def __post_init__(self) -> None:
        for name in ("penalty", "rho", "batch"):
            _positive(f"lasso.{name}", getattr(self, name))
        if self.iterations < 2:
            raise ValueError(f"lasso.iterations must be at least 2, not {self.iterations}")


@config
class AdmmConfig:
    """One scheme of ADMM; the table of schemes is in docs/science/admm.md."""

    label: str
    """Name in tables and folders."""
    alpha: float = 1.0
    """Relaxation, in (0, 2)."""
    omega: float = 0.0
    """How much of the penalty enters by its gradient only, in [0, 1]."""
    omega1: float = 0.0
    """How much of the loss enters by its gradient only, in [0, 1]."""
    c: float = 0.0
    """Proximal weight tau over rho, at least 0."""
    parts: int = 1
    """More than 1: consensus ADMM of so many parts of the rows, which ranks share."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 2:
            raise ValueError(f"admm: alpha of {self.label} must be in (0, 2), not {self.alpha}")
        for name in ("omega", "omega1"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"admm: {name} of {self.label} must be in [0, 1], not {value}")
        if not (self.c >= 0 and math.isfinite(self.c)):
            raise ValueError(f"admm: c of {self.label} must not be negative, not {self.c}")
        if self.parts < 1:
            raise ValueError(f"admm: parts of {self.label} must be at least 1, not {self.parts}")
        if self.parts > 1 and self.omega:
            raise ValueError(f"admm: {self.label} is consensus, which has no omega; leave it out")


@config
class ComposeStage:
    """One run of a compositional solver."""

    portfolio: PortfolioConfig = PortfolioConfig()
    solver: CompositionalConfig


@config
class AdmmStage:
    """One run of ADMM on the lasso."""

    lasso: LassoConfig = LassoConfig()
    scheme: AdmmConfig

    def __post_init__(self) -> None:
        if self.lasso.batch % self.scheme.parts:
            raise ValueError(
                f"lasso.batch = {self.lasso.batch} cannot be dealt out to the {self.scheme.parts} "
                f"parts of {self.scheme.label}: make it a multiple"
            )


@config
class Recipe:
    """Solvers on one problem: [[compositional]] on a portfolio, or [[admm]] on a lasso."""

    name: str
    """Also the default name of the run's folder."""
    pipeline: Literal["science"] = "science"
    """Kind of run."""
    seeds: int = 5
    """Runs of each solver that draws samples."""
    seed: int = 0
    """Of everything random; run k of every solver has the same seed."""
    portfolio: PortfolioConfig = PortfolioConfig()
    compositional: tuple[CompositionalConfig, ...] = ()
    lasso: LassoConfig = LassoConfig()
    admm: tuple[AdmmConfig, ...] = ()
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, not {self.seeds}")
        if bool(self.compositional) == bool(self.admm):
            raise ValueError("give [[compositional]] tables or [[admm]] tables, one of the two")
        check_names(self.names, "compositional" if self.compositional else "admm")
        self.settings()

    @property
    def names(self) -> list[str]:
        """Of the arms."""
        return [c.label or c.method for c in self.compositional] + [a.label for a in self.admm]

    def settings(self) -> list[ComposeStage | AdmmStage]:
        """What each arm's runs are told."""
        return [
            *(ComposeStage(portfolio=self.portfolio, solver=c) for c in self.compositional),
            *(AdmmStage(lasso=self.lasso, scheme=a) for a in self.admm),
        ]

    @property
    def algorithm(self) -> str:
        """For lists of recipes."""
        return ", ".join(self.names)
