"""Networks that transformers reads, of which nothing may be missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparring.launch.errors import SparringError


def read_network(kind: Any, folder: Path, **options: Any) -> Any:
    """`kind.from_pretrained` of a folder, in evaluation mode.

    transformers itself draws weights anew that a file lacks, and only prints a warning.

    Args:
        kind: a class of transformers' models, or an auto class.
        folder: config and weights.
        options: of `from_pretrained`.

    Raises:
        SparringError: the weights cannot be read, or some are missing.
    """
    from safetensors import SafetensorError

    try:
        network, told = kind.from_pretrained(str(folder), output_loading_info=True, **options)
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise SparringError(f"{folder}: its weights cannot be read: {error}") from None
    missing = sorted(told["missing_keys"])
    if missing:
        raise SparringError(
            f"{folder} lacks {len(missing)} weights, the first is {missing[0]}; it is of another "
            "architecture or version, or was not written whole: train or save it again"
        )
    return network.eval()
