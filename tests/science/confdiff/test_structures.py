"""Files to rows and arrays to files, real structures, and files that are wrong."""

from __future__ import annotations

import gc
import math
import re
import sys
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import torch

from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, write_rows
from sparring.science.confdiff import atoms as atom14
from sparring.science.confdiff import structures, topologies
from sparring.science.confdiff.dataset import Dataset
from sparring.science.confdiff.frames import Frames
from sparring.science.confdiff.residues import CODES
from sparring.science.confdiff.rows import Conformation
from sparring.science.confdiff.structures import atoms_array, read, torsions_array

SEQUENCE = CODES
DATA = [path for path in structures.benchmark_files() if "reference_wildtypes" in path.parts]


def ensemble(sequence: str = SEQUENCE, count: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Atoms, caps and torsions of random chains."""
    generator = torch.Generator().manual_seed(1)
    torsions = atom14.standard_torsions(sequence).repeat(count, 1, 1)
    torsions = torsions + 0.3 * torch.randn(
        torsions.shape, generator=generator, dtype=torch.float64
    )
    types, turns = atom14.types_of(sequence), atom14.sincos(torsions)
    frames = atom14.chain_frames(turns, types)
    atoms = atom14.to_atoms(frames, turns, types)[0]
    caps = atom14.cap_atoms(frames, turns, types)
    return atoms.numpy(), caps.numpy(), torsions.numpy()


def test_pdb_is_in_angstrom_and_xtc_in_nanometres(tmp_path: Path) -> None:
    atoms, _, _ = ensemble()
    pdb, xtc = topologies.write(tmp_path, SEQUENCE, atoms)
    line = next(x for x in pdb.read_text().splitlines() if x[12:16].strip() == "CA")
    assert [float(line[30 + 8 * i : 38 + 8 * i]) for i in range(3)] == pytest.approx(
        10 * atoms[0, 0, 1], abs=1e-3
    )
    with mdtraj.formats.XTCTrajectoryFile(str(xtc)) as file:
        xyz = file.read()[0]
    assert xyz.shape == (3, sum(len(x) for x in topologies.ATOMS.values()), 3)
    assert xyz[2, 1] == pytest.approx(atoms[2, 0, 1], abs=6e-4)


@pytest.mark.parametrize("capped", [False, True])
def test_written_ensembles_are_read_again(tmp_path: Path, capped: bool) -> None:
    atoms, caps, torsions = ensemble()
    pdb, xtc = topologies.write(tmp_path, SEQUENCE, atoms, caps if capped else None)
    reading = read(xtc, pdb, "name")
    assert reading.ignored == 0
    assert [(r.chain, r.number) for r in reading.conformations] == [("name", i) for i in range(3)]
    types = atom14.types_of(SEQUENCE)
    names = atom14.canonical(torch.from_numpy(atoms), types).numpy()
    for i, row in enumerate(reading.conformations):
        assert (row.sequence, row.capped, row.energy) == (SEQUENCE, capped, None)
        there = np.isfinite(atoms_array(row)).all(-1)
        assert np.array_equal(there, atom14.exists(types).numpy())
        assert atoms_array(row)[there] == pytest.approx(names[i][there], abs=6e-4)
        first = torsions_array(row)[0]
        assert np.isnan(first[:2]).all() == (not capped)
        if capped:
            assert np.abs(np.sin((first[:3] - torsions[i, 0, :3]) / 2)).max() < 0.02
    write_rows(tmp_path / "rows.parquet", Conformation, reading.conformations)
    assert read_rows(tmp_path / "rows.parquet", Conformation) == reading.conformations


def test_topology_bonds() -> None:
    """One fragment; the bonds of a chain of ideal geometry have a bond's length."""
    atoms, caps, _ = ensemble()
    built = topologies.trajectory(SEQUENCE, atoms, caps)
    assert built.topology.n_residues == len(SEQUENCE) + 2
    pairs = [(a.index, b.index) for a, b in built.topology.bonds]
    lengths = mdtraj.compute_distances(built, pairs)
    # A random proline ring does not close; its bond N-CD is the only one that no group holds.
    open_ring = [{a.name, b.name} == {"N", "CD"} for a, b in built.topology.bonds]
    assert sum(open_ring) == 1
    assert (
        0.11
        < lengths[:, ~np.array(open_ring)].min()
        <= lengths[:, ~np.array(open_ring)].max()
        < 0.19
    )
    terminal = topologies.topology("GA", terminal=True)
    assert [a.name for a in terminal.atoms][-1] == "OXT"
    assert topologies.topology("GA", capped=True, terminal=True) == topologies.topology("GA", True)


def test_real_side_chains_fit_ideal_groups() -> None:
    """Real residues from their frames and torsions: median error a tenth of an Angstrom."""
    errors: dict[str, list[float]] = {}
    for path in DATA[:8]:
        for row in read(path).conformations:
            atoms = torch.from_numpy(atoms_array(row)).double()
            types = atom14.types_of(row.sequence)
            turns = atom14.sincos(torch.from_numpy(torsions_array(row)).double())
            built, _ = atom14.to_atoms(atom14.frames_of(atoms), turns, types)
            for code, error in zip(row.sequence, (built - atoms).norm(dim=-1), strict=True):
                errors.setdefault(code, []).append(float(error.nan_to_num().max()))
    assert set(errors) >= set("ADEGIKLNPRSTV")
    worst = {code: float(np.median(values)) for code, values in errors.items()}
    assert max(worst.values()) < 0.12, worst  # nm, the farthest atom of tryptophan
    assert np.median([v for values in errors.values() for v in values]) < 0.05


def test_frames_of_data_keep_the_torsions_of_a_simulation_better() -> None:
    # 100 frames of our own MD at 400 K, whose N-CA-C is 113.8 ± 3.9 degrees where 111.1 is ideal.
    folder = Path(__file__).parent / "data"
    rows = read(folder / "ala5-400K.xtc", folder / "ala5.pdb", "ala5").conformations
    atoms = torch.from_numpy(np.stack([atoms_array(row) for row in rows])).double()
    turns = atom14.sincos(
        torch.from_numpy(np.stack([torsions_array(row) for row in rows])).double()
    )
    types = atom14.types_of("AAAAA")
    real = atom14.backbone_torsions(atoms)

    def missed(frames: Frames) -> torch.Tensor:
        """(3,) root mean square errors of omega, phi and psi of what is rebuilt, degrees."""
        built, _ = atom14.to_atoms(frames, turns, types)
        turned = torch.remainder(atom14.backbone_torsions(built) - real + math.pi, 2 * math.pi)
        return (turned - math.pi).square().nanmean((0, 1)).sqrt().rad2deg()

    learnt = Dataset(rows).batch(range(100)).frames
    ratio = missed(Frames(learnt.rotations.double(), learnt.translations.double())) / missed(
        atom14.frames_of(atoms)
    )
    assert len(rows) == 100
    assert float(ratio.max()) < 0.75, ratio


def test_benchmark_structures() -> None:
    assert len(structures.benchmark_files()) == 289
    rows, skipped = structures.benchmark_structures(40, ["trp-cage", "reference_wildtypes/1ENH"])
    assert {row.chain.split("/")[-1] for row in rows} == {"2JOF_A"}
    assert {row.sequence for row in rows} == {"DAYAQWLKDGGPSSGRPPPS"}
    assert list(skipped.values()) == ["48 residues, more than 40"]
    assert "bioemu_benchmarks" not in sys.modules
    with pytest.raises(SparringError, match="at most 5 residues and one of trp-cage"):
        structures.benchmark_structures(5, ["trp-cage"])


def test_chains_water_and_lone_caps(tmp_path: Path) -> None:
    """Two chains, water, an ion and a calcium; selenomethionine is methionine."""
    atoms, caps, _ = ensemble("MA", 1)
    top = topologies.topology("MA", capped=True)
    first = topologies.trajectory("MA", atoms, caps)
    second = topologies.trajectory("MA", atoms + 3)
    rest = mdtraj.Topology()
    chain = rest.add_chain()
    for name, element in (("HOH", "O"), ("CL", "Cl"), ("CA", "Ca")):
        symbol = mdtraj.element.get_by_symbol(element)
        rest.add_atom("CA" if name == "CA" else name[0], symbol, rest.add_residue(name, chain))
    both = first.stack(second).stack(mdtraj.Trajectory(np.zeros((1, 3, 3)), rest))
    path = tmp_path / "complex.pdb"
    both.save_pdb(str(path))
    path.write_text(path.read_text().replace(" SD  MET", "SE   MSE").replace("MET", "MSE"))
    reading = read(path)
    assert reading.ignored == 3
    assert [(r.sequence, r.capped) for r in reading.conformations] == [("MA", True), ("MA", False)]
    assert len({r.chain for r in reading.conformations}) == 2
    for row in reading.conformations:
        assert np.isfinite(atoms_array(row)[0, :8]).all()
    lone = first.atom_slice([a.index for a in top.atoms if a.residue.name != "NME"])
    reading = structures.from_trajectory(lone, "lone")
    assert (reading.conformations[0].capped, reading.ignored) == (False, 3)


def test_force_fields_names(tmp_path: Path) -> None:
    atoms, _, _ = ensemble("HCHD", 1)
    pdb, _ = topologies.write(tmp_path, "HCHD", atoms)
    text = pdb.read_text().replace("HIS A   1", "HID A   1").replace("CYS", "CYX")
    pdb.write_text(text.replace("HIS A   3", "HIP A   3").replace("ASP", "ASH"))
    row = read(pdb).conformations[0]
    assert row.sequence == "HCHD"
    assert np.isfinite(torsions_array(row)[:, 3]).all()


def test_missing_side_chains_are_nan(tmp_path: Path) -> None:
    atoms, _, _ = ensemble("GRA", 1)
    built = topologies.trajectory("GRA", atoms)
    kept = [a.index for a in built.topology.atoms if a.name not in ("NE", "CZ", "NH1", "NH2")]
    row = structures.from_trajectory(built.atom_slice(kept), "cut").conformations[0]
    assert np.isnan(atoms_array(row)[1, 7:]).all()
    assert np.isnan(torsions_array(row)[1, 5:]).all()
    assert np.isfinite(torsions_array(row)[1, :5]).all()


def _save(
    folder: Path, sequence: str, drop: tuple[str, ...] = (), atoms: np.ndarray | None = None
) -> Path:
    given = ensemble(sequence, 1)[0] if atoms is None else atoms
    built = topologies.trajectory(sequence, given)
    kept = [a.index for a in built.topology.atoms if str(a) not in drop]
    path = folder / "given.pdb"
    built.atom_slice(kept).save_pdb(str(path))
    return path


def test_wrong_structures(tmp_path: Path) -> None:
    unknown = _save(tmp_path, "GAG")
    unknown.write_text(unknown.read_text().replace("ALA", "XYZ"))
    with pytest.raises(SparringError, match="XYZ2 is no amino acid of the standard twenty"):
        read(unknown)
    with pytest.raises(SparringError, match="chain A: residue ALA2 has no CA; frames need"):
        read(_save(tmp_path, "GAG", ("ALA2-CA",)))
    one = _save(tmp_path, "GA", tuple(f"ALA2-{x}" for x in ("N", "CA", "C", "O", "CB")))
    with pytest.raises(SparringError, match="has one residue, GLY1; a peptide needs two"):
        read(one)
    atoms = ensemble("GAGA", 2)[0]
    atoms[1, 2:] += 0.3
    broken = topologies.trajectory("GAGA", atoms)
    with pytest.raises(SparringError, match=r"broken between ALA2 and GLY3, C-N is .* structure 1"):
        structures.from_trajectory(broken, "given")
    broken.xyz[:] = topologies.trajectory("GAGA", ensemble("GAGA", 2)[0]).xyz
    broken.xyz[1, 4] = np.nan
    with pytest.raises(SparringError, match="structure 1 has coordinates that are not finite"):
        structures.from_trajectory(broken, "given")
    water = mdtraj.Topology()
    water.add_atom("O", mdtraj.element.oxygen, water.add_residue("HOH", water.add_chain()))
    with pytest.raises(SparringError, match="water has no amino acid"):
        structures.from_trajectory(mdtraj.Trajectory(np.zeros((1, 1, 3)), water), "water")


def test_wrong_files(tmp_path: Path) -> None:
    atoms, _, _ = ensemble("GAG")
    pdb, xtc = topologies.write(tmp_path / "a", "GAG", atoms)
    other, _ = topologies.write(tmp_path / "b", "GAGA", ensemble("GAGA")[0])
    with pytest.raises(SparringError, match="does not match its topology of 18 atoms"):
        read(xtc, other)
    with pytest.raises(SparringError, match="trajectories also need a topology"):
        read(xtc)
    with pytest.raises(SparringError, match=re.escape("nothing.pdb: no such file")):
        read(tmp_path / "nothing.pdb")
    with pytest.raises(SparringError, match=re.escape("nothing.pdb: no such file")):
        read(xtc, tmp_path / "nothing.pdb")
    with pytest.raises(SparringError, match="no structure of GAG to write"):
        topologies.write(tmp_path / "c", "GAG", atoms[:0])
    atoms[2, 0, 1, 0] = math.nan
    with pytest.raises(SparringError, match="structure 2 of GAG has missing or infinite"):
        topologies.write(tmp_path / "c", "GAG", atoms)
    assert not (tmp_path / "c").exists()
    assert read(pdb).conformations


# mdtraj 1.11 leaves a PDB file open that it cannot parse.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_noise_is_no_structure(tmp_path: Path) -> None:
    noise = tmp_path / "noise.pdb"
    noise.write_text("these are no atoms\n")
    with pytest.raises(SparringError, match=r"noise\.pdb cannot be read as a structure"):
        read(noise)
    gc.collect()


def test_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mdtraj", None)
    with pytest.raises(SparringError, match=re.escape('mdtraj: pip install "sparring[proteins]"')):
        structures.mdtraj_module()
    monkeypatch.setattr(structures, "_BENCHMARKS", "no_such_package")
    with pytest.raises(SparringError, match="pip install --no-deps bioemu-benchmarks"):
        structures.benchmark_files()


def test_rows_without_forces() -> None:
    row = structures.rows_of("GA", ensemble("GA")[0])[1]
    assert (row.chain, row.number) == ("GA", 1)
    with pytest.raises(SparringError, match="structure 1 of GA has no forces"):
        structures.forces_array(row)
