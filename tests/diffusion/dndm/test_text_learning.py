"""A mapping that is learnt, by networks for either noise, and what samplers make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_text import TINY, TrainRun, mapped, sampled, toy_rows, write_data

from sparring.diffusion.dndm.config import (
    ProcessConfig,
    SamplerConfig,
    TextModelConfig,
)
from sparring.diffusion.dndm.rows import Text
from sparring.launch.errors import SparringError

LEARNT = {
    "absorbing": ProcessConfig(),
    "uniform": ProcessConfig(noise="uniform", steps=0),
    "uniform all": ProcessConfig(noise="uniform", steps=8),
    "uniform noisy": ProcessConfig(noise="uniform", steps=8),
}


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Callable[[str], Path]:
    """A network that knows the mapping, for either noise, trained once."""
    made: dict[str, Path] = {}

    def make(noise: str) -> Path:
        if noise not in made:
            told = TextModelConfig(**{**vars(TINY), "schedule_conditioning": noise == "uniform"})
            run = TrainRun(
                tmp_path_factory.mktemp(noise) / "run",
                data,
                process=LEARNT[noise],
                model=told,
                tokens="all" if noise.endswith(" all") else "noisy",
                **TOY_TRAINING,
            )
            run()
            first, last = run.metrics[0], run.metrics[-1]
            assert last["cross_entropy"] < first["cross_entropy"] / 10
            assert last["length_accuracy"] == 1
            made[noise] = run.output
        return made[noise]

    return make


TOY_TRAINING: dict[str, Any] = {
    "steps": 120,
    "batch": 36,
    "micro_batch": 36,
    "lr": 1e-2,
    "schedule": "cosine",
    "warmup": 0.1,
    "label_smoothing": 0.0,
    "coupled": False,
    "weighting": "none",
    "length_weight": 0.03,
    "save_every": 0,
}


@pytest.mark.parametrize(
    "options",
    [
        {"algorithm": "dndm", "steps": 20},
        {"algorithm": "dndm", "steps": 20, "schedule": "beta", "beta": (17.0, 4.0)},
        {"algorithm": "dndm-v2", "steps": 20},
        {"algorithm": "dndm-k", "steps": 20, "token": "argmax", "length_beam": 3},
        {"algorithm": "dndm-c"},
        {"algorithm": "first-hitting"},
        {"algorithm": "d3pm", "steps": 8},
        {"algorithm": "rdm", "steps": 8},
        {"algorithm": "rdm-k", "steps": 8},
        {"algorithm": "maskgit", "steps": 2, "token": "argmax"},
        {"algorithm": "threshold", "threshold": 0.8},
        {"algorithm": "entropy-bound", "bound": 0.2},
        {"algorithm": "autoregressive"},
    ],
    ids=lambda options: SamplerConfig(**options).name,
)
def test_samplers_give_what_was_learnt(
    options: dict[str, Any], learnt: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    rows = sampled(learnt("absorbing"), data, tmp_path / "s", temperature=0.3, batch=36, **options)
    assert [row.source for row in rows] == [row.source for row in toy_rows()]
    assert sum(row.text == mapped(row.source) for row in rows) >= 34
    calls = {"d3pm": 8, "rdm": 8, "rdm-k": 8}.get(options["algorithm"], 4)
    assert rows[0].nfe <= calls * (2 if "length_beam" in options else 1)


def test_a_network_that_is_told_the_noise(
    learnt: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    rows = sampled(learnt("uniform"), data, tmp_path / "s", algorithm="dndm-c", temperature=0.3)
    assert sum(row.text == mapped(row.source) for row in rows) >= 33
    assert {row.evaluations for row in rows} == {3, 4}  # one a token
    again = sampled(
        learnt("uniform"), data, tmp_path / "v", algorithm="dndm-v2", steps=20, temperature=0.3
    )
    assert sum(row.text == mapped(row.source) for row in again) >= 33
    with pytest.raises(SparringError, match=r"does not take the settings.*schedule_conditioning"):
        sampled(learnt("uniform"), data, tmp_path / "r", algorithm="d3pm", steps=8)


@pytest.mark.slow
def test_ancestral_sampling_needs_a_network_that_knows_clean_tokens(
    learnt: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    """Multinomial noise: with the loss of all tokens D3PM samples what was learnt; with that of
    changed tokens only, as RDM and the paper train, it replaces clean ones to the end."""
    right = {
        tokens: sum(
            row.text == mapped(row.source)
            for row in sampled(
                learnt(f"uniform {tokens}"),
                data,
                tmp_path / tokens,
                algorithm="d3pm",
                steps=8,
                temperature=0.3,
                batch=36,
            )
        )
        for tokens in ("all", "noisy")
    }
    assert right["all"] >= 34 > right["noisy"]


def test_training_goes_on_from_a_network(
    learnt: Callable[[str], Path], new_run: Callable[..., TrainRun], tmp_path: Path
) -> None:
    run = new_run("on", steps=1)
    run.inputs["model"] = learnt("absorbing")
    run()
    assert run.metrics[0]["cross_entropy"] < 1.5
    longer = write_data(tmp_path / "long", [*toy_rows(), Text("l", "abca", mapped("abca"))])
    run = new_run("long")
    run.inputs |= {"data": longer, "model": learnt("absorbing")}
    with pytest.raises(SparringError, match=r"target of 5 symbols.* at most 4"):
        run()
    other = write_data(tmp_path / "other", [Text("o", "ab", "A D")])
    run = new_run("other")
    run.inputs |= {"data": other, "model": learnt("absorbing")}
    with pytest.raises(SparringError, match="another vocabulary"):
        run()
