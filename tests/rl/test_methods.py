"""The methods: what they reduce to, their stationary error, resuming, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_process import (
    GAMMA,
    HORIZON,
    chances,
    enumerate_all,
    estimates,
    mean_and_variance,
    process,
    softmax,
)
from torch import Tensor, nn

from sparring.rl import (
    GPOMDP,
    PAGEPG,
    SRVRPG,
    SVRPG,
    CategoricalPolicy,
    GaussianPolicy,
    PolicyGradient,
    StormPG,
)

SETTINGS: dict[str, Any] = {"batch": 4, "horizon": HORIZON, "gamma": GAMMA, "lr": 0.05}


def build(kind: type[PolicyGradient], seed: int = 0, **changes: Any) -> PolicyGradient:
    settings = {**SETTINGS, **changes}
    width = max(settings["batch"], settings.get("init_batch", 1))
    return kind(softmax(seed), process(int(width)), **settings)


def table(method: PolicyGradient) -> Tensor:
    return next(method.policy.parameters()).detach().clone()


def follow(method: PolicyGradient, iterations: int) -> list[Tensor]:
    """The parameters after each iteration."""
    found = []
    for _ in range(iterations):
        method.step()
        found.append(table(method))
    return found


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "normalised", "mars"])
def test_special_cases_are_equal_bit_for_bit(optimizer: str) -> None:
    """Oracle 5."""
    common = {"optimizer": optimizer}
    plain = follow(build(GPOMDP, **common), 6)
    assert same(plain, follow(build(StormPG, alpha=1.0, init_batch=4, **common), 6))
    pages = {"init_batch": 4, **common}
    assert same(plain, follow(build(PAGEPG, probability=1.0, **pages), 6))
    assert same(plain, follow(build(SRVRPG, period=1, **pages), 6))
    sarah = follow(build(SRVRPG, init_batch=8, period=3, **common), 8)
    assert same(sarah, follow(build(StormPG, alpha=0.0, init_batch=8, restart=3, **common), 8))
    assert not same(plain, sarah[:6])
    never = follow(build(PAGEPG, probability=0.0, **pages), 5)
    assert same(never, follow(build(StormPG, alpha=0.0, init_batch=4, **common), 5))
    # The snapshot is the policy before only one iteration after it was taken.
    snapshot = follow(build(SVRPG, init_batch=8, period=3, **common), 8)
    assert same(sarah[:2], snapshot[:2])
    assert not torch.equal(sarah[2], snapshot[2])


def test_policies_that_do_not_move_make_an_average_of_batches() -> None:
    """Weights are then 1, both gradients equal, and g the exponential average."""
    still = {"optimizer": "sgd", "lr": 1e-300}
    plain, method = build(GPOMDP, **still), build(StormPG, alpha=0.3, init_batch=4, **still)
    average = None
    for _ in range(6):
        plain.step()
        record = method.step()
        assert (record["max_weight"], record["ess"], record["kl"]) == (1, 1, 0)
        new = plain.direction[0]
        average = new if average is None else 0.7 * average + 0.3 * new
        torch.testing.assert_close(method.direction[0], average, rtol=0, atol=1e-12)


def error_over_prediction(alpha: float, seeds: int) -> float:
    """Mean |g - grad J|^2 of small steps over alpha / (2 - alpha) sigma^2 / B, by enumeration."""
    everything, found, predicted = enumerate_all(), [], []
    for seed in range(seeds):
        method = build(StormPG, alpha=alpha, init_batch=20, batch=2, baseline="none",
                       optimizer="sgd", lr=3e-4)  # fmt: skip
        method.seed = seed
        for number in range(round(250 / alpha)):
            if number % 25 == 0:  # the policy hardly moves in between
                policy = method.policy
                rows = estimates(everything, policy, [(1.0, policy)])
                true, sigma2 = mean_and_variance(chances(everything, policy).detach(), rows)
            method.step()
            if number > 10 / alpha:  # the first batch is another
                found.append(float((method.direction[0] - true).square().sum()))
                predicted.append(alpha / (2 - alpha) * sigma2 / 2)
    return float(np.mean(found) / np.mean(predicted))


def test_stationary_error() -> None:
    """Oracle 4."""
    assert error_over_prediction(0.6, 2) == pytest.approx(1, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("alpha", "seeds"), [(0.3, 2), (0.1, 4), (0.03, 4)])
def test_stationary_error_of_small_alpha(alpha: float, seeds: int) -> None:
    assert error_over_prediction(alpha, seeds) == pytest.approx(1, rel=0.15)


KINDS = [
    (GPOMDP, {}),
    (StormPG, {"alpha": 0.3, "init_batch": 6}),
    (SVRPG, {"init_batch": 6, "period": 3}),
    (SRVRPG, {"init_batch": 6, "period": 3}),
    (PAGEPG, {"init_batch": 6, "probability": 0.4}),
]


@pytest.mark.parametrize(("kind", "extra"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
@pytest.mark.parametrize("optimizer", ["adam", "mars"])
def test_resuming_is_exact(kind: Any, extra: Any, optimizer: str, tmp_path: Path) -> None:
    common = {"baseline": "running", "optimizer": optimizer, "lr_decay": 0.9, **extra}
    through = build(kind, **common)
    result = through.train(max_trajectories=60, seed=7)
    broken = build(kind, **common)
    broken.train(max_trajectories=25, seed=7)
    torch.save(broken.state_dict(), tmp_path / "state.pt")
    resumed = build(kind, seed=9, **common)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    rest = resumed.train(max_trajectories=60)
    assert torch.equal(table(resumed), table(through))
    assert torch.equal(resumed.direction[0], through.direction[0])
    assert (rest.trajectories, rest.env_steps) == (result.trajectories, result.env_steps)
    same_columns = set(result.records[0]) - {"seconds"}
    tail = result.records[-len(rest.records) :]
    assert [{k: r[k] for k in same_columns} for r in tail] == [
        {k: r[k] for k in same_columns} for r in rest.records
    ]


def broken_once(method: PolicyGradient, monkeypatch: pytest.MonkeyPatch) -> None:
    """One iteration whose gradients are infinite."""
    good = method._gradients

    def infinite(*arguments: Any) -> Any:
        present, reference, figures = good(*arguments)
        bad = [[torch.full_like(g, torch.inf) for g in gs or []] for gs in (present, reference)]
        return bad[0], bad[1] or None, figures

    with monkeypatch.context() as patch:
        patch.setattr(method, "_gradients", infinite)
        with pytest.raises(FloatingPointError, match="not finite; lower lr"):
            method.step()


@pytest.mark.parametrize(("kind", "extra"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
def test_a_step_that_diverges_changes_nothing(
    kind: Any, extra: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recursion and the running baseline are then as before, also where an anchor was due."""
    through, retried = (build(kind, baseline="running", **extra) for _ in range(2))
    for _ in range(5):
        broken_once(retried, monkeypatch)
        direction = [g.clone() for g in retried.direction]
        assert all(torch.isfinite(g).all() for g in direction)
        first, second = through.step(), retried.step()
        assert torch.equal(table(through), table(retried))
        assert {**first, "seconds": 0} == {**second, "seconds": 0}


def test_numpys_whole_numbers_are_whole_numbers(tmp_path: Path) -> None:
    method = build(StormPG, batch=np.int64(4), init_batch=np.int64(6), alpha=0.5,
                   horizon=np.int32(3))  # fmt: skip
    method.step()
    assert method.next_batch == 4
    torch.save(method.state_dict(), tmp_path / "state.pt")
    build(StormPG, batch=4, init_batch=6, alpha=0.5, horizon=3).load_state_dict(
        torch.load(tmp_path / "state.pt", weights_only=True)
    )
    with pytest.raises(ValueError, match="batch must be a whole number from 1 on, not True"):
        build(GPOMDP, batch=True)


def test_costs_and_records() -> None:
    seen = []
    method = build(StormPG, alpha=0.3, init_batch=10, on_record=seen.append)
    result = method.train(max_trajectories=31, seed=1)
    assert result.column("trajectories").tolist() == [10, 14, 18, 22, 26, 30]
    assert result.trajectories == 30  # another batch of 4 would not fit
    assert 30 <= result.env_steps <= 30 * HORIZON
    assert seen == result.records
    assert result.column("max_weight").max() > 1
    assert ((result.column("ess") > 0) & (result.column("ess") <= 1)).all()
    assert method.train(max_trajectories=34).trajectories == 34
    with pytest.raises(ValueError, match="this run has seed 1, not 2"):
        method.train(max_trajectories=50, seed=2)
    other = build(StormPG, alpha=0.3, init_batch=10)
    other.train(max_trajectories=31, seed=2)
    assert not torch.equal(table(other), table(method))


def test_a_defensive_batch_bounds_weights() -> None:
    rough = {"alpha": 0.2, "init_batch": 8, "batch": 8, "lr": 2.0}
    free = build(StormPG, **rough).train(max_trajectories=200, seed=0)
    bound = build(StormPG, defensive=0.25, **rough).train(max_trajectories=200, seed=0)
    assert free.column("max_weight").max() > 4
    assert 1 < bound.column("max_weight").max() <= 4
    clipped = build(StormPG, clip=1.5, **rough).train(max_trajectories=200, seed=0)
    assert clipped.column("max_weight").max() > 1.5  # as they were before
    with pytest.raises(ValueError, match=r"defensive = 0.01 of a batch of 8 is 0 trajectories"):
        build(StormPG, defensive=0.01, **rough)
    with pytest.raises(ValueError, match=r"at least 2 \(the baseline 'loo' leaves one out\)"):
        build(StormPG, defensive=0.125, **rough)
    build(StormPG, defensive=0.125, baseline="none", **rough)


@pytest.mark.parametrize(("kind", "extra"), KINDS, ids=[kind.__name__ for kind, _ in KINDS])
@pytest.mark.parametrize("estimator", ["gpomdp", "pgt", "reinforce"])
def test_every_method_improves_the_policy(kind: Any, extra: Any, estimator: str) -> None:
    method = build(kind, estimator=estimator, batch=8, lr=0.1, **extra)
    exact = process().objective
    before = float(exact(method.policy, horizon=HORIZON, gamma=GAMMA).detach())
    method.train(max_trajectories=300, seed=0)
    after = float(exact(method.policy, horizon=HORIZON, gamma=GAMMA).detach())
    assert after > before + 0.5


class Beta(nn.Module):
    """A policy of another kind: no noise of the library's fits it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def distribution(self, observations: Tensor) -> torch.distributions.Distribution:
        a, b = (1 + nn.functional.softplus(self.layer(observations))).unbind(-1)
        one = torch.distributions.Beta(a[:, None], b[:, None])
        return torch.distributions.Independent(one, 1)


def test_any_module_with_a_distribution() -> None:
    torch.manual_seed(0)
    method = StormPG(Beta(), "sparring/ContinuousCartPole-v0", alpha=0.5, init_batch=4,
                     batch=2, horizon=20, lr=0.01)  # fmt: skip
    state = torch.random.get_rng_state()
    first = method.train(max_trajectories=10, seed=0).records[-1]["objective"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert first > 0


REFUSED = [
    (StormPG, {"alpha": 1.5, "init_batch": 4}, r"alpha must lie in \[0, 1\], not 1.5"),
    (StormPG, {"alpha": float("nan"), "init_batch": 4}, "alpha must lie"),
    (StormPG, {"alpha": 0.5, "init_batch": 0}, "init_batch must be a whole number from 1"),
    (StormPG, {"alpha": 0.5, "init_batch": 4, "restart": 0}, "restart must be a whole"),
    (GPOMDP, {"horizon": 0}, "horizon must be a whole number from 1 on, not 0"),
    (GPOMDP, {"batch": 2.5}, "batch must be a whole number"),
    (GPOMDP, {"gamma": 1.01}, r"gamma must lie in \[0, 1\]"),
    (GPOMDP, {"lr": 0.0}, "lr must be above 0"),
    (GPOMDP, {"lr_decay": 0.0}, "lr_decay must lie"),
    (GPOMDP, {"optimizer": "lbfgs"}, "optimizer must be one of"),
    (GPOMDP, {"estimator": "sarsa"}, "estimator must be one of"),
    (GPOMDP, {"baseline": "value"}, "baseline must be one of"),
    (GPOMDP, {"clip": 0.9}, "clip must be at least 1"),
    (GPOMDP, {"defensive": 1.0}, r"defensive must lie in \[0, 1\)"),
    (SRVRPG, {"init_batch": 4, "period": 0}, "period must be a whole"),
    (PAGEPG, {"init_batch": 4, "probability": -0.1}, "probability must lie"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REFUSED)
def test_wrong_settings_are_refused(kind: Any, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(kind, **{"batch": 4, **changes})


def test_wrong_states_and_budgets_are_refused() -> None:
    state = build(StormPG, alpha=0.3, init_batch=4).state_dict()
    with pytest.raises(ValueError, match=r"alpha = 0.3, here 0.5"):
        build(StormPG, alpha=0.5, init_batch=4).load_state_dict(state)
    with pytest.raises(ValueError, match=r"method = 'storm-pg', here 'gpomdp'"):
        build(GPOMDP).load_state_dict(state)
    with pytest.raises(ValueError, match="does not hold the first batch of 40"):
        build(StormPG, alpha=0.5, init_batch=40).train(max_trajectories=30)
    with pytest.raises(ValueError, match="at least 2 trajectories"):
        build(GPOMDP, batch=1).step()
    frozen = softmax(0).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        GPOMDP(frozen, process(4), **SETTINGS)
    with pytest.raises(ValueError, match="sigma must be above 0"):
        GaussianPolicy(2, 1, sigma=0.0)
    with pytest.raises(ValueError, match=r"policy emits .* the environment takes Box"):
        GPOMDP(CategoricalPolicy(4, 2), "sparring/ContinuousCartPole-v0", **SETTINGS).step()
