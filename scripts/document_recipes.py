"""Write the table of recipe keys into docs/recipes.md, from the configuration classes.

``python scripts/document_recipes.py`` writes; ``--check`` only compares, and exits with 1 when the
file is out of date. Help is the string below each field, defaults are the classes' own.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from sparring.launch.config import is_resource
from sparring.launch.runs import pipelines

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
SHARED = ("launch", "optimizer")  # tables that mean the same in every recipe
BEGIN, END = "<!-- keys: begin -->", "<!-- keys: end -->"

_TYPES = {
    "str": "text",
    "int": "integer",
    "float": "number",
    "bool": "true or false",
    "Schedule": "number, or one an iteration",
    "tuple[str, ...]": "list of texts",
    "tuple[int, ...]": "list of integers",
    "tuple[float, float]": "two numbers",
    "dict[str, str]": "table of texts",
    "dict[str, str | bool | int | float]": "table",
}


def field_notes(cls: type) -> dict[str, tuple[str, str]]:
    """Type and help of each field, as the source of a class and its bases has them."""
    notes: dict[str, tuple[str, str]] = {}
    for base in reversed([c for c in cls.__mro__ if dataclasses.is_dataclass(c)]):
        notes |= _own_notes(base)
    return notes


def _own_notes(cls: type) -> dict[str, tuple[str, str]]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    notes = {}
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            notes[node.target.id] = (_type_name(node.annotation), text)
    return notes


def _type_name(annotation: ast.expr) -> str:
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        values = annotation.slice
        choices = values.elts if isinstance(values, ast.Tuple) else [values]
        return " or ".join(_toml(ast.literal_eval(choice)) for choice in choices)
    source = ast.unparse(annotation).removesuffix(" | None")
    return _TYPES.get(source, source)


def _toml(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return f'`"{value}"`'
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f"`{value}`"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _toml(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return _toml(field.default_factory())
    return "required"


def sections(recipe: type) -> list[tuple[str, type]]:
    """Every table of a recipe: its name (empty for the top) and its class."""
    found = [("", recipe)]
    for name, cls in found:  # grows while it is read
        for key, hint in get_type_hints(cls).items():
            inner = _table(hint)
            if inner:
                found.append((f"{name}.{key}".removeprefix("."), inner))
    return sorted(found, key=lambda entry: _place(recipe, entry[0]))


def _table(hint: Any) -> type | None:
    """The class of a table, or of the entries of an array of tables."""
    entry = get_args(hint)[0] if get_origin(hint) is tuple else hint
    return entry if dataclasses.is_dataclass(entry) else None  # type: ignore[return-value]


def _heading(recipe: type, name: str) -> str:
    """A table's name as TOML writes it; an array of tables in double brackets."""
    hint: Any = recipe
    for part in name.split("."):
        hint = get_type_hints(_table(hint))[part]
    return f"[[{name}]]" if get_origin(hint) is tuple else f"[{name}]"


def _place(recipe: type, name: str) -> tuple[int, ...]:
    """Where a table stands in the recipe: a nested one behind the one that holds it."""
    cls: Any = recipe
    place = []
    for part in filter(None, name.split(".")):
        place.append([field.name for field in dataclasses.fields(cls)].index(part))
        cls = _table(get_type_hints(cls)[part])
    return tuple(place)


def render() -> str:
    """The generated part of the page: what all recipes have, then each pipeline."""
    found = {name: sections(pipeline.recipe) for name, pipeline in pipelines().items()}
    shared = {name.rpartition(".")[2]: cls for name, cls in found["alignment"] if _shared(name)}
    lines = ["## All recipes", ""]
    for name in SHARED:
        heading = f"`[{name}]`" if name == "launch" else f"Tables that end in `.{name}`"
        lines += _keys(f"### {heading}", shared[name])
    for pipeline, tables in sorted(found.items()):
        recipe = tables[0][1]
        lines += [f'## `pipeline = "{pipeline}"`', ""]
        for name, cls in tables:
            if not _shared(name):
                heading = f"`{_heading(recipe, name)}`" if name else "Top of the file"
                lines += _keys(f"### {heading}", cls)
    return "\n".join(lines)


def _shared(name: str) -> bool:
    return name.rpartition(".")[2] in SHARED


def _keys(heading: str, cls: type) -> list[str]:
    """The table of one section's keys."""
    about = inspect.getdoc(cls) or ""
    lines = [heading, "", about, "", "| key | value | default | meaning |", "|---|---|---|---|"]
    notes, hints = field_notes(cls), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if _table(hints[field.name]):
            continue  # a table of its own
        kind, text = notes[field.name]
        name = f"`{field.name}`{' °' * is_resource(field)}"
        cells = [name, kind, _default(field), text]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return [*lines, ""]


def page(text: str) -> str:
    """The page with its generated part renewed."""
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n\n{render()}\n{END}{tail}"


def main(arguments: list[str]) -> int:
    """Write or check the page; returns the exit code."""
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if arguments == ["--check"]:
        if new != old:
            print(f"{PAGE.name} is out of date; run: python scripts/document_recipes.py")
        return int(new != old)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
