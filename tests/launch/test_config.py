"""Recipes from TOML: what is refused, and what the message says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sparring.launch.config import (
    at,
    build,
    config,
    differences,
    memory_advice,
    parse,
    plain,
    read_toml,
    resource,
)
from sparring.launch.errors import UsageError


@config
class Inner:
    steps: int = 1
    rate: float | tuple[float, ...] = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")


@config
class Outer:
    name: str
    inner: Inner = Inner()
    where: Path = Path("here")


@config
class Bounded:
    batch: int = 1
    memory: int = resource(default=1)


def refusal(**data: object) -> str:
    with pytest.raises(UsageError) as caught:
        build(Outer, data, "r.toml")
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_valid_data() -> None:
    built = build(Outer, {"name": "a", "inner": {"rate": [0.1, 0.2]}}, "r.toml")
    assert built == Outer(name="a", inner=Inner(rate=(0.1, 0.2)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"nme": "a", "name": "a"}, "r.toml: unknown key 'nme'; did you mean 'name'?"),
        (
            {"name": "a", "inner": {"stepps": 2}},
            "r.toml: unknown key 'inner.stepps'; did you mean 'inner.steps'?",
        ),
        (
            {"name": "a", "inner": {"zzz": 2}},
            "r.toml: unknown key 'inner.zzz'; allowed here: steps, rate",
        ),
        (
            {"name": "a", "inner": "fast"},
            "r.toml: 'inner' is a section, not 'fast'; write [inner] and its keys below",
        ),
        ({}, "r.toml: key 'name' is missing"),
        (
            {"name": "a", "inner": {"steps": 0}},
            "r.toml: inner: steps must be at least 1, not 0",
        ),
    ],
)
def test_refusals_name_the_key_and_the_fix(data: dict[str, object], message: str) -> None:
    assert refusal(**data) == message


def test_a_wrong_type_shows_key_and_value() -> None:
    text = refusal(name="a", inner={"steps": "many"})
    assert "inner.steps" in text
    assert "integer" in text
    assert "'many'" in text


@pytest.mark.parametrize(
    "inner", [{"steps": True}, {"steps": "2"}, {"rate": "0.1"}, {"steps": 1.5}, {"rate": True}]
)
def test_what_could_be_taken_for_a_number_is_refused(inner: dict[str, object]) -> None:
    assert next(iter(inner)) in refusal(name="a", inner=inner)


def test_python_values_are_as_good_as_toml() -> None:
    import numpy as np

    inner = Inner(steps=3, rate=(1.0, 2.0))
    built = build(Outer, {"name": "a", "where": Path("there"), "inner": inner}, "call")
    assert built == Outer(name="a", where=Path("there"), inner=inner)
    assert build(Inner, {"steps": np.int64(4), "rate": 1}, "call") == Inner(steps=4, rate=1.0)


def test_all_problems_are_told_at_once() -> None:
    assert len(refusal(nam="a", inner={"steps": "many"}).splitlines()) == 3


def test_missing_file_folder_and_bad_syntax(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nothing\.toml: no such recipe; `sparring recipes`"):
        read_toml(tmp_path / "nothing.toml")
    with pytest.raises(UsageError, match="is a folder"):
        read_toml(tmp_path)
    bad = tmp_path / "bad.toml"
    bad.write_text("a = 1\nb = = 2\n")
    with pytest.raises(UsageError, match=r"bad\.toml is not valid TOML: .*line 2"):
        read_toml(bad)
    bad.write_bytes(b"a = '\xff'\n")
    with pytest.raises(UsageError, match="is not valid TOML"):
        read_toml(bad)


def test_the_command_line_overrides_the_file() -> None:
    default = Outer(name="a", inner=Inner(steps=3, rate=0.5))
    options = parse(Outer, ["--inner.steps", "7"], prog="p", description="d", default=default)
    assert options == Outer(name="a", inner=Inner(steps=7, rate=0.5))


@config
class Switches:
    keep_all: bool = False
    inner: Inner = Inner()
    names: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("arguments", "keep_all", "names"),
    [
        (["--keep-all"], True, ()),
        (["--keep_all", "--names", "a", "b"], True, ("a", "b")),
        (["--names", "a", "--keep-all"], True, ("a",)),
        (["--keep-all", "False"], False, ()),
        ([], False, ()),
    ],
)
def test_a_switch_alone_means_true(
    arguments: list[str], keep_all: bool, names: tuple[str, ...]
) -> None:
    options = parse(Switches, arguments, prog="p", description="d")
    assert options == Switches(keep_all=keep_all, names=names)


def test_a_refused_override_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for value in ("many", "0"):
        try:
            parse(Outer, ["--inner.steps", value], prog="p", description="", default=Outer(name=""))
        except UsageError as error:
            code, text = error.exit_code, str(error)
        except SystemExit as stop:
            code, text = stop.code, capsys.readouterr().err
        assert code == 2
        assert value in text


def test_schedules_keep_their_last_value() -> None:
    assert [at(2.0, t) for t in range(3)] == [2.0, 2.0, 2.0]
    assert [at((1.0, 2.0), t) for t in range(4)] == [1.0, 2.0, 2.0, 2.0]


def test_plain_data_builds_the_same_again() -> None:
    outer = Outer(name="a", inner=Inner(rate=(0.1, 0.2)), where=Path("x/y"))
    assert build(Outer, plain(outer), "again") == outer


def test_plain_data_without_resources_is_what_decides_a_result() -> None:
    assert plain(Bounded(batch=2, memory=3), resources=False) == {"batch": 2}
    assert plain(Bounded(batch=2, memory=3)) == {"batch": 2, "memory": 3}
    nested = {"some": (Bounded(),), "one": Bounded(memory=3)}
    assert plain(nested, resources=False) == {"some": [{"batch": 1}], "one": {"batch": 1}}
    assert build(Bounded, {"memory": 5}, "r.toml").memory == 5


def test_differences_are_dotted_keys() -> None:
    old, new = plain(Outer(name="a")), plain(Outer(name="b", inner=Inner(steps=2)))
    assert differences(old, new) == ["inner.steps: 1 -> 2", "name: 'a' -> 'b'"]
    assert differences(old, old) == []


def test_checking_a_recipe_imports_no_model_code() -> None:
    code = (
        "import sys; from sparring.alignment.config import Recipe; "
        "from sparring.launch.config import build; build(Recipe, {'name': 'a'}, 'r'); "
        "print([m for m in ('torch', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@config
class Training:
    offload: bool = resource(default=False)
    cache: str = resource(default="")
    lr: float = 1.0


@config
class Trainer:
    train: Training = Training()
    batch: int = 64
    micro_batch: int = resource(default=4)


@config
class Sampler:
    batch: int = 100


@config
class Bare:
    lr: float = 1.0


def test_advice_on_memory_names_what_changes_no_result_or_else_the_batch() -> None:
    advice = memory_advice(Trainer())
    assert advice.endswith("which change no result: train.offload = False, micro_batch = 4")
    assert memory_advice(Sampler()) == "This stage has a setting of memory: batch = 100"
    assert memory_advice(Bare()) == ""
