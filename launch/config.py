"""Recipes and options: TOML files validated into frozen dataclasses.

Nothing here imports torch, so that `sparring --help` and checking a recipe stay fast.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from sparring.launch.errors import UsageError

Config = TypeVar("Config")
Value = TypeVar("Value")
Schedule = float | tuple[float, ...]
"""A value, or one an iteration; a list's last entry stays for the iterations after it."""
_RESOURCE = "resource"


def resource(*, default: Value) -> Value:
    """A field for memory or speed, whose value changes nothing of a result but rounding (and the
    draws of dropout): what was made with another one stays valid."""
    field: Any = dataclasses.field(default=default, metadata={_RESOURCE: True})
    return field  # type: ignore[no-any-return]


def is_resource(field: dataclasses.Field[Any]) -> bool:
    """Whether a field of a configuration class is for memory or speed alone."""
    return _RESOURCE in field.metadata


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(dataclasses.field, resource)
)
def config(cls: type[Config]) -> type[Config]:
    """A frozen, keyword-only dataclass whose unknown keys are refused when read from a file."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclasses.dataclass(frozen=True, kw_only=True)(cls)


def _keys(cls: Any, path: tuple[str | int, ...]) -> list[str]:
    """Names that are allowed at a dotted path of a configuration class."""
    import typing

    for part in path:
        if isinstance(part, int):  # an entry of tuple[Section, ...]
            cls = next(iter(typing.get_args(cls)), None)
        else:
            cls = (typing.get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}).get(part)
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _explain(cls: type, error: Mapping[str, Any]) -> str:
    *parents, key = error["loc"] or ("",)
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        allowed = _keys(cls, tuple(parents))
        near = difflib.get_close_matches(str(key), allowed, n=1)
        place = ".".join([*map(str, parents), near[0]]) if near else ""
        return f"unknown key {name!r}; " + (
            f"did you mean {place!r}?" if near else f"allowed here: {', '.join(allowed)}"
        )
    if error["type"] in ("missing", "missing_argument"):
        return f"key {name!r} is missing"
    if error["type"] == "dataclass_type":
        return f"{name!r} is a section, not {error['input']!r}; write [{name}] and its keys below"
    problem = error["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{name + ': ' if name else ''}{problem}{shown}"


def _json_ready(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def build(cls: type[Config], data: Mapping[str, Any], where: str) -> Config:
    """Validate plain data into a configuration class.

    Raises:
        UsageError: every unknown key (with the nearest allowed one), wrong type and bad value.
    """
    from pydantic import TypeAdapter, ValidationError

    # Strictly, so that "no" is no switch and true no number; in JSON a list may be a tuple.
    text = json.dumps(plain(data), default=_json_ready)
    try:
        return TypeAdapter(cls).validate_json(text, strict=True)
    except ValidationError as error:
        problems = [_explain(cls, item) for item in error.errors()]
        raise UsageError("\n".join(f"{where}: {problem}" for problem in problems)) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: no such file, or where the syntax is wrong.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe; `sparring recipes` lists them") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder, not a recipe file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None


def parse(
    cls: Any, arguments: list[str], *, prog: str, description: str, default: Any = None
) -> Any:
    """Parse command-line options into a dataclass; `default` is what they override.

    A switch alone means True: ``--kl`` is ``--kl True``.

    Raises:
        UsageError: a value that the class itself refuses.
    """
    import tyro

    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        return tyro.cli(
            cls,
            args=_spelt_out(arguments, _switches(cls)),
            prog=prog,
            description=description,
            config=(tyro.conf.FlagConversionOff, tyro.conf.SuppressFixed),
            **options,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def _switches(cls: Any, prefix: str = "--") -> set[str]:
    """Options of a dataclass that are True or False."""
    import typing

    found: set[str] = set()
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        flat = any(
            getattr(extra, "name", None) == "" for extra in getattr(hint, "__metadata__", ())
        )
        bare = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        option = name.replace("_", "-")
        if bare is bool:
            found.add(f"{prefix}{option}")
        elif dataclasses.is_dataclass(bare):
            found |= _switches(bare, prefix if flat else f"{prefix}{option}.")
    return found


def _spelt_out(arguments: list[str], switches: set[str]) -> list[str]:
    """The arguments with "True" behind every switch that has no value."""
    words: list[str] = []
    for place, word in enumerate(arguments):
        words.append(word)
        alone = place + 1 == len(arguments) or arguments[place + 1].startswith("--")
        if word.replace("_", "-") in switches and alone:
            words.append("True")
    return words


def positive(name: str, value: float) -> None:
    """Refuse what is not above zero, or is infinite."""
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be positive, not {value}")


def within(name: str, value: float, low: float, high: float) -> None:
    """Refuse what is not between two bounds."""
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, not {value}")


def schedule_values(name: str, schedule: Schedule) -> tuple[float, ...]:
    """All values of a schedule; an empty one is refused."""
    values = schedule if isinstance(schedule, tuple) else (schedule,)
    if not values:
        raise ValueError(f"{name} is an empty list; give a number, or one an iteration")
    return values


def at(schedule: Any, iteration: int) -> Any:
    """The value of a per-iteration schedule: a single value, or a list whose last entry stays."""
    if isinstance(schedule, tuple):
        return schedule[min(iteration, len(schedule) - 1)]
    return schedule


def resolved(section: Config, iteration: int) -> Config:
    """A section with every schedule replaced by its value at an iteration (0-based)."""
    values = {
        f.name: at(getattr(section, f.name), iteration)
        for f in dataclasses.fields(section)  # type: ignore[arg-type]
    }
    return dataclasses.replace(section, **values)  # type: ignore[type-var]


def plain(value: Any, *, resources: bool = True) -> Any:
    """Configuration as JSON-ready data; without `resources` only what decides a result."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            f.name: plain(getattr(value, f.name), resources=resources)
            for f in dataclasses.fields(value)
            if resources or not is_resource(f)
        }
    if isinstance(value, Mapping):
        return {str(k): plain(v, resources=resources) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, resources=resources) for v in value]
    return str(value) if isinstance(value, Path) else value


def memory_advice(config: Any) -> str:
    """A line on what to change where a stage's memory ran out; "" if nothing is known."""
    found, said = _resources(config), "settings of memory and speed, which change no result"
    if not found and (batch := getattr(config, "batch", None)):
        found, said = {"batch": batch}, "a setting of memory"
    values = ", ".join(f"{name} = {value}" for name, value in found.items())
    return f"This stage has {said}: {values}" if found else ""


def _resources(value: Any, prefix: str = "") -> dict[str, Any]:
    """Numbers and switches for memory or speed alone, by dotted key; no folder of a cache."""
    found: dict[str, Any] = {}
    for f in dataclasses.fields(value):
        part = getattr(value, f.name)
        if is_resource(f) and not isinstance(part, str):
            found[f"{prefix}{f.name}"] = part
        elif dataclasses.is_dataclass(part):
            found |= _resources(part, f"{prefix}{f.name}.")
    return found


def without_launch(recipe: Any, *, resources: bool = True) -> dict[str, Any]:
    """A recipe as plain data, but for how it is launched, which is no part of what it computes."""
    return {k: v for k, v in plain(recipe, resources=resources).items() if k != "launch"}


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys in which two plain configurations differ, as "key: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in sorted(old.keys() | new.keys())
            for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [f"{prefix.rstrip('.')}: {old!r} -> {new!r}"]


def parse_portion(text: str) -> tuple[int, int]:
    """(i, n) of "i/n", the i-th of n portions, i from 0; "" is all: (0, 1).

    Raises:
        ValueError: it is not of this form, or i is not below n.
    """
    if not text:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"a shard is i/n with i from 0 to n - 1, such as 0/4, not {text!r}")
    return int(found[1]), int(found[2])
