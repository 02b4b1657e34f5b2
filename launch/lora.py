"""LoRA adapters inside a model: put in, switched off, folded into the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparring.launch.errors import SparringError


def add_lora(
    model: Any, rank: int, alpha: float, targets: Sequence[str] | str = "all-linear"
) -> Any:
    """The model with trainable adapters on its linear layers and all else frozen.

    Args:
        rank: of the adapters.
        alpha: the product of an adapter's matrices is scaled by alpha / rank.
        targets: names of layers, or "all-linear".

    Raises:
        SparringError: a layer is a transposed one, whose adapters `merge_lora` does not know.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    chosen = targets if isinstance(targets, str) else list(targets)
    for name, layer in model.named_modules():
        wanted = chosen == "all-linear" or name.rpartition(".")[2] in chosen
        if wanted and isinstance(layer, Conv1D):
            raise SparringError(
                f"LoRA is for linear layers, and {name} is a Conv1D, as in GPT-2, whose weight is "
                "the other way round; train all weights (lora_rank = 0)"
            )
    return inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=chosen), model
    )


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The model as it was before `add_lora`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    # Not enable_adapters(), which also changes requires_grad, and with it DeepSpeed's hooks.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_lora(state: Mapping[str, Tensor], scaling: float) -> dict[str, Tensor]:
    """Fold adapters into the weights they stand beside: W + scaling·B·A, in float32.

    Momentum acts on merged weights: A and B enter as a product, so extrapolating each is wrong.
    """
    merged = {}
    for name, tensor in state.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        target = name.replace(".base_layer.", ".")
        root = name.removesuffix(".base_layer.weight")
        if target != name and f"{root}.lora_A.default.weight" in state:
            a = state[f"{root}.lora_A.default.weight"].float()
            b = state[f"{root}.lora_B.default.weight"].float()
            tensor = tensor.float() + scaling * (b @ a)
        merged[target] = tensor
    return merged
