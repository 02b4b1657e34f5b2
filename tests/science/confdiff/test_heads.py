"""Energy and force networks: symmetry, units, where they start."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from confdiff_inputs import normal
from torch import Tensor

from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.heads import EnergyNetwork, ForceNetwork, GuidanceModel
from sparring.science.confdiff.igso3 import exp_rotation
from sparring.science.confdiff.network import ConformationConfig, ConformationNetwork, load_as
from sparring.science.confdiff.sizes import SIZES

SMALL = dataclasses.asdict(dataclasses.replace(SIZES["tiny"], blocks=2))
EXACT = {"rtol": 0.0, "atol": 1e-12}


def base() -> ConformationNetwork:
    torch.manual_seed(0)
    return ConformationNetwork(ConformationConfig(size=SMALL)).double()


def made(kind: type[GuidanceModel], **options: bool) -> GuidanceModel:
    torch.manual_seed(1)
    return kind.from_base(base(), **options).eval()


def inputs(size: int = 6) -> tuple[Frames, dict[str, Tensor]]:
    frames = Frames(exp_rotation(2 * normal(2, size, 3)), normal(2, size, 3, seed=1))
    return frames, {
        "t": torch.tensor([0.1, 0.7], dtype=torch.float64),
        "mask": torch.ones(2, size, dtype=torch.bool),
        "index": torch.arange(size).expand(2, size),
        "aatype": torch.arange(2 * size).reshape(2, size) % 20,
    }


def parts(net: GuidanceModel, frames: Frames, given: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        out = net(frames.rotations, frames.translations, **given)
    return [out] if isinstance(out, Tensor) else list(out.values())


def test_energy_is_invariant_and_knows_left_from_right() -> None:
    net, (frames, given) = made(EnergyNetwork), inputs()
    (energy,) = parts(net, frames, given)
    assert energy.shape == (2,)
    moved = frames.moved(exp_rotation(normal(3, seed=8)), normal(3, seed=9))
    torch.testing.assert_close(parts(net, moved, given)[0], energy, **EXACT)
    flip = torch.diag(torch.tensor([1.0, 1, -1])).double()
    mirrored = Frames(flip @ frames.rotations @ flip, frames.translations @ flip)
    assert float((parts(net, mirrored, given)[0] - energy).abs().min()) > 1e-5


def test_forces_turn_and_do_not_move() -> None:
    net, (frames, given) = made(ForceNetwork), inputs()
    turn = exp_rotation(normal(3, seed=8))
    out = parts(net, frames, given)
    found = parts(net, frames.moved(turn, normal(3, seed=9)), given)
    torch.testing.assert_close(found[0], out[0] @ turn.T, **EXACT)
    assert float(out[0].norm(dim=-1).std()) > 0.003  # no unit vectors
    for i in (1, 2):
        torch.testing.assert_close(found[i], out[i], **EXACT)


def test_forces_are_of_the_scores_size_and_nothing_at_1() -> None:
    net, (frames, given) = made(ForceNetwork), inputs()
    early = torch.tensor([0.01, 0.3], dtype=torch.float64)
    scaled = []
    for out, scale in zip(
        parts(net, frames, {**given, "t": early}), net.config.diffusion.score_scale(early),
        strict=False,
    ):  # fmt: skip
        rms = out.square().mean((-1, -2)).sqrt()
        scaled.append(rms / scale)
    # 1 / std is 22 and 1.2: without the scale, one of them would be off by that.
    for rms in scaled:
        assert float(rms.max() / rms.min()) < 4
    at_1 = parts(net, frames, {**given, "t": torch.ones(2)})
    assert float(at_1[0].abs().max()) == float(at_1[1].abs().max()) == 0
    assert at_1[2].tolist() == [0, 0]  # no weight is likelier than another


@pytest.mark.parametrize("kind", [EnergyNetwork, ForceNetwork])
def test_padding_changes_nothing(kind: type[GuidanceModel]) -> None:
    net, (frames, given) = made(kind), inputs(9)
    given["mask"] = torch.arange(9).expand(2, 9) < 5
    short = {name: v if name == "t" else v[:, :5] for name, v in given.items()}
    for long, alone in zip(
        parts(net, frames, given), parts(net, frames[:, :5], short), strict=True
    ):
        torch.testing.assert_close(long[:, :5] if long.ndim > 1 else long, alone, **EXACT)
        assert long.ndim == 1 or float(long[:, 5:].abs().max()) == 0


@pytest.mark.parametrize("kind", [EnergyNetwork, ForceNetwork])
@pytest.mark.parametrize("train_trunk", [True, False])
def test_what_is_trained(kind: type[GuidanceModel], train_trunk: bool, tmp_path: Path) -> None:
    net, (frames, given) = made(kind, train_trunk=train_trunk), inputs()
    start = base().trunk.state_dict()
    for name, value in net.trunk.state_dict().items():
        assert torch.equal(value, start[name])
    out = net(frames.rotations, frames.translations, **given)
    leaves = [out] if isinstance(out, Tensor) else list(out.values())
    sum((leaf * normal(*leaf.shape, seed=3)).sum() for leaf in leaves).backward()
    for name, parameter in net.named_parameters():
        assert parameter.requires_grad == (train_trunk or not name.startswith("trunk."))
        if parameter.requires_grad:
            assert float(parameter.grad.abs().max()) > 0, name
    net.float().save_pretrained(tmp_path)
    found = load_as(kind, tmp_path)
    assert all(
        a.requires_grad == b.requires_grad
        for a, b in zip(net.parameters(), found.parameters(), strict=True)
    )
    for one, other in zip(parts(net, frames, given), parts(found, frames, given), strict=True):
        assert torch.equal(one, other)


def test_energies_of_parts_add_up() -> None:
    # Two copies of a residue in one chain have twice the energy that a mean would leave as it is.
    net, (frames, given) = made(EnergyNetwork), inputs(1)
    twice = {name: v if name == "t" else torch.cat([v, v], 1) for name, v in given.items()}
    pair = Frames(frames.rotations.repeat(1, 2, 1, 1), frames.translations.repeat(1, 2, 1))
    one, two = parts(net, frames, given)[0], parts(net, pair, twice)[0]
    torch.testing.assert_close(two, 2 * one)
