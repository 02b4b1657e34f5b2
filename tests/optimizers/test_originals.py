"""Which parameters get what, and where they are found again."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from mars_training import difference, feed, gradients, parameters
from torch import nn

from sparring.optimizers import MARS
from sparring.optimizers.layouts import describe


def test_kinds_come_from_names_groups_and_dimensions(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.ModuleDict(
        {"embed_tokens": nn.Embedding(4, 3), "layer": nn.Linear(3, 3), "conv": nn.Conv2d(3, 2, 1)}
    )
    lines = {
        "adamw": "1 matrices MARS-AdamW, 3 vectors AdamW, 1 embeddings MARS-AdamW",
        "lion": "1 matrices MARS-Lion, 3 vectors AdamW, 1 embeddings MARS-Lion",
        "shampoo": "1 matrices MARS-Shampoo, 3 vectors AdamW, 1 embeddings AdamW",
    }
    for variant, line in lines.items():
        optimizer = MARS(model.named_parameters(), variant=variant)  # type: ignore[arg-type]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        with caplog.at_level(logging.INFO, logger="sparring.optimizers.mars"):
            optimizer.step()
            optimizer.step()
        assert [record.message for record in caplog.records] == [f"MARS: {line}"]
        caplog.clear()
    convolution = [{"params": [model["conv"].weight], "kind": "matrix"}]
    optimizer = MARS(convolution, variant="shampoo")
    optimizer.step()
    assert optimizer.updates == {"MARS-Shampoo": 1}


TABLES = ("tok_emb", "shared", "transformer.wte", "embeddings.word_embeddings", "embed_out")
TABLES += ("output", "head", "lm_head", "model.embed_tokens.modules_to_save.default")
LAYERS = ("time_embedding.linear_1", "time_embed.0", "layers.0.attention.output", "blocks.3.head")
LAYERS += ("lm_head.lora_A.default", "layers.1.output.dense", "query")


def test_tables_are_told_by_the_name_of_the_module_that_owns_them() -> None:
    matrix = nn.Parameter(torch.zeros(3, 3))
    kinds = {name: describe(matrix, f"{name}.weight").kind for name in TABLES + LAYERS}
    assert kinds == {**dict.fromkeys(TABLES, "embedding"), **dict.fromkeys(LAYERS, "matrix")}
    assert describe(matrix, "pos_embed").kind == "embedding"
    assert describe(nn.Parameter(torch.zeros(3)), "embed.weight").kind == "vector"


@pytest.mark.parametrize("compiled", [False, True])
def test_nothing_to_work_on_is_refused(compiled: bool) -> None:
    vector, frozen = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, 3))
    frozen.requires_grad_(False)
    optimizer = MARS([vector, frozen])
    step = optimizer.step
    if compiled:  # whose errors are dynamo's, with the text of ours
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend="eager")
    for _ in range(2):
        vector.grad = torch.ones(3)
        message = r"no tensor gets MARS \(1 vectors AdamW\).*optimize_1d"
        with pytest.raises(RuntimeError if compiled else ValueError, match=message):
            step()
        assert not torch.any(vector)
    with pytest.raises(ValueError, match=r"\(no parameter requires a gradient\)"):
        MARS([frozen]).step()


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_step_says_once_what_is_trained(
    compiled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Under LoRA the frozen base is not."""
    adapter, base, bias = (nn.Parameter(torch.zeros(s)) for s in ((3, 2), (3, 3), (3,)))
    base.requires_grad_(False)
    optimizer = MARS([adapter, base, bias])
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    with caplog.at_level(logging.INFO, logger="sparring.optimizers.mars"):
        for _ in range(2):
            adapter.grad, bias.grad = torch.ones(3, 2), torch.ones(3)
            (step if compiled else optimizer.step)()
    said = [r.message for r in caplog.records if r.name == "sparring.optimizers.mars"]
    assert said == ["MARS: 1 matrices MARS-AdamW, 1 vectors AdamW"]


@pytest.mark.parametrize("first", ["some are zero", "all are zero"])
def test_only_deepspeed_s_own_step_of_zeros_is_none(first: str) -> None:
    """Without ZeRO it makes one on its clones; a batch may have zeros too, as LoRA's first has."""
    ends = []
    for cloned in (False, True):
        params = parameters()[::2]
        optimizer = MARS(params, lr=0.1, weight_decay=0.1)
        tensors = [nn.Parameter(p.detach().clone()) for p in params] if cloned else params
        if cloned:
            optimizer.param_groups[0]["params"] = tensors
            feed(optimizer, tensors, [torch.zeros_like(t) for t in tensors])
            assert all(state["step"] == 0 for state in optimizer.state.values())
        for number, step in enumerate(gradients(3)):
            zeros = number == 0
            given = [g * (not zeros or (n == 0 and first == "some are zero"))
                     for n, g in enumerate(step[::2])]  # fmt: skip
            feed(optimizer, tensors, given)
        ends.append(tensors)
    assert difference(*ends) == 0
    assert difference(ends[0], parameters()[::2]) > 0.01


def test_a_parameter_that_was_exchanged_is_not_kept_alive() -> None:
    """As accelerate does for FSDP2, so that the unsharded model can be freed."""
    layer = torch.nn.Linear(3, 2)
    optimizer = MARS(layer.named_parameters())
    gone = [weakref.ref(parameter) for parameter in layer.parameters()]
    for number in range(2):
        optimizer.param_groups[0]["params"][number] = torch.empty(1)
    del layer
    gc.collect()
    assert [reference() for reference in gone] == [None, None]
    assert optimizer._originals.summary() == "1 matrices MARS-AdamW, 1 vectors AdamW"
