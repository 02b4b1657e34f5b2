"""Stage `prompts`: training and held-out prompts, split by base question."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparring.alignment.config import PromptsConfig
from sparring.alignment.prompt_files import load_prompts
from sparring.alignment.prompts import chitchat_prompts, constraint_prompts, split
from sparring.alignment.rows import Prompt
from sparring.launch import artifacts
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context, Figures


def _all_prompts(config: PromptsConfig, seed: int) -> list[Prompt]:
    """All prompts of the source: a built-in set by name, a file, or a data set."""
    built_in = {"constraints": constraint_prompts, "chitchat": chitchat_prompts}
    if config.source in built_in:
        return built_in[config.source](seed)
    return load_prompts(config.source, config.split, first_turn=config.turns == "first")


def run(
    config: PromptsConfig, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Write ``train.parquet`` and ``heldout.parquet``."""
    prompts = _all_prompts(config, context.seed)
    if config.train:
        chosen = split(prompts, heldout=config.heldout, train=config.train, seed=context.seed)
    else:  # all, as they come
        chosen = prompts, []
    train, heldout = chosen
    write_rows(output / "train.parquet", Prompt, train)
    write_rows(output / "heldout.parquet", Prompt, heldout)
    return {
        "train": len(train),
        "heldout": len(heldout),
        "train_groups": len({p.group for p in train}),
        "heldout_groups": len({p.group for p in heldout}),
    }


def is_prompt_set(path: Path) -> bool:
    """Whether a path is a prompts artifact, and no file or data set of the user's."""
    return (path / artifacts.MANIFEST).is_file() or (path / "heldout.parquet").is_file()


def read_prompt_set(path: Path) -> list[Prompt]:
    """All prompts of a prompts artifact, or of a JSONL or parquet file or saved data set."""
    if not is_prompt_set(path):
        return load_prompts(path)
    parts = (path / "train.parquet", path / "heldout.parquet")
    return [row for part in parts for row in read_rows(part, Prompt)]
