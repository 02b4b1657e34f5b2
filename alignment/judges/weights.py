"""Finding a judge's checkpoint, reading its tensors, and naming it by its bytes."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from sparring.launch import collective
from sparring.launch.errors import SparringError

TOKENIZER_FILES = ("tokenizer.json", "spm.model", "spiece.model", "vocab.txt")
"""Any one of these makes a folder hold a tokenizer."""
_SMALL = ("*.json", "*.model", "*.txt", "*.jinja")
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"


def checkpoint_name(path_or_hub_id: str | Path) -> str:
    """The path or hub id to hand to transformers.

    Raises:
        SparringError: it is written as a path and nothing is there.
    """
    name = str(path_or_hub_id)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    looks_like_path = path.is_absolute() or name[:1] in ".~" or name.count("/") != 1
    if path.exists() or looks_like_path:
        raise SparringError(
            f"judge checkpoint {name!r}: there is no such folder "
            f"(give a folder of a transformers checkpoint, or a hub id owner/name)"
        )
    return name


def checkpoint_folder(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """A checkpoint's folder on this machine, fetched from the hub when it is a hub id.

    Args:
        path_or_hub_id: folder or hub id.
        weights: fetch the tensors too, as safetensors where there are any; without, only
            configuration and tokenizer.

    Raises:
        SparringError: no such folder, or the hub cannot be reached.
    """
    name = checkpoint_name(path_or_hub_id)
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    wanted = [*_SMALL, "*.safetensors"] if weights else list(_SMALL)
    try:
        folder = Path(snapshot_download(name, allow_patterns=wanted))
        if weights and not list(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*wanted, _PICKLE]))
    except (OSError, ValueError) as error:
        raise SparringError(
            f"judge checkpoint {name!r} is no folder here and could not be fetched from the hub: "
            f"{str(error).splitlines()[0]}"
        ) from None
    return folder


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, on the CPU.

    Raises:
        SparringError: there are none, or a file is damaged or holds more than tensors.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    index = folder / f"{_SAFETENSORS}.index.json"
    files = [folder / _SAFETENSORS]
    if index.is_file():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / name for name in sorted(set(shards))]
    if (folder / _PICKLE).is_file() and not files[0].is_file():
        return _unpickled(folder / _PICKLE)
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        if not path.is_file():
            raise SparringError(f"judge checkpoint {str(folder)!r} has no {path.name}")
        try:
            tensors |= load_file(path)
        except SafetensorError as error:
            raise SparringError(f"{path} is not a readable safetensors file: {error}") from None
    return tensors


def _unpickled(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a pickled checkpoint; nothing in the file is run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise SparringError(
            f"{path} holds more than tensors, or is damaged ({str(error).splitlines()[0]}); "
            f"pickles that run code are not loaded: convert it to {_SAFETENSORS}"
        ) from None
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise SparringError(f"{path} is not a table of tensors; convert it to {_SAFETENSORS}")
    return found


def check_weights(
    name: str, model: torch.nn.Module, tensors: dict[str, torch.Tensor], harmless: Iterable[str]
) -> None:
    """Refuse tensors that do not fill a model exactly.

    Args:
        name: of the checkpoint, for the message.
        model: may be on the meta device.
        tensors: by the model's own names.
        harmless: names that may be there although the model has no use for them.

    Raises:
        SparringError: names what is missing, unexpected or of another shape.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing = sorted(set(shapes) - set(tensors))
    unexpected = sorted(set(tensors) - set(shapes) - set(harmless))
    other = [
        f"{key} is {tuple(tensors[key].shape)}, not {shape}"
        for key, shape in sorted(shapes.items())
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    problems = (("missing", missing), ("unexpected", unexpected), ("other shapes", other))
    told = [
        f"{what} weights: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' * (len(keys) > 5)}"
        for what, keys in problems
        if keys
    ]
    if told:
        raise SparringError(
            f"judge checkpoint {name!r} does not fit its model; {'; '.join(told)}. "
            f"Is it another model, or another size than its configuration says?"
        )


def load_or_explain(loader: Any, name: str, **options: Any) -> Any:
    """`loader.from_pretrained(name)`, with a message that names the checkpoint when it fails.

    Raises:
        SparringError: files are missing or unreadable, or the hub cannot be reached.
    """
    try:
        return loader.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError) as error:
        raise SparringError(f"judge checkpoint {name!r} cannot be loaded: {error}") from error


def placement(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where a judge runs: this rank's GPU in float16 when there is one, else the CPU in float32.

    Raises:
        SparringError: the dtype is not one of float32, float16, bfloat16.
    """
    where = torch.device(device) if device else collective.device()
    allowed = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    chosen = dtype or ("float16" if where.type == "cuda" else "float32")
    if chosen not in allowed:
        raise SparringError(f"judge dtype {dtype!r} is not one of {', '.join(allowed)}")
    return where, allowed[chosen]


def weights_hash(model: torch.nn.Module, tokenizer: Any) -> str:
    """16 hex digits over names, dtypes, shapes and bytes of the weights, and the vocabulary."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()[:16]
