"""The house: who may import whom, what the wheel holds, what no file may name."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]
PACKAGES = ("alignment", "diffusion", "launch", "optimizers", "rl", "science")
# What each package may import of the others. What two of them need moves down.
BELOW = {
    "optimizers": set(),
    "launch": {"optimizers"},
    **{name: {"launch", "optimizers"} for name in ("alignment", "diffusion", "rl", "science")},
}


def modules(package: str) -> list[Path]:
    return sorted((HOUSE / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module that a file names: in imports, and in strings like "sparring.x.y:function"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found |= set(re.findall(r"^sparring\.[\w.]+", node.value))
    return found


def owner(module: str) -> str | None:
    """The package of the house that a module belongs to."""
    parts = module.split(".")
    return parts[1] if parts[0] == "sparring" and parts[1:] and parts[1] in PACKAGES else None


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down_only(package: str) -> None:
    for path in modules(package):
        owners = {owner(name) for name in imported(path)} - {None, package}
        assert owners <= BELOW[package], f"{path.relative_to(HOUSE)} imports {sorted(owners)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_everything_is_imported_as_sparring(package: str) -> None:
    """`import alignment` would find another distribution's package, or none."""
    for path in modules(package):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & set(PACKAGES), f"{path.relative_to(HOUSE)} imports {tops & set(PACKAGES)}"


def test_the_check_of_imports_can_fail(tmp_path: Path) -> None:
    source = tmp_path / "m.py"
    source.write_text(
        'import alignment\nfrom sparring import rl\nS = "sparring.science.admm:run"\n'
    )
    assert {owner(name) for name in imported(source)} >= {"rl", "science"}
    assert "alignment" in imported(source)


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_and_modules_say_what_they_are(package: str) -> None:
    folders = {path.parent for path in modules(package)} | {HOUSE / package}
    missing = [f for f in folders if not (f / "__init__.py").is_file()]
    missing += [p for p in modules(package) if not ast.get_docstring(ast.parse(p.read_text()))]
    assert not missing


def test_no_drawer_for_odds_and_ends() -> None:
    names = {path.stem for package in PACKAGES for path in modules(package)}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_the_links_lead_to_the_folders() -> None:
    for name in (*PACKAGES, "recipes"):
        link = HOUSE / "src" / "sparring" / name
        assert link.is_symlink()
        assert not link.readlink().is_absolute()
        assert link.resolve() == HOUSE / name


def test_the_wheel_holds_the_folders_and_nothing_else(tmp_path: Path) -> None:
    # A copy: setuptools leaves build/ behind, and an old one would go into the wheel.
    skipped = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(HOUSE, tmp_path / "house", symlinks=True, ignore=skipped)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    done = subprocess.run(
        [*command, "--quiet", "--wheel-dir", str(tmp_path), str(tmp_path / "house")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    expected = {"sparring/__init__.py", "sparring/py.typed"}
    for package in PACKAGES:
        files = [*modules(package)]
        files += [p for end in ("html", "c") for p in (HOUSE / package).rglob(f"*.{end}")]
        expected |= {f"sparring/{path.relative_to(HOUSE).as_posix()}" for path in files}
    expected |= {
        f"sparring/{path.relative_to(HOUSE).as_posix()}"
        for path in (HOUSE / "recipes").rglob("*.toml")
    }
    assert packed == expected
    assert "sparring/launch/report.html" in packed
    assert any(name.endswith("entry_points.txt") for name in names)


def tracked() -> list[Path]:
    """Files of the repository."""
    if not (HOUSE / ".git").exists():
        pytest.skip("needs the git repository, to know which files belong to it")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=HOUSE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    paths = [HOUSE / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


REGISTRIES = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("files", "pythonhosted", "org"),
        ("registry", "npmjs", "org"),
        ("deb", "debian", "org"),
    )
)
# Where people keep things on one machine; assembled so that this file does not match itself.
MACHINE_PATH = re.compile(
    r"(?<![\w.$}/])/(?:" + "|".join(("home", "Users", "root", "work")) + r")/\w"
)


def test_no_file_names_a_registry_or_a_place_on_one_machine() -> None:
    faults = []
    for path in tracked():
        text = path.read_bytes().decode("utf-8", errors="ignore")
        name = path.relative_to(HOUSE)
        faults += [f"{name}: {host}" for host in REGISTRIES if host in text]
        faults += [f"{name}: {found}" for found in MACHINE_PATH.findall(text)]
        faults += [f"{name}: {HOUSE}"] if str(HOUSE) in text else []
    assert not faults


def test_the_check_of_places_can_fail() -> None:
    assert MACHINE_PATH.search("see /" + "home/me/model")
    assert MACHINE_PATH.search('"/' + 'work/main"')
    assert not MACHINE_PATH.search("output/work/shard and https://x.io/home/page and iter0/work/x")
