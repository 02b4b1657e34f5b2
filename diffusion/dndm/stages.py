"""The stages of discrete diffusion on text: their settings, what they read. Imports no torch."""

from __future__ import annotations

from sparring.diffusion.dndm.config import (
    ProcessConfig,
    SamplerConfig,
    TextDataConfig,
    TextEvaluateConfig,
    TextModelConfig,
    TextTrainConfig,
)
from sparring.launch.config import config, positive, within
from sparring.launch.stages import Stage


@config
class TrainTextStage(TextTrainConfig):
    """Training, with the network and the noise it is for."""

    model: TextModelConfig = TextModelConfig()
    process: ProcessConfig = ProcessConfig()


@config
class SampleTextStage(SamplerConfig):
    """Sampling by one sampler."""

    batch: int = 100
    """Sequences that are sampled together, a shard."""
    length: int = 0
    """Symbols of a sequence without a source; 0: as held-out ones."""
    prompt: str = ""
    """How sequences without a source begin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("batch", self.batch)
        within("length", self.length, 0, float("inf"))


_DATA = "artifact of text-data"
_MODEL = "folder of a network, made by train-text-diffusion"

TEXT_DATA = Stage(
    name="text-data",
    summary="collect texts or pairs of texts, and split them",
    function="sparring.diffusion.dndm.collect:run",
    config=TextDataConfig,
    version="2",
    inputs={},
    light=True,
    reads=("path",),
)
TRAIN_TEXT = Stage(
    name="train-text-diffusion",
    summary="train a network that predicts clean text from noised text",
    function="sparring.diffusion.dndm.train:run",
    config=TrainTextStage,
    version="4",
    inputs={"data": _DATA, "model?": f"{_MODEL}, to start from; its settings stay"},
    packages=("torch", "transformers", "deepspeed", "accelerate"),
)
SAMPLE_TEXT = Stage(
    name="sample-text-diffusion",
    summary="sample texts by a named sampler",
    function="sparring.diffusion.dndm.sample:run",
    finish="sparring.diffusion.dndm.sample:finish",
    config=SampleTextStage,
    version="2",
    inputs={"model": _MODEL, "data": _DATA},
    packages=("torch", "transformers"),
)
EVALUATE_TEXT = Stage(
    name="evaluate-text-diffusion",
    summary="measure sampled texts against held-out ones",
    function="sparring.diffusion.dndm.evaluate:run",
    config=TextEvaluateConfig,
    version="2",
    inputs={
        "samples": "artifact of sample-text-diffusion",
        "data": _DATA,
        "model?": f"{_MODEL}; for the measure bits",
    },
    packages=("sacrebleu", "torch", "transformers"),
    single=True,
)

STAGES = {stage.name: stage for stage in (TEXT_DATA, TRAIN_TEXT, SAMPLE_TEXT, EVALUATE_TEXT)}
