"""The transformers: Hugging Face's format, padding, what they look at, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_text import TINY
from transformers import AutoConfig

from sparring.diffusion.dndm.config import ProcessConfig, TextModelConfig
from sparring.diffusion.dndm.network import TextDenoiser, TextDenoiserConfig, load, padded
from sparring.diffusion.dndm.vocabulary import Vocabularies, Vocabulary
from sparring.launch.config import plain
from sparring.launch.errors import SparringError


def network(*, source: bool = True, seed: int = 0, **options: Any) -> TextDenoiser:
    torch.manual_seed(seed)
    config = TextDenoiserConfig(
        vocab_size=9,
        source_vocab_size=7 if source else 0,
        max_target=8,
        max_source=6 if source else 0,
        network=plain(TextModelConfig(**{**vars(TINY), **options})),
        process=plain(ProcessConfig(noise="uniform", schedule="beta", beta=(17.0, 4.0), steps=0)),
        vocabulary_digest="d",
    )
    return TextDenoiser(config).eval()


X = torch.tensor([[3, 4, 5, 6, 1], [7, 1, 0, 0, 0]])
T = torch.tensor([0.25, 1.0])
SOURCE = torch.tensor([[3, 4, 5, 6], [6, 0, 0, 0]])


@pytest.mark.parametrize("source", [True, False])
def test_a_round_trip_changes_nothing(source: bool, tmp_path: Path) -> None:
    made = network(source=source)
    made.save_pretrained(str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    again = load(tmp_path)
    cond = {"source": SOURCE} if source else {}
    assert torch.equal(made(X, T, **cond).logits, again(X, T, **cond).logits)
    assert again.config.noise.law_K.tolist() == [0, 0, 0] + [1 / 6] * 6
    assert again.config.steps == float("inf")
    assert float(again.config.schedule.alpha(torch.tensor(0.5))) > 0.99  # Beta(17, 4)
    assert not again.training


@pytest.mark.parametrize("source", [True, False])
def test_padding_does_not_change_a_row(source: bool) -> None:
    made = network(source=source)
    cond = {"source": SOURCE} if source else {}
    together = made(X, T, **cond)
    alone = made(X[1:, :2], T[1:], **({"source": SOURCE[1:, :1]} if source else {}))
    torch.testing.assert_close(together.logits[1:, :2], alone.logits, atol=1e-6, rtol=1e-5)
    if source:
        torch.testing.assert_close(
            together.length_logits[1:], alone.length_logits, atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("source", [True, False])
def test_every_position_sees_every_other(source: bool) -> None:
    """No causal mask: the last token changes the first one's logits; so do source and time."""
    made = network(source=source)
    cond = {"source": SOURCE} if source else {}
    base = made(X, T, **cond).logits[0, 0]
    changed = X.clone()
    changed[0, 4] = 8
    assert not torch.allclose(base, made(changed, T, **cond).logits[0, 0], atol=1e-4)
    assert not torch.allclose(base, made(X, T / 2, **cond).logits[0, 0], atol=1e-4)
    if source:
        other = SOURCE.clone()
        other[0, 3] = 3
        assert not torch.allclose(base, made(X, T, source=other).logits[0, 0], atol=1e-4)


def test_a_window_is_what_every_other_layer_sees() -> None:
    text = torch.randint(3, 9, (1, 8), generator=torch.Generator().manual_seed(0))
    changed = text.clone()
    changed[0, 3] = 3 if text[0, 3] != 3 else 4
    for layers, reach in ((1, 2), (2, 8)):
        made = network(source=False, layers=layers, window=2)
        moved = made(text, T[:1]).logits[0] - made(changed, T[:1]).logits[0]
        seen = moved.abs().amax(1) > 1e-4
        assert seen.tolist() == [abs(place - 3) <= reach for place in range(8)]


def test_places_are_relative_without_a_source() -> None:
    """The same symbols further right, among padding that nothing looks at, have the same logits."""
    made = network(source=False, layers=2)
    text = torch.tensor([[3, 4, 5, 0, 0, 0, 0, 0]])
    here, there = (made(text.roll(by, 1), T[:1]).logits for by in (0, 4))
    torch.testing.assert_close(there[:, 4:7], here[:, :3], atol=1e-6, rtol=1e-5)


def test_without_time_t_is_not_read() -> None:
    made = network(time=False)
    assert torch.equal(made(X, T, source=SOURCE).logits, made(X, T / 3, source=SOURCE).logits)


def test_a_known_memory_and_shared_sources_are_the_same() -> None:
    made = network()
    base = made(X, T, source=SOURCE).logits
    assert torch.equal(base, made(X, T, source=SOURCE, memory=made.encode(SOURCE)).logits)
    twice = made(X.repeat(2, 1), T.repeat(2), source=SOURCE)
    torch.testing.assert_close(twice.logits, base.repeat(2, 1, 1), atol=1e-6, rtol=1e-5)
    assert twice.length_logits.shape == (2, 7)


def test_the_mask_of_noisy_tokens_is_read_and_asked_for() -> None:
    made = network(source=False, schedule_conditioning=True)
    noisy = torch.zeros_like(X, dtype=torch.bool)
    base = made(X, T, noisy=noisy).logits
    assert not torch.allclose(base, made(X, T, noisy=~noisy).logits, atol=1e-3)
    with pytest.raises(ValueError, match="trained with the mask of noisy tokens"):
        made(X, T)
    with pytest.raises(ValueError, match="trained without the mask"):
        network(source=False)(X, T, noisy=noisy)
    with pytest.raises(ValueError, match="source exactly"):
        network()(X, T)


def test_layers_start_from_draws_of_their_own() -> None:
    made = network(layers=2)
    one, two = (layer.linear1.weight for layer in made.decoder.layers)
    assert not torch.allclose(one, two)


def test_what_is_no_network_of_this_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SparringError, match=r"no config\.json"):
        load(tmp_path)
    made = network()
    made.save_pretrained(str(tmp_path))
    other = Vocabularies(Vocabulary.of(["A"], "words"), None)
    with pytest.raises(SparringError, match="another vocabulary"):
        load(tmp_path, other)
    state = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if not k.startswith("head.")},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(SparringError, match=r"lacks 2 weights, the first is head\.bias"):
        load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SparringError, match="weights cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(SparringError, match="not of a network"):
        load(tmp_path)


def test_it_needs_no_remote_code(tmp_path: Path) -> None:
    network().save_pretrained(str(tmp_path))
    AutoConfig.register("sparring-text-denoiser", TextDenoiserConfig, exist_ok=True)
    assert type(AutoConfig.from_pretrained(str(tmp_path))) is TextDenoiserConfig


def test_padded() -> None:
    assert padded([[3], [4, 5]]).tolist() == [[3, 0], [4, 5]]
