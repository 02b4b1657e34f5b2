"""Responses from a stage or from the user's own files. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparring.alignment import tokens
from sparring.alignment.config import TemplateConfig
from sparring.alignment.prompt_files import file_rows
from sparring.alignment.rows import Prompt, Response
from sparring.launch.errors import SparringError
from sparring.launch.rows import read_rows


def read_responses(path: Path) -> list[Response]:
    """The responses of an artifact of `generate`, or of a JSONL or parquet file.

    A file's row has `responses`, a list of texts (or of {role, content}), and may have `prompt_id`
    (default: the row's number, as in a file of prompts, so that one file can be both); or it has
    `response` and `prompt_id`, one row a response, and may have `k`. Responses of files have no
    token ids: they can be judged and evaluated; `sparring pair --model` encodes them for training.

    Raises:
        SparringError: nothing there, a malformed row (named), or a response number given twice.
    """
    if path.is_dir():
        return read_rows(path / "responses.parquet", Response)
    if _is_stage_file(path):
        return read_rows(path, Response)
    rows = [r for n, (where, row) in enumerate(file_rows(path)) for r in _responses(where, n, row)]
    if not rows:
        raise SparringError(f"{path}: there are no responses in it")
    counted: Counter[str] = Counter()
    for n, row in enumerate(rows):  # one row a response, without k: in the file's order
        if row.k < 0:
            rows[n] = replace(row, k=counted[row.prompt_id])
        counted[row.prompt_id] += 1
    twice = [key for key, count in Counter((r.prompt_id, r.k) for r in rows).items() if count > 1]
    if twice:
        raise SparringError(
            f"{path}: response k={twice[0][1]} to prompt {twice[0][0]!r} is given twice "
            f"({len(twice)} such); every row needs a k of its own, or none any"
        )
    return rows


def _is_stage_file(path: Path) -> bool:
    """Whether a parquet file is what `generate` writes."""
    if path.suffix != ".parquet" or not path.is_file():
        return False
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return "response_ids" in pq.read_schema(path).names
    except pa.ArrowInvalid as error:
        raise SparringError(f"{path} is not a readable parquet file: {error}") from error


def _responses(where: str, number: int, row: Any) -> Iterator[Response]:
    if not isinstance(row, dict):
        raise SparringError(f"{where}: a row must be an object, this is {type(row).__name__}")
    name = row.get("prompt_id")
    many, one = row.get("responses"), row.get("response")
    if many is None and one is None:
        raise SparringError(
            f"{where}: there is no `responses` (a list of texts) and no `response`; "
            f"there is {', '.join(row) or 'nothing'}"
        )
    if many is None:
        if name is None:
            raise SparringError(
                f"{where}: a row with one `response` needs its prompt's `prompt_id`"
            )
        number = row.get("k", -1)
        if not isinstance(number, int):
            raise SparringError(f"{where}: `k` must be a whole number, this is {number!r}")
        yield _response(where, str(name), number, one)
        return
    if not isinstance(many, list) or not many:
        raise SparringError(f"{where}: `responses` must be a list of texts, this is {many!r}")
    for k, text in enumerate(many):
        yield _response(where, f"{number:06d}" if name is None else str(name), k, text)


def _response(where: str, prompt_id: str, k: int, given: Any) -> Response:
    text = given.get("content") if isinstance(given, dict) else given
    if not isinstance(text, str):
        raise SparringError(f"{where}: a response must be text, this is {given!r}")
    return Response(
        prompt_id=prompt_id,
        k=k,
        iteration=0,
        text=text.strip(),
        prompt_ids=(),
        response_ids=(),
        finish_reason="stop",
        seed=0,
    )


def with_ids(
    rows: Sequence[Response],
    prompts: dict[str, Prompt],
    model: Path,
    *,
    how: TemplateConfig,
    limit: int,
) -> list[Response]:
    """Given texts as the tokens that training sees; sampled responses keep theirs.

    Args:
        rows: responses, of which those without `prompt_ids` are encoded.
        prompts: by id.
        model: folder whose tokenizer and template are used.
        how: prompts are written and responses end.
        limit: longest response in tokens; a longer one is cut and has no EOS.

    Raises:
        SparringError: no tokenizer or template, or a response without its prompt.
    """
    tokenizer = tokens.load_tokenizer(model)
    place = tokens.turn(tokenizer, model, how)
    encoded = []
    for row in rows:
        if row.prompt_ids:
            encoded.append(row)
            continue
        if row.prompt_id not in prompts:
            raise SparringError(f"there is a response to {row.prompt_id!r}, but no such prompt")
        ids = tokens.response_ids(tokenizer, row.text, place, limit=limit) if row.text else []
        ended = bool(ids) and ids[-1] == place.end
        encoded.append(
            replace(
                row,
                prompt_ids=tuple(tokens.prompt_ids(tokenizer, prompts[row.prompt_id], how)),
                response_ids=tuple(ids),
                finish_reason="stop" if ended else "length",
            )
        )
    return encoded
