"""Evaluation on files: who meets whom, what is judged once, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from letter_judge import LetterJudge

from sparring.alignment import evaluation, results
from sparring.alignment import health as judge_health
from sparring.alignment.config import JudgeConfig, Recipe
from sparring.alignment.games import pairwise_probabilities
from sparring.alignment.harness import leaderboards
from sparring.alignment.matches import policy_names
from sparring.alignment.response_files import read_responses
from sparring.alignment.results import evaluation_text, intervals
from sparring.alignment.rows import Judged, Message, Prompt, Response
from sparring.alignment.stages import EVALUATE, EvaluateStage
from sparring.launch import artifacts, cli
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import write_rows
from sparring.launch.stages import LaunchConfig, Step, execute, numbered

PROMPTS = 12
LETTER = JudgeConfig(name="letter_judge:make", chunk=5)
Make = Callable[..., Path]


class Counting(LetterJudge):
    """Also counts calls and ordered pairs."""

    def __init__(self) -> None:
        super().__init__(weight=0.5)
        self.calls: list[tuple[int, int]] = []

    def matrix(self, prompts: Any, responses: Any) -> Any:
        self.calls.append((len(responses), len(responses[0])))
        return super().matrix(prompts, responses)

    def usage(self) -> dict[str, float]:
        return {"calls": float(len(self.calls))}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.jsonl"
    rows = ({"prompt_id": f"p{n}", "prompt": f"say {n}", "group": f"g{n // 2}"} for n in range(99))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Responses of a policy that says "a" as often as `letters` says on average."""

    def write(
        name: str, letters: float, *, k: int = 2, ids: Sequence[int] | None = None, filler: int = 20
    ) -> Path:
        rng = np.random.default_rng(len(name) + int(100 * letters))
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = [
            Response(
                prompt_id=f"p{n}",
                k=number,
                iteration=0,
                text="a" * int(rng.poisson(letters)) + "b" * int(rng.integers(1, filler)),
                prompt_ids=(1,),
                response_ids=(3, 4, 2),
                finish_reason="stop",
                seed=0,
            )
            for n in (range(PROMPTS) if ids is None else ids)
            for number in range(k)
        ]
        write_rows(folder / "responses.parquet", Response, rows)
        return folder

    return write


@pytest.fixture
def evaluate(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run the stage in this process; returns its artifact and the judge."""

    def run(*, judge: Counting | None = None, against: Sequence[Path] = (), **inputs: Path) -> Any:
        judge = judge or Counting()
        monkeypatch.setattr(evaluation, "make_judge", lambda config: judge)
        settings = EvaluateStage(judge=LETTER)
        given = {"prompts": prompts} | inputs | numbered("against", list(against))
        output = tmp_path / f"evaluate{len(list(tmp_path.glob('evaluate*')))}"
        launch = LaunchConfig(inline=("evaluate",))
        artifact, _ = execute(
            Step("evaluate", EVALUATE, settings, {}, seed=1),
            given,
            output,
            launch,
            logs=tmp_path,
            on_event=lambda _: None,
        )
        return artifact, judge

    return run


def counts(folder: Path, order: Sequence[int] = range(PROMPTS)) -> np.ndarray:
    from sparring.launch.rows import read_rows

    found = {(r.prompt_id, r.k): r.text for r in read_rows(folder / "responses.parquet", Response)}
    return np.array([found[f"p{n}", k].count("a") for n in order for k in range(2)])


def test_two_policies_have_a_win_rate_and_no_game(make: Make, evaluate: Any) -> None:
    ours, base = make("c", 3.0), make("b", 2.0)
    artifact, judge = evaluate(current=ours, base=base)
    figures = artifact.figures
    expected = 0.5 + 0.5 * np.sign(counts(ours) - counts(base)).mean()
    assert figures["win_rate_base"][0] == pytest.approx(expected)
    assert (figures["prompts"], figures["groups"], figures["responses"]) == (12, 6, 24)
    low, high = figures["lc_win_rate_base"][1:]
    assert 0 < low < high < 1
    assert "cross_play" not in figures
    assert not [name for name in figures if name.startswith(("exploit", "best", "cyclic"))]
    assert judge.calls == [(5, 2)] * 4 + [(4, 2)]  # bounded chunks, both orders inside
    assert figures["judge_usage"] == {"calls": 5}


def test_all_policies_are_judged_at_once(make: Make, evaluate: Any) -> None:
    folders = [
        make(name, letters) for name, letters in (("a", 1), ("x/B", 4), ("C", 2), ("now", 3))
    ]
    base, *against, current = folders
    artifact, judge = evaluate(current=current, base=base, against=against)
    figures = artifact.figures
    assert {k for _, k in judge.calls} == {4}
    assert sum(rows for rows, _ in judge.calls) == PROMPTS * 2
    game = figures["cross_play"]
    assert game["policies"] == ["base", "B", "C", "current"]
    letters = 0.5 * np.stack([counts(folder) for folder in folders], 1)
    chances = pairwise_probabilities(letters[:, :, None] - letters[:, None, :])
    np.testing.assert_allclose(game["payoff"], chances.mean(axis=0), atol=1e-6)
    mean = np.array(game["payoff"])
    assert figures["exploitability_last"][0] == pytest.approx(mean[:, 3].max() - 0.5)
    assert figures["exploitability_average"][0] == pytest.approx(mean.mean(axis=1).max() - 0.5)
    assert figures["exploitability_last"][1] <= figures["exploitability_last"][2]
    assert game["duality_gap_last"][0] == pytest.approx(2 * figures["exploitability_last"][0])
    for name, column in (("vs_B", 1), ("vs_C", 2)):
        margin = np.sign(letters[:, 3] - letters[:, column])
        assert figures[f"win_rate_{name}"][0] == pytest.approx(0.5 + 0.5 * margin.mean())
        assert figures[f"lc_win_rate_{name}"]
    assert {"best_response_last", "best_response_average", "cyclicity"} <= set(figures)
    text = evaluation_text(artifact.path)
    for shown in ("win rate vs B", "LC win rate vs start", "row beats column", "exploitability"):
        assert shown in text
    assert "12 prompts in 6 groups, 24 responses; 95 % intervals over groups" in text


def test_a_policy_that_is_named_twice_is_judged_once(make: Make, evaluate: Any) -> None:
    one, two, ours = make("one", 1), make("two", 2), make("ours", 3)
    artifact, judge = evaluate(current=ours, base=one, previous=two, against=[one, two, ours])
    assert {k for _, k in judge.calls} == {3}
    figures = artifact.figures
    assert figures["cross_play"]["policies"] == ["base", "two", "current"]
    assert figures["win_rate_vs_one"] == figures["win_rate_base"]
    assert figures["win_rate_vs_two"] == figures["win_rate_previous"]
    assert figures["win_rate_vs_ours"] == [0.5] * 3


def test_only_oneself_to_meet_needs_no_judge(make: Make, evaluate: Any) -> None:
    ours = make("ours", 3)
    artifact, judge = evaluate(current=ours, base=ours)
    assert artifact.figures["win_rate_base"] == [0.5] * 3
    assert not judge.calls


def test_prompts_are_matched_by_id(make: Make, evaluate: Any) -> None:
    order = list(range(PROMPTS))[::-1]
    ours, base = make("c", 3.0), make("b", 1.0, ids=order)
    figures = evaluate(current=ours, base=base)[0].figures
    expected = 0.5 + 0.5 * np.sign(counts(ours) - counts(base)).mean()
    assert figures["win_rate_base"][0] == pytest.approx(expected)
    assert expected != pytest.approx(0.5 + 0.5 * np.sign(counts(ours) - counts(base, order)).mean())


def test_files_can_be_evaluated(tmp_path: Path, evaluate: Any) -> None:
    paths = []
    for name, letters in (("ours", "aaa"), ("B", "a"), ("C", "aa")):
        paths.append(tmp_path / f"{name}.jsonl")
        rows = ({"prompt_id": f"p{n}", "responses": [letters + "b" * n, "b"]} for n in range(4))
        paths[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = evaluate(current=paths[0], against=paths[1:])[0].figures
    assert figures["cross_play"]["policies"] == ["B", "C", "current"]
    assert figures["win_rate_vs_B"][0] == 0.75  # the second response ties
    assert figures["characters"][0] == pytest.approx((3 + 1.5 + 1) / 2)
    assert "length" not in figures


def test_texts_of_files_are_encoded_for_likelihoods(
    tmp_path: Path, tiny_model: Path, tiny_prompts: Path, evaluate: Any
) -> None:
    path = tmp_path / "ours.jsonl"
    rows = ({"prompt_id": f"p{n}", "responses": ["a cat", "the dog ran"]} for n in range(4))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    models = {"model": tiny_model, "base_model": tiny_model}
    figures = evaluate(current=path, prompts=tiny_prompts, **models)[0].figures
    assert figures["kl"] == [0, 0, 0]
    # Random weights: about log(1/35) a token, and every prompt has a human response.
    assert figures["human_logp_per_token"][0] == pytest.approx(-np.log(35), abs=0.5)
    assert "length" not in figures


@pytest.mark.parametrize("options", [{"level": 1.0}, {"level": 0.0}, {"lm_eval_limit": -1}])
def test_settings_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EVALUATE.config(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": range(7)}, r"responses of B answer 7 prompts, those of current 12: 5 only in cur"),
        (
            {"ids": range(3, 15)},
            r"3 only in current \(such as 'p0'\) and 3 only in B \(such as 'p12",
        ),
        ({"k": 3}, "B has 3 responses a prompt, current has 2"),
    ],
)
def test_refuses_other_prompts(
    make: Make, evaluate: Any, options: dict[str, Any], message: str
) -> None:
    current, other = make("c", 1.0), make("B", 2.0, **options)
    with pytest.raises(SparringError, match=message):
        evaluate(current=current, against=[other])


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["w/B", "w/C"], ["B", "C"]),
        (["run/heldout1/generate", "run/heldout2/generate"], ["heldout1", "heldout2"]),
        (["one/heldout1/generate", "two/heldout1/generate"], ["one/heldout1", "two/heldout1"]),
        (["w/base"], ["w/base"]),
        (["w/B.jsonl", "w/C.parquet"], ["B", "C"]),
        (["w/llama-3.2", "w/llama-3.1"], ["llama-3.2", "llama-3.1"]),
        ([], []),
    ],
)
def test_policies_have_names_of_their_own(paths: list[str], names: list[str]) -> None:
    assert policy_names([Path("/") / path for path in paths]) == names


# From the command line


def sparring(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = cli.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_prints_a_table(
    make: Make, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--prompts", prompts, "--current", make("A", 3), "--against", make("B", 1)]
    given += [make("C", 2), "--judge.name", "letter_judge:make", "--out", tmp_path / "e"]
    code, out, err = sparring(capsys, "evaluate", *given, "--launch.inline", "evaluate")
    assert code == 0, err
    shown = ["win rate vs B", "LC win rate vs C", "row beats column", "12 prompts in 6 groups"]
    places = [out.index(text) for text in shown]  # in the order in which they were given
    assert places == sorted(places)


def test_nothing_to_evaluate_says_what_to_give(
    tmp_path: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--out", tmp_path / "e", "--launch.inline", "evaluate"]
    code, _, err = sparring(capsys, "evaluate", *options)
    assert code != 0
    assert "give --prompts and --current" in err
    code, _, err = sparring(capsys, "evaluate", *options, "--current", make("A", 1))
    assert code != 0
    assert "give --prompts" in err
    code, _, err = sparring(capsys, "evaluate", *options, "--lm-eval", "arc_easy")
    assert code != 0
    assert "--lm-eval arc_easy needs --model" in err


# The report


def test_the_report_shows_the_game_and_the_judge(make: Make, evaluate: Any, tmp_path: Path) -> None:
    base, other, previous, ours = (make(f"m{n}/heldout{n}/generate", n) for n in range(4))
    figures = evaluate(current=ours, base=base, previous=previous, against=[other])[0].figures
    assert "win_rate_vs_heldout1" in figures
    (section,) = results._cross_play([(0, {}), (3, figures)])
    assert section.columns == ["row beats column", "start", "iterate 1", "iterate 2", "iterate 3"]
    assert [row[0] for row in section.rows] == ["start", "iterate 1", "iterate 2", "iterate 3"]
    assert all(row[n + 1] == "-" for n, row in enumerate(section.rows))
    assert "exploitability" in section.note
    assert results._cross_play([(0, {})]) == []

    judged = tmp_path / "run" / "iter1" / "judge"
    logits = ((0.0, 3.0), (3.0, 0.0))  # whoever is first wins
    rows = [Judged(f"p{n}", 1, logits) for n in range(PROMPTS)]
    health = judge_health.health(rows, read_responses(ours))
    recipe = Recipe(name="r", iterations=2)
    assert results._health(recipe, tmp_path / "run") == []
    artifacts.prepare(judged, "key")
    artifacts.complete(judged, "key", {"figures": {"health": health}})
    table, verdicts = results._health(recipe, tmp_path / "run")
    assert "favours the first place" in judge_health.judged_text(judged)
    assert table.columns == ["figure", "iteration 2", "reference"]
    assert verdicts.rows[0][1].startswith("favours the first place")


# Leaderboards

HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HARNESS, reason="lm-evaluation-harness is not installed")
# The harness and what it brings are not ours to keep free of warnings.
foreign = pytest.mark.filterwarnings("ignore")
# It reads the thousands of task files that it comes with.
reads_them_all = pytest.mark.slow


@pytest.fixture
def own_task(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"the {w}", "choices": ["cat", "dog"], "answer": n % 2}
        for n, w in enumerate(["big", "old", "red", "sad", "wet", "tan"])
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny_choice.yaml").write_text(
        "task: tiny_choice\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {data}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        'doc_to_target: "{{answer}}"\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    return folder


@needs_harness
@foreign
@reads_them_all
def test_a_leaderboard_of_ones_own(
    tiny_model: Path,
    own_task: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    options = ["--model", tiny_model, "--lm-eval", "tiny_choice", "--lm-eval-path", own_task]
    out = tmp_path / "e"
    code, shown, err = sparring(
        capsys, "evaluate", *options, "--out", out, "--launch.inline", "evaluate"
    )
    assert code == 0, err
    figures = json.loads((out / "manifest.json").read_text())["figures"]
    result = figures["lm_eval"]["tiny_choice"]["acc"]
    assert result["value"] * 6 == pytest.approx(round(result["value"] * 6))
    assert result["stderr"] >= 0
    assert "tiny_choice acc" in shown
    assert intervals(figures)["tiny_choice acc"][0] == result["value"]
    fewer = leaderboards(tiny_model, ["tiny_*"], own_tasks=own_task, limit=2)
    assert fewer["lm_eval"]["tiny_choice"]["acc"]["value"] in (0, 0.5, 1)


@needs_harness
@foreign
@reads_them_all
def test_unknown_tasks_are_refused(tiny_model: Path, own_task: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no task 'tiny_choise'; did you mean tiny_choice"):
        leaderboards(tiny_model, ["tiny_choise"], own_tasks=own_task)
    with pytest.raises(UsageError, match="no folder of task files"):
        leaderboards(tiny_model, ["tiny_choice"], own_tasks=tmp_path / "none")


def test_a_missing_harness_says_how_to_get_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(SparringError, match=r"pip install 'sparring\[eval\]'"):
        leaderboards(tiny_model, ["arc_easy"])


def test_the_report_leaves_out_prompts_that_were_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`prompts.too_long = "drop"` leaves held-out prompts without answers."""
    prompts = [Prompt(f"p{n}", (Message("user", f"question {n}"),), f"g{n}") for n in range(8)]
    (tmp_path / "prompts").mkdir()
    write_rows(tmp_path / "prompts" / "heldout.parquet", Prompt, prompts)
    for t in (0, 1):
        folder = tmp_path / f"heldout{t}" / "generate"
        folder.mkdir(parents=True)
        answers = [
            Response(p.prompt_id, 0, t, f"answer {t}", (1,), (2,), "stop", 0) for p in prompts[1:]
        ]
        write_rows(folder / "responses.parquet", Response, answers)
    monkeypatch.setattr(results, "evaluations", lambda recipe, run: [(0, {}), (1, {})])
    section = results._samples(Recipe(name="r"), tmp_path)
    assert section is not None
    assert [row[0] for row in section.rows] == [f"question {n}" for n in range(1, 7)]
