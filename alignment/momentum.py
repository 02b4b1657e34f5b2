"""APO's momentum: extrapolation past the newest solution (arXiv 2410.06293).

π_{t+1} ∝ π̂_{t+1}·(π̂_{t+1}/π̂_t)^α. Both factors are solutions of a solve, never the extrapolated
policy it started from, and the last solution is the result as it is. In parameters this reads
θ̂_new + α(θ̂_new − θ̂_old), exact for a softmax-linear policy and what the paper runs.

Give it float32 weights: an iteration moves a weight by less than bfloat16 resolves, so 16-bit
checkpoints lose much of the difference that is extrapolated.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparring.launch.artifacts import MANIFEST
from sparring.launch.errors import SparringError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack"}


def _require_finite(alpha: float) -> None:
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite (0.3 in the paper), got {alpha}")


# What checkpoints on the hub may store although the model has no such weight, so that a trained
# policy lacks it: buffers of older transformers, and a head that is the embeddings.
_NOT_LOADED = ("rotary_emb.inv_freq", ".masked_bias", "lm_head.weight")


def _require_same(new: Mapping[str, tuple[int, ...]], old: Mapping[str, tuple[int, ...]]) -> None:
    """Names and shapes agree, or an error that lists where they do not."""
    faults = [f"{name} is only in new" for name in sorted(new.keys() - old.keys())]
    faults += [
        f"{name} is only in old"
        for name in sorted(old.keys() - new.keys())
        if not name.endswith(_NOT_LOADED)
    ]
    faults += [
        f"{name} is {new[name]} in new and {old[name]} in old"
        for name in sorted(new.keys() & old.keys())
        if new[name] != old[name]
    ]
    if faults:
        shown = "; ".join(faults[:5]) + ("; ..." if len(faults) > 5 else "")
        raise SparringError(
            f"{len(faults)} tensors do not match ({shown}). Extrapolation needs two checkpoints of "
            "one model; merge LoRA adapters first"
        )


def _extrapolate_tensor(name: str, new: Tensor, old: Tensor, alpha: float) -> Tensor:
    if new.is_floating_point() != old.is_floating_point():
        raise SparringError(f"tensor {name} is {new.dtype} in new and {old.dtype} in old")
    if not new.is_floating_point():
        return new.clone()
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    # The ends are branches: new + α(new − old) rounds at α = −1, and (1 + α)new − α·old, which is
    # exact at both for ordinary numbers, still turns −0 into +0 and 0·inf into NaN. In between the
    # difference form is the better one, since the difference of two near numbers is exact.
    if alpha == 0:
        return new.to(dtype, copy=True)
    if alpha == -1:
        return old.to(dtype, copy=True)
    new, old = new.to(dtype), old.to(dtype)
    return new + alpha * (new - old)


def extrapolate(
    new: Mapping[str, Tensor], old: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """θ̂_new + α(θ̂_new − θ̂_old), tensor by tensor (arXiv 2410.06293, section 5).

    Args:
        new: state dict of the newest solution π̂_{t+1}.
        old: state dict of the one before, π̂_t; the same names and shapes.
        alpha: momentum; 0 gives `new` and −1 gives `old`, both bit for bit.

    Returns:
        Fresh tensors in float32, or float64 where an input is. Integer and boolean buffers are
        copied from `new`.

    Raises:
        ValueError: `alpha` is not finite.
        SparringError: names, shapes or kinds of dtype differ; the message names the tensors.
    """
    _require_finite(alpha)
    _require_same(
        {name: tuple(t.shape) for name, t in new.items()},
        {name: tuple(t.shape) for name, t in old.items()},
    )
    return {name: _extrapolate_tensor(name, t, old[name], alpha) for name, t in new.items()}


def folded_reference(logp_new: Tensor, logp_old: Tensor, alpha: float) -> Tensor:
    """Log-probabilities under the extrapolated policy, without making it: (1+α)·new − α·old.

    log π_t(y|x) = (1+α) log π̂_t(y|x) − α log π̂_{t−1}(y|x) − log Z′(x) (arXiv 2410.06293, eq. 3.6).
    This leaves out log Z′(x), one number a prompt. It cancels in Δ_w − Δ_l, so DPO, IPO and SPIN
    see the exact reference. SPPO regresses each Δ on its own: there the missing log Z′ shifts every
    target of the prompt and the solution differs; extrapolate the weights instead.

    Args:
        logp_new: (B,) nats, summed over the response, under π̂_t.
        logp_old: (B,) nats, under π̂_{t−1}.
        alpha: momentum; 0 gives `logp_new`.

    Returns:
        (B,) unnormalised log-probabilities in nats.

    Raises:
        ValueError: `alpha` is not finite, or the shapes differ.
    """
    _require_finite(alpha)
    if logp_new.shape != logp_old.shape:
        raise ValueError(
            "logp_new and logp_old must have one shape, got "
            f"{tuple(logp_new.shape)} and {tuple(logp_old.shape)}"
        )
    return (1 + alpha) * logp_new - alpha * logp_old


def _weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor of a sharded folder."""
    path = folder / _INDEX
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SparringError(f"{path} is not an index with a weight_map: {error!r}") from error
    if not files:
        raise SparringError(f"{path} lists no tensor")
    strange = sorted({file for file in files.values() if Path(file).name != file})
    if strange:
        raise SparringError(f"{path} names shards outside its folder: {', '.join(strange)}")
    return files


def _open(folder: Path, file: str, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(folder / file, framework="pt", device="cpu"))
    except (OSError, SafetensorError) as error:
        raise SparringError(f"{folder / file} is missing or not safetensors: {error}") from error


class _Weights:
    """The tensors of a model folder, mapped from disk and read one at a time."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.sharded = (folder / _INDEX).is_file()
        if not self.sharded and not (folder / _SINGLE).is_file():
            raise SparringError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
        listed = _weight_map(folder) if self.sharded else {}
        files = sorted(set(listed.values())) if self.sharded else [_SINGLE]
        self._open_files = {file: _open(folder, file, stack) for file in files}
        held = {file: list(shard.keys()) for file, shard in self._open_files.items()}
        self.file_of = listed or dict.fromkeys(held[_SINGLE], _SINGLE)
        absent = [f"{name} in {f}" for name, f in self.file_of.items() if name not in held[f]]
        if absent:
            raise SparringError(f"{folder}: the index lists {absent[0]}, which is not there")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: tuple(self._open_files[file].get_slice(name).get_shape())
            for name, file in self.file_of.items()
        }

    def files(self) -> dict[str, list[str]]:
        """Tensor names of each file."""
        return {f: [n for n, g in self.file_of.items() if g == f] for f in self._open_files}

    def __getitem__(self, name: str) -> Tensor:
        tensor: Tensor = self._open_files[self.file_of[name]].get_tensor(name)
        return tensor


def extrapolate_folder(new: Path, old: Path, out: Path, alpha: float) -> None:
    """`extrapolate` on two Hugging Face model folders, one shard of `new` in memory at a time.

    The folders may be sharded differently. `out` gets the shards of `new` in float32, its other
    top-level files (config, tokenizer, ...) unchanged, and an index when there is more than one
    shard. The copied config still names the dtype of `new`: a 16-bit one makes loaders round.

    Args:
        new: folder of the newest solution π̂_{t+1}: `model.safetensors`, or shards with their index.
        old: folder of the one before, π̂_t.
        out: folder to write; made if needed, and neither of the other two.
        alpha: momentum.

    Raises:
        ValueError: `alpha` is not finite.
        SparringError: a folder holds no readable safetensors, the tensors do not match, or `out` is
            an input. Names and shapes are checked before anything is written.
    """
    _require_finite(alpha)
    if out.resolve() in {new.resolve(), old.resolve()}:
        raise SparringError(f"{out} is an input of the extrapolation; choose another folder")
    with ExitStack() as stack:
        new_weights, old_weights = _Weights(new, stack), _Weights(old, stack)
        _require_same(new_weights.shapes, old_weights.shapes)
        out.mkdir(parents=True, exist_ok=True)
        total_size = 0
        for file, names in new_weights.files().items():
            shard = {
                name: _extrapolate_tensor(name, new_weights[name], old_weights[name], alpha)
                for name in names
            }
            total_size += sum(tensor.nbytes for tensor in shard.values())
            save_file(shard, out / file, metadata={"format": "pt"})
    if new_weights.sharded:
        index = {"metadata": {"total_size": total_size}, "weight_map": new_weights.file_of}
        (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8")
    for path in sorted(new.iterdir()):
        is_weight = path.suffix in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        # An artifact's own files stay with it: its manifest would call the new folder complete.
        is_own = path.name.startswith(".") or path.name in (MANIFEST, "metrics.jsonl")
        if path.is_file() and not is_weight and not is_own:
            shutil.copyfile(path, out / path.name)
