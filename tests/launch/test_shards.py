"""Shards: what a row-wise stage gives does not depend on how it was spread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparring.launch import shards
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.processes import World
from sparring.launch.stages import Context

ITEMS = list(range(11))


@dataclass(frozen=True)
class Square:
    n: int
    square: int


def never() -> bool:
    return False


def run(
    work: Path,
    *,
    rank: int = 0,
    ranks: int = 1,
    size: int = 3,
    stopped: Callable[[], bool] = never,
    events: list[dict[str, object]] | None = None,
) -> list[int]:
    """Run one rank; returns the rows that it computed."""
    computed: list[int] = []
    sink = [] if events is None else events

    def square(chunk: Sequence[int]) -> list[Square]:
        computed.extend(chunk)
        return [Square(n, n * n) for n in chunk]

    def emit(**event: object) -> None:
        sink.append(event)

    context = Context(World(rank, ranks, rank), work, 0, stopped, emit)
    shards.make(ITEMS, size, Square, square, context, unit="numbers")
    return computed


def merge(work: Path, size: int = 3) -> list[Square]:
    return shards.merge(len(shards.chunks(ITEMS, size)), Square, work)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 4, 11, 100])
def test_ranks_and_shards_change_nothing(tmp_path: Path, ranks: int, size: int) -> None:
    shares = [run(tmp_path, rank=rank, ranks=ranks, size=size) for rank in range(ranks)]
    assert merge(tmp_path, size) == [Square(n, n * n) for n in ITEMS]
    assert sorted(n for share in shares for n in share) == ITEMS
    if ranks <= len(shards.chunks(ITEMS, size)):
        assert all(shares)


def test_shard_files_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    for ranks in (1, 3):
        (tmp_path / str(ranks)).mkdir()
        for rank in range(ranks):
            run(tmp_path / str(ranks), rank=rank, ranks=ranks)
    one, three = (
        {p.name: p.read_bytes() for p in (tmp_path / str(ranks)).iterdir()} for ranks in (1, 3)
    )
    assert one == three


def test_a_run_may_be_resumed_on_more_ranks(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(Stopped):
        run(tmp_path, stopped=lambda: next(asked))
    later = [run(tmp_path, rank=rank, ranks=2) for rank in range(2)]
    assert later == [[9, 10] if rank else [6, 7, 8] for rank in range(2)]
    assert merge(tmp_path) == [Square(n, n * n) for n in ITEMS]


def test_stopping_keeps_what_is_done(tmp_path: Path) -> None:
    asked = iter([False, True])
    with pytest.raises(Stopped, match="run the same command again"):
        run(tmp_path, stopped=lambda: next(asked))
    assert [p.name for p in tmp_path.iterdir()] == ["shard-00000.parquet"]


def test_a_missing_shard_is_an_error(tmp_path: Path) -> None:
    run(tmp_path)
    (tmp_path / "shard-00002.parquet").unlink()
    with pytest.raises(SparringError, match=r"shard 2 of 4 is missing .*run the stage again"):
        merge(tmp_path)


def test_a_half_written_shard_counts_as_missing(tmp_path: Path) -> None:
    run(tmp_path)
    whole = (tmp_path / "shard-00001.parquet").read_bytes()
    (tmp_path / "shard-00001.parquet").unlink()
    (tmp_path / "shard-00001.tmp").write_bytes(whole[:20])
    with pytest.raises(SparringError, match="shard 1 of 4"):
        merge(tmp_path)
    assert run(tmp_path) == [3, 4, 5]
    assert (tmp_path / "shard-00001.parquet").read_bytes() == whole


def test_progress_counts_the_rows_of_all_ranks(tmp_path: Path) -> None:
    last = []
    for rank in range(2):
        events: list[dict[str, object]] = []
        run(tmp_path, rank=rank, ranks=2, events=events)
        assert {event["total"] for event in events} == {len(ITEMS)}
        last.append(events[-1]["done"])
    assert last == [6, 5]


def test_what_is_kept_is_reported_at_once(tmp_path: Path) -> None:
    """It took no time, so an estimate of what is left must see it as the start."""
    run(tmp_path)
    (tmp_path / "shard-00002.parquet").unlink()
    events: list[dict[str, object]] = []
    assert run(tmp_path, events=events) == [6, 7, 8]
    assert [event["done"] for event in events] == [8, 11]
