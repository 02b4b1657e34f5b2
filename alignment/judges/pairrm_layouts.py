"""PairRM's two released layouts, read into one network.

`PairRM-hf` is a transformers folder. The original llm-blender/PairRM has LLM-Blender's own settings
as its config.json and no DeBERTa configuration: that, and the tokenizer, are those of the model it
was trained from. Names of tensors agree.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from sparring.alignment.judges.deberta import DebertaV2Config, DebertaV2PairRM
from sparring.alignment.judges.weights import (
    TOKENIZER_FILES,
    check_weights,
    checkpoint_folder,
    load_or_explain,
    read_weights,
)
from sparring.launch.errors import SparringError

SOURCE_TOKENS = 1224
CANDIDATE_TOKENS = 412
MARKERS = ("<|source|>", "<|candidate1|>", "<|candidate2|>")
ADDED_TOKENS = (*MARKERS, "<|candidate|>")
"""In LLM-Blender's order, which gives them their ids. It marks both candidates with the last one
and replaces it before the forward pass."""
MARKER_KEYS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")

HARMLESS = frozenset({"pretrained_model.embeddings.position_ids"})
"""0, 1, 2, ...: transformers before 4.31 stored this constant with the weights."""
_EMBEDDING = "pretrained_model.embeddings.word_embeddings.weight"


@dataclass(frozen=True)
class Loaded:
    """What a folder holds."""

    model: DebertaV2PairRM
    tokenizer: Any
    source_tokens: int
    """Where a prompt is cut."""
    total_tokens: int
    """What prompt and both candidates have together."""


def load_checkpoint(path_or_hub_id: str | Path, base: str, dtype: torch.dtype) -> Loaded:
    """Read a checkpoint of either layout, on the CPU.

    Args:
        path_or_hub_id: folder or hub id.
        base: for the original layout, folder or hub id with the DeBERTa configuration and
            tokenizer; empty: the `model_name` of the checkpoint's settings.
        dtype: of the weights.

    Raises:
        SparringError: no such checkpoint, neither layout, something is missing, or the weights do
            not fit.
    """
    folder = checkpoint_folder(path_or_hub_id)
    settings = _json(folder / "config.json")
    if "ranker_type" in settings:
        return _original(folder, settings, base, dtype)
    for key in ("n_tasks", "drop_out", *MARKER_KEYS):
        if key not in settings:
            raise SparringError(
                f"{str(path_or_hub_id)!r} is not a PairRM checkpoint: its config.json has neither "
                f"{key!r} (layout of PairRM-hf) nor 'ranker_type' (layout of llm-blender/PairRM)"
            )
    config = load_or_explain(DebertaV2Config, str(folder))
    tokenizer = load_or_explain(AutoTokenizer, str(folder))
    model = _filled(folder, config, read_weights(folder), dtype)
    return Loaded(model, tokenizer, SOURCE_TOKENS, SOURCE_TOKENS + 2 * CANDIDATE_TOKENS)


def _original(folder: Path, settings: dict[str, Any], base: str, dtype: torch.dtype) -> Loaded:
    kind = f"{settings['ranker_type']}/{settings.get('model_type')}"
    if kind != "pairranker/deberta":
        raise SparringError(
            f"{folder} holds the LLM-Blender ranker {kind!r}; PairRM is 'pairranker/deberta' "
            f"(for a scalar reward model, use the judge reward-model)"
        )
    name = base or settings.get("model_name") or ""
    if not name:
        raise SparringError(
            f"{folder / 'config.json'} names no model_name; give the option base: the folder or "
            f"hub id of the DeBERTa that it was trained from"
        )
    source = _base_folder(folder, name)
    config = load_or_explain(DebertaV2Config, str(source))
    has_tokenizer = any((folder / file).is_file() for file in TOKENIZER_FILES)
    tokenizer = load_or_explain(AutoTokenizer, str(folder if has_tokenizer else source))
    tokenizer.add_tokens(list(ADDED_TOKENS))
    tensors = read_weights(folder)
    if _EMBEDDING in tensors and len(tensors[_EMBEDDING]) != len(tokenizer):
        raise SparringError(
            f"{folder} has embeddings of {len(tensors[_EMBEDDING])} tokens, the tokenizer of "
            f"{name!r} has {len(tokenizer)} with the markers: it was trained from another base"
        )
    config.vocab_size = len(tokenizer)
    config.n_tasks = int(settings.get("n_tasks", 1))
    config.drop_out = float(settings.get("drop_out", 0.05))
    for key, marker in zip(MARKER_KEYS, MARKERS, strict=True):
        setattr(config, key, tokenizer.convert_tokens_to_ids(marker))
    source_tokens = settings.get("source_maxlength") or SOURCE_TOKENS
    candidate_tokens = settings.get("candidate_maxlength") or CANDIDATE_TOKENS
    model = _filled(folder, config, tensors, dtype)
    return Loaded(model, tokenizer, source_tokens, source_tokens + 2 * candidate_tokens)


def _base_folder(folder: Path, name: str) -> Path:
    """Where the original layout's DeBERTa configuration and tokenizer are."""
    advice = "give the option base: a folder with config.json and tokenizer of that model"
    try:
        source = checkpoint_folder(name, weights=False)
    except SparringError as error:
        raise SparringError(
            f"{folder} is in the original layout, which has no DeBERTa configuration of its own; "
            f"it was trained from {name!r}, which is not here ({error}); {advice}"
        ) from None
    if _json(source / "config.json").get("model_type") != "deberta-v2":
        raise SparringError(f"{source} is not a DeBERTa-v2 or -v3 model; {advice}")
    if not any((place / file).is_file() for place in (folder, source) for file in TOKENIZER_FILES):
        raise SparringError(
            f"neither {folder} nor {source} has a tokenizer "
            f"({', '.join(TOKENIZER_FILES)}); {advice}"
        )
    return source


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SparringError(f"{path.parent} is not a checkpoint: it has no {path.name}") from None
    except json.JSONDecodeError as error:
        raise SparringError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise SparringError(f"{path} is not a JSON object")
    return found


def _filled(
    folder: Path, config: DebertaV2Config, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> DebertaV2PairRM:
    """The network with these tensors and no others."""
    with torch.device("meta"):
        shapes = DebertaV2PairRM(config)
    # transformers would go on with random numbers in the place of what is missing.
    check_weights(str(folder), shapes, tensors, HARMLESS)
    return DebertaV2PairRM.from_pretrained(  # type: ignore[no-any-return]
        None, config=config, state_dict=tensors, dtype=dtype
    )
