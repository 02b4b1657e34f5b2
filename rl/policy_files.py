"""Policies on disk: one safetensors file that says what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparring.launch.errors import SparringError
from sparring.rl.policies import CategoricalPolicy, GaussianPolicy

_KINDS = {"categorical": CategoricalPolicy, "gaussian": GaussianPolicy}


def write_policy(path: Path, policy: CategoricalPolicy | GaussianPolicy) -> None:
    """Write parameters and sigma; equal policies give equal bytes."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(policy, cls))
    learned = [name for name, _ in policy.named_parameters()]
    # One entry: safetensors writes several in any order.
    about = json.dumps({"kind": kind, "learn_sigma": "log_sigma" in learned}, sort_keys=True)
    save_file(policy.state_dict(), path, metadata={"policy": about})


def read_policy(path: Path) -> CategoricalPolicy | GaussianPolicy:
    """The policy that `write_policy` wrote; the sizes of its layers are those of the tensors.

    Raises:
        SparringError: the file holds none.
    """
    try:
        with safe_open(str(path), "pt") as file:
            about = json.loads((file.metadata() or {})["policy"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError) as error:
        raise SparringError(f"{path} holds no policy of `sparring run` ({error!r})") from None
    weights = [name for name in tensors if name.endswith(".weight")]
    layers = [tensors[name] for name in sorted(weights, key=lambda n: int(n.split(".")[1]))]
    sizes = [layers[0].shape[1], *(len(layer) for layer in layers)]
    settings: dict[str, Any] = {
        "hidden": sizes[1:-1],
        "bias": "network.0.bias" in tensors,
        "dtype": layers[0].dtype,
    }
    if about["kind"] == "gaussian":
        settings["learn_sigma"] = about["learn_sigma"]
    kind: Any = _KINDS[about["kind"]]
    policy: CategoricalPolicy | GaussianPolicy = kind(sizes[0], sizes[-1], **settings)
    policy.load_state_dict(tensors)
    return policy
