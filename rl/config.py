"""The recipe of a comparison of policy-gradient methods. Imports neither torch nor gymnasium."""

from __future__ import annotations

import math
from typing import Literal

from sparring.launch.arms import check_names
from sparring.launch.config import config
from sparring.launch.stages import LaunchConfig
from sparring.rl.ranges import check_count, check_range

MethodName = Literal["gpomdp", "svrpg", "srvr-pg", "page-pg", "storm-pg"]

METHODS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "gpomdp": ("plain policy gradient (Baxter and Bartlett 2001)", (), ()),
    "svrpg": ("corrections against a snapshot (arXiv 1806.05618)", ("init_batch", "period"), ()),
    "srvr-pg": ("SARAH's recursion, restarted (arXiv 1909.08610)", ("init_batch", "period"), ()),
    "page-pg": ("the same, restarted at random (arXiv 2202.00308)",
                ("init_batch", "probability"), ()),
    "storm-pg": ("one recursion, one large batch (arXiv 2003.04302)",
                 ("init_batch", "alpha"), ("restart",)),
}  # fmt: skip
"""Each with what it is, the settings of its own that it needs, and those that it may have."""

_OWN = ("init_batch", "alpha", "restart", "period", "probability")


@config
class EnvironmentConfig:
    """The task: J = E sum_{h < H} gamma^h r_h."""

    id: str
    """A gymnasium id, sparring/ContinuousCartPole-v0 or sparring/ContinuousMountainCar-v0."""
    horizon: int
    """H, steps of an episode at most; a time limit of the environment below it ends it too."""
    gamma: float = 0.99
    """Discount, in [0, 1]."""

    def __post_init__(self) -> None:
        check_count("environment.horizon", self.horizon)
        check_range("environment.gamma", self.gamma, 0, 1)


@config
class PolicyConfig:
    """A tanh network: softmax over discrete actions, Gaussian over continuous ones."""

    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers (the papers: one of 64); an empty list is a linear policy."""
    sigma: float = 0.5
    """Standard deviation of continuous actions, in their unit."""
    learn_sigma: bool = False
    """Whether sigma is learned, one an action dimension; the paper's is fixed."""

    def __post_init__(self) -> None:
        for width in self.hidden:
            check_count("policy.hidden", width)
        if not (self.sigma > 0 and math.isfinite(self.sigma)):
            raise ValueError(f"policy.sigma must be above 0, not {self.sigma}")


@config
class MethodConfig:
    """One method with its settings; ranges and advice are in docs/rl/."""

    method: MethodName
    """gpomdp, svrpg, srvr-pg, page-pg or storm-pg."""
    label: str = ""
    """Name in tables and folders; the method's if empty."""
    lr: float
    """Learning rate."""
    batch: int
    """B, trajectories an iteration, on all ranks."""
    init_batch: int | None = None
    """S_0, trajectories of the first iteration (storm-pg) or of an anchor (svrpg, srvr-pg,
    page-pg)."""
    alpha: float | None = None
    """storm-pg: weight of the new estimate, in [0, 1]; 1 is plain policy gradient."""
    restart: int | None = None
    """storm-pg: iterations from one large batch to the next; the paper has one only."""
    period: int | None = None
    """svrpg, srvr-pg: iterations from one anchor to the next."""
    probability: float | None = None
    """page-pg: of an anchor, in [0, 1]."""
    estimator: Literal["gpomdp", "pgt", "reinforce"] = "gpomdp"
    """How a trajectory's gradient is estimated; the paper's is gpomdp."""
    baseline: Literal["loo", "running", "none"] = "loo"
    """Mean over the other trajectories of the batch, or of earlier batches, or none."""
    optimizer: Literal["adam", "sgd", "normalised", "mars"] = "adam"
    """What makes a step of the estimate; the paper's is adam."""
    lr_decay: float = 1.0
    """Factor of lr after each iteration, in (0, 1]."""
    clip: float | None = None
    """Upper bound of importance weights, at least 1: biased, but bounded."""
    defensive: float = 0.0
    """Share of a corrected batch that the previous policy samples, in [0, 1)."""

    def __post_init__(self) -> None:
        name = self.label or self.method
        _, needed, allowed = METHODS[self.method]
        for key in _OWN:
            value = getattr(self, key)
            if key in needed and value is None:
                raise ValueError(f"methods: {name} needs {key}")
            if value is not None and key not in (*needed, *allowed):
                raise ValueError(f"methods: {name} takes no {key}; leave it out")
            if value is not None and key in ("alpha", "probability"):
                check_range(f"methods: {key} of {name}", value, 0, 1)
            elif value is not None:
                check_count(f"methods: {key} of {name}", value)
        check_count(f"methods: batch of {name}", self.batch)
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"methods: lr of {name} must be above 0, not {self.lr}")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"methods: lr_decay of {name} must be in (0, 1], not {self.lr_decay}")
        if self.clip is not None and not self.clip >= 1:
            raise ValueError(f"methods: clip of {name} must be at least 1, not {self.clip}")
        if not 0 <= self.defensive < 1:
            raise ValueError(
                f"methods: defensive of {name} must be in [0, 1), not {self.defensive}"
            )

    @property
    def first_batch(self) -> int:
        """Trajectories of the first iteration."""
        return self.init_batch or self.batch


@config
class LearnConfig:
    """Training of one policy by one method."""

    environment: EnvironmentConfig
    policy: PolicyConfig = PolicyConfig()
    method: MethodConfig
    trajectories: int
    """Budget, on all ranks."""

    def __post_init__(self) -> None:
        check_count("trajectories", self.trajectories)
        if self.method.first_batch > self.trajectories:
            raise ValueError(
                f"trajectories = {self.trajectories} does not hold the first batch of "
                f"{self.method.first_batch} of {self.method.label or self.method.method}: raise "
                "it, or lower the batch"
            )


@config
class Recipe:
    """Policy-gradient methods on one task, all with the same budget and the same seeds."""

    name: str
    """Also the default name of the run's folder."""
    pipeline: Literal["rl"] = "rl"
    """Kind of run."""
    trajectories: int
    """Budget of each run, on all ranks."""
    seeds: int = 5
    """Runs of each method."""
    seed: int = 0
    """Of everything random; run k of every method has the same first policy and noise."""
    environment: EnvironmentConfig
    policy: PolicyConfig = PolicyConfig()
    methods: tuple[MethodConfig, ...]
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        check_count("seeds", self.seeds)
        if not self.methods:
            raise ValueError("methods is empty; give at least one [[methods]] table")
        check_names([name for name, _ in self.arms], "methods")
        # Builds every stage's settings, which refuse what does not fit together.
        self.settings()

    @property
    def arms(self) -> list[tuple[str, MethodConfig]]:
        """Methods by the name of their folder."""
        return [(entry.label or entry.method, entry) for entry in self.methods]

    def settings(self) -> list[LearnConfig]:
        """What each method's runs are told."""
        return [
            LearnConfig(
                environment=self.environment,
                policy=self.policy,
                method=method,
                trajectories=self.trajectories,
            )
            for _, method in self.arms
        ]

    @property
    def algorithm(self) -> str:
        """For lists of recipes."""
        return ", ".join(name for name, _ in self.arms)
