"""Recipes that cannot work are refused before anything runs, with the allowed values."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sparring.alignment.config import Recipe, TrainConfig
from sparring.launch.config import build, plain, resolved
from sparring.launch.errors import UsageError


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "devices", 0, "model.devices must be positive, not 0"),
        ("prompts", "train", 0, "takes every prompt; then prompts.heldout must be 0"),
        ("prompts", "heldout", 0, "prompts.heldout must be positive, not 0"),
        ("prompts", "train", 2, "leaves some of the 3 iterations without a prompt; raise it"),
        ("generate", "k", 0, "generate.k must be positive, not 0"),
        ("generate", "max_batch", 0, "generate.max_batch must be positive, not 0"),
        ("generate", "top_p", 1.5, "generate.top_p is a probability above 0, not 1.5"),
        ("generate", "temperature", -1.0, "generate.temperature must not be negative, not -1.0"),
        ("generate", "engine", "magic", "'vllm' or 'transformers' (got 'magic')"),
        ("judge", "chunk", 0, "judge.chunk must be positive, not 0"),
        ("pair", "min_margin", 1.0, "pair.min_margin is from 0 to below 1, not 1.0"),
        ("train", "lr", -1.0, "train.lr must be positive, not -1.0"),
        ("train", "beta", [0.1, 0.0], "train.beta must be positive, not 0.0"),
        ("train", "warmup", 1.0, "train.warmup is a share from 0 to below 1, not 1.0"),
        ("train", "zero", 4, "train.zero is a ZeRO stage 0 to 3, or -1, not 4"),
        ("train", "offload", True, "train.offload needs train.zero 2 or 3"),
        ("evaluate", "level", 95, "evaluate.level is a probability, not 95"),
        ("launch", "processes", 0, "launch.processes must be at least 1, not 0"),
    ],
)
def test_refused_values(section: str, key: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(Recipe, {"name": "r", section: {key: value}}, "r.toml")
    assert message in str(caught.value)


def test_fewer_prompts_than_iterations_are_fine_when_all_see_all() -> None:
    prompts = {"train": 2, "fresh": False}
    assert build(Recipe, {"name": "r", "prompts": prompts}, "r.toml").iterations == 3


@pytest.mark.parametrize(
    ("algorithm", "rule", "message"),
    [
        ("sppo", "best-wors", "unknown pair rule 'best-wors'; did you mean 'best-worst'?"),
        ("sppo", "real-generated", "does not fit sppo, which uses 'best-worst'"),
        ("spin", "all", "does not fit spin, which uses 'real-generated'"),
        ("dpo", "all", "which dpo does not read; use 'best-worst' or 'random-pair'"),
    ],
)
def test_refused_pair_rules(algorithm: str, rule: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(Recipe, {"name": "r", "algorithm": algorithm, "pair": {"rule": rule}}, "r.toml")
    assert message in str(caught.value)


@pytest.mark.parametrize("rule", ["all", "random-pair", "shuffled", "my_rules:mine"])
def test_accepted_pair_rules(rule: str) -> None:
    recipe = build(Recipe, {"name": "r", "algorithm": "sppo", "pair": {"rule": rule}}, "r.toml")
    assert recipe.pair.rule == rule


def test_an_unknown_algorithm_has_a_nearest_one() -> None:
    with pytest.raises(UsageError, match="unknown algorithm 'spin2'; did you mean 'spin'"):
        build(Recipe, {"name": "r", "algorithm": "spin2"}, "r.toml")


def test_a_value_written_out_is_the_default() -> None:
    """1 and 1.0 are equal, but not as JSON, from which content keys are made."""
    recipe = Recipe(name="r")
    again = build(Recipe, plain(recipe), "again")
    assert json.dumps(plain(again)) == json.dumps(plain(recipe))


def test_resolved_takes_the_iterations_values() -> None:
    train = TrainConfig(beta=(0.1, 0.5), lr=1e-5)
    assert [resolved(train, t) for t in range(3)] == [
        TrainConfig(beta=0.1, lr=1e-5),
        TrainConfig(beta=0.5, lr=1e-5),
        TrainConfig(beta=0.5, lr=1e-5),
    ]
