"""HPS v2 and ImageReward from their published checkpoints, on transformers' CLIP and BLIP.

Both are files of other packages' parameter names; renamed, they are models that transformers has,
so neither package is needed. Sizes are read from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor, nn

from sparring.launch.collective import device

State = dict[str, Tensor]
_HEAD = 64  # width of an attention head in all of the published models
_OPEN_CLIP = (
    (r"visual\.conv1", "vision_model.embeddings.patch_embedding"),
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.ln_pre", "vision_model.pre_layrnorm"),
    (r"visual\.ln_post", "vision_model.post_layernorm"),
    (r"visual\.transformer\.resblocks", "vision_model.encoder.layers"),
    (r"token_embedding", "text_model.embeddings.token_embedding"),
    (r"positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final", "text_model.final_layer_norm"),
    (r"transformer\.resblocks", "text_model.encoder.layers"),
    (r"\.ln_(\d)\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
_BLIP = (
    (r"^visual_encoder\.cls_token", "embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed", "embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj", "embeddings.patch_embedding"),
    (r"^visual_encoder\.norm", "post_layernorm"),
    (r"^visual_encoder\.blocks", "encoder.layers"),
    (r"\.norm(\d)\.", r".layer_norm\1."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
    (r"\.attn\.", ".self_attn."),
)


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def _layers(state: Mapping[str, Tensor], prefix: str) -> int:
    found = {int(m[1]) for name in state if (m := re.match(rf"{re.escape(prefix)}\.(\d+)\.", name))}
    return max(found) + 1


def read_checkpoint(path: Path) -> State:
    """A state dict from a file, also where it is kept under "state_dict"; no code is run."""
    held = torch.load(path, map_location="cpu", weights_only=True)
    return dict(held.get("state_dict", held))


def clip_from_open_clip(state: Mapping[str, Tensor], end: int) -> nn.Module:
    """transformers' CLIP with the weights of an OpenCLIP (of HPS v2: ViT-H/14, GELU).

    Args:
        end: number of the token that ends a text, where it is read off.
    """
    from transformers import CLIPConfig, CLIPModel

    patch = state["visual.conv1.weight"]
    width, text = patch.shape[0], state["ln_final.weight"].shape[0]
    side = round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    config = CLIPConfig(
        projection_dim=state["text_projection"].shape[1],
        vision_config={
            "hidden_size": width,
            "intermediate_size": len(state["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": _layers(state, "visual.transformer.resblocks"),
            # ViT-H has 16 heads of 80; all smaller ones have heads of 64.
            "num_attention_heads": 16 if width == 1280 else width // _HEAD,
            "patch_size": patch.shape[-1],
            "image_size": side * patch.shape[-1],
            "hidden_act": "gelu",
        },
        text_config={
            "hidden_size": text,
            "intermediate_size": len(state["transformer.resblocks.0.mlp.c_fc.bias"]),
            "num_hidden_layers": _layers(state, "transformer.resblocks"),
            "num_attention_heads": text // _HEAD,
            "vocab_size": len(state["token_embedding.weight"]),
            "max_position_embeddings": len(state["positional_embedding"]),
            "hidden_act": "gelu",
            "eos_token_id": end,
        },
    )
    converted: State = {
        "logit_scale": state["logit_scale"],
        "visual_projection.weight": state["visual.proj"].T,
        "text_projection.weight": state["text_projection"].T,
    }
    for name, value in state.items():
        if name in ("logit_scale", "visual.proj", "text_projection", "attn_mask"):
            continue
        new = _renamed(name, _OPEN_CLIP)
        if "in_proj_" in new:
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                converted[new.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            converted[new] = value
    model = CLIPModel(config)
    model.load_state_dict(converted)
    return model.eval()  # type: ignore[no-any-return]


class ImageRewardModel(nn.Module):
    """BLIP's image encoder, its text encoder that attends to the image, and linear layers.

    Xu et al., *ImageReward*, arXiv 2304.05977. The linear layers have no activations between them.

    Args:
        state: tensors of the published checkpoint.
    """

    mean, std = 0.16717362830052426, 1.0333394966054072
    """Of rewards on the authors' validation set; scores are centred and scaled by them."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        from transformers import BlipTextConfig, BlipVisionConfig
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        blip = {k.removeprefix("blip."): v for k, v in state.items() if k.startswith("blip.")}
        patch = blip["visual_encoder.patch_embed.proj.weight"]
        words = blip["text_encoder.embeddings.word_embeddings.weight"]
        side = round((blip["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
        vision = BlipVisionConfig(
            hidden_size=patch.shape[0],
            intermediate_size=len(blip["visual_encoder.blocks.0.mlp.fc1.bias"]),
            num_hidden_layers=_layers(blip, "visual_encoder.blocks"),
            num_attention_heads=patch.shape[0] // _HEAD,
            image_size=side * patch.shape[-1],
            patch_size=patch.shape[-1],
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            vocab_size=len(words),
            hidden_size=words.shape[1],
            encoder_hidden_size=patch.shape[0],
            intermediate_size=len(blip["text_encoder.encoder.layer.0.intermediate.dense.bias"]),
            num_hidden_layers=_layers(blip, "text_encoder.encoder.layer"),
            num_attention_heads=words.shape[1] // _HEAD,
            max_position_embeddings=len(blip["text_encoder.embeddings.position_embeddings.weight"]),
        )
        self.vision, self.text = BlipVisionModel(vision), BlipTextModel(text, False)
        self.vision.load_state_dict(
            {_renamed(k, _BLIP): v for k, v in blip.items() if k.startswith("visual_encoder.")}
        )
        own = {
            k.removeprefix("text_encoder."): v
            for k, v in blip.items()
            if k.startswith("text_encoder.") and not k.endswith("position_ids")
        }
        self.text.load_state_dict(own)
        linear = sorted(
            (k for k in state if re.fullmatch(r"mlp\.layers\.\d+\.weight", k)),
            key=lambda k: int(k.split(".")[2]),
        )
        shapes = [state[k].shape for k in linear]
        self.mlp = nn.Sequential(*(nn.Linear(taken, given) for given, taken in shapes))
        for layer, name in zip(self.mlp, linear, strict=True):
            bias = name.removesuffix("weight") + "bias"
            layer.load_state_dict({"weight": state[name], "bias": state[bias]})
        self.eval()

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B,) scores of images (B, 3, H, W) with token numbers (B, L)."""
        image = self.vision(pixels).last_hidden_state
        seen = torch.ones(image.shape[:2], dtype=torch.long, device=image.device)
        made = self.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=seen,
        )
        reward = self.mlp(made.last_hidden_state[:, 0])[:, 0]
        return (reward - self.mean) / self.std  # type: ignore[no-any-return]


class PreferenceModel:
    """A scorer by a network that takes prepared images and tokens.

    Args:
        name: of the scorer.
        model: the network.
        score: of the network and what the processors return, (B,).
        images: processor of images.
        texts: tokenizer; `longest` tokens at most.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        score: Callable[[Any, Any, Any], Tensor],
        images: Any,
        texts: Any,
        longest: int,
        batch: int = 32,
    ) -> None:
        self.name, self._model, self._score = name, model, score
        self._images, self._texts, self._longest, self._batch = images, texts, longest, batch

    @torch.no_grad()
    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> list[float]:
        """One number an image."""
        model, found = self._model.to(device()), []
        for start in range(0, len(images), self._batch):
            part = slice(start, start + self._batch)
            pictures = [image.convert("RGB") for image in images[part]]
            seen = self._images(images=pictures, return_tensors="pt").to(device())
            read = self._texts(
                list(prompts[part]),
                padding="max_length",
                truncation=True,
                max_length=self._longest,
                return_tensors="pt",
            ).to(device())
            found += self._score(model, seen, read).tolist()
        return found


def _cosine(model: Any, seen: Any, read: Any) -> Tensor:
    made = model(
        pixel_values=seen["pixel_values"],
        input_ids=read["input_ids"],
        attention_mask=read["attention_mask"],
    )
    return (made.image_embeds * made.text_embeds).sum(1)  # type: ignore[no-any-return]


def _reward(model: Any, seen: Any, read: Any) -> Tensor:
    return model(seen["pixel_values"], read["input_ids"], read["attention_mask"])  # type: ignore[no-any-return]


def hpsv2(checkpoint: Path, processor: str) -> PreferenceModel:
    """Wu et al., *Human Preference Score v2*, arXiv 2306.09341: the cosine of a tuned CLIP.

    Args:
        checkpoint: HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.
        processor: folder or hub id with CLIP ViT-H/14's image processor and tokenizer.
    """
    from transformers import CLIPProcessor

    both = CLIPProcessor.from_pretrained(processor)
    model = clip_from_open_clip(read_checkpoint(checkpoint), both.tokenizer.eos_token_id)
    longest = model.config.text_config.max_position_embeddings  # type: ignore[union-attr]
    return PreferenceModel("hpsv2", model, _cosine, both.image_processor, both.tokenizer, longest)  # type: ignore[arg-type]


def image_reward(checkpoint: Path, tokenizer: str) -> PreferenceModel:
    """ImageReward of its checkpoint.

    Args:
        checkpoint: ImageReward.pt.
        tokenizer: folder or hub id of BERT's tokenizer.
    """
    from transformers import AutoTokenizer, CLIPImageProcessor

    model = ImageRewardModel(read_checkpoint(checkpoint))
    size = model.vision.config.image_size
    images = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    texts = AutoTokenizer.from_pretrained(tokenizer)
    return PreferenceModel("imagereward", model, _reward, images, texts, longest=35)
