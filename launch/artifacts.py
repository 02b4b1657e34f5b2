"""Artifacts: folders whose manifest, written last, is the proof that they are complete.

An artifact's key is a hash of everything that decides its content (inputs, configuration, code and
engine versions); its digest is a hash of the content itself. A folder without a manifest is work in
progress: its `work/` folder holds shards and checkpoints from which the stage goes on.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparring.launch.errors import SparringError

MANIFEST = "manifest.json"
WORK = "work"
_KEY = ".key"


def hash_json(value: Any) -> str:
    """Hash of JSON-ready data, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the whole new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _files(folder: Path) -> list[Path]:
    """Content files below a folder: no manifest, no work in progress, nothing hidden."""
    found = []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.is_file() and not hidden and parts[0] != WORK and parts != (MANIFEST,):
            found.append(path)
    return found


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {
            "sha256": hash_file(path),
            "bytes": path.stat().st_size,
        }
        for path in _files(folder)
    }


def _digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    return hash_json({name: entry["sha256"] for name, entry in files.items()})


def content_digest(path: Path) -> str:
    """Digest of any file or folder, artifact or not.

    Raises:
        SparringError: nothing is there, or an artifact that is not complete.
    """
    if path.is_file():
        return hash_file(path)
    if not path.is_dir():
        raise SparringError(f"{path}: no such file or folder")
    if (path / _KEY).exists() and not (path / MANIFEST).exists():
        raise SparringError(
            f"{path} is half-written (it has no {MANIFEST}); run the command that makes it again"
        )
    artifact = read(path)
    return artifact.digest if artifact else _digest(_describe(path))


@dataclass(frozen=True)
class Artifact:
    """A complete folder."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def key(self) -> str:
        return str(self.manifest["key"])

    @property
    def figures(self) -> dict[str, Any]:
        return dict(self.manifest["figures"])


def other_input(folder: Path, name: str, path: Path) -> tuple[str, str] | None:
    """Digests of an artifact's input as its manifest has it and of `path`, if they differ.

    None if they agree, or if the folder's manifest does not know such an input.
    """
    artifact = read(folder)
    made = artifact.manifest.get("inputs", {}).get(name) if artifact else None
    here = content_digest(path)
    return None if made in (None, here) else (made, here)


def read(folder: Path) -> Artifact | None:
    """The artifact in a folder, or None when there is no manifest.

    Raises:
        SparringError: a manifest whose files are gone or have another size.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except json.JSONDecodeError as error:
        raise SparringError(f"{folder / MANIFEST} is not JSON ({error}); delete {folder}") from None
    if "files" not in manifest:
        return None
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise SparringError(
                f"{path} is missing or was changed after its artifact was completed; "
                f"delete {folder} and run again"
            )
    return Artifact(folder, manifest)


def verify(artifact: Artifact) -> list[str]:
    """Files whose bytes are not those of the manifest."""
    return [
        name
        for name, entry in artifact.manifest["files"].items()
        if hash_file(artifact.path / name) != entry["sha256"]
    ]


def current_key(folder: Path) -> str | None:
    """Key of what is or becomes the artifact in a folder; None where there is none."""
    marker = folder / _KEY
    return marker.read_text() if marker.is_file() else None


def prepare(folder: Path, key: str) -> Artifact | None:
    """Make a folder ready for the artifact of this key; return the artifact if it is already there.

    What another key left there is kept under `NAME.stale-KEY`, and comes back when its key does.
    """
    for place in (folder, folder.with_name(f"{folder.name}.stale-{key[:8]}")):
        if current_key(place) == key:
            if place != folder:
                _set_aside(folder)
                place.rename(folder)
            artifact = read(folder)
            if artifact:
                shutil.rmtree(folder / WORK, ignore_errors=True)
            else:
                (folder / WORK).mkdir(exist_ok=True)
            return artifact
    _set_aside(folder)
    # The marker first: a folder with content but without it would be taken for someone else's.
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _KEY, key)
    (folder / WORK).mkdir()
    return None


def _set_aside(folder: Path) -> None:
    if not folder.exists():
        return
    key = current_key(folder)
    strange = (path for path in folder.iterdir() if not path.match(f".{_KEY}.*.tmp"))
    if key is None and any(strange):
        raise SparringError(
            f"{folder} holds files that sparring did not write; choose another place"
        )
    if key is not None:
        aside = folder.with_name(f"{folder.name}.stale-{key[:8]}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)


def complete(folder: Path, key: str, facts: Mapping[str, Any]) -> Artifact:
    """Write the manifest: from now on the folder is whole. `facts` is stored beside the files."""
    files = _describe(folder)
    manifest = {"format": 1, "key": key, "digest": _digest(files), **facts, "files": files}
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / WORK, ignore_errors=True)
    return Artifact(folder, manifest)


@contextmanager
def locked(file: Path, folder: Path) -> Iterator[None]:
    """Hold a folder for one process, by a lock on `file`.

    Raises:
        SparringError: another process holds it.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire(timeout=0)
    except Timeout:
        raise SparringError(
            f"another sparring process is working in {folder}; wait for it, stop it, "
            "or choose another folder with --out"
        ) from None
    except OSError as error:
        raise SparringError(f"{folder} cannot be written: {error}; choose another --out") from None
    try:
        yield
    finally:
        lock.release()
