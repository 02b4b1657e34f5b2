"""Shards: equal pieces of a row-wise stage, spread over ranks, each kept as soon as it is done.

What is in a shard depends on the rows and the chunk size alone, never on the number of ranks, so a
run started on one rank and resumed on four gives the same file. Machines that know nothing of each
other each make a portion i/n of the shards; `sparring merge` puts their artifacts together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sparring.launch.config import parse_portion
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.rows import read_rows, write_rows
from sparring.launch.stages import Context

Item = TypeVar("Item")
Row = TypeVar("Row")


def _path(work: Path, number: int) -> Path:
    return work / f"shard-{number:05d}.parquet"


def chunks(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    """Split rows into pieces of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def portion(items: Sequence[Item], size: int, shard: str) -> Sequence[Item]:
    """The rows of portion "i/n": whole chunks, neighbours, so that portions in order are the rows.

    Raises:
        SparringError: there are fewer chunks than portions, so that some would be empty.
    """
    number, count = parse_portion(shard)
    pieces = -(-len(items) // size)
    if count > max(pieces, 1):
        raise SparringError(
            f"{len(items)} rows in chunks of {size} are {pieces} chunks, too few for {count} "
            "shards; make fewer shards, or smaller chunks"
        )
    return items[number * pieces // count * size : (number + 1) * pieces // count * size]


def make(
    items: Sequence[Item],
    size: int,
    row_type: type[Row],
    function: Callable[[Sequence[Item]], Sequence[Row]],
    context: Context,
    *,
    unit: str,
) -> None:
    """Apply `function` to this rank's chunks that have no shard yet, and write one shard each.

    Raises:
        Stopped: asked to stop; the shards written so far are kept.
    """
    pieces = chunks(items, size)
    mine = range(context.world.rank, len(pieces), context.world.size)
    missing = [number for number in mine if not _path(context.work, number).exists()]
    done = sum(len(pieces[number]) for number in set(mine) - set(missing))

    def report() -> None:
        context.emit(done=done, total=len(items), unit=unit, rank=context.world.rank)

    report()
    for number in missing:
        if context.stopped():
            raise Stopped("stopped; run the same command again to go on")
        path = _path(context.work, number)
        temporary = path.with_suffix(".tmp")
        write_rows(temporary, row_type, function(pieces[number]))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        done += len(pieces[number])
        report()


def merge(count: int, row_type: type[Row], work: Path) -> list[Row]:
    """All rows of `count` shards, in order.

    Raises:
        SparringError: a shard is missing.
    """
    missing = [n for n in range(count) if not _path(work, n).exists()]
    if missing:
        raise SparringError(
            f"{work}: shard {missing[0]} of {count} is missing ({len(missing)} in all); "
            "run the stage again"
        )
    return [row for number in range(count) for row in read_rows(_path(work, number), row_type)]
