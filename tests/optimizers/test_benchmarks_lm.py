"""scripts/benchmarks/mars_lm.py at sizes that say nothing about optimizers."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import math
import random
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "1024", "--batch", "256", "--vocabulary", "300", "--validation", "256"]


@pytest.fixture(scope="module")
def lm() -> Iterator[ModuleType]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
        yield importlib.import_module("mars_lm")
    torch.set_num_threads(threads)
    for name in ("mars_lm", "mars_lm_model", "mars_lm_runs"):
        del sys.modules[name]


@pytest.fixture
def documents(lm: ModuleType) -> Any:
    return importlib.import_module("mars_lm_model").documents


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs that are the same in every commit, unlike the pages of docs/."""
    words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
    draw = random.Random(0)
    paragraphs = []
    for _ in range(400):
        start = draw.randrange(len(words) - 60)
        paragraphs.append(" ".join(words[start : start + draw.randint(20, 60)]))
    file = tmp_path_factory.mktemp("text") / "paragraphs.txt"
    file.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def made(lm: ModuleType, text: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a quick sweep over all arms that has been run."""
    out = tmp_path_factory.mktemp("lm")
    arguments = ["--quick", "--text", str(text), "--out", str(out), *SMALL]
    lm.main(arguments)
    return arguments


def records(arguments: list[str]) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in files(arguments)]


def files(arguments: list[str]) -> list[Path]:
    return sorted((Path(arguments[arguments.index("--out") + 1]) / "runs").iterdir())


def test_table_and_json_have_every_arm(lm, made, capsys):
    lm.main([*made, "--table-only"])
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert found["benchmark"] == "mars_lm"
    assert list(found["arms"]) == list(lm.ARMS)
    for name, arm in found["arms"].items():
        assert any(line.startswith(f"| {name} | 3 | {arm['lr']:g}") for line in lines)
        assert (arm["seeds"], arm["diverged"]) == (2, 0)
        assert 0 < arm["validation_loss"] < math.log(300) + 0.1  # at most a guess among all tokens
        assert len(arm["lr_tried"]) == arm["tuning_runs"] == 3
    for name in lm.ARMS:
        assert name == "adamw" or f"{name} minus adamw" in found["differences"]
    assert found["differences"]["mars-lion minus lion"]["seeds"] == 2
    out = Path(made[made.index("--out") + 1])
    assert (out / "table.md").read_text().splitlines() == lines[:-1]
    assert (out / "curves.svg").stat().st_size > 1000


def test_budgets_are_equal_in_tokens_or_gradients(lm, made, capsys):
    lm.main([*made, "--table-only"])
    arms = json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]
    budgets = {name: (arm["steps"], arm["tokens"], arm["gradients"]) for name, arm in arms.items()}
    assert budgets.pop("mars-adamw-exact") == (4, 1024, 8)
    assert budgets.pop("mars-adamw-exact-equal-gradients") == (2, 512, 4)
    assert set(budgets.values()) == {(4, 1024, 4)}


def test_what_is_there_is_not_run_again(lm, made, monkeypatch, capsys):
    before = records(made)
    monkeypatch.setattr(lm, "train", lambda *_: pytest.fail("a finished run was run again"))
    lm.main(made)
    assert records(made) == before
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["setting"]["tokens"] == 1024


def test_an_interrupted_sweep_ends_with_the_same_losses(lm, made, tmp_path):
    before = records(made)
    again = [*made[: made.index("--out")], "--out", str(tmp_path), *SMALL]
    lm.main([*again, "--arms", "adamw", "mars-adamw-exact"])
    losses = {(r["arm"], r["lr"], r["seed"]): r["validation"] for r in before}
    for record in records(again):
        assert record["validation"] == losses[record["arm"], record["lr"], record["seed"]]
    whole = records(again)
    for file in files(again)[::2]:
        file.unlink()
    lm.main([*again, "--arms", "adamw", "mars-adamw-exact"])
    without_times = [[{**r, "cpu_seconds": 0} for r in some] for some in (whole, records(again))]
    assert without_times[0] == without_times[1]


def test_runs_of_another_setting_are_not_mixed_in(lm, made, monkeypatch, capsys):
    monkeypatch.setattr(lm, "train", lambda *_: pytest.fail("--table-only ran something"))
    table = Path(made[made.index("--out") + 1]) / "table.md"
    before = table.read_text()
    lm.main([*made, "--tokens", "2048", "--table-only"])
    assert table.read_text() == before
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["arms"] == {}
    lm.main([*made, "--table-only"])  # as it was
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])["arms"]) == set(lm.ARMS)


def test_a_seed_is_the_same_start_and_order_for_every_arm(lm, made):
    options = lm.arguments(made)
    data = lm.load(options, lm.hash_file(options.text))
    losses = [
        lm.train(arm, 1e-9, seed, data, options)["validation"]
        for seed in (1, 2)
        for arm in lm.ARMS.values()
    ]
    first, second = losses[: len(lm.ARMS)], losses[len(lm.ARMS) :]
    assert max(first) - min(first) < 1e-5 < abs(first[0] - second[0])
    some = [list(zip(range(3), lm.batches(data.train, 8, seed), strict=False)) for seed in (1, 1)]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*some, strict=True))


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of arXiv 2302.06675 with betas (0.9, 0.99)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            lr = group["lr"]
            for weight in group["params"]:
                m = self.state[weight].setdefault("m", torch.zeros_like(weight))
                direction = torch.sign(0.9 * m + 0.1 * weight.grad)
                weight -= lr * (direction + group["weight_decay"] * weight)
                m.mul_(0.99).add_(0.01 * weight.grad)


def test_the_lion_arm_is_lion(lm, made):
    options = lm.arguments(made)
    data = lm.load(options, lm.hash_file(options.text))
    by_hand = lm.Arm(lambda groups, lr: [Lion(groups, {"lr": lr})], 0.0)
    losses = [
        lm.train(arm, 2e-3, 1, data, options)["validation"]
        for arm in (lm.ARMS["lion"], by_hand, lm.ARMS["mars-lion"])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[2] - losses[1]) > 1e-3


def test_diverged_runs_are_recorded_and_lead_the_grid_down(lm, made, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(lm.ARMS, "adamw", lm.Arm(lm.adamw(0.9, 0.95), 1e30))
    lm.main([*made, "--out", str(tmp_path), "--arms", "adamw", "lion"])
    lines = capsys.readouterr().out.splitlines()
    arm = json.loads(lines[-1])["arms"]["adamw"]
    assert list(arm["lr_tried"].values()) == [None, None, None]
    assert (arm["lr"], arm["validation_loss"], arm["diverged"]) == (5e29, None, 2)
    assert any("2 diverged" in line for line in lines)


@pytest.mark.parametrize(("optimum", "tried"), [(3, 4), (9, 5), (0.5, 6), (1000, 8)], ids=str)
def test_all_grids_go_on_when_one_does(lm, made, monkeypatch, tmp_path, capsys, optimum, tried):
    """As many runs for every arm, wherever its optimum lies; and the same ones in two pieces."""
    lowest = {name: arm.lr for name, arm in lm.ARMS.items()}
    best = {**{name: 3 * lr for name, lr in lowest.items()}, "adamw": optimum * lowest["adamw"]}
    arm_of = {id(arm): name for name, arm in lm.ARMS.items()}

    def train(arm: Any, lr: float, seed: int, data: Any, options: Any) -> dict[str, Any]:
        return {"validation": 5 + math.log(lr / best[arm_of[id(arm)]]) ** 2, "curve": [],
                "steps": 1, "tokens": 1, "gradients": 1, "cpu_seconds": 0.0}  # fmt: skip

    monkeypatch.setattr(lm, "load", lambda options, corpus: None)
    monkeypatch.setattr(lm, "plot", lambda *_: None)
    found = []
    for name, interruptions in (("whole", []), ("pieces", [7, 35, 3, 11])):
        for after in [*interruptions, None]:
            left = itertools.count() if after is None else iter(range(after))

            def limited(*given: Any, left: Iterator[int] = left) -> dict[str, Any]:
                if next(left, None) is None:
                    raise KeyboardInterrupt
                return train(*given)

            monkeypatch.setattr(lm, "train", limited)
            again = [*made, "--out", str(tmp_path / name), "--points", "4", "--extensions", "4"]
            with contextlib.suppress(KeyboardInterrupt):
                lm.main(again)
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1])["arms"])
    assert found[0] == found[1]
    assert {arm["tuning_runs"] for arm in found[0].values()} == {tried}
    for name, arm in found[0].items():
        grid = sorted(float(lr) for lr in arm["lr_tried"])
        assert all(b == pytest.approx(2 * a) for a, b in pairwise(grid))
        assert arm["at_edge"] == (tried == 8 and name == "adamw")
        assert arm["at_edge"] or abs(math.log2(arm["lr"] / best[name])) <= 0.5


def test_differences_are_by_seed_with_students_interval(lm):
    mine, other = {1: 1.0, 2: 2.5, 3: 3.0, 4: 9.0}, {1: 0.0, 2: 0.5, 3: 0.0}
    found = lm.difference(mine, other)  # 1, 2, 3: sd 1
    assert found["mean"] == pytest.approx(2)
    assert found["high"] - found["mean"] == pytest.approx(4.3027 / math.sqrt(3), rel=1e-3)
    assert found["seeds"] == 3
    assert lm.difference({1: 1.0}, {1: 0.0}) is None


def test_documents_stay_on_one_side(documents, text):
    train, validation = documents(text)
    assert not set(train) & set(validation)
    assert len(set(train)) == len(train) == pytest.approx(19 * len(validation), rel=0.1)
    assert documents(text) == (train, validation)
    assert sum(map(len, documents(text, limit=20))) == 20


def test_the_default_text_is_real_conversations(documents):
    pytest.importorskip("chitchat_dataset", reason="needs chitchat-dataset (requirements/data.txt)")
    train, validation = documents(None)
    assert (len(train), len(validation)) == (5928, 311)
    assert not set(train) & set(validation)


@pytest.mark.parametrize(
    ("bad", "says"),
    [(["--seeds", "0", "1"], "seed 0 chose"), (["--batch", "100"], "no multiple of --context")],
)
def test_bad_options_are_refused(lm, made, bad, says, capsys):
    with pytest.raises(SystemExit):
        lm.main([*made, *bad])
    assert says in capsys.readouterr().err


def test_too_little_text_is_refused(lm, tmp_path):
    (tmp_path / "short.txt").write_text("a few words\n\nand a few more words")
    with pytest.raises(ValueError, match="too little text"):
        lm.main(["--quick", "--text", str(tmp_path / "short.txt"), "--out", str(tmp_path)])


def test_the_schedule_warms_up_and_ends_near_zero(lm):
    shares = [lm.schedule(step, 100) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9] == shares[10] == 1
    assert shares[10:] == sorted(shares[10:], reverse=True)
    assert 0 < shares[-1] < 1e-3
    assert lm.schedule(0, 1) == 1
