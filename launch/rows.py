"""Typed rows in parquet files: a frozen dataclass is the schema."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from sparring.launch.errors import SparringError

Row = TypeVar("Row")

_SCALARS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    bytes: pa.binary(),
}


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """Arrow type and nullability of a field annotation (scalars, tuples, optionals, mappings)."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is types.UnionType:
        (inner,) = [a for a in args if a is not type(None)]
        return _arrow_type(inner)[0], True
    if origin is tuple:
        # "element" is what parquet calls it: files that are read and written again stay the same.
        return pa.list_(pa.field("element", _arrow_type(args[0])[0])), False
    if origin is dict:
        return pa.map_(_arrow_type(args[0])[0], _arrow_type(args[1])[0]), False
    if dataclasses.is_dataclass(annotation):
        return pa.struct(schema(typing.cast(type, annotation))), False
    return _SCALARS[annotation], False


@cache
def schema(row_type: Any) -> pa.Schema:
    """The Arrow schema of a row type."""
    hints = typing.get_type_hints(row_type)
    fields = []
    for field in dataclasses.fields(row_type):
        arrow, nullable = _arrow_type(hints[field.name])
        fields.append(pa.field(field.name, arrow, nullable=nullable))
    return pa.schema(fields)


def _optional(row_type: Any) -> set[str]:
    """Fields with a default, whose columns a file may leave out."""
    return {
        field.name
        for field in dataclasses.fields(row_type)
        if field.default is not dataclasses.MISSING
        or field.default_factory is not dataclasses.MISSING
    }


def write_rows(path: Path, row_type: type[Row], rows: Iterable[Row]) -> None:
    """Write rows to a parquet file; the same rows always give the same bytes."""
    records = [dataclasses.asdict(typing.cast(Any, row)) for row in rows]
    for record in records:
        for name, value in record.items():
            if isinstance(value, dict):
                record[name] = sorted(value.items())
    table = pa.Table.from_pylist(records, schema=schema(typing.cast(Any, row_type)))
    pq.write_table(table, path, compression="zstd")


def _plain(value: Any) -> Any:
    return tuple(_plain(v) for v in value) if isinstance(value, list) else value


def _build(annotation: Any, value: Any) -> Any:
    """Turn what pyarrow gives back into what the annotation promises."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if value is None:
        return None
    if origin is types.UnionType:
        return _build(next(a for a in args if a is not type(None)), value)
    if origin is dict:
        return {key: _build(args[1], item) for key, item in value}
    if origin is tuple and dataclasses.is_dataclass(args[0]):
        return tuple(_build(args[0], v) for v in value)
    if dataclasses.is_dataclass(annotation):
        return typing.cast(Any, annotation)(**value)
    return _plain(value)


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """Read a parquet file as rows of the given type.

    A column whose field has a default may be missing; the rows then have the default.

    Raises:
        SparringError: the file is missing, is not parquet, or lacks a column.
    """
    path = Path(path)
    if not path.is_file():
        raise SparringError(f"{path}: no such file")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise SparringError(f"{path} is not a readable parquet file: {error}") from error
    wanted = schema(typing.cast(Any, row_type))
    optional = _optional(typing.cast(Any, row_type))
    absent = [name for name in wanted.names if name not in table.column_names]
    missing = [name for name in absent if name not in optional]
    if missing:
        raise SparringError(
            f"{path} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(table.column_names)} and {row_type.__name__} rows need "
            f"{', '.join(wanted.names)}"
        )
    try:
        given = pa.schema([field for field in wanted if field.name not in absent])
        records = table.select(given.names).cast(given).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise SparringError(f"{path} does not hold {row_type.__name__} rows: {error}") from error
    hints = typing.get_type_hints(row_type)
    return [
        row_type(**{name: _build(hints[name], value) for name, value in record.items()})
        for record in records
    ]
