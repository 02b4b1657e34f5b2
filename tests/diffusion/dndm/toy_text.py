"""A deterministic mapping of short texts, and stages that are called as the launcher calls them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparring.diffusion.dndm import sample, train
from sparring.diffusion.dndm.config import ProcessConfig, TextModelConfig
from sparring.diffusion.dndm.rows import SampledText, Text
from sparring.diffusion.dndm.stages import SampleTextStage, TrainTextStage
from sparring.diffusion.dndm.vocabulary import Vocabularies, Vocabulary
from sparring.launch.processes import World
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context

TINY = TextModelConfig(
    hidden=32, layers=1, encoder_layers=1, heads=2, feedforward=64, dropout=0.0, offsets=3
)


def mapped(source: str) -> str:
    """The phone of each letter, and the last one twice."""
    return " ".join([letter.upper() for letter in source] + [source[-1].upper()])


def toy_rows() -> list[Text]:
    sources = ["".join(s) for n in (2, 3) for s in itertools.product("abc", repeat=n)]
    return [Text(s, s, mapped(s)) for s in sources]


def write_data(folder: Path, rows: list[Text], *, pairs: bool = True) -> Path:
    """An artifact of text-data whose held-out texts are those of training."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Vocabulary.of((row.source for row in rows), "characters") if pairs else None
    target = Vocabulary.of((row.target for row in rows), "words" if pairs else "characters")
    Vocabularies(target, source).save(folder)
    for name in ("train", "heldout"):
        write_rows(folder / f"{name}.parquet", Text, rows)
    return folder


class TrainRun:
    """One training in a folder of its own, callable again to resume it."""

    def __init__(self, output: Path, data: Path, **options: Any) -> None:
        self.output, self.inputs = output, {"data": data}
        chosen: dict[str, Any] = {
            "model": TINY,
            "process": ProcessConfig(),
            "steps": 4,
            "batch": 10,
            "micro_batch": 10,
            "lr": 1e-3,
            "schedule": "constant",
            "warmup": 0.0,
        }
        self.config = TrainTextStage(**{**chosen, **options})
        (output / "work").mkdir(parents=True)

    def __call__(self, stopped: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        context = Context(World(), self.output / "work", 3, stopped, lambda **_: None)
        return train.run(self.config, self.inputs, self.output, context)

    @property
    def metrics(self) -> list[dict[str, float]]:
        lines = (self.output / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def sampled(
    model: Path, data: Path, output: Path, seed: int = 5, **options: Any
) -> list[SampledText]:
    """Rows of one call of sample-text-diffusion."""
    (output / "work").mkdir(parents=True)
    settings = SampleTextStage(**options)
    context = Context(World(), output / "work", seed, emit=lambda **_: None)
    inputs = {"model": model, "data": data}
    sample.run(settings, inputs, output, context)
    sample.finish(settings, inputs, output, context)
    return read_rows(output / "samples.parquet", SampledText)
