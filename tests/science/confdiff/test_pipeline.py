"""The recipe of ConfDiff becomes the right chain, and wrong settings are refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from sparring.launch import artifacts
from sparring.launch.config import build
from sparring.science.confdiff.config import (
    ConformationRecipe,
    ConformationSampleConfig,
    GuideConfig,
    MdConfig,
    inverse_temperature_change,
)
from sparring.science.confdiff.md_stage import simulation
from sparring.science.confdiff.pipeline import PIPELINE
from sparring.science.confdiff.results import cells, density, energy_shift, moved, typical_range

ARMS = (
    ConformationSampleConfig(),
    ConformationSampleConfig(gamma=0.8),
    ConformationSampleConfig(guidance="force"),
    ConformationSampleConfig(guidance="energy", correction="smc", filter=False),
)
RECIPE = ConformationRecipe(
    name="test", md=MdConfig(sequence="AA", temperature=400), target=350, arms=ARMS, seeds=2
)


def test_every_arm_gets_the_networks_it_needs_and_no_other() -> None:
    steps = {step.name: step for step in PIPELINE.steps(RECIPE)}
    assert [name for name in steps if name.startswith("seed0/")] == [
        f"seed0/{name}" for name in ("base", "unconditional", "force", "energy")
    ]
    sampled = {name: dict(steps[f"{name}/seed1/conf-sample"].inputs) for name in
               ("base", "base-gamma=0.8", "force", "energy-smc")}  # fmt: skip
    assert sampled["base"] == {"model": "seed1/base"}
    assert sampled["base-gamma=0.8"]["unconditional"] == "seed1/unconditional"
    assert sampled["force"] == {"model": "seed1/base", "guide": "seed1/force"}
    assert sampled["energy-smc"]["guide"] == "seed1/energy"
    assert not steps["seed0/unconditional"].config.sequence
    assert steps["seed0/force"].config.kind == "force"
    assert steps["seed0/force"].config.temperature == 350


def test_the_reference_is_an_independent_simulation_that_nothing_is_trained_on() -> None:
    steps = {step.name: step for step in PIPELINE.steps(RECIPE)}
    source, reference = steps["md-source"], steps["md-target"]
    assert (source.config.temperature, reference.config.temperature) == (400, 350)
    assert source.seed != reference.seed
    for step in steps.values():
        if step.stage.name in ("conf-train", "conf-guide"):
            assert step.inputs["data.0"] == "md-source"
        assert "md-target" not in [v for k, v in step.inputs.items() if k != "reference"]
    assert steps["reweighted/conf-evaluate"].config.reweight == 350
    assert steps["source/conf-evaluate"].config.reweight == 0


def test_relaxed_labels_are_made_for_guides_alone() -> None:
    relaxed = dataclasses.replace(RECIPE, guide=GuideConfig(energy="relaxed"))
    steps = {step.name: step for step in PIPELINE.steps(relaxed)}
    assert steps["labels"].inputs == {"data": "md-source"}
    assert steps["labels"].config.relaxed
    for name in ("energy", "force"):
        assert steps[f"seed1/{name}"].inputs["data.0"] == "labels"
    assert steps["seed1/base"].inputs["data.0"] == "md-source"
    plain = dataclasses.replace(relaxed, arms=ARMS[:1])
    for recipe in (RECIPE, plain):
        assert "labels" not in [step.name for step in PIPELINE.steps(recipe)]


def test_a_start_by_torsions_takes_its_turn() -> None:
    config = MdConfig(sequence="AA", start="both", torsions=(-60.0, -30.0, 70.0, 20.0))
    starts = [simulation(config, {}, 0, replica).start for replica in range(4)]
    assert starts == ["extended", "helix", "torsions -60 -30 70 20", "extended"]


def test_arms_share_their_noise_and_seeds_do_not() -> None:
    steps = {step.name: step for step in PIPELINE.steps(RECIPE)}
    seeds = [steps[f"{arm.name}/seed{n}/conf-sample"].seed for n in range(2) for arm in ARMS]
    assert len(set(seeds)) == 2
    assert seeds[0] == seeds[3] != seeds[4]
    assert steps["seed0/base"].seed != steps["seed1/base"].seed


def test_the_change_of_temperature_is_in_mol_per_kj() -> None:
    # RT is 2.494 kJ/mol at 300 K.
    assert 1 / inverse_temperature_change(300, 1e12) == pytest.approx(2.494, rel=1e-3)
    assert inverse_temperature_change(350, 400) > 0 > inverse_temperature_change(400, 350)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"md": {"sequence": ""}}, "md.sequence is empty"),
        ({"md": {"temperature": -1}}, "temperature must be positive"),
        ({"md": {"save_every": 0.001}}, "shorter than a time step"),
        ({"md": {"save_every": 0.05}}, "is 12.5 time steps of 4.0 fs"),
        ({"md": {"sequence": "AA", "torsions": [1.0]}}, "4 numbers for AA, not 1"),
        ({"arms": []}, "at least one"),
        ({"arms": [{}, {}]}, "two are called 'base'"),
        ({"arms": [{"gamma": 1.5}]}, "gamma"),
        ({"arms": [{"correction": "smc", "solver": "ode"}]}, "weighs the steps of solver"),
        (
            {"arms": [{"guidance": "energy", "correction": "smc"}]},
            "a filter would change their law",
        ),
        (
            {"arms": [{"correction": "smc", "filter": False}]},
            "base-smc: a correction needs guidance",
        ),
        (
            {"arms": [{"guidance": "force", "correction": "weights", "filter": False}]},
            "needs an energy guide",
        ),
        (
            {
                "md": {"sequence": "AA", "temperature": 400},
                "arms": [{"guidance": "force", "temperature": 333}],
            },
            "its law is that of 300 K",
        ),
        (
            {
                "target": 350,
                "md": {"sequence": "AA", "temperature": 350},
                "arms": [{"guidance": "force"}],
            },
            "there is nothing to guide",
        ),
        (
            {"md": {"sequence": "AA", "nanoseconds": 0.02, "save_every": 2}},
            "a replica has 10; lower",
        ),
        ({"seeds": 0}, "seeds must be"),
        ({"target": 0}, "target must be"),
        ({"train": {"steps": 0}}, "steps must be"),
        ({"train": {"t_min": 0}}, "t_min is a time"),
        ({"train": {"sigma_min": 1.5}}, "sigma_min is an angle"),
        ({"guide": {"anchor": -1}}, "anchor"),
        ({"guide": {"contrast": 1}}, "contrast"),
    ],
)
def test_wrong_values_are_named(data: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(Exception, match=message):
        build(ConformationRecipe, {"name": "x", "md": {"sequence": "AA"}, **data}, "test")


def test_a_shift_is_over_pairs_and_without_the_farthest(tmp_path: Path) -> None:
    numbers = np.arange(40.0)
    base = np.random.default_rng(0).normal(size=40)
    guided = base - 3
    guided[7] += 1e6  # atoms on each other
    for name, energy, of in (("base", base, numbers), ("arm", guided[::-1], numbers[::-1])):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "panels.npz", energy=energy, energy_of=of)
    assert energy_shift(tmp_path / "arm", tmp_path / "base") == pytest.approx(-3)


def test_how_far_guidance_moves_the_base(tmp_path: Path) -> None:
    def evaluated(place: str, js: float, energy: float) -> None:
        output = tmp_path / place / "conf-evaluate"
        output.mkdir(parents=True)
        np.savez(output / "panels.npz", energy=[energy], energy_of=[0.0])
        target = {"js_rg_floor": 0.1, "js_tic_floor": 0.3, "reference_energy": -20.0}
        figures = {"js_rg": js, "js_tic": js, "energy": energy, **target}
        facts = {"stage": "conf-evaluate", "seconds": 1.0, "figures": figures}
        artifacts.complete(output, "key", facts)

    recipe = dataclasses.replace(RECIPE, seeds=3)
    evaluated("source", 0.2, -10.0)
    assert moved(recipe, tmp_path) == [], "nothing to compare yet"
    for seed, half in (("seed0", 0.0), ("seed2", 0.05)):  # seed1 is not there yet
        evaluated(f"base/{seed}", 0.25, -5.0)
        evaluated(f"force/{seed}", 0.15 + half, -10.0 + 10 * half)
    evaluated("force/seed1", 9.0, 9.0)
    heading, line = moved(recipe, tmp_path)
    assert heading == ["guidance", "js rg", "energy", "seeds"], "js tic has no way to go"
    means = [float(cell.split(" ± ")[0]) for cell in line[1:3]]
    assert means == pytest.approx([0.75, 0.475])
    assert (line[0], line[3]) == ("force", "2")
    names = [line[0] for line in cells(recipe, tmp_path)]
    assert names[-2:] == ["base, 2 of 3 seeds", "force"]


def test_the_range_of_a_picture_is_without_what_is_far_away() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    low, high = typical_range(values)
    assert (low, high) == pytest.approx((-2.9, 2.9), abs=0.4), "nearly all of a normal law"
    values[:50] = 1e6
    assert typical_range(values) == pytest.approx((-2.9, 4.0), abs=0.5)


def test_a_density_counts_what_is_outside_the_picture() -> None:
    values, weights = np.array([0.1, 1.0, 9.0]), np.array([1.0, 2.0, 1.0])
    heights = density(values, weights, np.array([0.0, 0.5, 2.0]))
    assert heights == pytest.approx([0.25 / 0.5, 0.5 / 1.5])


def test_nothing_evaluated_is_said(tmp_path: Path) -> None:
    assert PIPELINE.summary(RECIPE, tmp_path)["table"] == "nothing was evaluated yet"
    assert PIPELINE.report(RECIPE, tmp_path).is_file()
    assert dataclasses.replace(RECIPE, seeds=1).seeds == 1
