"""Extrapolation in memory, on disk and folded into the reference."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparring.alignment.momentum import extrapolate, extrapolate_folder, folded_reference
from sparring.launch.errors import SparringError

Weights = dict[str, Tensor]


def weights(seed: int, dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed": (7, 4), "block.w": (4, 4), "block.b": (4,), "head": (4, 7)}
    made = {name: torch.randn(*s, generator=generator).to(dtype) for name, s in shapes.items()}
    return made | {"position_ids": torch.arange(5) + seed}


def same_bits(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].numpy().tobytes() == b[n].numpy().tobytes() for n in a
    )


def save_folder(folder: Path, tensors: Weights, shards: int = 1) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / "tokenizer.json").write_text(folder.name)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load_folder(folder: Path) -> Weights:
    loaded: Weights = {}
    for file in folder.glob("*.safetensors"):
        loaded |= load_file(file)
    return loaded


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.6, 1.0, -0.4])
def test_matches_numpy(alpha: float) -> None:
    new, old = weights(1), weights(2)
    result = extrapolate(new, old, alpha)
    for name in ("embed", "block.w", "block.b", "head"):
        expected = (1 + alpha) * new[name].double().numpy() - alpha * old[name].double().numpy()
        np.testing.assert_allclose(result[name], expected, rtol=1e-5, atol=1e-6)
        assert result[name].dtype == torch.float32
    assert torch.equal(result["position_ids"], new["position_ids"])


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=1, max_size=8))
def test_ends_are_exact_to_the_bit(pairs: list[tuple[float, float]]) -> None:
    """Signed zeros, subnormals, infinities and NaN included."""
    table = torch.tensor(pairs, dtype=torch.float32)
    new, old = {"w": table[:, 0].clone()}, {"w": table[:, 1].clone()}
    assert same_bits(extrapolate(new, old, 0.0), new)
    assert same_bits(extrapolate(new, old, -1.0), old)


def test_results_are_copies() -> None:
    new, old = weights(1), weights(2)
    kept = {name: tensor.clone() for name, tensor in new.items()}
    for alpha in (0.0, 0.3):
        for tensor in extrapolate(new, old, alpha).values():
            tensor.zero_()
    for tensor in extrapolate(new, old, -1.0).values():
        tensor.zero_()
    assert same_bits(new, kept)
    assert same_bits(old, weights(2))


def test_precision_is_float32_at_least() -> None:
    assert extrapolate(weights(1, torch.bfloat16), weights(2), 0.3)["head"].dtype == torch.float32
    assert extrapolate(weights(1), weights(2, torch.float64), 0.3)["head"].dtype == torch.float64
    assert extrapolate(weights(1, torch.bfloat16), weights(2), 0.0)["head"].dtype == torch.float32


def test_float32_weights_keep_a_step_that_bfloat16_loses() -> None:
    generator = torch.Generator().manual_seed(0)
    old = 0.02 * torch.randn(20_000, generator=generator)
    new = old + 2e-5 * torch.randn(20_000, generator=generator)

    def realised(result: Tensor) -> float:
        """Displacement of the extrapolated weights along the true step; the ideal is 1.3."""
        step = (new - old).double()
        return float((result.double() - old) @ step / (step @ step))

    from_float32 = extrapolate({"w": new}, {"w": old}, 0.3)["w"]
    rounded = extrapolate({"w": new.bfloat16()}, {"w": old.bfloat16()}, 0.3)["w"]
    assert realised(from_float32) == pytest.approx(1.3, abs=1e-4)
    error = (rounded - (old + 1.3 * (new - old))).abs().mean() / (new - old).abs().mean()
    assert error > 0.5


def test_lora_is_merged_before_extrapolation() -> None:
    generator = torch.Generator().manual_seed(0)
    base, a_new, a_old = (torch.randn(4, 4, generator=generator).double() for _ in range(3))
    b_new, b_old = (torch.randn(4, 4, generator=generator).double() for _ in range(2))
    full = extrapolate({"w": base + b_new @ a_new}, {"w": base + b_old @ a_old}, 0.3)["w"]
    delta = extrapolate({"d": b_new @ a_new}, {"d": b_old @ a_old}, 0.3)["d"]
    torch.testing.assert_close(base + delta, full)
    factors = extrapolate({"a": a_new, "b": b_new}, {"a": a_old, "b": b_old}, 0.3)
    assert (base + factors["b"] @ factors["a"] - full).abs().max() > 0.1


def test_mismatches_name_the_tensors() -> None:
    new, old = weights(1), weights(2)
    del new["head"], old["block.b"]
    old["embed"] = torch.zeros(8, 4)
    with pytest.raises(SparringError) as error:
        extrapolate(new, old, 0.3)
    for words in (
        "3 tensors",
        "block.b is only in new",
        "head is only in old",
        "embed is (7, 4) in new and (8, 4) in old",
    ):
        assert words in str(error.value)
    with pytest.raises(SparringError, match=r"tensor w is torch.float32 in new and torch.int64"):
        extrapolate({"w": torch.zeros(1)}, {"w": torch.zeros(1, dtype=torch.int64)}, 0.0)


def test_what_no_model_loads_may_be_missing_in_a_trained_policy() -> None:
    new = weights(1)
    stored = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "lm_head.weight": torch.ones(2, 2),
    }
    found = extrapolate(new, {**weights(2), **stored}, 0.3)
    assert found.keys() == new.keys()


@pytest.mark.parametrize("alpha", [math.nan, math.inf])
def test_refuses_an_infinite_alpha(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="alpha must be finite"):
        extrapolate(weights(1), weights(2), alpha)
    with pytest.raises(ValueError, match="alpha must be finite"):
        folded_reference(torch.zeros(1), torch.zeros(1), alpha)
    with pytest.raises(ValueError, match="alpha must be finite"):
        extrapolate_folder(tmp_path, tmp_path, tmp_path / "out", alpha)


@pytest.mark.parametrize("alpha", [0.0, -1.0, 0.3])
@pytest.mark.parametrize(("new_shards", "old_shards"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_folders_agree_with_memory(
    tmp_path: Path, alpha: float, new_shards: int, old_shards: int
) -> None:
    new = save_folder(tmp_path / "new", weights(1), new_shards)
    old = save_folder(tmp_path / "old", weights(2), old_shards)
    extrapolate_folder(new, old, tmp_path / "out", alpha)
    assert same_bits(load_folder(tmp_path / "out"), extrapolate(weights(1), weights(2), alpha))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in new.iterdir()}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"


def test_folder_index_and_metadata_suit_transformers(tmp_path: Path) -> None:
    new = save_folder(tmp_path / "new", weights(1, torch.bfloat16), 2)
    old = save_folder(tmp_path / "old", weights(2, torch.bfloat16), 2)
    out = tmp_path / "deep" / "out"
    extrapolate_folder(new, old, out, 0.3)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_folder(out).values())
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert shard.get_tensor(name).dtype in (torch.float32, torch.int64)


def test_folder_leaves_other_weights_behind(tmp_path: Path) -> None:
    new = save_folder(tmp_path / "new", weights(1))
    old = save_folder(tmp_path / "old", weights(2))
    (new / "pytorch_model.bin").write_bytes(b"stale")
    (new / "pytorch_model.bin.index.json").write_text("{}")
    (new / "checkpoint-3").mkdir()
    extrapolate_folder(new, old, tmp_path / "out", 0.3)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}


def test_folder_leaves_what_belongs_to_the_artifact_behind(tmp_path: Path) -> None:
    """With the key and manifest of `new` the folder would pass for whole, and for another one."""
    new, old = (save_folder(tmp_path / name, weights(1)) for name in ("new", "old"))
    for name in (".key", ".rank0.lock", "manifest.json", "metrics.jsonl"):
        (new / name).write_text("{}")
    extrapolate_folder(new, old, tmp_path / "out", 0.3)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "model.safetensors"}


def test_folder_mistakes_are_found_before_writing(tmp_path: Path) -> None:
    new = save_folder(tmp_path / "new", weights(1), 2)
    other = weights(2)
    del other["head"]
    old = save_folder(tmp_path / "old", other)
    out = tmp_path / "out"
    with pytest.raises(SparringError, match="head is only in new"):
        extrapolate_folder(new, old, out, 0.3)
    with pytest.raises(SparringError, match=r"has neither model.safetensors nor"):
        extrapolate_folder(new, tmp_path / "nowhere", out, 0.3)
    with pytest.raises(SparringError, match="is an input"):
        extrapolate_folder(new, old, tmp_path / "x" / ".." / "old", 0.3)
    (new / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(SparringError, match=r"model-00002-of-00002\.safetensors is missing"):
        extrapolate_folder(new, old, out, 0.3)
    assert not out.exists()


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not an index"),
        ('{"weights": {}}', "is not an index"),
        ('{"weight_map": []}', "is not an index"),
        ('{"weight_map": {}}', "lists no tensor"),
        ('{"weight_map": {"w": "../model.safetensors"}}', "outside its folder: ../model"),
        ('{"weight_map": {"w": "model.safetensors"}}', "lists w in model.safetensors, which is"),
    ],
)
def test_bad_indexes(tmp_path: Path, index: str, message: str) -> None:
    folder = save_folder(tmp_path / "new", weights(1))
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SparringError, match=message):
        extrapolate_folder(folder, folder, tmp_path / "out", 0.3)


def test_folded_reference() -> None:
    new, old = torch.tensor([-3.0, -0.25]), torch.tensor([-5.0, -0.5])
    assert folded_reference(new, old, 0.5).tolist() == [-2.0, -0.125]
    assert torch.equal(folded_reference(new, old, 0.0), new)
    with pytest.raises(ValueError, match=r"\(2,\) and \(2, 1\)"):
        folded_reference(new, old.unsqueeze(1), 0.3)
