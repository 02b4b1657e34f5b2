"""Artifacts: a manifest proves completeness, and nothing without one is taken as whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sparring.launch import artifacts
from sparring.launch.errors import SparringError


def make(folder: Path, key: str, text: str) -> artifacts.Artifact:
    assert artifacts.prepare(folder, key) is None
    (folder / "data.txt").write_text(text)
    return artifacts.complete(folder, key, {"stage": "s", "figures": {"n": 1}})


def test_round_trip(tmp_path: Path) -> None:
    made = make(tmp_path / "a", "k" * 64, "hello")
    read = artifacts.read(tmp_path / "a")
    assert read == made
    assert (read.key, read.figures) == ("k" * 64, {"n": 1})
    assert artifacts.prepare(tmp_path / "a", "k" * 64) == made
    assert not (tmp_path / "a" / "work").exists()


def test_the_digest_is_of_the_content_alone(tmp_path: Path) -> None:
    one, two = make(tmp_path / "a", "k", "hello"), make(tmp_path / "b", "l", "hello")
    other = make(tmp_path / "c", "k", "hallo")
    assert one.digest == two.digest != other.digest
    assert artifacts.content_digest(tmp_path / "a") == one.digest


def test_hash_json_does_not_depend_on_the_order_of_keys() -> None:
    assert artifacts.hash_json({"a": 1, "b": 2}) == artifacts.hash_json({"b": 2, "a": 1})
    assert artifacts.hash_json({"a": [1, 2]}) != artifacts.hash_json({"a": [2, 1]})


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at any moment of `complete` leaves a folder that is not whole."""
    folder = tmp_path / "a"
    artifacts.prepare(folder, "key")
    (folder / "work" / "shard").write_text("kept")
    (folder / "data.txt").write_text("hello")

    def crash(path: Path, text: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "write_atomically", crash)
    with pytest.raises(KeyboardInterrupt):
        artifacts.complete(folder, "key", {"figures": {}})
    monkeypatch.undo()
    assert artifacts.read(folder) is None
    assert artifacts.prepare(folder, "key") is None
    assert (folder / "work" / "shard").read_text() == "kept"


def test_a_half_written_manifest_does_not_exist(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        artifacts.write_atomically(path, "new")
    assert path.read_text() == "old"


def test_half_written_artifacts_are_refused_as_inputs(tmp_path: Path) -> None:
    artifacts.prepare(tmp_path / "a", "key")
    (tmp_path / "a" / "data.txt").write_text("hel")
    with pytest.raises(SparringError, match=r"half-written .*run the command that makes it again"):
        artifacts.content_digest(tmp_path / "a")


def test_a_stale_key_is_set_aside_and_comes_back(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    old = make(folder, "old-key-1", "old")
    new = make(folder, "new-key-2", "new")
    assert (tmp_path / "a.stale-old-key-" / "data.txt").read_text() == "old"
    assert artifacts.prepare(folder, "old-key-1") == old
    assert (folder / "data.txt").read_text() == "old"
    assert artifacts.prepare(folder, "new-key-2") == new
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "a.stale-old-key-"]


def test_work_in_progress_of_another_key_is_not_reused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    artifacts.prepare(folder, "old-key-1")
    (folder / "work" / "shard").write_text("old")
    artifacts.prepare(folder, "new-key-2")
    assert not list((folder / "work").iterdir())
    artifacts.prepare(folder, "old-key-1")
    assert (folder / "work" / "shard").read_text() == "old"


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SparringError, match="did not write; choose another place"):
        artifacts.prepare(tmp_path, "key")
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert artifacts.prepare(tmp_path, "key") is None
    assert (tmp_path / "work").is_dir()


@pytest.mark.parametrize("crash_in", ["mkdir", "write_atomically", "replace"])
def test_a_crash_while_preparing_does_not_block_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash_in: str
) -> None:
    """kill -9 just before or after each step of `prepare`."""
    place, name = (artifacts, crash_in) if crash_in == "write_atomically" else (Path, crash_in)
    original = getattr(place, name)
    for before in (True, False):

        def crash(*args: object, _before: bool = before, **options: object) -> None:
            if not _before:
                original(*args, **options)
            raise KeyboardInterrupt

        folder = tmp_path / f"{crash_in}-{before}"
        with monkeypatch.context() as patch:
            patch.setattr(place, name, crash)
            with pytest.raises(KeyboardInterrupt):
                artifacts.prepare(folder, "key")
        assert artifacts.prepare(folder, "key") is None
        assert (folder / "work").is_dir()


def test_a_changed_file_size_is_detected(tmp_path: Path) -> None:
    make(tmp_path / "a", "key", "hello")
    with (tmp_path / "a" / "data.txt").open("a") as file:
        file.write("!")
    with pytest.raises(SparringError, match=r"data\.txt is missing or was changed .* delete .*/a"):
        artifacts.read(tmp_path / "a")
    (tmp_path / "a" / "data.txt").unlink()
    with pytest.raises(SparringError, match="is missing or was changed"):
        artifacts.content_digest(tmp_path / "a")


def test_verify_reads_the_bytes(tmp_path: Path) -> None:
    artifact = make(tmp_path / "a", "key", "hello")
    assert artifacts.verify(artifact) == []
    (tmp_path / "a" / "data.txt").write_text("hallo")
    assert artifacts.verify(artifact) == ["data.txt"]


def test_hidden_files_and_work_are_no_content(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    artifacts.prepare(folder, "key")
    for name in (".hidden", "work/shard", "data.txt", "deep/work/data.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    made = artifacts.complete(folder, "key", {"figures": {}})
    assert list(made.manifest["files"]) == ["data.txt", "deep/work/data.txt"]


def test_a_manifest_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(SparringError, match=r"manifest\.json is not JSON .*delete"):
        artifacts.read(tmp_path)


def test_a_foreign_manifest_is_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "an app"}))
    assert artifacts.read(tmp_path) is None


def test_nothing_there(tmp_path: Path) -> None:
    assert artifacts.read(tmp_path / "a") is None
    with pytest.raises(SparringError, match="no such file or folder"):
        artifacts.content_digest(tmp_path / "a")
