"""The stages on files and the pipeline, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from toy_text import TINY, TrainRun, sampled, toy_rows, write_data

from sparring.diffusion.dndm.algorithms import ALGORITHMS, settings_of
from sparring.diffusion.dndm.config import STEPLESS, SamplerConfig, TextModelConfig, TextRecipe
from sparring.diffusion.dndm.network import TextDenoiser
from sparring.diffusion.dndm.rows import SampledText, Text
from sparring.launch.cli import main
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.runs import load_recipe

RECIPE = """
name = "tiny"
pipeline = "dndm"
seeds = 2
batch = 4

[data]
source = "text8"
path = "{path}"
length = 8
heldout = 6

[model]
hidden = 16
layers = 1
heads = 2
feedforward = 16

[train]
steps = 2
batch = 8
micro_batch = 8

[[samplers]]
algorithm = "dndm"
steps = 6

[[samplers]]
algorithm = "d3pm"
steps = 6
count = 4

[evaluate]
measures = ["perplexity", "entropy", "bits"]

[launch]
inline = ["train-text-diffusion", "sample-text-diffusion"]
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data of unconditional text, pieces of 8."""
    rows = [Text(f"t{n}", "", "abcdefgh"[n:] + "abcdefgh"[:n]) for n in range(8)]
    return write_data(tmp_path_factory.mktemp("texts") / "data", rows, pairs=False)


@pytest.fixture(scope="module")
def unconditional(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = TrainRun(tmp_path_factory.mktemp("unconditional") / "run", texts, steps=2)
    run()
    return run.output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("pairs") / "data", toy_rows())


@pytest.fixture(scope="module")
def conditional(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = TrainRun(tmp_path_factory.mktemp("conditional") / "run", pairs, steps=2)
    run()
    return run.output


def test_a_recipe_runs_resumes_and_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text8"
    path.write_text("the cat sat on the mat and saw the dog " * 20)
    recipe, out = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(path=path))
    assert main(["run", str(recipe), "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["computed"] == 2 + 2 * 2 * 2
    assert found["samplers"].keys() == {"dndm-T=6", "d3pm-T=6"}
    for run in found["samplers"]["d3pm-T=6"]:
        assert (run["nfe"], run["row_evaluations"]) == (6, 6)
        assert run["perplexity"] > 1
        assert run["seconds"] > 0
        assert run["batches"] == 1  # its own count: one batch of the recipe's two
        # A network that knows next to nothing: the log of its alphabet, or above.
        assert 3 < run["bits"] < 10
    assert {run["batches"] for run in found["samplers"]["dndm-T=6"]} == {2}
    assert len({run["bits"] for run in found["samplers"]["dndm-T=6"]}) == 2  # of two seeds
    assert all(run["nfe"] <= 6 for run in found["samplers"]["dndm-T=6"])
    rows = read_rows(
        out / "dndm-T=6" / "seed0" / "sample-text-diffusion" / "samples.parquet", SampledText
    )
    assert [row.batch for row in rows] == [0, 0, 0, 0, 1, 1]
    assert all(len(row.text) == len(row.ids) == 8 for row in rows)
    assert "dndm-T=6" in (out / "report.html").read_text()
    assert main(["run", str(recipe), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "0 steps computed" in shown
    assert "row evaluations" in shown


def test_batches_do_not_change_samples(unconditional: Path, texts: Path, tmp_path: Path) -> None:
    whole = sampled(unconditional, texts, tmp_path / "a", algorithm="dndm-c", batch=8)
    parts = sampled(unconditional, texts, tmp_path / "b", algorithm="dndm-c", batch=3)
    assert [row.text for row in whole] == [row.text for row in parts]
    assert len({row.text for row in whole}) > 1
    other = sampled(unconditional, texts, tmp_path / "c", seed=6, algorithm="dndm-c", batch=8)
    assert [row.text for row in whole] != [row.text for row in other]
    assert {row.nfe for row in whole} == {8}


def test_a_prompt_stays_and_more_can_be_asked_for(
    unconditional: Path, texts: Path, tmp_path: Path
) -> None:
    rows = sampled(unconditional, texts, tmp_path / "s", prompt="cab", length=6, count=11)
    assert len(rows) == 11
    assert all(row.text.startswith("cab") and len(row.text) == 6 for row in rows)
    assert max(row.evaluations for row in rows) <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 9}, "takes at most 8 symbols"),
        ({"prompt": "abcdefgh"}, "nothing would be left to sample"),
        ({"prompt": "a?"}, "outside the alphabet: '?'"),
        ({"algorithm": "mdlm-cache"}, "networks that ignore t"),
        ({"length_beam": 2}, "needs a network with a source"),
        ({"algorithm": "d3pm", "token": "argmax"}, "does not take the settings"),
        ({"algorithm": "d3pm", "steps": 0}, "finitely many steps"),
    ],
)
def test_what_cannot_be_sampled_is_said(
    options: dict[str, Any], message: str, unconditional: Path, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(SparringError) as caught:
        sampled(unconditional, texts, tmp_path / "s", **options)
    assert message in str(caught.value)


def test_ranks_of_one_host_have_an_accelerator_each(
    unconditional: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of two ranks samples on cuda:1."""
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(TextDenoiser, "to", lambda self, place: asked.append(place) or self)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert len(sampled(unconditional, texts, tmp_path / "s", count=2)) == 2
    assert asked == [torch.device("cuda", 1)]


def test_sources_that_the_network_does_not_take(
    conditional: Path, pairs: Path, texts: Path, tmp_path: Path
) -> None:
    for source, message in (("abcabc", "has 6 symbols"), ("", "has 0 symbols")):
        folder = tmp_path / f"data{len(source)}"
        write_data(folder, toy_rows())
        write_rows(folder / "heldout.parquet", Text, [Text("x", source, "A")])
        with pytest.raises(SparringError, match=message):
            sampled(conditional, folder, tmp_path / f"s{len(source)}")
    with pytest.raises(SparringError, match="another vocabulary"):
        sampled(conditional, texts, tmp_path / "t")
    with pytest.raises(UsageError, match="only 36 pairs"):
        sampled(conditional, pairs, tmp_path / "u", count=37)
    with pytest.raises(UsageError, match="without a source"):
        sampled(conditional, pairs, tmp_path / "v", prompt="A")


def test_the_command_line_prints_no_traceback(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sample-text-diffusion", "--model", str(texts), "--data", str(texts)]
    inline = ["--launch.inline", "sample-text-diffusion"]
    assert main([*words, "--out", str(tmp_path / "o"), *inline]) == 1
    shown = capsys.readouterr().err
    assert "no config.json" in shown
    assert "Traceback" not in shown


def test_a_beam_takes_the_best_of_its_lengths(
    conditional: Path, pairs: Path, tmp_path: Path
) -> None:
    one = sampled(conditional, pairs, tmp_path / "one", algorithm="dndm-k", token="argmax")
    three = sampled(
        conditional, pairs, tmp_path / "three", algorithm="dndm-k", token="argmax", length_beam=3
    )
    # The likeliest length is among the three, and its candidate has the same seed.
    assert all(b.score >= a.score for a, b in zip(one, three, strict=True))
    assert any(b.score > a.score for a, b in zip(one, three, strict=True))
    assert all(a.score < 0 for a in one)


def test_recipes_know_the_samplers() -> None:
    assert set(get_args(get_type_hints(SamplerConfig)["algorithm"])) == set(ALGORITHMS)
    assert {n for n in ALGORITHMS if "steps" not in settings_of(n)} == set(STEPLESS)
    assert SamplerConfig(algorithm="threshold", threshold=0.6).name == "threshold-0.6"
    assert SamplerConfig(algorithm="entropy-bound").name == "entropy-bound-0.1"
    assert SamplerConfig(steps=0).name == "dndm-T=inf"
    assert SamplerConfig(schedule="beta", beta=(17.0, 4.0)).name == "dndm-T=50-beta=17,4"


@pytest.mark.parametrize(
    "options",
    [
        {"samplers": ()},
        {"samplers": (SamplerConfig(), SamplerConfig())},
        {"samplers": (SamplerConfig(label="text-data"),)},
        {"name": "a/b"},
        {"seeds": 0},
    ],
)
def test_recipes_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TextRecipe(**{"name": "x", **options})
    with pytest.raises(ValueError, match=r"multiple of model\.heads"):
        TextModelConfig(**{**vars(TINY), "heads": 3})


PAPER = Path(__file__).resolve().parents[3] / "recipes" / "paper"


@pytest.mark.parametrize(
    ("name", "sizes", "updates", "warmup", "dropout", "noise", "betas"),
    [
        ("iwslt14", (1024, 4), 100_000, 30_000, 0.3, ("absorbing", "linear"), ((5, 3), (17, 4))),
        (
            "iwslt14-multinomial",
            (1024, 4),
            100_000,
            30_000,
            0.3,
            ("uniform", "cosine"),
            ((17, 5), (17, 4)),
        ),
        ("wmt14", (2048, 8), 80_000, None, 0.2, ("absorbing", "linear"), ((3, 3), (100, 4))),
        ("wmt16", (2048, 8), 180_000, 15_000, None, ("absorbing", "linear"), ((20, 5), (100, 4))),
    ],
)
def test_the_papers_translation(
    name: str,
    sizes: tuple[int, int],
    updates: int,
    warmup: int | None,
    dropout: float | None,
    noise: tuple[str, str],
    betas: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    """Spec, section 2.2 and 2.3; None where it gives no number."""
    _, recipe = load_recipe(PAPER / f"dndm-{name}.toml")
    model, train, process = recipe.model, recipe.train, recipe.process
    assert (model.layers, model.encoder_layers, model.hidden) == (6, 6, 512)
    assert (model.feedforward, model.heads) == sizes
    assert dropout is None or model.dropout == dropout
    assert (train.lr, train.steps, train.weighting, train.coupled) == (
        5e-4,
        updates,
        "linear",
        True,
    )
    assert warmup is None or train.warmup * updates == pytest.approx(warmup, rel=0.001)
    assert (process.steps, process.noise, process.schedule) == (50, *noise)
    assert train.batch % (8 * train.micro_batch) == 0
    for sampler in recipe.samplers:
        assert (sampler.token, sampler.length_beam) == ("argmax", 5)
        wanted = betas[1] if sampler.algorithm == "dndm-c" else betas[0]
        assert sampler.beta == ((1, 1) if sampler.algorithm == "rdm-k" else wanted)


@pytest.mark.parametrize(("name", "steps", "length"), [("text8", 1000, 256), ("enwik8", 4000, 320)])
def test_the_papers_characters(name: str, steps: int, length: int) -> None:
    _, recipe = load_recipe(PAPER / f"dndm-{name}.toml")
    assert recipe.data.source == name
    assert (recipe.process.steps, recipe.data.length, recipe.model.layers) == (steps, length, 12)
    assert {s.steps for s in recipe.samplers if s.algorithm != "dndm-c"} == {steps}
    assert recipe.data.heldout * length == pytest.approx(5_000_000, rel=1e-3)
