"""Settings of the stages of ConfDiff and its recipe. Imports no torch."""

from __future__ import annotations

import math
from typing import Literal

from sparring.launch.arms import check_names
from sparring.launch.config import config, positive, resource, within
from sparring.launch.stages import LaunchConfig
from sparring.launch.training import TrainingConfig

GAS_CONSTANT = 0.00831446261815324
"""R in kJ/mol/K."""


def inverse_temperature_change(target: float, source: float) -> float:
    """k = 1/(R T_target) - 1/(R T_source) in mol/kJ: exp(-k U) leads from one law to the other."""
    return (1 / target - 1 / source) / GAS_CONSTANT


@config
class ForceFieldConfig:
    """What energies and forces are computed with: ff14SB in OpenMM."""

    solvent: Literal["obc2", "gbn2", "vacuum"] = "obc2"
    """Implicit water. "obc2" is five times as fast on a CPU; the authors took "gbn2"."""
    platform: Literal["CPU", "Reference", "CUDA", "OpenCL"] = "CPU"
    """OpenMM's. On a CPU core "Reference" is the fastest for fewer than a hundred atoms."""


@config
class MdConfig(ForceFieldConfig):
    """Reference molecular dynamics by OpenMM, so that no data is needed to begin."""

    sequence: str = ""
    """One-letter codes; or give --fasta or --pdb."""
    capped: bool = True
    """ACE before the first residue and NME after the last."""
    temperature: float = 300.0
    """K."""
    nanoseconds: float = 1.0
    """Of each replica, after equilibration."""
    equilibration: float = 0.05
    """Nanoseconds that are thrown away first."""
    replicas: int = 2
    """Independent simulations, dealt out to ranks."""
    save_every: float = 1.0
    """Picoseconds between frames."""
    timestep: float = 4.0
    """Femtoseconds; hydrogens weigh 3 u and their bonds are constrained."""
    friction: float = 1.0
    """1/ps, of the Langevin thermostat."""
    start: Literal["extended", "helix", "both"] = "extended"
    """Where replicas begin without --pdb; "both": in turn."""
    torsions: tuple[float, ...] = ()
    """Phi and psi in degrees of residue after residue: one more start, in turn with `start`."""

    def __post_init__(self) -> None:
        for name in (
            "temperature",
            "nanoseconds",
            "replicas",
            "save_every",
            "timestep",
            "friction",
        ):
            positive(name, getattr(self, name))
        within("equilibration", self.equilibration, 0, math.inf)
        if self.sequence and len(self.torsions) not in (0, 2 * len(self.sequence)):
            raise ValueError(
                f"torsions are phi and psi of each residue, {2 * len(self.sequence)} numbers for "
                f"{self.sequence}, not {len(self.torsions)}"
            )
        if self.save_every * 1000 < self.timestep:
            raise ValueError(
                f"save_every ({self.save_every} ps) is shorter than a time step "
                f"({self.timestep} fs)"
            )
        every = 1000 * self.save_every / self.timestep
        if abs(every - round(every)) > 1e-6 * every:
            raise ValueError(
                f"save_every ({self.save_every} ps) is {every:g} time steps of {self.timestep} fs: "
                "frames would not be where their times say; make it whole steps"
            )


@config
class StructuresConfig:
    """Structures and trajectories as data."""

    source: Literal["files", "bioemu"] = "files"
    """"files": --pdb and --traj; "bioemu": the 289 real PDB files of package bioemu-benchmarks."""
    stride: int = 1
    """Every how many frames of a trajectory."""
    temperature: float = 0.0
    """K, that the trajectory was simulated at; 0: unknown, energies cannot be reweighted then."""
    min_length: int = 2
    """Shorter chains are left out and counted."""
    max_length: int = 512
    """Longer chains are left out and counted."""
    heldout: float = 0.0
    """Share of the chains (of the frames, if there is one chain) for heldout.parquet."""

    def __post_init__(self) -> None:
        positive("stride", self.stride)
        within("temperature", self.temperature, 0, math.inf)
        within("min_length", self.min_length, 2, self.max_length)
        if not 0 <= self.heldout < 1:
            raise ValueError(f"heldout is a share from 0 to below 1, not {self.heldout}")


@config
class LabelConfig(ForceFieldConfig):
    """Energies and forces of structures that have none."""

    relaxed: bool = False
    """Also the energy with side chains and hydrogens relaxed about the held backbone: labels with
    less noise, for `guide.energy`."""
    chunk: int = 100
    """Structures a shard."""

    def __post_init__(self) -> None:
        positive("chunk", self.chunk)


@config
class LossConfig:
    """Weights of the parts of the loss; those of the authors' full-atom model."""

    translation: float = 1.0
    """Score of the translations, over its scale."""
    rotation: float = 0.5
    """Score of the rotations: axis, and angle over its scale at later times."""
    backbone: float = 0.25
    """Squared error of N, CA, C and O in A^2, at t below 0.25."""
    distance: float = 0.25
    """Squared error of backbone distances below 6 A, at t below 0.25."""
    torsion: float = 0.25
    """Squared error of sines and cosines."""
    fape: float = 1.0
    """Frame-aligned point errors, at most 10 A each: of CA seen from the backbone's frames, and of
    all heavy atoms seen from all rigid groups."""
    plain: bool = False
    """Only the weighted score matching of translations and rotations (both 1), and torsions: the
    loss whose minimum is exactly the score."""

    def __post_init__(self) -> None:
        for name in ("translation", "rotation", "backbone", "distance", "torsion", "fape"):
            within(f"loss.{name}", getattr(self, name), 0, math.inf)


@config
class ConformationTrainConfig(TrainingConfig):
    """How the network of the score is trained."""

    steps: int = 10000
    """Optimizer steps."""
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: float = 0.05
    """Share of the schedule over which the learning rate rises from 0."""
    batch: int = 128
    """Structures an optimizer step, over all ranks."""
    micro_batch: int = resource(default=128)
    """Structures a rank's forward pass."""
    ema: float = 0.999
    """Decay of a moving average of the weights, which then is the result; 0: none."""
    save_every: int = resource(default=500)
    """Optimizer steps between checkpoints; 0: none."""
    size: Literal["tiny", "base", "paper"] = "tiny"
    """Of the network."""
    sequence: bool = True
    """Tell the network the amino acids; without them it is the unconditional model of the
    mixture."""
    t_min: float = 0.0005
    """Earliest time, where sampling ends, with 0.07 A of noise left in translations (the paper's
    0.01: 0.45 A)."""
    sigma_min: float = 0.02
    """Radians of noise in rotations at t = 0 (the paper's 0.1 moves a carbonyl's O by 0.3 A)."""
    times: Literal["uniform", "quadratic"] = "uniform"
    """How t is drawn: the paper's, or t_min + (1 - t_min) u^2, more often near the end."""
    loss: LossConfig = LossConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("train.steps", self.steps)
        if not 0 < self.t_min < 0.5:
            raise ValueError(f"train.t_min is a time above 0 and below 0.5, not {self.t_min}")
        if not 0 < self.sigma_min < 1:
            raise ValueError(
                f"train.sigma_min is an angle above 0 and below 1 radian, not {self.sigma_min}"
            )


@config
class GuideConfig(TrainingConfig):
    """How a network of energy or force is trained on labelled structures."""

    kind: Literal["force", "energy"] = "force"
    """"force": regression on the gradient of the intermediate energy by weighted score matching;
    "energy": contrastive prediction of the intermediate energy (arXiv 2304.12824)."""
    temperature: float = 300.0
    """K that samples shall have; the data's own temperature is recorded with it."""
    energy: Literal["measured", "relaxed"] = "measured"
    """"measured": weights from each structure's energy; "relaxed": from its regression on the
    relaxed energy of conf label, with far less noise and a small bias."""
    times: Literal["uniform", "quadratic"] = "quadratic"
    """How t is drawn: as the paper's base model, or t_min + (1 - t_min) u^2, more often near the
    end, where a structure's energy is still seen."""
    steps: int = 5000
    """Optimizer steps."""
    lr: float = 3e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: float = 0.05
    """Share of the schedule over which the learning rate rises from 0."""
    batch: int = 128
    """Structures an optimizer step, over all ranks."""
    micro_batch: int = resource(default=128)
    """Structures a rank's forward pass; energy: at least one contrast."""
    contrast: int = 16
    """energy: structures that are contrasted with one another, of one chain at one time."""
    ema: float = 0.999
    """Decay of a moving average of the weights, which then is the result; 0: none."""
    save_every: int = resource(default=500)
    """Optimizer steps between checkpoints; 0: none."""
    consistency: float = 10.0
    """force: weight of agreeing with the slope of the energy that is learnt beside it, which moves
    no minimum and has none of the noise of score matching; 0: score matching alone."""
    anchor: float = 0.0
    """force: weight of matching simulated forces at t = 0 beside the exact objective."""
    train_trunk: bool = True
    """Train the trunk too, which starts as the base network's; otherwise the heads alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("temperature", self.temperature)
        positive("steps", self.steps)
        within("contrast", self.contrast, 2, math.inf)
        if self.kind == "energy":
            within("batch", self.batch, 2, math.inf)
        within("consistency", self.consistency, 0, math.inf)
        within("anchor", self.anchor, 0, math.inf)


@config
class ConformationSampleConfig:
    """How conformations are sampled."""

    label: str = ""
    """Name in tables and folders; made of the settings if empty."""
    guidance: Literal["none", "energy", "force"] = "none"
    """Which guide is used (in a recipe; a command line gives --guide)."""
    num_samples: int = 100
    """Exactly so many are made."""
    solver: Literal["sde", "ode", "heun"] = "sde"
    """"sde": reverse diffusion; "ode": probability flow; "heun": the flow at second order, for few
    steps."""
    steps: int = 200
    """Network calls of a sample (heun: twice so many)."""
    grid: Literal["quadratic", "uniform"] = "quadratic"
    """Times of the steps: finer towards the end, or the paper's, which wants 1000 steps."""
    gamma: float = 1.0
    """Weight of the conditional score; the unconditional one has the rest."""
    eta: float = 1.0
    """Strength of guidance. Only 1 gives the Boltzmann law of the guide's temperature."""
    temperature: float = 0.0
    """K; 0: the guide's, or the base model's without one. Another one is refused: it takes a guide
    that was trained for it."""
    correction: Literal["none", "weights", "smc"] = "none"
    """"weights": log-weights by which samples follow the learnt energy at any eta; "smc": and
    resampling within a batch. Both need an energy guide and solver sde."""
    filter: bool = True
    """Try again where a structure has a broken chain or a clash, which changes the law by what it
    leaves out; not with a correction."""
    attempts: int = 20
    """Tries of each sample before the stage fails."""
    batch: int = 100
    """Structures that are sampled together, a shard."""
    energies: bool = False
    """Put energies of OpenMM into samples.npz, with hydrogens added and side chains relaxed."""

    def __post_init__(self) -> None:
        for name in ("num_samples", "steps", "attempts", "batch"):
            positive(name, getattr(self, name))
        within("gamma", self.gamma, 0, 1)
        within("eta", self.eta, 0, math.inf)
        within("temperature", self.temperature, 0, math.inf)
        if self.correction != "none" and self.solver != "sde":
            raise ValueError(
                f'correction = "{self.correction}" weighs the steps of solver = "sde", not those '
                f"of {self.solver}"
            )
        if self.correction != "none" and self.filter:
            raise ValueError(
                f'correction = "{self.correction}" weighs samples, and a filter would change their '
                "law: give --filter False (filter = false in a recipe)"
            )

    @property
    def name(self) -> str:
        """The label, or one made of what differs between arms."""
        if self.label:
            return self.label
        parts: list[str] = ["base" if self.guidance == "none" else self.guidance]
        if self.gamma != 1:
            parts.append(f"gamma={self.gamma:g}")
        if self.eta != 1:
            parts.append(f"eta={self.eta:g}")
        if self.solver != "sde":
            parts.append(self.solver)
        if self.correction != "none":
            parts.append(self.correction)
        return "-".join(parts)


@config
class ConformationEvaluateConfig(ForceFieldConfig):
    """What is measured of an ensemble, against a reference."""

    reweight: float = 0.0
    """K: weigh the samples, which need energies and a temperature, to this one; 0: as they are."""
    structures: int = 1000
    """How many of the samples are looked at, drawn at random: distances of histograms compare at
    one number only, since fewer draws of the same law are farther from it; 0: all."""
    lag: int = 10
    """Frames, of the reference's TICA; 0: no TICA, as for structures that are no trajectory."""
    energies: int = 200
    """Structures whose energy is computed after hydrogens were placed and relaxed; 0: none."""

    def __post_init__(self) -> None:
        within("reweight", self.reweight, 0, math.inf)
        for name in ("energies", "structures", "lag"):
            within(name, getattr(self, name), 0, math.inf)


@config
class ConformationRecipe:
    """Simulation, training, guidance and sampling of one peptide, against simulation at another
    temperature."""

    name: str
    """Also the default name of the run's folder."""
    pipeline: Literal["conformations"] = "conformations"
    """Kind of run."""
    algorithm: Literal["confdiff"] = "confdiff"
    """What is compared are the [[arms]]."""
    seed: int = 0
    """Of everything random."""
    seeds: int = 1
    """Times that networks are trained and sampled; the simulations are the same."""
    md: MdConfig = MdConfig()
    """The simulation that is learnt from."""
    target: float = 300.0
    """K of the law that is aimed at, and of the simulation that nothing is trained on."""
    train: ConformationTrainConfig = ConformationTrainConfig()
    guide: GuideConfig = GuideConfig()
    """`kind` and `temperature` follow from the arms and `target`."""
    arms: tuple[ConformationSampleConfig, ...] = (ConformationSampleConfig(),)
    evaluate: ConformationEvaluateConfig = ConformationEvaluateConfig()
    """`reweight` is filled in for the reweighted simulation; the force field is that of `md`."""
    launch: LaunchConfig = LaunchConfig()

    def __post_init__(self) -> None:
        positive("seeds", self.seeds)
        positive("target", self.target)
        if not self.md.sequence:
            raise ValueError("md.sequence is empty; give one-letter codes, such as AAAAA")
        if not self.arms:
            raise ValueError("a recipe needs at least one of [[arms]]")
        for arm in self.arms:
            self._check(arm)
        frames = round(1000 * self.md.nanoseconds / self.md.save_every)
        if self.evaluate.lag >= max(1, frames):
            raise ValueError(
                f"evaluate.lag = {self.evaluate.lag} frames, but a replica has {frames}; lower it, "
                "or simulate longer"
            )

    def _check(self, arm: ConformationSampleConfig) -> None:
        """Refuse now what a stage would refuse after the simulations."""
        if arm.guidance == "none" and arm.correction != "none":
            raise ValueError(f"arm {arm.name}: a correction needs guidance")
        if arm.guidance == "force" and arm.correction != "none":
            raise ValueError(f"arm {arm.name}: a correction needs an energy guide, not a force's")
        if arm.guidance != "none" and self.target == self.md.temperature:
            raise ValueError(
                f"target and md.temperature are both {self.target:g} K: there is nothing to guide"
            )
        law = self.target if arm.guidance != "none" else self.md.temperature
        if arm.temperature not in (0, law):
            raise ValueError(
                f"arm {arm.name}: temperature = {arm.temperature:g} K, but its law is that of "
                f"{law:g} K; leave it out"
            )
        check_names([arm.name for arm in self.arms], "arms")
