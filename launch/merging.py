"""Stage `merge`: the shards of a stage, made on machines of their own, become one artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.launch import artifacts
from sparring.launch.artifacts import Artifact
from sparring.launch.config import config, differences, parse_portion
from sparring.launch.errors import SparringError
from sparring.launch.stages import Context, Figures, Stage, many


@config
class MergeConfig:
    """Nothing to choose: which shards there are is in their manifests."""


MERGE = Stage(
    name="merge",
    summary="put the shards of a stage together",
    function="sparring.launch.merging:run",
    config=MergeConfig,
    version="1",
    inputs={"shards*": "artifacts that `--shard 0/n` to `--shard n-1/n` made, in any order"},
    light=True,
)


def run(config: MergeConfig, inputs: Mapping[str, Path], output: Path, context: Context) -> Figures:
    """Write the files of the unsharded stage.

    Raises:
        SparringError: a shard is missing, given twice, not complete, or of other work.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    parts = _ordered([_whole(path) for path in many("shards", inputs)])
    names = sorted(name for name in parts[0].manifest["files"] if name.endswith(".parquet"))
    rows = {}
    for name in names:
        table = pa.concat_tables([pq.read_table(part.path / name) for part in parts])
        # Joined and written as `write_rows` does, the bytes are those of the unsharded stage.
        pq.write_table(_plain_maps(table.combine_chunks()), output / name, compression="zstd")
        rows[name] = table.num_rows
    return {"shards": len(parts), "rows": rows}


def _plain_maps(table: Any) -> Any:
    """The table with maps as pyarrow makes them: those it reads from parquet are named after their
    column, and that name would be written."""
    import pyarrow as pa

    for place, field in enumerate(table.schema):
        if pa.types.is_map(field.type):
            parts = [
                pa.MapArray.from_arrays(part.offsets, part.keys, part.items)
                for part in table.column(place).chunks
            ]
            plain = pa.map_(field.type.key_type, field.type.item_type)
            column = pa.chunked_array(parts, type=plain)
            table = table.set_column(place, field.with_type(plain), column)
    return table


def _whole(path: Path) -> Artifact:
    artifact = artifacts.read(path)
    if artifact is None:
        raise SparringError(f"{path} is not complete; run the command that makes it again")
    damaged = artifacts.verify(artifact)
    if damaged:
        raise SparringError(
            f"{path}: {', '.join(damaged)} changed after it was made; make it again"
        )
    return artifact


def _ordered(parts: Sequence[Artifact]) -> list[Artifact]:
    """The shards by number, when together they are all of one stage's work."""
    if not parts:
        raise SparringError("there is nothing to merge; give --shards with a folder each")
    numbered: dict[int, Artifact] = {}
    count = _portion(parts[0])[1]
    for part in parts:
        number, of = _portion(part)
        if of != count:
            raise SparringError(f"{part.path} is one of {of} shards, {parts[0].path} of {count}")
        if number in numbered:
            raise SparringError(
                f"shard {number}/{count} is given twice: {numbered[number].path} and {part.path}"
            )
        different = differences(_identity(parts[0]), _identity(part))
        if different:
            raise SparringError(
                f"{part.path} and {parts[0].path} are no shards of the same work:\n  "
                + "\n  ".join(different)
            )
        numbered[number] = part
    missing = [f"{number}/{count}" for number in range(count) if number not in numbered]
    if missing:
        raise SparringError(f"shard {', '.join(missing)} is missing")
    return [numbered[number] for number in range(count)]


def _portion(part: Artifact) -> tuple[int, int]:
    shard = part.manifest["config"].get("shard")
    if not shard:
        raise SparringError(f"{part.path} is no shard: it was made without --shard i/n")
    return parse_portion(shard)


def _identity(part: Artifact) -> dict[str, Any]:
    """What shards of one work have in common. A judge's shard may have been given the sampler's
    shard, so inputs may differ, and the stage itself checks that they belong together."""
    facts = part.manifest
    settings = {key: value for key, value in facts["config"].items() if key != "shard"}
    kept = ("stage", "version", "packages", "seed", "inputs")
    return {**{key: facts[key] for key in kept}, "config": settings}
