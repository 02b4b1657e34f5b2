"""Stage `learn`: train one policy by one method, with a checkpoint to go on from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparring.launch.collective import one_thread, process_group
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.metrics import MetricsFile, read_metrics
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures
from sparring.rl.config import LearnConfig
from sparring.rl.environments import open_environment
from sparring.rl.method import PolicyGradient
from sparring.rl.policies import CategoricalPolicy, GaussianPolicy, policy_for
from sparring.rl.policy_files import write_policy
from sparring.rl.ranks import max_over_ranks
from sparring.rl.relatives import GPOMDP, PAGEPG, SRVRPG, SVRPG
from sparring.rl.states import save_state
from sparring.rl.storm import StormPG

_KINDS: dict[str, type[PolicyGradient]] = {
    kind.name: kind for kind in (GPOMDP, SVRPG, SRVRPG, PAGEPG, StormPG)
}
_OPTIONAL = ("init_batch", "alpha", "restart", "period", "probability")
_SIDE_BY_SIDE = 64  # environments on a rank at most; changes no trajectory
_SAVE_EVERY = 1.0  # seconds between checkpoints, which cost milliseconds
_CHECKPOINT = "state.pt"


def run(config: LearnConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Write metrics.jsonl, a row an iteration, and policy.safetensors."""
    with one_thread(), process_group(context.world):
        try:
            method = build(config, context.seed, context.world.size)
            return _train(method, config, output, context)
        except ValueError as error:
            # What the library raises for arguments and environments that it cannot use.
            raise SparringError(str(error)) from error


def build(config: LearnConfig, seed: int, ranks: int = 1) -> PolicyGradient:
    """The method with a fresh policy, whose weights depend on the seed alone.

    Raises:
        ValueError: settings that do not fit together or to the environment.
        SparringError: no such environment, or it needs a package that is not here.
    """
    asked = config.method
    width = -(-max(asked.batch, asked.first_batch) // ranks)
    environment = open_environment(config.environment.id, min(width, _SIDE_BY_SIDE))
    settings: dict[str, Any] = {"hidden": config.policy.hidden}
    if not hasattr(environment.single_action_space, "n"):
        settings |= {"sigma": config.policy.sigma, "learn_sigma": config.policy.learn_sigma}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "policy"))
        policy = policy_for(environment, **settings)
    own = {name: getattr(asked, name) for name in _OPTIONAL}
    method = _KINDS[asked.method](
        policy,
        environment,
        batch=asked.batch,
        horizon=config.environment.horizon,
        gamma=config.environment.gamma,
        lr=asked.lr,
        lr_decay=asked.lr_decay,
        estimator=asked.estimator,
        baseline=asked.baseline,
        optimizer=asked.optimizer,
        clip=asked.clip,
        defensive=asked.defensive,
        **{name: value for name, value in own.items() if value is not None},
    )
    method.seed = seed
    return method


def _train(method: PolicyGradient, config: LearnConfig, output: Path, context: Context) -> Figures:
    first = context.world.rank == 0
    checkpoint = context.work / _CHECKPOINT
    if checkpoint.exists():
        method.load_state_dict(torch.load(checkpoint, weights_only=True))
        if first:
            context.emit(note=f"going on from iteration {method.iteration}")
    metrics = output / "metrics.jsonl"
    rows = MetricsFile(metrics, start=method.iteration + 1, counter="iteration") if first else None
    diverged, saved = "", time.monotonic()
    while method.trajectories + method.next_batch <= config.trajectories:
        # All ranks stop at the same iteration, or the others would wait for one that is gone.
        if max_over_ranks(float(context.stopped())):
            if first:
                save_state(checkpoint, method.state_dict())
            raise Stopped("stopped; run the same command again to go on")
        try:
            record = method.step()
        except FloatingPointError as error:
            diverged = f"after {method.trajectories} trajectories: {error}"
            break
        if rows is None:
            continue
        # Seconds would make the bytes of two equal runs differ; the manifest has them.
        rows.write(**{name: value for name, value in record.items() if name != "seconds"})
        context.emit(done=method.trajectories, total=config.trajectories, unit="trajectories")
        if time.monotonic() - saved > _SAVE_EVERY:
            save_state(checkpoint, method.state_dict())
            saved = time.monotonic()
    if not first:
        return {}
    if diverged:
        context.emit(note=f"diverged {diverged}")
    assert isinstance(method.policy, CategoricalPolicy | GaussianPolicy)
    write_policy(output / "policy.safetensors", method.policy)
    return _figures(metrics, diverged)


def _figures(metrics: Path, diverged: str) -> Figures:
    records = read_metrics(metrics)
    if not records:
        raise SparringError(f"the first iteration diverged {diverged}")
    last = records[-1]
    return {
        "return_mean": last["return_mean"],
        "trajectories": last["trajectories"],
        "env_steps": last["env_steps"],
        "max_weight": max(record["max_weight"] for record in records),
        "diverged": diverged,
    }
