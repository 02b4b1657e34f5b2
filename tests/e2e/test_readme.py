"""The README's data stages, run as a newcomer would paste them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def block(heading: str) -> str:
    """The first bash block below a heading of the README."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    below = text.split(heading, 1)[1]
    found = re.search(r"^```bash\n(.*?)^```$", below, re.M | re.S)
    assert found, heading
    return found[1]


def test_the_data_stages_go_from_prompts_to_a_policy(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-e", "-c", block("### 3. The data stages alone")],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "work/policy/model.safetensors").stat().st_size > 5e8
    assert (tmp_path / "work/judged/judged.parquet").is_file()
    printed = [line.split(":")[0] for line in done.stdout.splitlines() if line[:5] == "work/"]
    assert printed == [f"work/{n}" for n in ("responses", "judged", "pairs", "reference", "policy")]
