"""The stages of ConfDiff: their settings, what they read. Imports no torch."""

from __future__ import annotations

from sparring.launch.config import config
from sparring.launch.stages import Stage
from sparring.science.confdiff.config import (
    ConformationEvaluateConfig,
    ConformationSampleConfig,
    ConformationTrainConfig,
    ForceFieldConfig,
    GuideConfig,
    LabelConfig,
    MdConfig,
    StructuresConfig,
)


@config
class SampleStage(ConformationSampleConfig, ForceFieldConfig):
    """Sampling, of a sequence that is given here or by --fasta or --pdb; the force field is that of
    --energies."""

    sequence: str = ""
    """One-letter codes; empty: that of --fasta or --pdb, or the one the model was trained on."""
    capped: bool | None = None
    """ACE and NME at the ends; left out: as the model's data."""


_HERE = "sparring.science.confdiff"
_ROWS = "artifact of conf-md, conf-structures or conf-label"
_TORCH = ("torch", "roma", "mdtraj")
_OPENMM = ("openmm", "mdtraj", "PeptideBuilder")

MD = Stage(
    name="conf-md",
    summary="simulate a peptide with OpenMM",
    function=f"{_HERE}.md_stage:run",
    finish=f"{_HERE}.md_stage:finish",
    config=MdConfig,
    version="2",
    inputs={"fasta?": "file with one sequence", "pdb?": "structure to start from"},
    packages=_OPENMM,
)
STRUCTURES = Stage(
    name="conf-structures",
    summary="read PDB files and trajectories as training data",
    function=f"{_HERE}.structures_stage:run",
    config=StructuresConfig,
    version="3",
    inputs={
        "pdb*": "PDB files or folders of them; the first is the topology of --traj",
        "traj*": "trajectories that mdtraj reads",
    },
    packages=("mdtraj",),
)
LABEL = Stage(
    name="conf-label",
    summary="compute energies and forces of structures with OpenMM",
    function=f"{_HERE}.label_stage:run",
    finish=f"{_HERE}.label_stage:finish",
    config=LabelConfig,
    version="3",
    inputs={"data": _ROWS},
    packages=(*_OPENMM, "pdbfixer"),
)
TRAIN = Stage(
    name="conf-train",
    summary="train the network of the score on conformations",
    function=f"{_HERE}.train:run",
    config=ConformationTrainConfig,
    version="7",
    inputs={
        "data*": _ROWS,
        "model?": "folder of a network to start from, of this sequence and noise; its size stays",
        "representations?": ".npz file of pretrained arrays, see docs/science/confdiff.md",
    },
    packages=(*_TORCH, "transformers", "deepspeed", "accelerate"),
)
GUIDE = Stage(
    name="conf-guide",
    summary="train a network of energy or force on labelled conformations",
    function=f"{_HERE}.guide:run",
    config=GuideConfig,
    version="8",
    inputs={
        "model": "folder of the base network, made by conf-train",
        "data*": f"{_ROWS}, with energies and a temperature",
        "representations?": ".npz file of pretrained arrays",
    },
    packages=(*_TORCH, "transformers", "deepspeed", "accelerate"),
)
SAMPLE = Stage(
    name="conf-sample",
    summary="sample conformations of a sequence",
    function=f"{_HERE}.sample:run",
    finish=f"{_HERE}.sample:finish",
    config=SampleStage,
    version="5",
    inputs={
        "model": "folder of a network, made by conf-train",
        "unconditional?": "one trained with sequence = false, for gamma below 1",
        "guide?": "network of energy or force, made by conf-guide",
        "fasta?": "file with one sequence",
        "pdb?": "structure whose sequence is sampled",
        "representations?": ".npz file of pretrained arrays",
    },
    packages=_TORCH,
)
EVALUATE = Stage(
    name="conf-evaluate",
    summary="measure an ensemble against a reference",
    function=f"{_HERE}.evaluate:run",
    config=ConformationEvaluateConfig,
    version="4",
    inputs={
        "samples": "artifact of conf-sample, conf-md or conf-structures",
        "reference": "artifact of conf-md or conf-structures",
        "states?": "artifact of conf-structures with known states, for coverage",
    },
    packages=("openmm", "mdtraj", "deeptime", "scipy"),
)

STAGES = {stage.name: stage for stage in (MD, STRUCTURES, LABEL, TRAIN, GUIDE, SAMPLE, EVALUATE)}
