"""Networks on frames: symmetry, padding, files, gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from confdiff_inputs import normal
from torch import Tensor

from sparring.launch.errors import SparringError
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.heads import EnergyNetwork
from sparring.science.confdiff.igso3 import exp_rotation, log_rotation
from sparring.science.confdiff.network import (
    ConformationConfig,
    ConformationNetwork,
    Denoised,
    load,
)
from sparring.science.confdiff.process import Process
from sparring.science.confdiff.sizes import SIZES, NetworkSize
from sparring.science.confdiff.trunk import poses, quaternion_rotation

SMALL = dataclasses.asdict(dataclasses.replace(SIZES["tiny"], blocks=2))


def network(**config: object) -> ConformationNetwork:
    torch.manual_seed(0)
    made = ConformationNetwork(ConformationConfig(size=SMALL, **config))
    # As if trained: no output is small by its start.
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made.double().eval()


def inputs(size: int = 6, seed: int = 0) -> tuple[Frames, dict[str, Tensor]]:
    frames = Frames(exp_rotation(2 * normal(2, size, 3, seed=seed)), normal(2, size, 3, seed=seed))
    return frames, {
        "t": torch.tensor([0.1, 0.7], dtype=torch.float64),
        "mask": torch.ones(2, size, dtype=torch.bool),
        "index": torch.arange(size).expand(2, size).clone(),
        "aatype": torch.arange(2 * size).reshape(2, size) % 20,
    }


def run(net: ConformationNetwork, frames: Frames, given: dict[str, Tensor]) -> Denoised:
    with torch.no_grad():
        return net(frames.rotations, frames.translations, **given)


def test_equivariance() -> None:
    net, (frames, given) = network(), inputs()
    turn, shift = exp_rotation(normal(3, seed=8)), normal(3, seed=9)
    out, moved = run(net, frames, given), run(net, frames.moved(turn, shift), given)
    expected = Frames(out.rotations, out.translations).moved(turn, shift)
    exact = {"rtol": 0.0, "atol": 1e-12}
    torch.testing.assert_close(moved.rotations, expected.rotations, **exact)
    torch.testing.assert_close(moved.translations, expected.translations, **exact)
    torch.testing.assert_close(moved.torsions, out.torsions, **exact)
    assert float((out.translations - frames.translations).norm(dim=-1).min()) > 1e-3
    assert not torch.allclose(
        run(net, frames, {**given, "t": given["t"] / 2}).torsions, out.torsions
    )


def test_moves_are_as_large_as_the_noise() -> None:
    net, (frames, given) = network(), inputs()
    process = net.config.diffusion
    for t in (process.t_min, 0.05, 1.0):
        given["t"] = torch.full((2,), t, dtype=torch.float64)
        out = run(net, frames, given)
        shift = (out.translations - frames.translations).square().mean().sqrt()
        turn = log_rotation(frames.rotations.mT @ out.rotations).square().mean().sqrt()
        assert 0.05 < float(shift / process.std(t)) < 10
        assert 0.05 < float(turn / process.sigma(t)) < 10


def test_pairs_see_places_and_axes_in_the_first_one_s_frame() -> None:
    frames = Frames(exp_rotation(normal(1, 2, 3)), normal(1, 2, 3, seed=1))
    seen = poses(frames.rotations, frames.translations)
    away = frames.rotations[0, 0].T @ (frames.translations[0, 1] - frames.translations[0, 0])
    torch.testing.assert_close(seen[0, 0, 1, :3], 10 * away / (1 + away.norm()))
    turn = frames.rotations[0, 0].T @ frames.rotations[0, 1]
    torch.testing.assert_close(seen[0, 0, 1, 3:].reshape(3, 3), turn)
    itself = torch.cat([torch.zeros(3), torch.eye(3).ravel()]).to(seen)
    torch.testing.assert_close(seen[0, 1, 1], itself)
    far = poses(frames.rotations, 100 * frames.translations)
    assert float(far[..., :3].norm(dim=-1).max()) < 10


def test_a_mirror_image_is_another_thing() -> None:
    net, (frames, given) = network(), inputs()
    flip = torch.diag(torch.tensor([1.0, 1, -1])).double()
    # Axes of mirrored atoms by Gram-Schmidt: two are mirrored, the third is their cross product.
    mirrored = Frames(flip @ frames.rotations @ flip, frames.translations @ flip)
    out, other = run(net, frames, given), run(net, mirrored, given)
    assert float((out.torsions - other.torsions).abs().max()) > 1e-3
    assert float((other.translations - out.translations @ flip).abs().max()) > 1e-3


def test_padding_changes_nothing() -> None:
    net, (frames, given) = network(), inputs(9)
    given["mask"] = torch.arange(9).expand(2, 9) < 5
    short = {name: v if name == "t" else v[:, :5] for name, v in given.items()}
    long, alone = run(net, frames, given), run(net, frames[:, :5], short)
    for name in ("rotations", "translations", "torsions"):
        torch.testing.assert_close(long[name][:, :5], alone[name], rtol=0, atol=1e-12)
    torch.testing.assert_close(long.translations[:, 5:], frames.translations[:, 5:])


def test_residues_have_no_order_but_their_numbers() -> None:
    net, (frames, given) = network(), inputs()
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    mixed = {name: v if name == "t" else v[:, order] for name, v in given.items()}
    out, other = run(net, frames, given), run(net, frames[:, order], mixed)
    torch.testing.assert_close(other.translations, out.translations[:, order], rtol=0, atol=1e-12)
    torch.testing.assert_close(other.torsions, out.torsions[:, order], rtol=0, atol=1e-12)
    kept = {**mixed, "index": given["index"]}
    assert not torch.allclose(run(net, frames[:, order], kept).torsions, other.torsions)


def test_what_it_is_told() -> None:
    frames, given = inputs()
    out = run(network(), frames, given)
    other = {**given, "aatype": given["aatype"].flip(1)}
    assert not torch.allclose(run(network(), frames, other).torsions, out.torsions)

    pretrained = network(node_dim=5, edge_dim=3)
    features = {"node": normal(2, 6, 5), "edge": normal(2, 6, 6, 3)}
    out = run(pretrained, frames, {**given, **features})
    for name in features:
        changed = {**features, name: features[name].flip(-1)}
        found = run(pretrained, frames, {**given, **changed})
        assert not torch.allclose(found.torsions, out.torsions)


def test_input_that_it_was_not_trained_with() -> None:
    frames, given = inputs()
    with pytest.raises(ValueError, match="trained without aatype, and was given one"):
        run(network(sequence=False), frames, given)
    with pytest.raises(ValueError, match="trained with aatype, and was given none"):
        run(network(), frames, {k: v for k, v in given.items() if k != "aatype"})
    with pytest.raises(ValueError, match="trained with edge, and was given none"):
        run(network(edge_dim=3), frames, given)
    with pytest.raises(ValueError, match="4 wide, not 5"):
        run(network(node_dim=5), frames, {**given, "node": normal(2, 6, 4)})


def test_each_parameter_learns() -> None:
    net, (frames, given) = network(node_dim=5, edge_dim=3), inputs()
    given |= {"node": normal(2, 6, 5), "edge": normal(2, 6, 6, 3)}

    def gradients() -> list[Tensor]:
        net.zero_grad()
        out = net(frames.rotations, frames.translations, **given)
        parts = (out.rotations, out.translations, out.torsions)
        sum((part * normal(*part.shape, seed=3)).sum() for part in parts).backward()
        return [parameter.grad for parameter in net.train().parameters()]

    plain = gradients()
    # A parameter without gradient stops DeepSpeed; one of rounding makes Adam walk at random.
    assert min(float(gradient.abs().max()) for gradient in plain) > 1e-9
    net.gradient_checkpointing_enable()
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other)


def test_files(tmp_path: Path) -> None:
    net, (frames, given) = network(process=dataclasses.asdict(Process(t_min=0.02))), inputs()
    net.float().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    found = load(tmp_path)
    assert not found.training
    assert found.config.diffusion == Process(t_min=0.02)
    assert found.config.shape == NetworkSize(**SMALL)
    assert torch.equal(run(found, frames, given).torsions, run(net, frames, given).torsions)

    EnergyNetwork.from_base(net).save_pretrained(tmp_path / "energy")
    with pytest.raises(SparringError, match="holds a EnergyNetwork, not a ConformationNetwork"):
        load(tmp_path / "energy")
    with pytest.raises(SparringError, match=r"has no config\.json"):
        load(tmp_path / "nothing")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(SparringError, match="cannot be read"):
        load(tmp_path)


def test_geometry_stays_wide_in_half_precision() -> None:
    net, (frames, given) = network().float(), inputs()
    exact = run(net, frames, given)
    half = run(net.to(torch.bfloat16), frames, given)
    assert half.translations.dtype == torch.float32
    unit = half.rotations.mT @ half.rotations
    torch.testing.assert_close(unit, torch.eye(3).expand_as(unit), rtol=0, atol=1e-5)
    assert float((half.translations - exact.translations).abs().mean()) < 0.05


def test_geometry_stays_wide_under_autocast() -> None:
    # What training in bfloat16 does: weights of float32, products of matrices in bfloat16.
    net, (frames, given) = network().float(), inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(net, frames, given)
        turn = exp_rotation(normal(3, seed=8))
        moved = run(net, frames.moved(turn, normal(3, seed=9)), given)
    assert half.translations.dtype == half.torsions.dtype == torch.float32
    unit = half.rotations.mT @ half.rotations
    torch.testing.assert_close(unit, torch.eye(3).expand_as(unit), rtol=0, atol=1e-5)
    wanted = half.translations @ turn.float().T + normal(3, seed=9).float()
    assert float((moved.translations - wanted).abs().mean()) < 0.002  # nm; 0.013 without


def test_quaternions() -> None:
    vector = normal(5, 3)
    turn = quaternion_rotation(vector)
    angle = 2 * vector.norm(dim=-1).atan()
    axis = vector / vector.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(turn, exp_rotation(axis * angle[:, None]))


@pytest.mark.parametrize(("name", "millions"), [("tiny", 0.37), ("base", 1.8), ("paper", 12.4)])
def test_sizes(name: str, millions: float) -> None:
    with torch.device("meta"):
        net = ConformationNetwork(ConformationConfig(size=dataclasses.asdict(SIZES[name])))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.05)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="blocks must be at least 1, not 0"):
        NetworkSize(blocks=0)
    with pytest.raises(ValueError, match="edge 30 must be a multiple of 4"):
        NetworkSize(edge=30)
