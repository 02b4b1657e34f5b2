"""The commands of `sparring`, with what each does, and the text of its help."""

from __future__ import annotations

from collections.abc import Sequence

COMMANDS = {
    "demo": "improve a small real model on this machine, in about ten minutes",
    "run": "run a recipe; run it again to resume",
    "plan": "check a recipe and list its steps, without running any",
    "prompts": "collect prompts from a file, a data set or a built-in set",
    "generate": "sample K responses a prompt",
    "merge": "put the shards of a stage together",
    "parity": "check that sampler and trainer agree on sampled responses",
    "judge": "compare each prompt's responses with each other",
    "pair": "turn judged or human responses into training pairs",
    "reference": "compute the reference policy's log-probabilities once",
    "train": "optimise a policy on pairs",
    "extrapolate": "APO's momentum on two checkpoints",
    "evaluate": "measure an iterate on held-out prompts",
    "images": "collect images with captions",
    "image-model": "bring a text-to-image pipeline into a folder",
    "generate-images": "make images for the captions of real ones",
    "encode-images": "latents and conditions of real and generated images",
    "train-images": "optimise a text-to-image network on pairs",
    "evaluate-images": "score images for held-out captions",
    "text-data": "collect texts or pairs of texts, and split them",
    "train-text-diffusion": "train a network that undoes the noising of text",
    "sample-text-diffusion": "sample texts by a named sampler",
    "evaluate-text-diffusion": "measure sampled texts against held-out ones",
    "conf-md": "simulate a peptide with OpenMM",
    "conf-structures": "read PDB files and trajectories as training data",
    "conf-label": "compute energies and forces of structures",
    "conf-train": "train a diffusion model of conformations",
    "conf-guide": "train a network of energy or force that guides it",
    "conf-sample": "sample conformations of a sequence",
    "conf-evaluate": "measure an ensemble against a reference",
    "report": "write a run's report again",
    "track": "send a run's metrics to TensorBoard, Weights & Biases or Trackio",
    "recipes": "list algorithms and recipes",
    "doctor": "say which stages can run here, and why not",
}


_OTHERS = ("demo", "run", "plan", "report", "track", "recipes", "doctor")
STAGE_COMMANDS = tuple(name for name in COMMANDS if name not in _OTHERS)

HELP = ("--help", "-h", "help")
_FAMILY = "conf"  # commands that are two words: `sparring conf md`


def spoken(command: str) -> str:
    """A command as it is typed."""
    return command.replace("-", " ", 1) if command.startswith(f"{_FAMILY}-") else command


def joined(arguments: Sequence[str]) -> list[str]:
    """The arguments with a command of two words made one; its first word alone asks for help."""
    words = list(arguments)
    if words[:1] != [_FAMILY]:
        return words
    if len(words) == 1 or words[1] in HELP:
        return ["--help"]
    return ["-".join(words[:2]), *words[2:]]


def usage() -> str:
    """The text of ``sparring --help``."""
    lines = [f"  {spoken(name):<24} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sparring COMMAND [options] [--json]",
            "",
            "Self-play alignment: generate, judge, pair, train, and again.",
            "",
            *lines,
            "",
            "`sparring COMMAND --help` lists its options; --json prints the result as JSON.",
            "A recipe is a TOML file or the name of one that `sparring recipes` lists; its values",
            "are overridden like this: sparring run sppo-smollm2 --train.lr 1e-5",
        ]
    )
