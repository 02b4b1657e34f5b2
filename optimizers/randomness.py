"""The state of random generators, so that a second forward pass draws what the first one drew."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch


def draws(devices: Iterable[torch.device]) -> dict[str, Any]:
    """The state of every generator that a forward pass on these devices may draw from."""
    accelerators = {device for device in devices if device.type not in ("cpu", "meta")}
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.get_rng_state(),
        "devices": {
            device: torch.get_device_module(device).get_rng_state(device) for device in accelerators
        },
    }


def restore(state: Mapping[str, Any]) -> None:
    """Draw again what was drawn after `draws`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["cpu"])
    for device, generator in state["devices"].items():
        torch.get_device_module(device).set_rng_state(generator, device)
