"""`generate`: what people know from Hugging Face, for masked language models and denoisers.

Shape legend: B rows, N positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparring.diffusion.dndm.algorithms import Sampler, algorithm, settings_of
from sparring.diffusion.dndm.denoisers import Denoiser, Sampled, check_mode, masked_lm, shaped
from sparring.diffusion.dndm.draws import Generators
from sparring.diffusion.dndm.noise import Noise, absorbing


def generate(
    model: nn.Module | Denoiser,
    input_ids: Tensor,
    *,
    mask_token_id: int | None = None,
    noise: Noise | None = None,
    free_mask: Tensor | None = None,
    max_new_tokens: int = 0,
    attention_mask: Tensor | None = None,
    sampler: str | Sampler = "dndm",
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    suppress_tokens: Sequence[int] = (),
    generator: Generators | None = None,
    output_history: bool = False,
    cond: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Sampled:
    """Fill in the free positions of a prompt.

    Args:
        model: a `transformers` masked language model (anything whose output has `.logits` and
            whose config has `vocab_size`), which is told no time; a `TextDenoiser`, whose noise
            is its own; or `denoiser(x, t, **cond)`.
        input_ids: (B, N) tokens. Positions that are not free never change.
        mask_token_id: of absorbing noise, for models that know their vocab_size but no noise.
        noise: in its place, for any other denoiser or noise.
        free_mask: (B, N) bool, what is generated. None for the mask tokens.
        max_new_tokens: free positions that are added to a row, behind the last token that its
            attention_mask shows and before its padding.
        attention_mask: (B, N), handed to the model, ones added for new tokens.
        sampler: a name from `ALGORITHMS`, with its `settings`, or a sampler.
        temperature, top_k, top_p, suppress_tokens: as of `shaped`.
        generator: one, or one a row; torch's default generator if None.
        output_history: keep x before the first call and after each.
        cond: more keyword arguments for the model; tensors have the batch as first axis.
        settings: of the named sampler: steps, schedule, token, ...; steps=50 where it needs some.

    Returns:
        `sequences`, `nfe`, `evaluations` by row, `row_evaluations`, `history` and `logp_BN`.

    Raises:
        ValueError: neither or both of mask_token_id and noise, a tensor of another shape, no free
            position, max_new_tokens beside conditions of positions, or what the sampler raises.
    """
    for name, value in (
        ("input_ids", input_ids),
        ("free_mask", free_mask),
        ("attention_mask", attention_mask),
    ):
        if value is not None and (value.ndim != 2 or value.shape != input_ids.shape):
            raise ValueError(
                f"{name} must have shape (rows, positions), that of input_ids, not "
                f"{tuple(value.shape)}; a single row is input_ids[None]"
            )
    denoiser, noise = _denoiser_and_noise(model, mask_token_id, noise)
    if free_mask is None:
        if noise.mask_id is None:
            raise ValueError("multinomial noise has no mask to be found by: pass free_mask")
        free_mask = input_ids == noise.mask_id
    conditions = dict(cond or {})
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    if max_new_tokens:
        _refuse_positions(conditions, input_ids.shape)
    places = _places(input_ids, attention_mask, max_new_tokens)
    if attention_mask is not None:
        conditions["attention_mask"] = _widened(attention_mask, places, 1)
    if isinstance(sampler, str):
        if "steps" in settings_of(sampler):
            settings.setdefault("steps", _STEPS)
        sampler = algorithm(sampler, **settings)
    elif settings:
        raise ValueError(f"settings {sorted(settings)} belong to named samplers: set them on yours")
    # A masked language model may like its mask best, which is no token that could be kept.
    never = [*suppress_tokens, *([] if noise.mask_id is None else [noise.mask_id])]
    return sampler.sample(
        shaped(
            denoiser,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            suppress_tokens=never,
        ),
        _widened(input_ids, places, 0),
        _widened(free_mask, places, 1),
        noise=noise,
        generator=torch.default_generator if generator is None else generator,
        cond=conditions,
        output_history=output_history,
    )


_STEPS = 50


def _places(ids_BN: Tensor, attention_mask: Tensor | None, more: int) -> Tensor:
    """(B, N + more): which position a widened row has where; N stands for a new one."""
    rows, size = ids_BN.shape
    at = torch.arange(size + more, device=ids_BN.device).expand(rows, -1)
    if attention_mask is None:
        end = at.new_full((rows, 1), size)
    else:
        shown = attention_mask.to(ids_BN.device) != 0
        end = (shown * (at[:, :size] + 1)).amax(1, keepdim=True)
    new = (at >= end) & (at < end + more)
    return torch.where(new, size, torch.where(at < end, at, at - more))


def _widened(values_BN: Tensor, places: Tensor, fill: int) -> Tensor:
    new = torch.full_like(values_BN[:, :1], fill)
    return torch.cat([values_BN, new], 1).gather(1, places.to(values_BN.device))


def _refuse_positions(conditions: Mapping[str, Any], shape: torch.Size) -> None:
    for name, value in conditions.items():
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            raise ValueError(
                f"cond[{name!r}] has a value for each of {shape[1]} positions, and max_new_tokens "
                "adds some: put mask tokens into input_ids in place of max_new_tokens"
            )


def _denoiser_and_noise(
    model: nn.Module | Denoiser, mask_token_id: int | None, noise: Noise | None
) -> tuple[Denoiser, Noise]:
    trained = getattr(getattr(model, "config", None), "noise", None)
    if isinstance(model, nn.Module) and isinstance(trained, Noise):  # a network of this package
        check_mode(model)
        if mask_token_id not in (None, trained.mask_id):
            raise ValueError(
                f"{type(model).__name__} was trained for the mask {trained.mask_id}, not "
                f"{mask_token_id}: leave mask_token_id out"
            )
        return cast(Denoiser, model.denoiser), trained if noise is None else noise
    if (mask_token_id is None) == (noise is None):
        raise ValueError(
            f"pass one of mask_token_id ({mask_token_id!r}) and noise ({noise!r}): the first for a "
            "masked language model, the second for anything else"
        )
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    denoiser = masked_lm(model) if isinstance(model, nn.Module) and size is not None else model
    if noise is not None:
        return denoiser, noise
    if size is None:
        raise ValueError(
            f"{type(model).__name__} has no config.vocab_size: pass noise=absorbing(vocab_size, "
            f"{mask_token_id}) in place of mask_token_id"
        )
    assert mask_token_id is not None
    return denoiser, absorbing(size, mask_token_id)
