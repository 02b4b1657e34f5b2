"""A simulation and networks, each made once, that the tests of ConfDiff's stages share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparring.launch.cli import main

STAGES = "conf-md conf-structures conf-label conf-train conf-guide conf-sample conf-evaluate"
INLINE = ["--launch.inline", *STAGES.split()]
MD = ("--sequence", "AGA", "--temperature", "400", "--nanoseconds", "0.006", "--equilibration",
      "0.001", "--save-every", "0.1", "--platform", "Reference")  # fmt: skip
TRAINING = ("--batch", "16", "--micro-batch", "16", "--warmup", "0", "--lr", "1e-3", "--save-every",
            "2", "--ema", "0")  # fmt: skip

Conf = Callable[..., dict[str, Any]]


def run_conf(stage: str, out: Path, *options: str, **inputs: Path) -> dict[str, Any]:
    """Run ``sparring conf STAGE``; returns its figures."""
    given = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    inline = [] if "--launch.processes" in options else INLINE
    arguments = ["conf", stage, *given, "--out", str(out), *options, *inline, "--json"]
    assert main(arguments) == 0
    return dict(json.loads((out / "manifest.json").read_text())["figures"])


@pytest.fixture(scope="session")
def conf() -> Conf:
    return run_conf


@pytest.fixture(scope="session")
def training() -> tuple[str, ...]:
    return TRAINING


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 frames of capped AGA at 400 K, with energies and forces."""
    out = tmp_path_factory.mktemp("confdiff") / "md"
    run_conf("md", out, *MD)
    return out


@pytest.fixture(scope="session")
def base(simulated: Path) -> Path:
    """A network that has hardly learnt anything."""
    out = simulated.with_name("base")
    run_conf("train", out, "--steps", "4", *TRAINING, data=simulated)
    return out


@pytest.fixture(scope="session")
def guides(simulated: Path, base: Path) -> dict[str, Path]:
    """One guide of each kind, to 350 K."""
    made = {}
    for kind in ("energy", "force"):
        made[kind] = simulated.with_name(kind)
        options = ("--kind", kind, "--temperature", "350", "--steps", "3", *TRAINING)
        run_conf("guide", made[kind], *options, data=simulated, model=base)
    return made
