"""A whole run of the pipeline `conformations` on a tripeptide: table, report, and resuming."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sparring.launch.cli import main

RECIPE = """
name = "tiny"
pipeline = "conformations"
target = 330.0

[md]
sequence = "AGA"
temperature = 400.0
nanoseconds = 0.004
equilibration = 0.0005
save_every = 0.1
platform = "Reference"

[train]
steps = 2
batch = 16
micro_batch = 16

[guide]
steps = 2
batch = 16
micro_batch = 16

[evaluate]
lag = 2
energies = 2
platform = "Reference"

[[arms]]
num_samples = 3
steps = 4
filter = false

[[arms]]
guidance = "force"
num_samples = 3
steps = 4
filter = false

[[arms]]
guidance = "energy"
correction = "weights"
gamma = 0.9
num_samples = 3
steps = 4
filter = false

[launch]
inline = ["conf-md", "conf-train", "conf-guide", "conf-sample", "conf-evaluate"]
"""


def test_a_run_compares_its_arms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    words = ["run", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "run"), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["ensembles"]) == [
        "MD 400 K", "MD 400 K reweighted", "base", "force", "energy-gamma=0.9-weights"
    ]  # fmt: skip
    assert found["ensembles"]["MD 400 K reweighted"][0]["ess"] < 1
    shifts = {name: "energy_shift" in runs[0] for name, runs in found["ensembles"].items()}
    assert [name for name, shifted in shifts.items() if shifted] == [
        "force", "energy-gamma=0.9-weights"
    ]  # fmt: skip
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("MD 330 K, half against half", "energy-gamma=0.9-weights", "data:image/png"):
        assert text in page
    assert main(words) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["computed"], again["kept"]) == (0, found["computed"])
    assert main(["report", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    for text in (shown, page):
        assert "js rg per residue" in text
        # Samples of a few steps are out of the reference's range, and it is said.
        assert re.search(r"\d \(0\.\d", text)
