"""Parameter groups of matrices, vectors and embeddings, for MARS and for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from trainer_worker import tiny_gpt2, tiny_llama

from sparring.optimizers import MARS, OptimizerConfig, build_optimizer
from sparring.optimizers.groups import embeddings
from sparring.optimizers.huggingface import mars_groups
from sparring.optimizers.layouts import describe


def names(groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for group in groups:
        found.setdefault(group["kind"], []).extend(name for name, _ in group["params"])
    return found


def test_groups_are_matrices_vectors_and_embeddings() -> None:
    groups = mars_groups(tiny_gpt2(), weight_decay=0.1)
    found = names(groups)
    # The head is tied: it stands there once, under the embedding's name.
    assert found["embedding"] == ["transformer.wte.weight", "transformer.wpe.weight"]
    assert "transformer.h.0.attn.c_attn.weight" in found["matrix"]
    assert {name.rsplit(".", 1)[1] for name in found["matrix"]} == {"weight"}
    assert "transformer.ln_f.weight" in found["vector"]
    assert "transformer.h.0.attn.c_attn.bias" in found["vector"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1]
    untied = names(mars_groups(tiny_llama()))
    assert untied["embedding"] == ["model.embed_tokens.weight", "lm_head.weight"]
    optimizer = MARS(mars_groups(tiny_llama(), weight_decay=0.1, weight_decay_1d=0.2))
    decays = [(group["kind"], group["weight_decay"]) for group in optimizer.param_groups]
    assert decays == [("matrix", 0.1), ("vector", 0.2), ("embedding", 0.1)]
    assert optimizer.param_groups[2]["param_names"] == untied["embedding"]


def test_groups_of_a_plain_module_go_by_name_and_whole_shapes() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Linear(3, 2, bias=False), "up": nn.Linear(3, 2), "conv": nn.Conv2d(1, 1, 3)}
    )
    model["conv"].bias.requires_grad_(False)
    model["up"].weight.ds_shape = torch.Size((2, 3))  # as zero.Init leaves it: flat, and empty
    model["up"].weight.data = torch.empty(0)
    expected = {
        "matrix": ["up.weight"],
        "vector": ["conv.weight", "up.bias"],
        "embedding": ["embed.weight"],
    }
    groups = mars_groups(model, weight_decay=0.1)
    assert names(groups) == expected
    # Trainer decays convolutions too: their kind is the rule's matter.
    decays = {name: group["weight_decay"] for group in groups for name, _ in group["params"]}
    assert [name for name, decay in decays.items() if not decay] == ["up.bias"]
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        mars_groups(nn.Linear(1, 1).requires_grad_(False))


@pytest.mark.parametrize("name", ["mars", "adamw", "rmsprop"])
def test_a_recipe_s_optimizer_has_the_same_groups(name: Any) -> None:
    """A group holds one kind: ZeRO makes one flat partition of it."""
    model = nn.ModuleDict(
        {"embed": nn.Embedding(3, 2), "up": nn.Linear(3, 2), "c": nn.Conv2d(1, 1, 3)}
    )
    model["up"].weight.requires_grad_(False)
    config = OptimizerConfig(name=name, weight_decay=0.1)
    optimizer = build_optimizer(config, model.named_parameters(), lr=0.01)
    found = [(group["kind"], group["weight_decay"], [p.dim() for p in group["params"]])
             for group in optimizer.param_groups]  # fmt: skip
    assert found == [("vector", 0.1, [4]), ("vector", 0.0, [1, 1]), ("embedding", 0.1, [2])]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter is trainable"):
        build_optimizer(config, model.named_parameters(), lr=0.01)


def tiny_mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 20}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads))


@pytest.mark.parametrize(
    ("variant", "stacks"),
    [("adamw", "MARS-AdamW"), ("lion", "MARS-Lion"), ("shampoo", "AdamW")],
)
def test_experts_are_stacks_of_matrices(variant: Any, stacks: str) -> None:
    """Most weights of such a model are theirs; one orthogonal factor of all would mix them."""
    model = tiny_mixtral()
    found = names(mars_groups(model))
    assert {name.split(".")[-1] for name in found["stack"]} == {"gate_up_proj", "down_proj"}
    assert not any("experts" in name for kind in ("matrix", "vector") for name in found[kind])
    held = sum(dict(model.named_parameters())[name].numel() for name in found["stack"])
    assert held > 0.5 * sum(p.numel() for p in model.parameters())
    optimizer = MARS(mars_groups(model), variant=variant)
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    optimizer.step()
    assert f"2 stacks {stacks}" in optimizer._originals.summary()


def test_biases_of_experts_are_vectors_and_stacks_are_only_theirs() -> None:
    flat, stack = nn.Parameter(torch.zeros(4, 6)), nn.Parameter(torch.zeros(4, 6, 3))
    kinds = {
        name: describe(parameter, name).kind
        for name, parameter in {
            "layers.0.mlp.experts.gate_up_proj_bias": flat,
            "layers.0.mlp.experts.3.weight": flat,  # one module an expert
            "layers.0.mlp.experts.gate_up_proj": stack,
            "conv.weight": stack,
        }.items()
    }
    assert list(kinds.values()) == ["vector", "matrix", "stack", "vector"]


def test_embeddings_are_told_by_their_modules_too() -> None:
    network = nn.ModuleDict({"tokens": nn.Embedding(5, 3), "mix": nn.Linear(3, 3)})
    tables = embeddings(network)
    assert tables == {network["tokens"].weight}
    config = OptimizerConfig(name="mars", variant="shampoo")
    optimizer = build_optimizer(config, network.named_parameters(), lr=0.01, tables=tables)
    kinds = {group["kind"]: group["param_names"] for group in optimizer.param_groups}
    assert kinds["embedding"] == ["tokens.weight"]
    assert kinds["matrix"] == ["mix.weight"]
