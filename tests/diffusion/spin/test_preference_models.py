"""HPS v2 and ImageReward: checkpoints in the published names give what their networks give.

The oracles are the published architectures, written here with torch's own attention, on small
random weights.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import clip_folder, squares
from torch import Tensor, nn
from torch.nn import functional

from sparring.diffusion.spin.preference_models import ImageRewardModel, clip_from_open_clip
from sparring.diffusion.spin.scorers import build_scorer
from sparring.launch.errors import SparringError

WIDTH, PATCH, SIDE = 64, 8, 2
REAL = [(image, caption) for _, caption, image in squares(90)]


class Block(nn.Module):
    """A pre-norm transformer block with OpenCLIP's names."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 1, batch_first=True)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(WIDTH, 96), "c_proj": nn.Linear(96, WIDTH)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp["c_proj"](functional.gelu(self.mlp["c_fc"](self.ln_2(x))))


def tower() -> nn.ModuleDict:
    return nn.ModuleDict({"resblocks": nn.ModuleList([Block(), Block()])})


class OpenClip(nn.Module):
    """CLIP with OpenCLIP's names."""

    def __init__(self, words: int, longest: int) -> None:
        super().__init__()
        self.visual = nn.Module()
        self.visual.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.visual.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.visual.positional_embedding = nn.Parameter(torch.randn(SIDE**2 + 1, WIDTH))
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.visual.transformer = tower()
        self.visual.proj = nn.Parameter(torch.randn(WIDTH, 12))
        self.token_embedding = nn.Embedding(words, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(longest, WIDTH))
        self.transformer = tower()
        self.ln_final = nn.LayerNorm(WIDTH)
        self.text_projection = nn.Parameter(torch.randn(WIDTH, 12))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def cosine(self, pixels: Tensor, ids: Tensor, end: Tensor) -> Tensor:
        v = self.visual
        x = v.conv1(pixels).flatten(2).mT
        x = torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + v.positional_embedding
        x = v.ln_pre(x)
        for block in v.transformer["resblocks"]:
            x = block(x, None)
        image = v.ln_post(x[:, 0]) @ v.proj
        y = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.transformer["resblocks"]:
            y = block(y, mask)
        text = self.ln_final(y)[torch.arange(len(y)), end] @ self.text_projection
        return functional.cosine_similarity(image, text)


def test_hps_is_the_cosine_of_the_published_network(tmp_path: Path) -> None:
    from transformers import CLIPProcessor

    folder = clip_folder(tmp_path / "clip")
    processor = CLIPProcessor.from_pretrained(folder)
    torch.manual_seed(1)
    network = OpenClip(len(processor.tokenizer), 16).eval()
    checkpoint = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": network.state_dict()}, checkpoint)
    scorer = build_scorer(f"hpsv2:{checkpoint}|{folder}", REAL)
    images, captions = [i for i, _ in REAL[:3]], [c for _, c in REAL[:3]]
    found = scorer.score(images, captions)
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    ids = processor.tokenizer(captions, padding="max_length", max_length=16, return_tensors="pt")
    end = ids["attention_mask"].sum(1) - 1
    with torch.no_grad():
        expected = network.cosine(pixels, ids["input_ids"], end)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-4)
    assert scorer.name == "hpsv2"
    assert expected.std() > 1e-3


def test_open_clip_of_another_shape_is_refused() -> None:
    state = OpenClip(20, 16).state_dict()
    del state["visual.ln_post.bias"]
    with pytest.raises(RuntimeError, match="post_layernorm"):
        clip_from_open_clip(state, 1)


class VisionBlock(nn.Module):
    """A block of a vision transformer with BLIP's (timm's) names."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn = nn.ModuleDict(
            {"qkv": nn.Linear(WIDTH, 3 * WIDTH), "proj": nn.Linear(WIDTH, WIDTH)}
        )
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 96), "fc2": nn.Linear(96, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn["qkv"](self.norm1(x)).chunk(3, dim=-1)
        x = x + self.attn["proj"](functional.scaled_dot_product_attention(q, k, v))
        return x + self.mlp["fc2"](functional.gelu(self.mlp["fc1"](self.norm2(x))))


def image_reward_parts() -> tuple[nn.Module, Any, nn.Sequential]:
    """Vision transformer in BLIP's names, text encoder (whose names transformers kept), linears."""
    from transformers import BlipTextConfig
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    torch.manual_seed(2)
    vision = nn.Module()
    vision.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
    vision.pos_embed = nn.Parameter(torch.randn(1, SIDE**2 + 1, WIDTH))
    vision.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
    vision.blocks = nn.ModuleList([VisionBlock(), VisionBlock()])
    vision.norm = nn.LayerNorm(WIDTH, eps=1e-6)
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=120,
            hidden_size=128,
            encoder_hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=40,
            bos_token_id=2,
            sep_token_id=3,
        ),
        False,
    ).eval()
    sizes = (128, 32, 16, 1)
    linears = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    # Dropout between them takes every other place in the published list.
    mlp = nn.Sequential(*(part for layer in linears for part in (layer, nn.Dropout(0.2)))).eval()
    return vision, text, mlp


def test_image_reward_is_the_published_network() -> None:
    vision, text, mlp = image_reward_parts()
    state = {f"blip.visual_encoder.{k}": v for k, v in vision.state_dict().items()}
    state |= {f"blip.text_encoder.{k}": v for k, v in text.state_dict().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    state |= {f"mlp.layers.{k}": v for k, v in mlp.state_dict().items()}
    pixels = torch.randn(3, 3, PATCH * SIDE, PATCH * SIDE)
    ids = torch.randint(4, 120, (3, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [5], [6]])).long()
    with torch.no_grad():
        found = ImageRewardModel(state)(pixels, ids, mask)
        x = vision.patch_embed["proj"](pixels).flatten(2).mT  # type: ignore[index, operator]
        x = torch.cat([vision.cls_token.expand(3, 1, -1), x], 1) + vision.pos_embed  # type: ignore[operator]
        for block in vision.blocks:  # type: ignore[union-attr]
            x = block(x)
        seen = vision.norm(x)  # type: ignore[operator]
        read = text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2]),
        )
        reward = mlp(read.last_hidden_state[:, 0])[:, 0]
    torch.testing.assert_close(found, (reward - 0.16717362830052426) / 1.0333394966054072)
    assert found.std() > 1e-3


@pytest.mark.parametrize("kind", ["hpsv2", "imagereward"])
def test_a_checkpoint_that_is_not_there_is_named(kind: str, tmp_path: Path) -> None:
    folder = clip_folder(tmp_path / "clip")
    with pytest.raises(SparringError, match=rf"scorer '{kind}' cannot be loaded from"):
        build_scorer(f"{kind}:{tmp_path}/none.pt|{folder}", REAL)
    torch.save({"weight": torch.ones(2)}, tmp_path / "other.pt")
    with pytest.raises(SparringError, match=rf"scorer '{kind}' cannot be loaded from"):
        build_scorer(f"{kind}:{tmp_path}/other.pt|{folder}", REAL)
