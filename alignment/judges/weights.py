"""Loading a judge's checkpoint, and naming it by its bytes."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sparring.launch.errors import SparringError


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
    """Where a judge runs: CUDA in float16 when there is one, else the CPU in float32.

    Raises:
        SparringError: the dtype is not one of float32, float16, bfloat16.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
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
