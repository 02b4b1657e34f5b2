"""Bad input to MARS: the error names the value and the fix, and nothing is changed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from mars_training import gradients, parameters, train
from torch import nn

from sparring.optimizers import MARS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number of at least 0, not -1.0"),
        ({"lr": float("nan")}, "lr must be a finite number"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), not \(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"betas_1d": (-0.1, 0.9)}, "betas_1d must be"),
        ({"eps": -1e-8}, "eps must be a finite number of at least 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0"),
        ({"weight_decay_1d": -0.1}, "weight_decay_1d must be a finite number of at least 0"),
        ({"lr_1d": -0.1}, "lr_1d must be a finite number of at least 0, or None"),
        ({"lr": 0.0, "lr_1d": 0.1}, "lr must be above 0 when lr_1d is given"),
        ({"gamma": 1.5}, r"gamma must be a number in \[0, 1\], not 1.5"),
        # What a ds_config may hold.
        ({"lr": "auto"}, "lr must be a finite number of at least 0, not 'auto'"),
        ({"lr": None}, "lr must be a finite number of at least 0, not None"),
        ({"eps": None}, "eps must be a finite number of at least 0, not None"),
        ({"eps": float("inf")}, "eps must be a finite number of at least 0, not inf"),
        ({"weight_decay": "auto"}, "weight_decay must be a finite number"),
        ({"gamma": "auto"}, r"gamma must be a number in \[0, 1\], not 'auto'"),
        ({"gamma": float("nan")}, "gamma must be a number"),
        ({"betas": 0.9}, r"betas must be two numbers in \[0, 1\), not 0.9"),
        ({"betas": "auto"}, "betas must be two numbers"),
        ({"betas": ("a", 0.9)}, "betas must be two numbers"),
        ({"amsgrad": "auto"}, "amsgrad must be True or False, not 'auto'"),
        ({"fused": "auto"}, "fused must be True, False or None, not 'auto'"),
        ({"ns_steps": 2.5}, "ns_steps must be a whole number"),
        ({"variant": "adam"}, "variant must be one of adamw, lion, shampoo, not 'adam'"),
        ({"orthogonaliser": "qr"}, "orthogonaliser must be one of"),
        ({"ns_steps": 0}, "ns_steps must be a whole number of at least 1"),
        ({"foreach": True, "fused": True}, "foreach and fused"),
        ({"lr": torch.tensor(0.1), "foreach": True}, "needs capturable=True"),
        ({"lr": torch.ones(2)}, "one element, not 2"),
    ],
    ids=str,
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MARS(parameters(), **options)
    optimizer = MARS(parameters())
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], **options})
    assert len(optimizer.param_groups) == 1


def test_a_parameter_given_twice_is_refused() -> None:
    matrix = nn.Parameter(torch.zeros(2, 3))
    message = r"parameters of shape \(2, 3\) are given more than once.*tied weights"
    for params in ([matrix, matrix], [("a", matrix), ("b", matrix)]):
        with pytest.raises(ValueError, match=message):
            MARS(params)
    with pytest.raises(ValueError, match=message):
        MARS([{"params": [matrix]}, {"params": matrix}])
    optimizer = MARS([matrix])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [matrix]})
    with pytest.raises(ValueError, match="exact"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))], "exact": True})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_are_refused_and_change_nothing() -> None:
    matrix, table = nn.Parameter(torch.zeros(2, 2)), nn.Embedding(5, 3, sparse=True)
    optimizer = MARS([matrix, *table.parameters()])
    table(torch.tensor([1])).sum().backward()
    matrix.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    assert not torch.any(matrix)


@pytest.mark.parametrize(
    ("mark", "message"),
    [("_fsdp_flattened", "FSDP1.*use FSDP2"), ("tensor_model_parallel", "AutoTP.*use DTensors")],
)
def test_parts_whose_whole_is_unknown_are_refused(mark: str, message: str) -> None:
    """Marked before MARS is built, by a group that is added, and between MARS and its step."""
    part = nn.Parameter(torch.zeros(2, 2))
    setattr(part, mark, True)
    with pytest.raises(ValueError, match=message):
        MARS([part])
    optimizer = MARS([nn.Parameter(torch.zeros(2, 2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [part]})
    assert len(optimizer.param_groups) == 1
    late = optimizer.param_groups[0]["params"][0]
    setattr(late, mark, True)
    late.data = late.data.view(-1)[:2].clone()
    late.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert optimizer.state_dict()["state"] == {}
    setattr(late, mark, False)
    with pytest.raises(ValueError, match=r"cannot tell which parameters the tensor of shape \(2,"):
        optimizer.step()


def test_a_state_of_another_variant_or_mode_is_refused_and_changes_nothing() -> None:
    params, stream = parameters(), gradients(3)
    optimizer = train(params, stream[:2])
    lion = train(parameters(), stream[:2], variant="lion")
    adamw = torch.optim.AdamW(parameters())
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"of MARS-lion, this is MARS-adamw.*variant='lion'"):
        optimizer.load_state_dict(lion.state_dict())
    with pytest.raises(ValueError, match="of another optimizer"):
        optimizer.load_state_dict(adamw.state_dict())
    exact = MARS(parameters(), exact=True)
    message = r"of MARS with exact=True, this is MARS with exact=False: build.*with exact=True"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(exact.state_dict())
    with pytest.raises(ValueError, match=r"of MARS with exact=False.*with exact=False"):
        exact.load_state_dict(optimizer.state_dict())
    assert exact.param_groups[0]["exact"] is True
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for name, value in state.items():
            assert torch.equal(value, after["state"][index][name])
