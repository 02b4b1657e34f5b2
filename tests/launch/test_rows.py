"""Rows in parquet: what is written is what is read."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows, schema, write_rows


@dataclass(frozen=True)
class Part:
    name: str
    size: int


@dataclass(frozen=True)
class Whole:
    text: str
    count: int
    share: float
    flag: bool
    note: str | None
    some: tuple[int, ...] | None
    ids: tuple[int, ...]
    matrix: tuple[tuple[float, ...], ...]
    parts: tuple[Part, ...]
    main: Part
    data: bytes
    figures: dict[str, tuple[float, ...]] = field(default_factory=dict)


int64 = st.integers(-(2**63), 2**63 - 1)
floats = st.floats(allow_nan=False)
parts = st.builds(Part, st.text(), int64)
wholes = st.builds(
    Whole,
    st.text(),
    int64,
    floats,
    st.booleans(),
    st.none() | st.text(),
    st.none() | st.lists(int64, max_size=3).map(tuple),
    st.lists(int64, max_size=4).map(tuple),
    st.lists(st.lists(floats, max_size=3).map(tuple), max_size=3).map(tuple),
    st.lists(parts, max_size=3).map(tuple),
    parts,
    st.binary(),
    st.dictionaries(st.text(), st.lists(floats, max_size=3).map(tuple), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(wholes, max_size=4))
def test_round_trip(rows: list[Whole]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_rows(path, Whole, rows)
        assert read_rows(path, Whole) == rows


def test_not_a_number_and_infinity_survive(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Number:
        value: float

    write_rows(tmp_path / "n", Number, [Number(math.nan), Number(-math.inf)])
    nan, infinity = read_rows(tmp_path / "n", Number)
    assert math.isnan(nan.value)
    assert infinity.value == -math.inf


def whole(**changes: object) -> Whole:
    one = Whole("a", 1, 0.5, True, None, None, (1,), ((1.0,),), (), Part("m", 1), b"")
    return dataclasses.replace(one, **changes)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    one = whole(figures={"x": (1.0,), "y": (2.0,)})
    two = whole(figures={"y": (2.0,), "x": (1.0,)})
    write_rows(tmp_path / "1", Whole, [one])
    write_rows(tmp_path / "2", Whole, [two])
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_only_optional_fields_are_nullable() -> None:
    assert [f.name for f in schema(Whole) if f.nullable] == ["note", "some"]


def test_errors_name_file_and_column(tmp_path: Path) -> None:
    with pytest.raises(SparringError, match=r"none\.parquet: no such file"):
        read_rows(tmp_path / "none.parquet", Part)
    text = tmp_path / "text.parquet"
    text.write_text("not parquet")
    with pytest.raises(SparringError, match=r"text\.parquet is not a readable parquet file"):
        read_rows(text, Part)
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"name": ["a"], "length": [1]}), other)
    with pytest.raises(SparringError, match=r"no column 'size'; it has name, length and Part rows"):
        read_rows(other, Part)
    pq.write_table(pa.table({"name": ["a"], "size": ["big"]}), other)
    with pytest.raises(SparringError, match="does not hold Part rows"):
        read_rows(other, Part)


def test_a_hole_in_a_required_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hole.parquet"
    pq.write_table(pa.table({"name": ["a", None], "size": [1, 2]}), path)
    with pytest.raises(SparringError, match=r"does not hold Part rows.*name"):
        read_rows(path, Part)


def test_columns_in_another_order_and_more_of_them_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "more.parquet"
    pq.write_table(pa.table({"size": [1], "extra": [2.0], "name": ["a"]}), path)
    assert read_rows(path, Part) == [Part("a", 1)]
