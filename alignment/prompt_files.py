"""Prompts from the user's own files and data sets. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparring.alignment.rows import Message, Prompt
from sparring.launch.errors import SparringError


def load_prompts(
    path_or_id: str | Path, split_name: str = "train", *, first_turn: bool = False
) -> list[Prompt]:
    """Prompts from a JSONL or parquet file, a saved `datasets` folder or a hub dataset.

    A row has `prompt` (text, or a list of {role, content}) or `messages`; where these end with the
    assistant's turn, that turn is the real response. A row may also have `prompt_id` (default: its
    number), `real`, `verifier` (JSON text or object) and `group` (default: a hash of the messages,
    so that equal prompts stay on one side of a split).

    Args:
        path_or_id: file, folder, or hub id such as "owner/name".
        split_name: which split of a dataset; not used for files.
        first_turn: of `messages`, take what precedes the first answer as the prompt, and that
            answer as the real response; the rest of the conversation is left out.

    Raises:
        SparringError: nothing there, a malformed line or row (named), no prompts, duplicate ids.
    """
    path = Path(path_or_id).expanduser()
    rows = file_rows(path) if path.is_file() else _dataset_rows(str(path_or_id), path, split_name)
    prompts = [_prompt(where, number, row, first_turn) for number, (where, row) in enumerate(rows)]
    if not prompts:
        raise SparringError(f"{path_or_id}: there are no prompts in it")
    seen: dict[str, int] = {}
    for number, prompt in enumerate(prompts):
        if prompt.prompt_id in seen:
            raise SparringError(
                f"{path_or_id}: prompt_id {prompt.prompt_id!r} is given twice, by prompts "
                f"{seen[prompt.prompt_id]} and {number} (from 0); ids must be distinct"
            )
        seen[prompt.prompt_id] = number
    return prompts


def file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a JSONL or parquet file, each with how a message names its place.

    Raises:
        SparringError: no such file, another kind of file, or a line that is no JSON.
    """
    if not path.is_file():
        raise SparringError(f"{path}: no such file")
    if path.suffix in {".jsonl", ".json", ".ndjson"}:
        return _jsonl_rows(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    raise SparringError(f"{path}: rows are read from .jsonl or .parquet files")


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError as error:
                half = error.object[error.start]
                raise SparringError(
                    f"{path}:{number}: {half!r} is half of a character, which no UTF-8 text has; "
                    "write the row with its other half, or without it"
                ) from None
            except ValueError as error:  # malformed JSON or UTF-8
                raise SparringError(f"{path}:{number}: not a JSON object: {error}") from error
            yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise SparringError(f"{path} is not a readable parquet file: {error}") from error
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def _dataset_rows(name: str, path: Path, split_name: str) -> Iterator[tuple[str, Any]]:
    looks_like_path = (
        path.is_absolute() or name[:1] in ".~" or path.suffix in {".jsonl", ".parquet"}
    )
    if looks_like_path and not path.exists():
        raise SparringError(f"{name}: no such file or folder")
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise SparringError(f"{name}: reading it needs: pip install datasets") from error
    saved = path.is_dir() and any(
        (path / marker).is_file() for marker in ("dataset_dict.json", "state.json")
    )
    try:
        data = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(name)
    except Exception as error:  # datasets raises many unrelated types; the message names the source
        raise SparringError(f"{name} cannot be read as a dataset: {error}") from error
    if isinstance(data, dict):
        if split_name not in data:
            raise SparringError(f"{name} has no split {split_name!r}; it has {', '.join(data)}")
        data = data[split_name]
    for number, row in enumerate(data):
        yield f"{name}, row {number}", row


def _prompt(where: str, number: int, row: Any, first_turn: bool) -> Prompt:
    if not isinstance(row, dict):
        raise SparringError(f"{where}: a row must be an object, this is {type(row).__name__}")
    source = row["prompt"] if row.get("prompt") is not None else row.get("messages")
    if first_turn and isinstance(row.get("messages"), list):
        source = _to_the_first_answer(row["messages"])
    if source is None:
        raise SparringError(
            f"{where}: there is no `prompt` and no `messages`; "
            f"there is {', '.join(row) or 'nothing'}"
        )
    source, real = _answered(where, source, _text(where, row, "real"))
    messages = _messages(where, source)
    digest = hashlib.sha256(json.dumps([(m.role, m.content) for m in messages]).encode())
    prompt = Prompt(
        prompt_id=_text(where, row, "prompt_id") or f"{number:06d}",
        messages=messages,
        group=_text(where, row, "group") or digest.hexdigest()[:16],
        real=real,
    )
    return replace(prompt, verifier=_verifier(where, row.get("verifier")))


def _to_the_first_answer(messages: list[Any]) -> list[Any]:
    for count, turn in enumerate(messages, start=1):
        if isinstance(turn, dict) and turn.get("role") == "assistant":
            return messages[:count]
    return messages


def _answered(where: str, source: Any, real: str | None) -> tuple[Any, str | None]:
    """Conversations that end with the assistant's turn carry their own real response."""
    if real is None and isinstance(source, list) and len(source) > 1:
        last = source[-1]
        if isinstance(last, dict) and last.get("role") == "assistant":
            return source[:-1], _text(f"{where}, the assistant's message", last, "content")
    return source, real


def _text(where: str, row: Mapping[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int) and name in {"prompt_id", "group"}:
        return str(value)
    raise SparringError(f"{where}: `{name}` must be text, this is {value!r}")


def _messages(where: str, source: Any) -> tuple[Message, ...]:
    turns = [{"role": "user", "content": source}] if isinstance(source, str) else source
    if not isinstance(turns, list) or not turns:
        raise SparringError(
            f"{where}: a prompt is text or a list of {{role, content}}, this is {source!r}"
        )
    messages = []
    for turn in turns:
        role, content = (
            (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (0, 0)
        )
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise SparringError(
                f"{where}: a message has a role (system, user or assistant) and a text content, "
                f"this is {turn!r}"
            )
        if not content.strip():
            raise SparringError(f"{where}: the {role} message is empty")
        messages.append(Message(role, content))
    if messages[-1].role != "user":
        raise SparringError(
            f"{where}: the last message is from the {messages[-1].role}; a prompt ends with the "
            f"user's turn (put the answer into `real`)"
        )
    return tuple(messages)


def _verifier(where: str, value: Any) -> str | None:
    if value is None:
        return None
    from sparring.alignment.judges.verifier import parse_verifier

    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    try:
        parse_verifier(text)
    except SparringError as error:
        raise SparringError(f"{where}: {error}") from error
    return text
