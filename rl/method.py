"""What all methods share: sample, estimate at two policies, combine, step; resume; ranks.

Shape legend: N trajectories on this rank, H horizon.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sparring.optimizers.recursive import RecursiveEstimator
from sparring.rl.baselines import Baseline, Kind
from sparring.rl.environments import Environment, open_environment
from sparring.rl.estimators import (
    Estimator,
    baseline_signal,
    check_estimator,
    coefficients,
    discounted,
    importance_weights,
    log_weights,
    surrogate,
)
from sparring.rl.ranges import check_count, check_range
from sparring.rl.ranks import (
    check_share,
    max_over_ranks,
    place,
    same_parameters,
    share,
    sum_over_ranks,
    together,
)
from sparring.rl.rollouts import Sampler, Trajectories, log_probabilities
from sparring.rl.states import check_settings
from sparring.rl.steps import Ascent, StepRule, norm

_LARGEST_LOG = 300.0  # the square of its exponential is a float64 still

Record = dict[str, float]
Gradients = list[Tensor]


@dataclass(frozen=True)
class TrainResult:
    """What a call of `train` did: one record an iteration, with both cost axes."""

    records: list[Record]
    trajectories: int
    """Since the start of the run, on all ranks."""
    env_steps: int
    """Since the start of the run, on all ranks."""

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """(iterations,) the figure `name` of every record."""
        return np.array([record[name] for record in self.records], dtype=np.float64)


@dataclass(frozen=True)
class Plan:
    """What the next iteration samples."""

    count: int
    """Trajectories, on all ranks."""
    corrects: bool
    """Whether the gradient at the reference policy is wanted too."""


class PolicyGradient(ABC):
    """A policy-gradient method: ascent of J = E sum_{h < H} gamma^h r_h.

    An iteration samples from the present policy, estimates the gradient there and, on the same
    trajectories with weights, at a reference policy (the one before, or a snapshot), combines both
    with the past into `direction`, and steps.

    Under torch.distributed the ranks share each batch: sums for baselines and gradients go over all
    ranks before anything is combined, so every rank makes the same step.

    Args:
        policy: a module with `distribution(observations)`; its parameters are moved. Its first
            parameter decides type and device.
        env: gymnasium id, maker of an environment, or vector environment (`open_environment`).
        batch: B, trajectories an iteration on all ranks.
        horizon: H, steps at most.
        gamma: discount, in [0, 1].
        lr: learning rate.
        estimator: "gpomdp" (the paper's), "pgt" or "reinforce".
        baseline: "loo", "running" or "none".
        optimizer: "adam" (the paper's), "sgd" (the theory's), "normalised" or "mars".
        lr_decay: factor of lr after each iteration, in (0, 1].
        clip: upper bound of importance weights, at least 1: biased, but bounded. None for none.
        defensive: share of a corrected batch that is sampled from the reference policy, in [0, 1):
            weights of the reference are then at most its inverse, without bias.
        num_envs: environments side by side on a rank; the rank's share of a batch if None.
        on_record: called with each record.

    Raises:
        ValueError: an argument outside its range, a part of a batch (the first, a defensive share,
            the rest of it) with fewer trajectories than ranks, or an environment that cannot be
            used.

    A record has: iteration, trajectories and env_steps (so far, all ranks), return_mean (of this
    batch, not discounted, present policy), objective (discounted), gradient_norm (of `direction`),
    lr, max_weight, ess (of the weights of whole trajectories before `clip`, as a share of the
    batch; 1 without weights), kl (estimate of KL(present || reference) over trajectories, nats) and
    seconds.
    """

    name: ClassVar[str]

    def __init__(
        self,
        policy: nn.Module,
        env: Environment,
        *,
        batch: int,
        horizon: int,
        lr: float,
        gamma: float = 0.99,
        estimator: Estimator = "gpomdp",
        baseline: Kind = "loo",
        optimizer: StepRule = "adam",
        lr_decay: float = 1.0,
        clip: float | None = None,
        defensive: float = 0.0,
        num_envs: int | None = None,
        on_record: Callable[[Record], None] | None = None,
    ) -> None:
        check_estimator(estimator)
        check_range("gamma", gamma, 0, 1)
        batch, horizon = check_count("batch", batch), check_count("horizon", horizon)
        check_share("batch", batch, batch)
        if not 0 <= defensive < 1:
            raise ValueError(f"defensive must lie in [0, 1), not {defensive!r}; 0 is off")
        if clip is not None and not clip >= 1:
            raise ValueError(f"clip must be at least 1, not {clip!r}; None is off")
        self.policy, self.batch, self.horizon, self.gamma = policy, batch, horizon, gamma
        self.estimator, self.clip, self.defensive = estimator, clip, defensive
        self._baseline = Baseline(baseline)
        self._old = self._defensive_share()
        width = math.ceil(batch / place()[1]) if num_envs is None else num_envs
        self._sampler = Sampler(open_environment(env, width), horizon)
        same_parameters(policy)
        self._parameters = [p for p in policy.parameters() if p.requires_grad]
        trainable = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("the policy has no parameter that requires a gradient")
        self._ascent = Ascent(trainable, optimizer, lr, lr_decay)
        self._reference = copy.deepcopy(policy)
        self._on_record = on_record
        self.recursion = self._make_recursion()
        self.direction: Gradients = []
        """g_t, what the last step went along."""
        self.seed = self.iteration = self.trajectories = self.env_steps = 0

    # What a method decides.

    @abstractmethod
    def _make_recursion(self) -> RecursiveEstimator:
        """The estimator that carries the past."""

    @abstractmethod
    def _plan(self) -> Plan:
        """What the next iteration samples: a function of iteration and seed only."""

    def _combine(self, present: Gradients, reference: Gradients | None) -> Gradients:
        """g_t from the gradients at the present policy and at the reference."""
        return self.recursion.update(present, reference)

    def _becomes_reference(self, plan: Plan) -> bool:
        """Whether the policy of this iteration is the reference of the next ones."""
        return True

    def _settings(self) -> dict[str, Any]:
        """What a state must agree on to be gone on from."""
        return {
            "method": self.name,
            "batch": self.batch,
            "horizon": self.horizon,
            "gamma": self.gamma,
            "estimator": self.estimator,
            "baseline": self._baseline.kind,
            "optimizer": self._ascent.rule,
            "clip": self.clip,
            "defensive": self.defensive,
        }

    # Training.

    def train(self, *, max_trajectories: int, seed: int | None = None) -> TrainResult:
        """Iterate while the next batch fits into the budget.

        Args:
            max_trajectories: budget since the start of the run, on all ranks. A second call with a
                larger one goes on.
            seed: of the run, 0 if None; a run that has begun keeps its own.

        Raises:
            ValueError: the budget does not hold the first batch, another seed than the run's, or
                what `Sampler.sample` raises.
        """
        if self.iteration == 0:
            self.seed = 0 if seed is None else seed
            if self.next_batch > max_trajectories:
                raise ValueError(
                    f"max_trajectories = {max_trajectories} does not hold the first batch of "
                    f"{self.next_batch}: raise it, or lower the batch"
                )
        elif seed not in (None, self.seed):
            raise ValueError(
                f"this run has seed {self.seed}, not {seed}: leave seed out to go on with it, or "
                "build the method anew"
            )
        records = []
        while self.trajectories + self.next_batch <= max_trajectories:
            records.append(self.step())
        return TrainResult(records, self.trajectories, self.env_steps)

    @property
    def next_batch(self) -> int:
        """Trajectories that the next iteration takes, on all ranks."""
        return self._plan().count

    def step(self) -> Record:
        """One iteration; returns its record.

        Raises:
            FloatingPointError: the run has diverged: an action, a weight or the gradient is not
                finite. The method is as it was at the beginning of the iteration.
        """
        start, plan = perf_counter(), self._plan()
        batch, own = together(lambda: self._sample(plan))
        olds = len(batch) - len(own)
        present, reference, figures = self._gradients(batch, plan, olds)
        past = copy.deepcopy(self.recursion.state_dict())
        # Copies, since the next step of the recursion works in place.
        direction = [g.clone() for g in self._combine(present, reference)]
        length = float(norm(direction))
        if not math.isfinite(length):
            self.recursion.load_state_dict(past)
            raise FloatingPointError(
                f"the gradient estimate of iteration {self.iteration + 1} is not finite; lower lr"
            )
        self.direction = direction
        self._baseline.advance()
        if self._becomes_reference(plan):
            self._reference.load_state_dict(self.policy.state_dict())
        lr = self._ascent.lr
        self._ascent.step(self.direction)
        steps, total, objective, counted = sum_over_ranks(
            [
                torch.tensor(float(batch.steps), dtype=torch.float64),
                own.rewards_NH.sum().cpu(),
                discounted(own.rewards_NH, self.gamma).sum().cpu(),
                torch.tensor(float(len(own)), dtype=torch.float64),
            ]
        )
        self.iteration += 1
        self.trajectories += plan.count
        self.env_steps += int(steps)
        record = {
            "iteration": self.iteration,
            "trajectories": self.trajectories,
            "env_steps": self.env_steps,
            "return_mean": float(total / counted),
            "objective": float(objective / counted),
            "gradient_norm": length,
            "lr": lr,
            **figures,
            "seconds": perf_counter() - start,
        }
        if self._on_record is not None:
            self._on_record(record)
        return record

    def _defensive_share(self) -> int:
        """Trajectories of a corrected batch that come from the reference policy."""
        if not self.defensive:
            return 0
        old = round(self.defensive * self.batch)
        least = 2 if self._baseline.kind == "loo" else 1
        if not least <= old <= self.batch - least:
            raise ValueError(
                f"defensive = {self.defensive} of a batch of {self.batch} is {old} trajectories: "
                f"raise the batch, or set defensive so that both policies get at least {least}"
                + (" (the baseline 'loo' leaves one out)" if least == 2 else "")
            )
        check_share("defensive", self.defensive, min(old, self.batch - old))
        return old

    def _sample(self, plan: Plan) -> tuple[Trajectories, Trajectories]:
        """This rank's trajectories, the reference's first, and the present policy's alone."""
        numbers = range(self.trajectories, self.trajectories + plan.count)
        old = self._old if plan.corrects else 0
        own = self._sampler.sample(self.policy, self.seed, share(numbers[old:]))
        if not old:
            return own, own
        olds = self._sampler.sample(self._reference, self.seed, share(numbers[:old]))
        return Trajectories.join([olds, own]), own

    def _gradients(
        self, batch: Trajectories, plan: Plan, olds: int
    ) -> tuple[Gradients, Gradients | None, Record]:
        """Mean estimates over all ranks' trajectories, at the present policy and the reference.

        The first `olds` of this rank are the reference's.
        """
        rewards = discounted(batch.rewards_NH, self.gamma)
        living = batch.alive_NH if self.estimator == "pgt" else torch.ones_like(batch.alive_NH)
        # One baseline for both gradients, or their difference would not cancel where they agree.
        sources = [slice(olds), slice(olds, None)] if olds else [slice(None)]
        baseline = self._baseline.values(baseline_signal(self.estimator, rewards), living, sources)

        def gradient(policy: nn.Module, logp: Tensor, weights: Tensor) -> Gradients:
            c = coefficients(self.estimator, rewards, baseline, weights)
            loss = surrogate(logp, c).sum() / plan.count
            trained = [p for p in policy.parameters() if p.requires_grad]
            return list(torch.autograd.grad(loss, trained, materialize_grads=True))

        logp = log_probabilities(self.policy, batch)
        if not plan.corrects:
            present = gradient(self.policy, logp, torch.ones_like(rewards))
            return sum_over_ranks(present), None, {"max_weight": 1.0, "ess": 1.0, "kl": 0.0}
        old = log_probabilities(self._reference, batch)
        old_share = self._old / plan.count if olds else 0.0
        behaviour = [(1 - old_share, logp)] + ([(old_share, old)] if olds else [])
        weights, here = together(
            lambda: [importance_weights(p, behaviour, clip=self.clip) for p in (old, logp)]
        )
        present = gradient(self.policy, logp, here)
        both = sum_over_ranks([*present, *gradient(self._reference, old, weights)])
        divergence = here[:, -1] * (logp - old).detach().sum(1)
        figures = self._weight_figures(log_weights(old, behaviour), divergence, plan)
        return both[: len(present)], both[len(present) :], figures

    @staticmethod
    def _weight_figures(logs_NH: Tensor, divergence_N: Tensor, plan: Plan) -> Record:
        """Of weights before they are clipped, which is where they tell how far the policies are."""
        weights_NH = logs_NH.clamp(max=_LARGEST_LOG).exp()
        last = weights_NH[:, -1]
        total, squares, kl = sum_over_ranks([last.sum(), last.square().sum(), divergence_N.sum()])
        return {
            "max_weight": max_over_ranks(float(weights_NH.max())),
            "ess": float(total**2 / squares.clamp(min=1e-300)) / plan.count,
            "kl": float(kl) / plan.count,
        }

    # Resuming.

    def state_dict(self) -> dict[str, Any]:
        """All that the next iteration depends on: tensors, numbers and strings.

        xi_t (policy), xi_{t-1} or the snapshot (reference), g_t (recursion), the optimizer, the
        baseline, and seed and counters, of which every random draw is a function.
        """
        return {
            "settings": self._settings(),
            "policy": self.policy.state_dict(),
            "reference": self._reference.state_dict(),
            "recursion": self.recursion.state_dict(),
            "optimizer": self._ascent.state_dict(),
            "baseline": self._baseline.state_dict(),
            "counters": {
                name: getattr(self, name)
                for name in ("seed", "iteration", "trajectories", "env_steps")
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, exactly.

        Raises:
            ValueError: the state is of another method or other settings.
        """
        check_settings(self._settings(), state["settings"])
        self.policy.load_state_dict(state["policy"])
        self._reference.load_state_dict(state["reference"])
        self.recursion.load_state_dict(state["recursion"])
        self._ascent.load_state_dict(state["optimizer"])
        self._baseline.load_state_dict(state["baseline"])
        for name, value in state["counters"].items():
            setattr(self, name, value)
