"""An exponential moving average of the weights, under every ZeRO stage.

Legend: s shadow (the average), p parameter, n number of updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_UPDATES = "@updates"


class EMA:
    """s <- d s + (1 - d) p with d = min(decay, (1 + n) / (10 + n)), so that early weights are left.

    In float32, of trainable parameters. ZeRO 3 averages this rank's shards, all other stages the
    whole parameters, on the parameters' device.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"the decay of an average is between 0 and 1, not {decay}")
        self.decay = decay
        self.updates = 0
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._shadow = {n: _held(p).float().clone() for n, p in self._parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present weights; call it after every optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        held = [_held(p).float() for p in self._parameters.values()]
        torch._foreach_lerp_(list(self._shadow.values()), held, 1 - decay)

    def full_state(self) -> dict[str, Tensor]:
        """The averaged weights, whole, on the CPU; collective under ZeRO 3."""
        return {
            name: _whole(self._shadow[name], parameter).cpu()
            for name, parameter in self._parameters.items()
        }

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part, with the number of updates."""
        return {**self._shadow, _UPDATES: torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what the same rank of as many saved."""
        self.updates = int(state[_UPDATES])
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])


def _held(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: ZeRO 3 leaves a flat, padded shard."""
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    return parameter.detach() if shard is None else shard.detach()


def _whole(shadow: Tensor, parameter: Any) -> Tensor:
    if getattr(parameter, "ds_tensor", None) is None:
        return shadow
    group = parameter.ds_process_group
    shards = [torch.empty_like(shadow) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, shadow, group=group)
    flat = torch.cat([shard.flatten() for shard in shards])
    return flat[: math.prod(parameter.ds_shape)].view(parameter.ds_shape)
