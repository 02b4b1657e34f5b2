"""The chain of steps that a recipe becomes, for each algorithm. Nothing is run here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sparring.alignment.algorithms import algorithms
from sparring.alignment.config import (
    EvaluateConfig,
    GenerateConfig,
    MomentumConfig,
    PairConfig,
    PromptsConfig,
    Recipe,
    TrainConfig,
)
from sparring.alignment.pipeline import build_steps
from sparring.launch.stages import Step


def chain(algorithm: str = "sppo", **settings: Any) -> dict[str, Step]:
    steps = build_steps(Recipe(name="r", algorithm=algorithm, **settings))
    return {step.name: step for step in steps}


def sources(steps: dict[str, Step], name: str) -> dict[str, str]:
    return dict(steps[name].inputs)


def of_kind(steps: dict[str, Step], kind: str) -> list[str]:
    return [name for name in steps if name.split("/")[-1] == kind]


ALL = sorted(algorithms())


@pytest.mark.parametrize("algorithm", ALL)
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_every_step_comes_after_its_inputs(algorithm: str, alpha: float) -> None:
    seen: set[str] = set()
    for name, step in chain(algorithm, momentum=MomentumConfig(alpha=alpha)).items():
        assert set(step.inputs.values()) <= seen
        allowed = {key.rstrip("?*") for key in step.stage.inputs}
        required = {key for key in step.stage.inputs if key[-1] not in "?*"}
        given = {key.partition(".")[0] for key in step.inputs}
        assert required <= given <= allowed
        assert name not in seen
        seen.add(name)


def test_sppo() -> None:
    steps = chain(iterations=2)
    one = ["generate", "parity", "judge", "pair", "reference", "train"]
    assert list(steps) == [
        "prompts",
        "model",
        "heldout0/generate",
        "heldout0/evaluate",
        *(f"iter0/{kind}" for kind in one),
        "heldout1/generate",
        "heldout1/evaluate",
        *(f"iter1/{kind}" for kind in one),
        "heldout2/generate",
        "heldout2/evaluate",
    ]
    for t, policy in enumerate(["model", "iter0/train"]):
        now = f"iter{t}"
        assert sources(steps, f"{now}/generate") == {"model": policy, "prompts": "prompts"}
        assert sources(steps, f"{now}/judge") == {
            "prompts": "prompts",
            "responses": f"{now}/generate",
        }
        assert sources(steps, f"{now}/pair") == {
            "prompts": "prompts",
            "responses": f"{now}/generate",
            "judged": f"{now}/judge",
        }
        assert sources(steps, f"{now}/reference") == {"model": policy, "pairs": f"{now}/pair"}
        assert sources(steps, f"{now}/train") == {"model": policy, "pairs": f"{now}/reference"}
    assert steps["iter1/pair"].config.rule == "best-worst"
    assert steps["iter1/generate"].config.k == 5


def test_each_iteration_has_its_own_prompts_or_all_of_them() -> None:
    def shares(steps: dict[str, Step]) -> list[tuple[int, int]]:
        return [(s.config.start, s.config.count) for n, s in steps.items() if n[:4] == "iter"
                and s.stage.name == "generate"]  # fmt: skip

    assert shares(chain(iterations=3, prompts=PromptsConfig(train=30))) == [
        (0, 10),
        (10, 10),
        (20, 10),
    ]
    whole = chain(iterations=2, prompts=PromptsConfig(train=30, fresh=False))
    assert shares(whole) == [(0, 0), (0, 0)]


def test_all_stages_write_prompts_alike() -> None:
    options = {"enable_thinking": False}
    steps = chain(generate=GenerateConfig(template_options=options))
    writers = [step for step in steps.values() if hasattr(step.config, "template_options")]
    kinds = {step.stage.name for step in writers}
    assert kinds == {"generate", "parity", "pair", "evaluate"}
    assert all(step.config.template_options == options for step in writers)


def test_spin() -> None:
    steps = chain("spin", iterations=3, prompts=PromptsConfig(fresh=False))
    assert not of_kind(steps, "judge")
    policies = ["model", "iter0/train", "iter1/train"]
    for t, policy in enumerate(policies):
        pair = sources(steps, f"iter{t}/pair")
        # D_t ∪ D_{t-1}, and D_0 alone: the pair stage mixes the previous one's fresh pairs.
        assert pair.pop("previous", None) == (f"iter{t - 1}/pair" if t else None)
        assert pair == {
            "prompts": "prompts",
            "responses": f"iter{t}/generate",
            "model": policy,
        }
        # All pairs, also the older ones, are referenced to the current policy.
        assert sources(steps, f"iter{t}/reference") == {"model": policy, "pairs": f"iter{t}/pair"}
        assert sources(steps, f"iter{t}/train") == {
            "model": policy,
            "pairs": f"iter{t}/reference",
        }
        assert steps[f"iter{t}/pair"].config.rule == "real-generated"
        assert steps[f"iter{t}/generate"].config.k == 1
        assert steps[f"iter{t}/train"].config.algorithm == "spin"
    assert not steps["heldout1/evaluate"].config.use_judge


@pytest.mark.parametrize(
    ("algorithm", "mix", "mixed"),
    [("spin", None, True), ("spin", False, False), ("sppo", None, False), ("sppo", True, True)],
)
def test_mixing_may_be_chosen(algorithm: str, mix: bool | None, mixed: bool) -> None:
    steps = chain(algorithm, iterations=2, pair=PairConfig(mix_previous=mix))
    assert ("previous" in steps["iter1/pair"].inputs) == mixed
    assert "previous" not in steps["iter0/pair"].inputs


def test_apo_on_weights() -> None:
    steps = chain("dpo", iterations=3, momentum=MomentumConfig(alpha=0.3))
    # π_1 and π_2 are made; π̂_3 is the result, so it is not extrapolated.
    assert of_kind(steps, "extrapolate") == ["iter0/extrapolate", "iter1/extrapolate"]
    assert sources(steps, "iter0/extrapolate") == {"new": "iter0/train", "old": "model"}
    # Both factors are solutions; the extrapolated policy is none of them.
    assert sources(steps, "iter1/extrapolate") == {"new": "iter1/train", "old": "iter0/train"}
    for t, policy in enumerate(["model", "iter0/extrapolate", "iter1/extrapolate"]):
        assert steps[f"iter{t}/generate"].inputs["model"] == policy
        assert steps[f"iter{t}/reference"].inputs["model"] == policy
        assert steps[f"iter{t}/train"].inputs["model"] == policy
        assert steps[f"iter{t}/reference"].config.alpha == 0


def test_the_solution_is_evaluated_and_is_the_result() -> None:
    steps = chain("dpo", iterations=2, momentum=MomentumConfig(alpha=0.3))
    for t, solution in enumerate(["model", "iter0/train", "iter1/train"]):
        assert steps[f"heldout{t}/generate"].inputs["model"] == solution
        assert steps[f"heldout{t}/evaluate"].inputs["model"] == solution
    assert list(steps)[-1] == "heldout2/evaluate"


def test_training_may_start_from_the_solution() -> None:
    momentum = MomentumConfig(alpha=0.3, start="solution")
    steps = chain("dpo", iterations=2, momentum=momentum)
    assert steps["iter1/train"].inputs["model"] == "iter0/train"
    assert steps["iter1/reference"].inputs["model"] == "iter0/extrapolate"


@pytest.mark.parametrize("algorithm", ["sppo", "dpo", "spin"])
@pytest.mark.parametrize("momentum", [{}, {"realised": "reference"}, {"start": "solution"}])
def test_no_momentum_is_the_method_itself(algorithm: str, momentum: dict[str, Any]) -> None:
    """The same steps with the same configurations, inputs and seeds: the same content keys."""
    plain = chain(algorithm)
    assert chain(algorithm, momentum=MomentumConfig(alpha=0.0, **momentum)) == plain
    assert chain(algorithm, momentum=MomentumConfig(alpha=(0.0, 0.0), **momentum)) == plain


def test_apo_folded_into_the_reference() -> None:
    momentum = MomentumConfig(alpha=0.3, realised="reference")
    steps = chain("dpo", iterations=3, momentum=momentum)
    assert not of_kind(steps, "extrapolate")
    # π_0 = π̂_0 has no momentum yet; from then on the last two solutions are folded.
    assert sources(steps, "iter0/reference") == {"model": "model", "pairs": "iter0/pair"}
    assert steps["iter0/reference"].config.alpha == 0
    for t, (new, old) in enumerate([("iter0/train", "model"), ("iter1/train", "iter0/train")], 1):
        assert sources(steps, f"iter{t}/reference") == {
            "model": new,
            "previous": old,
            "pairs": f"iter{t}/pair",
        }
        assert steps[f"iter{t}/reference"].config.alpha == 0.3
        assert steps[f"iter{t}/generate"].inputs["model"] == new
        assert steps[f"iter{t}/train"].inputs["model"] == new


@pytest.mark.parametrize("algorithm", ALL)
def test_folding_is_refused_where_it_is_not_exact(algorithm: str) -> None:
    momentum = MomentumConfig(alpha=0.3, realised="reference")
    if algorithms()[algorithm].folds:
        Recipe(name="r", algorithm=algorithm, momentum=momentum)
    else:
        with pytest.raises(ValueError, match=r"is not exact for .*; use 'weights'"):
            Recipe(name="r", algorithm=algorithm, momentum=momentum)


def test_sft() -> None:
    steps = chain("sft", iterations=2)
    assert steps["iter1/train"].config.algorithm == "sft"
    assert not of_kind(steps, "judge")
    assert "previous" not in steps["iter1/pair"].inputs


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(0.5, [0.5, 0.5, 0.5, 0.5]), ((0.1, 0.1, 5.0), [0.1, 0.1, 5.0, 5.0])],
)
def test_schedules_are_resolved_for_each_iteration(
    schedule: float | Sequence[float], expected: list[float]
) -> None:
    train = TrainConfig(beta=schedule, lr=schedule, epochs=schedule)  # type: ignore[arg-type]
    steps = chain("spin", iterations=4, train=train)
    for name in ("beta", "lr", "epochs"):
        values = [getattr(steps[f"iter{t}/train"].config, name) for t in range(4)]
        assert values == expected


def test_momentum_has_a_schedule_too() -> None:
    weights = chain("dpo", iterations=4, momentum=MomentumConfig(alpha=(0.1, 0.0, 0.3)))
    assert {n: weights[n].config.alpha for n in of_kind(weights, "extrapolate")} == {
        "iter0/extrapolate": 0.1,
        "iter2/extrapolate": 0.3,
    }
    assert weights["iter2/generate"].inputs["model"] == "iter1/train"
    momentum = MomentumConfig(alpha=(0.1, 0.0, 0.3), realised="reference")
    folded = chain("dpo", iterations=4, momentum=momentum)
    # The k-th solve's momentum acts on the reference of the iteration after it, as with weights.
    alphas = [folded[f"iter{t}/reference"].config.alpha for t in range(4)]
    assert alphas == [0.0, 0.1, 0.0, 0.3]


def test_evaluation_compares_with_start_and_previous() -> None:
    steps = chain(iterations=2, evaluate=EvaluateConfig(k=3, temperature=0.5))
    compared = [
        {k: v for k, v in sources(steps, f"heldout{t}/evaluate").items() if k != "prompts"}
        for t in range(3)
    ]
    assert compared == [
        {"current": "heldout0/generate", "model": "model"},
        {
            "current": "heldout1/generate",
            "base": "heldout0/generate",
            "model": "iter0/train",
            "base_model": "model",
        },
        {
            "current": "heldout2/generate",
            "base": "heldout0/generate",
            "previous": "heldout1/generate",
            "model": "iter1/train",
            "base_model": "model",
        },
    ]
    sampling = steps["heldout1/generate"].config
    assert (sampling.part, sampling.k, sampling.temperature, sampling.top_p) == (
        "heldout",
        3,
        0.5,
        1.0,
    )


def test_the_last_evaluation_meets_every_iterate_once() -> None:
    steps = chain(iterations=4)
    met = {
        t: {k: v for k, v in sources(steps, f"heldout{t}/evaluate").items() if "generate" in v}
        for t in range(5)
    }
    assert met[4] == {
        "current": "heldout4/generate",
        "base": "heldout0/generate",
        "against.0": "heldout1/generate",
        "against.1": "heldout2/generate",
        "previous": "heldout3/generate",
    }
    assert not [key for t in range(4) for key in met[t] if key.startswith("against")]
    # No judge, no game.
    assert "against.0" not in sources(chain("spin", iterations=4), "heldout4/evaluate")


def test_leaderboards_are_of_the_first_and_the_last_policy() -> None:
    board = EvaluateConfig(lm_eval=("arc_easy",), lm_eval_path="tasks", lm_eval_limit=5)
    steps = chain(iterations=2, evaluate=board)
    found = [steps[f"heldout{t}/evaluate"] for t in range(3)]
    assert [step.config.lm_eval for step in found] == [("arc_easy",), (), ("arc_easy",)]
    assert [step.inputs.get("lm_eval_path") for step in found] == ["path:tasks", None, "path:tasks"]
    assert found[2].config.lm_eval_limit == 5


@pytest.mark.parametrize(("temperature", "after"), [(1.0, True), (0.5, False)])
def test_the_kl_is_estimated_where_samples_allow_it(temperature: float, after: bool) -> None:
    """From the second policy on, and from samples of the policy itself."""
    steps = chain(iterations=2, evaluate=EvaluateConfig(temperature=temperature))
    found = [steps[f"heldout{t}/evaluate"].config.kl for t in range(3)]
    assert found == [False, after, after]


def test_the_slices_of_a_recipe_decide_what_stays_valid() -> None:
    """Another learning rate leaves all but training alone; another temperature, the judge's."""

    def same(one: dict[str, Step], two: dict[str, Step]) -> set[str]:
        return {step.stage.name for name, step in one.items() if two[name] == step}

    base = chain()
    everything = {step.stage.name for step in base.values()}
    assert same(base, chain(train=TrainConfig(lr=1e-5))) == everything - {"train"}
    hotter = chain(generate=GenerateConfig(temperature=0.7))
    held = {n for n in base if n.startswith("heldout") or n in ("prompts", "model")}
    assert all(hotter[n].config == base[n].config for n in held)
    assert hotter["iter0/generate"].config != base["iter0/generate"].config
    assert same(base, chain(pair=PairConfig(rule="shuffled"))) == everything - {"pair"}


def test_every_step_draws_from_its_own_stream() -> None:
    steps = chain(iterations=3)
    seeds = [step.seed for step in steps.values()]
    assert len(set(seeds)) == len(seeds)
    other = chain(iterations=3, seed=1)
    assert not set(seeds) & {step.seed for step in other.values()}
    # More iterations, or another algorithm, do not shift the draws of those before.
    longer = chain(iterations=4)
    assert all(longer[name].seed == step.seed for name, step in steps.items())
    assert chain("dpo")["iter1/generate"].seed == steps["iter1/generate"].seed
