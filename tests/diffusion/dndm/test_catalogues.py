"""Translations from .mo files, written here by the format's own description."""

from __future__ import annotations

import gettext
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from sparring.diffusion.dndm.catalogues import catalogues, messages, words
from sparring.launch.errors import SparringError

PAIRS = [
    ("", "Content-Type: text/plain; charset=UTF-8\n"),
    ("menu\x04~Save as...", "Speichern ~unter..."),
    ("menu2\x04Save as...", "Sichern unter..."),
    ("Page $(ARG1) of %1", "Seite $(ARG1) von %1"),
    ("OK", "OK"),
    ("%d row\0%d rows", "%d Zeile\0%d Zeilen"),
    ("100 %", "100%"),
]


def written(path: Path, pairs: Sequence[tuple[str, str]], order: str = "<") -> Path:
    """A catalogue: header, two tables of (length, place), then strings that end in a zero."""
    strings = [text.encode() for side in zip(*pairs, strict=True) for text in side]
    at, table, body = 28 + 8 * len(strings), b"", b""
    for text in strings:
        table += struct.pack(f"{order}2I", len(text), at + len(body))
        body += text + b"\0"
    count = len(pairs)
    header = struct.pack(f"{order}7I", 0x950412DE, 0, count, 28, 28 + 8 * count, 0, at)
    path.write_bytes(header + table + body)
    return path


@pytest.mark.parametrize("order", ["<", ">"])
def test_messages_are_those_that_gettext_reads(order: str, tmp_path: Path) -> None:
    pairs = sorted(PAIRS)
    path = written(tmp_path / "x.mo", pairs, order)
    found = dict(messages(path))
    with path.open("rb") as file:
        oracle = gettext.GNUTranslations(file)
    assert oracle.pgettext("menu", "~Save as...") == found["~Save as..."]
    assert oracle.ngettext("%d row", "%d rows", 1) == found["%d row"]
    assert len(found) == len(pairs)


def test_pairs_are_words_and_signs(tmp_path: Path) -> None:
    written(tmp_path / "x.mo", PAIRS)
    found = {row.source: (row.target, row.others) for row in catalogues(str(tmp_path))}
    assert found == {
        "Save as . . .": ("Speichern unter . . .", ("Sichern unter . . .",)),
        "Page of": ("Seite von", ()),
        "row": ("Zeile", ()),
    }
    assert words("~Fußnote_n <b>ändern</b>") == "Fußnoten ändern"


def test_what_is_no_catalogue_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.mo").write_bytes(b"hello, this is no catalogue")
    with pytest.raises(SparringError, match=r"x\.mo is no catalogue of gettext"):
        catalogues(str(tmp_path))
    whole = written(tmp_path / "y.mo", PAIRS).read_bytes()
    (tmp_path / "y.mo").write_bytes(whole[:-30])
    with pytest.raises(SparringError, match=r"y\.mo is no catalogue of gettext"):
        catalogues(str(tmp_path / "y.mo"))
    written(tmp_path / "z.mo", [("OK", "OK")])
    with pytest.raises(SparringError, match="holds no translation"):
        catalogues(str(tmp_path / "z.mo"))
    with pytest.raises(SparringError, match="no such file"):
        catalogues(str(tmp_path / "gone"))
