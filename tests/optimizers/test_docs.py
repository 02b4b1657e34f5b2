"""Every Python block of docs/optimizers/mars.md runs, on a tiny model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "optimizers" / "mars.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)

# What the page takes for granted.
SETUP = """
import os
os.environ["DS_ACCELERATOR"] = "cpu"
import sys
import torch
from datasets import Dataset
from transformers import AutoTokenizer, AutoModelForCausalLM
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
folder = sys.argv[2]
words = ["sun and moon", "rain on tin", "an old red house", "two cats sat"] * 2
texts = Dataset.from_list([{"text": t} for t in words])
pairs = Dataset.from_list([{"prompt": "say:", "chosen": t, "rejected": "no"} for t in words])
ids = torch.arange(5, 13)[None].repeat(2, 1)
loader = [{"input_ids": ids + i, "labels": ids + i} for i in range(3)]
dataset = [{"input_ids": list(range(5, 13)), "labels": list(range(5, 13))}] * 8
before = [p.detach().clone() for p in model.parameters()]
"""
AFTER = """
assert any(not torch.equal(a.to(b.device), b) for a, b in zip(before, model.parameters()))
"""


def test_the_page_has_the_promised_uses() -> None:
    text = "\n".join(BLOCKS)
    uses = (
        "Trainer(",
        "MARSFactory",
        "SFTTrainer(",
        "DPOTrainer(",
        "Accelerator()",
        '"type": "MARS"',
    )
    for use in uses:
        assert use in text


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int, tiny_model: Path, tmp_path: Path) -> None:
    # gloo does what this op does; compiling it takes minutes.
    op = "import deepspeed.ops; deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
    block = BLOCKS[number]
    script = SETUP + (op if "deepspeed" in block else "") + block + AFTER
    from sparring.launch.processes import free_port

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if "deepspeed" in block:
        environment |= place | {"MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tiny_model), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
