"""A model's parameters as groups of matrices, vectors and embeddings, for any optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from sparring.optimizers.layouts import KINDS, Kind, describe


def mars_groups(
    model: nn.Module, *, weight_decay: float = 0.0, weight_decay_1d: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable parameters of a model as groups of matrices, vectors and embeddings.

    Kinds are told by the parameters' own shapes, also where `zero.Init` has split them. Embeddings
    are the tables of `nn.Embedding`, the input embeddings and the output head of a transformers
    model, and go by their names in any other module. Adapters of PEFT are matrices. A tied weight
    stands in one group, once. Convolutions are vectors (`describe`), in a group of their own.

    Args:
        weight_decay: of matrices, embeddings and convolutions.
        weight_decay_1d: of biases and norms. 0 by default, as Trainer has it, where MARS alone
            would decay them like matrices.

    Raises:
        ValueError: the model has no trainable parameter.
    """
    groups = grouped(
        model.named_parameters(),
        weight_decay=weight_decay,
        weight_decay_1d=weight_decay_1d,
        tables=_tables(model),
    )
    if not groups:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameter: set requires_grad, or add adapters"
        )
    return groups


def grouped(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    weight_decay_1d: float = 0.0,
    tables: Collection[nn.Parameter] | None = None,
) -> list[dict[str, Any]]:
    """Named parameters in groups of one kind and one decay; those that are not trained, in none.

    Args:
        weight_decay: of all with two dimensions or more.
        weight_decay_1d: of the others.
        tables: the embeddings; None to tell them by their names.
    """
    found: dict[tuple[Kind, bool], list[tuple[str, nn.Parameter]]] = {
        (kind, decayed): [] for kind in KINDS for decayed in (True, False)
    }
    for name, parameter in parameters:
        if parameter.requires_grad:
            original = describe(parameter, name)
            kind = original.kind
            if tables is not None and kind in ("matrix", "embedding"):
                kind = "embedding" if parameter in tables else "matrix"
            found[kind, len(original.shape) >= 2].append((name, parameter))
    return [
        {
            "params": params,
            "kind": kind,
            "weight_decay": weight_decay if decayed else weight_decay_1d,
            "weight_decay_1d": None,  # the group's, whichever rule updates it
        }
        for (kind, decayed), params in found.items()
        if params
    ]


def embeddings(network: nn.Module) -> set[nn.Parameter]:
    """The tables of `nn.Embedding` in a network, and what is named like one."""
    found = {p for name, p in network.named_parameters() if describe(p, name).kind == "embedding"}
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            found.update(module.parameters())
    return found


def _tables(model: nn.Module) -> set[nn.Parameter] | None:
    """Weights with a row an item; None if the model does not tell its embeddings."""
    modules = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        get = getattr(model, name, None)
        if not callable(get):
            return None
        with contextlib.suppress(NotImplementedError):  # an image model: it has none
            modules.append(get())
    modules = [module for module in modules if isinstance(module, nn.Module)]
    modules += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables: set[nn.Parameter] = set()
    for module in modules:
        # PEFT wraps an embedding or a head together with its adapters, which are smaller.
        sizes = {p: math.prod(describe(p).shape) for p in module.parameters()}
        tables |= {p for p, size in sizes.items() if size == max(sizes.values())}
    return tables
