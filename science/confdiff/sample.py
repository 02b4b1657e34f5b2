"""Stage `conf-sample`: conformations of one sequence, in shards.

Sample i depends on (seed, i) alone; with resampling (correction = "smc") on its whole batch. Frames
are float64 on the way.

Shape legend: B samples, N residues.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparring.launch import artifacts, shards
from sparring.launch.collective import device
from sparring.launch.config import plain
from sparring.launch.errors import SparringError, UsageError
from sparring.launch.rows import write_rows
from sparring.launch.seeds import derive
from sparring.launch.stages import Context, Figures
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff.dataset import CONFORMATIONS, Batch, Representations, blank
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.guidance import (
    EnergyGradient,
    ForceGuidance,
    Mixture,
    NetworkEnergy,
    NetworkForce,
    NetworkScore,
)
from sparring.science.confdiff.guide import KINDS
from sparring.science.confdiff.labels import minimised_energies
from sparring.science.confdiff.md_stage import chosen_sequence
from sparring.science.confdiff.network import (
    WEIGHTS,
    ConformationConfig,
    ConformationNetwork,
    load,
    load_as,
)
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.smc import kish, twisted
from sparring.science.confdiff.solvers import SampleNoise, ScoreFunction, solve
from sparring.science.confdiff.stages import SAMPLE, SampleStage
from sparring.science.confdiff.structures import atoms_array, rows_of, torsions_array
from sparring.science.confdiff.tangent import Score
from sparring.science.confdiff.topologies import write
from sparring.science.confdiff.train import chains
from sparring.science.confdiff.validity import sound

RESAMPLE_BELOW = 0.5
"""Share of effective samples below which smc resamples."""


@dataclass(frozen=True)
class Networks:
    """What a sampler is made of."""

    base: ConformationNetwork
    unconditional: ConformationNetwork | None
    guide: Any
    kind: str
    """Of the guide: none, energy or force."""

    @classmethod
    def load(cls, settings: SampleStage, inputs: Mapping[str, Path]) -> Networks:
        """From folders.

        Raises:
            SparringError: a folder holds another kind of network.
            UsageError: a network that the settings need is not given, or the other way round.
        """
        base = load(inputs["model"])
        if (settings.gamma < 1) != ("unconditional" in inputs):
            raise UsageError(
                f"gamma = {settings.gamma:g} "
                + ("needs --unconditional" if settings.gamma < 1 else "uses no --unconditional")
            )
        unconditional = None
        if settings.gamma < 1:
            unconditional = load(inputs["unconditional"])
            _check_unconditional(unconditional.config, base.config, inputs["unconditional"])
        guide, kind = None, "none"
        if "guide" in inputs:
            kind = _kind(inputs["guide"])
            guide = load_as(KINDS[kind], inputs["guide"])
            _check_same_base(guide, base, inputs["model"])
        if settings.guidance not in ("none", kind):
            raise UsageError(f"guidance = {settings.guidance} needs such a network as --guide")
        if settings.correction != "none" and kind != "energy":
            raise UsageError(
                f"correction = {settings.correction} needs an energy network as --guide; a force "
                "does not say how likely a sample is"
            )
        return cls(base, unconditional, guide, kind)

    def temperature(self, wanted: float) -> float | None:
        """K of the samples' law; None if the data had none.

        Raises:
            UsageError: another temperature is wanted than the networks are for.
        """
        made = (
            self.guide.config.target
            if self.guide is not None
            else self.base.config.data.get("temperature")
        )
        if wanted and wanted != made:
            known = "of no temperature" if made is None else f"for {made:g} K"
            raise UsageError(
                f"--temperature {wanted:g}: these networks are {known}; conf guide trains one for "
                "another"
            )
        return None if made is None else float(made)


def _check_unconditional(config: ConformationConfig, base: ConformationConfig, where: Path) -> None:
    if config.sequence:
        raise SparringError(
            f"{where} is told the sequence, so that the mixture would be of two conditional "
            "networks; train it with --sequence False"
        )
    if config.process != base.process:
        raise SparringError(
            f"{where} was trained for another noise ({config.process}) than the base "
            f"({base.process}), so that their scores do not mix; train both with the same --t-min"
        )


def _kind(folder: Path) -> str:
    config = ConformationConfig.from_pretrained(str(folder))
    made = (config.architectures or ["?"])[0]
    for kind, network in KINDS.items():
        if network.__name__ == made:
            return kind
    raise SparringError(f"{folder} holds a {made}, no guide; conf guide makes one")


class ConformationSampler:
    """Networks and settings, for one chain."""

    def __init__(self, settings: SampleStage, inputs: Mapping[str, Path], seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.networks = Networks.load(settings, inputs)
        config = self.networks.base.config
        self.process = config.diffusion
        self.sequence, self.capped = target(settings, inputs, config)
        path = inputs.get("representations")
        self.known = Representations(path) if path else None
        self.temperature = self.networks.temperature(settings.temperature)
        if self.networks.kind != "none":
            _check_same_chain(self.networks.guide.config, self.sequence)
        for network in (self.networks.base, self.networks.unconditional, self.networks.guide):
            if network is not None:
                network.to(device())

    @torch.no_grad()
    def batch(self, numbers: Sequence[int]) -> list[Conformation]:
        """Samples by their numbers.

        Raises:
            SparringError: one of them never passed the filter.
        """
        if self.settings.correction != "none":
            return self._weighted(numbers)
        pending, found = list(numbers), {}
        for attempt in range(self.settings.attempts):
            made = self._plain(pending, attempt)
            good = sound(made) if self.settings.filter else [True] * len(made)
            for number, row, passed in zip(pending, made, good, strict=True):
                if passed:
                    found[number] = replace(row, number=number, attempts=attempt + 1)
            pending = [number for number in pending if number not in found]
            if not pending:
                return [found[number] for number in numbers]
        raise SparringError(
            f"{len(pending)} of {len(numbers)} samples had a broken chain or a clash in each of "
            f"{self.settings.attempts} attempts, the first is number {pending[0]}; train longer, "
            "take more --steps, or see them with --filter False"
        )

    def _noise(self, numbers: Sequence[int], attempt: int) -> SampleNoise:
        seed = derive(self.seed, "attempt", attempt)
        return SampleNoise(seed, numbers, [len(self.sequence)] * len(numbers), device=device())

    def _told(self, count: int) -> Batch:
        return blank([self.sequence] * count, self.known).to(device())

    def score(self, told: Batch) -> ScoreFunction:
        """The base model's, mixed with the unconditional one."""
        base = self.networks.base
        score = NetworkScore(base, self.process, chains(base.config, told))
        other = self.networks.unconditional
        if other is None:
            return score
        blind = NetworkScore(other, self.process, chains(other.config, told))
        return Mixture(score, blind, self.settings.gamma)

    def force(self, told: Batch) -> Any:
        """F_t of the guide."""
        guide = self.networks.guide
        told_chains = chains(guide.config, told)
        if self.networks.kind == "force":
            return NetworkForce(guide, told_chains)
        return EnergyGradient(NetworkEnergy(guide, told_chains), told.mask)

    def _plain(self, numbers: Sequence[int], attempt: int) -> list[Conformation]:
        told = self._told(len(numbers))
        score = self.score(told)
        if self.networks.kind != "none":
            score = ForceGuidance(score, self.force(told), self.settings.eta)
        noise = self._noise(numbers, attempt)
        made = solve(
            score,
            self.process,
            told.mask,
            noise,
            solver=self.settings.solver,
            steps=self.settings.steps,
            grid=self.settings.grid,
        )
        return self.rows(made.x, made.score, told)

    def _weighted(self, numbers: Sequence[int]) -> list[Conformation]:
        told, noise = self._told(len(numbers)), self._noise(numbers, 0)
        energy = NetworkEnergy(self.networks.guide, chains(self.networks.guide.config, told))
        resample = self.settings.correction == "smc"
        made = twisted(
            self.score(told),
            self.force(told),
            self.process,
            told.mask,
            noise,
            terminal=energy,
            twist=energy,
            eta=self.settings.eta,
            generator=torch.Generator().manual_seed(
                derive(self.seed, "resample", numbers[0]) % 2**63
            ),
            steps=self.settings.steps,
            grid=self.settings.grid,
            resample_below=RESAMPLE_BELOW if resample else 0.0,
        )
        rows = self.rows(made.x, made.score, told)
        weights, ancestors = made.log_weights.tolist(), made.ancestors.tolist()
        return [
            replace(row, number=n, log_weight=weight, ancestor=numbers[ancestor], attempts=1)
            for row, n, weight, ancestor in zip(rows, numbers, weights, ancestors, strict=True)
        ]

    def rows(self, x: Frames, score: Score, told: Batch) -> list[Conformation]:
        """Structures: x_t denoised by its own score, side chains from the network's torsions."""
        frames = self.process.denoised(x, score, self.process.t_min)
        assert score.torsions is not None
        torsions = score.torsions.to(frames.translations.dtype)
        atoms, there = atom14.to_atoms(frames, torsions, told.types)
        known = atoms.masked_fill(~there[..., None], torch.nan).cpu().numpy()
        caps = atom14.cap_atoms(frames, torsions, told.types).cpu().numpy() if self.capped else None
        return rows_of(self.sequence, known, caps, temperature=self.temperature)


def target(
    settings: SampleStage, inputs: Mapping[str, Path], config: ConformationConfig
) -> tuple[str, bool]:
    """The chain that is sampled, and whether it has caps.

    Raises:
        UsageError: no sequence is given, and the model knows more than one.
    """
    sequence, capped = chosen_sequence(settings.sequence, inputs)
    sequence = sequence or config.data.get("chain", "")
    if not sequence:
        raise UsageError(
            "the model was trained on several chains: give --sequence, --fasta or --pdb"
        )
    atom14.types_of(sequence)  # refuses unknown letters
    if settings.capped is not None:
        return sequence, settings.capped
    return sequence, bool(config.data.get("capped") if capped is None else capped)


def _check_same_chain(config: ConformationConfig, sequence: str) -> None:
    trained = config.data.get("chain", "")
    if trained and trained != sequence:
        raise UsageError(
            f"the guide was trained on {trained[:40]}, and knows no energy of {sequence[:40]}"
        )


def _check_same_base(guide: Any, base: ConformationNetwork, folder: Path) -> None:
    """A guide's E_t is of one q_0 and one noise."""
    weights = artifacts.hash_file(folder / WEIGHTS)
    if (
        getattr(guide.config, "base", None) != weights
        or guide.config.process != base.config.process
    ):
        raise UsageError(
            f"the guide was trained beside another network than {folder}, and its energies are of "
            "that one's law; give that one as --model, or train a guide with conf guide for this"
        )


def run(config: SampleStage, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Sample this rank's shards."""
    sampler = ConformationSampler(config, inputs, context.seed)
    if config.gamma < 1 and sampler.networks.kind != "none":
        context.emit(note="the guide is of the conditional model's law, not of the mixture's")
    started = time.perf_counter()
    shards.make(
        range(config.num_samples),
        config.batch,
        Conformation,
        sampler.batch,
        context,
        unit="conformations",
    )
    _add_seconds(context, time.perf_counter() - started)
    return {}


def _add_seconds(context: Context, seconds: float) -> None:
    """Keep how long this rank sampled, over all its calls."""
    path = context.work / f"seconds-{context.world.rank}.json"
    before = json.loads(path.read_text()) if path.is_file() else 0.0
    artifacts.write_json(path, before + seconds)


def finish(
    config: SampleStage, inputs: Mapping[str, Path], output: Path, context: Context
) -> Figures:
    """Put shards together: conformations.parquet, topology.pdb, samples.xtc and .npz,
    sequence.fasta, run.json."""
    rows = shards.merge(-(-config.num_samples // config.batch), Conformation, context.work)
    assert len(rows) == config.num_samples
    first, ancestors = rows[0], {row.ancestor for row in rows}
    atoms = np.stack([atoms_array(row) for row in rows])
    torsions = np.stack([torsions_array(row) for row in rows])
    types = atom14.types_of(first.sequence)
    frames = atom14.frames_of(torch.from_numpy(atoms))
    turns = atom14.sincos(torch.from_numpy(torsions))
    caps = atom14.cap_atoms(frames, turns, types).numpy() if first.capped else None
    write(output, first.sequence, atoms, caps)
    weights = torch.tensor([row.log_weight or 0.0 for row in rows], dtype=torch.float64)
    arrays: dict[str, Any] = {
        "rotations": frames.rotations.numpy(),
        "translations": frames.translations.numpy(),
        "torsions": torsions,
        "log_weights": weights.numpy(),
    }
    if config.energies:
        heavy = (atoms.astype(np.float64), torsions.astype(np.float64))
        arrays["energies"] = minimised_energies(
            first.sequence, *heavy, first.capped, config.solvent, config.platform
        )
    with (output / "samples.npz").open("wb") as file:
        np.savez(file, **arrays)
    write_rows(output / CONFORMATIONS, Conformation, rows)
    (output / "sequence.fasta").write_text(f">{first.chain}\n{first.sequence}\n")
    artifacts.write_json(
        output / "run.json",
        {
            "sequence": first.sequence,
            "capped": first.capped,
            "temperature": first.temperature,
            "seed": context.seed,
            "settings": plain(config),
            "settings_hash": artifacts.hash_json(plain(config)),
            "rank_seconds": sum(
                json.loads(path.read_text()) for path in context.work.glob("seconds-*.json")
            ),
            "packages": {name: metadata.version(name) for name in (*SAMPLE.packages, "sparring")},
        },
    )
    return {
        "conformations": len(rows),
        "residues": len(first.sequence),
        "temperature": first.temperature,
        "attempts": sum(row.attempts or 1 for row in rows) / len(rows),
        "effective": float(kish(weights)) / len(rows),
        **({"ancestors": len(ancestors) / len(rows)} if ancestors != {None} else {}),
    }
