"""Human translations from gettext's catalogues: what programs say, in two languages.

Imports no torch. A catalogue is a .mo file, as Debian's packages have them (libreoffice-l10n-de,
for one); its messages are pairs, split into words and signs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

from sparring.diffusion.dndm.corpora import local
from sparring.diffusion.dndm.rows import Text
from sparring.launch.errors import SparringError

_MAGIC = 0x950412DE
_PLACEHOLDER = re.compile(r"\$\(\w+\)|\$\{\w+\}|%[\w<>]+%?|%\S|<[^>]+>|&\w+;|#\w+#")
_TOKEN = re.compile(r"\w+|[^\w\s]")


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Messages and translations of a .mo file, in its order (GNU gettext manual, §10.3).

    A message's context is left out, and of plural forms all but the first.

    Raises:
        SparringError: the file is no catalogue, or its text is not UTF-8.
    """
    data = path.read_bytes()
    try:
        order = "<" if struct.unpack_from("<I", data)[0] == _MAGIC else ">"
        magic, _, count, originals, translations = struct.unpack_from(f"{order}5I", data)
        if magic != _MAGIC:
            raise ValueError("it does not begin as one")
        for number in range(count):
            pair = []
            for table in (originals, translations):
                length, start = struct.unpack_from(f"{order}2I", data, table + 8 * number)
                if start + length > len(data):
                    raise ValueError(f"message {number} lies behind its end")
                pair.append(data[start : start + length].decode("utf-8").partition("\0")[0])
            yield pair[0].rpartition("\x04")[2], pair[1]
    except (struct.error, ValueError) as error:
        raise SparringError(f"{path} is no catalogue of gettext: {error}") from None


def words(text: str) -> str:
    """Words and signs between spaces; placeholders, accelerators and markup are left out."""
    text = _PLACEHOLDER.sub(" ", text)
    # ~ marks a letter to press; _ does where it stands before a word or within one.
    text = re.sub(r"[~_]", "", text)
    return " ".join(_TOKEN.findall(text))


def catalogues(path: str) -> list[Text]:
    """Pairs of a .mo file, or of all in a folder; translations beside the first are `others`.

    Pairs that are the same in both languages (names, mostly) or have no letter are left out.

    Raises:
        SparringError: there is no such file, or no pair in it.
    """
    hint = "data.path is a .mo file or a folder of them"
    place = local(path, hint)
    files = sorted(place.rglob("*.mo")) if place.is_dir() else [place]
    found: dict[str, list[str]] = {}
    for file in files:
        for message, translation in messages(file):
            source, target = words(message), words(translation)
            if source == target or not re.search(r"[^\W\d]", source) or not target:
                continue
            said = found.setdefault(source, [])
            if target not in said:
                said.append(target)
    if not found:
        raise SparringError(f"{path} holds no translation; {hint}")
    return [
        Text(source, source, said[0], tuple(said[1:])) for source, said in sorted(found.items())
    ]
