"""The `sparring` command. Only what a command needs is imported, so that help is immediate."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

from sparring.launch.commands import COMMANDS, HELP, STAGE_COMMANDS, joined, spoken, usage
from sparring.launch.errors import SparringError, Stopped, UsageError, defect

_RESUME = "stopped; run the same command again to go on"


@dataclasses.dataclass(frozen=True)
class _Invocation:
    command: str
    arguments: list[str]
    as_json: bool
    changed: bool
    out: TextIO

    def show(self, result: Any, text: str) -> None:
        print(json.dumps(result, indent=1) if self.as_json else text, file=self.out)


def find_recipe(name: str) -> Path:
    """A recipe file by path, or by the name of one that comes with sparring."""
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        return path
    return recipe_folder() / f"{name}.toml"


def recipe_folder() -> Path:
    """Where the recipes that come with sparring are."""
    return Path(__file__).resolve().parent.parent / "recipes"


def _recipe_command(call: _Invocation, *, default: str | None = None) -> tuple[Any, Any, Any]:
    """Pipeline, recipe with overrides, and the options, of which --out is filled in."""
    import tyro

    from sparring.launch.config import parse
    from sparring.launch.runs import load_recipe

    arguments = list(call.arguments)
    if default is None:
        if not arguments or arguments[0].startswith("-"):
            if arguments[:1] in (["--help"], ["-h"]):
                arguments = ["demo", "--help"]
            else:
                raise UsageError(
                    f"sparring {call.command} needs a recipe first; `sparring recipes` lists them"
                )
        name = arguments.pop(0)
    else:
        name = default
    pipeline, recipe = load_recipe(find_recipe(name))
    options_type = dataclasses.make_dataclass(
        "Options",
        [
            ("recipe", Annotated[pipeline.recipe, _flat()]),
            ("out", Annotated[Path | None, tyro.conf.arg(help="folder of the run")], None),
        ],
        frozen=True,
    )
    prog = f"sparring {call.command}" + ("" if default else " RECIPE")
    options = parse(
        options_type,
        arguments,
        prog=prog,
        description=f"{COMMANDS[call.command]}. The run's folder is runs/NAME unless --out says "
        "otherwise; --changed goes on in a folder of an older version of the recipe.",
        default=options_type(recipe=recipe),
    )
    out = options.out or Path("runs") / options.recipe.name
    return pipeline, options.recipe, dataclasses.replace(options, out=out)


def _flat() -> Any:
    import tyro

    return tyro.conf.arg(name="")


def _execute(call: _Invocation, pipeline: Any, recipe: Any, options: Any) -> int:
    from sparring.launch import runs
    from sparring.launch.progress import Reporter

    reporter = Reporter(quiet=call.as_json)
    reporter.say(f"{recipe.name}: {recipe.algorithm}, {options.out}")
    result = runs.execute(pipeline, recipe, options.out, reporter, changed=call.changed)
    text = result.pop("table", "")
    kept = f"{result['computed']} steps computed, {result['kept']} kept"
    call.show(result, f"\n{text}\n\n{kept}\nreport: {result['report']}")
    return 0


def _run(call: _Invocation) -> int:
    return _execute(call, *_recipe_command(call))


def _demo(call: _Invocation) -> int:
    return _execute(call, *_recipe_command(call, default="demo"))


def _plan(call: _Invocation) -> int:
    from sparring.launch import runs
    from sparring.launch.config import plain

    pipeline, recipe, options = _recipe_command(call)
    planned = runs.plan(pipeline, recipe, options.out)
    rows = [{"step": p.step.name, "state": p.state, "inputs": dict(p.step.inputs)} for p in planned]
    lines = [f"{recipe.name}: {len(rows)} steps in {options.out}"]
    lines += [f"  {row['state']:<6} {row['step']:<24} {_sources(row['inputs'])}" for row in rows]
    call.show({"recipe": plain(recipe), "steps": rows}, "\n".join(lines))
    return 0


def _sources(inputs: Any) -> str:
    return "from " + ", ".join(dict.fromkeys(inputs.values())) if inputs else ""


def _stage_options(command: str, arguments: Sequence[str]) -> tuple[Any, Any, Any]:
    """Pipeline, stage and parsed options of a stage command."""
    import tyro

    from sparring.launch import runs, stages
    from sparring.launch.config import parse

    pipeline = next(p for p in runs.pipelines().values() if command in p.stages)
    stage = pipeline.stages[command]
    required: list[Any] = [("out", Annotated[Path, tyro.conf.arg(help="folder for the result")])]
    optional: list[Any] = []
    for name, text in stage.inputs.items():
        shown = tyro.conf.arg(help=text, metavar="PATH")
        if name.endswith("?"):
            optional.append((name.removesuffix("?"), Annotated[Path | None, shown], None))
        elif name.endswith("*"):
            several = tyro.conf.arg(help=text, metavar="PATH [PATH ...]")
            optional.append((name.removesuffix("*"), Annotated[tuple[Path, ...], several], ()))
        else:
            required.append((name, Annotated[Path, shown]))
    optional += [
        ("seed", Annotated[int, tyro.conf.arg(help="of everything random in this stage")], 0),
        ("launch", stages.LaunchConfig, stages.LaunchConfig()),
        ("settings", Annotated[stage.config, _flat()], stage.config()),
    ]
    options = parse(
        dataclasses.make_dataclass("Options", required + optional, frozen=True),
        list(arguments),
        prog=f"sparring {spoken(command)}",
        description=f"{stage.summary}. The result is a folder; running again resumes.",
    )
    return pipeline, stage, options


def _stage(call: _Invocation) -> int:
    """Run one stage on files: ``sparring generate --model … --prompts … --out …``."""
    from sparring.launch import stages
    from sparring.launch.calls import make
    from sparring.launch.progress import Reporter

    pipeline, stage, options = _stage_options(call.command, call.arguments)
    inputs: dict[str, Path] = {}
    for name in (name.rstrip("?*") for name in stage.inputs):
        path = getattr(options, name)
        if isinstance(path, tuple):
            inputs |= stages.numbered(name, path)
        elif path is not None:
            # A policy may be named instead of given as a folder.
            named = "model" in name and not path.exists()
            inputs[name] = pipeline.locate(str(path)) if named else path
    artifact, fresh = make(
        stage,
        options.settings,
        inputs,
        options.out,
        seed=options.seed,
        launch=options.launch,
        reporter=Reporter(quiet=call.as_json),
    )
    result = {"out": str(options.out), "digest": artifact.digest, "computed": fresh}
    text = f"{options.out}: {', '.join(artifact.manifest['files'])}"
    if stage.text:
        text = f"{stages.load(stage.text)(artifact.path)}\n\n{text}"
    call.show({**result, "figures": artifact.figures}, text)
    return 0


def _run_options(call: _Invocation, *more: Any) -> tuple[Any, Any, Any]:
    """Pipeline and recipe of the run that a command names, and its options."""
    import tyro

    from sparring.launch import runs
    from sparring.launch.config import build, parse

    positional = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help="folder of the run")]
    options = parse(
        dataclasses.make_dataclass("Options", [("run", positional), *more]),
        call.arguments,
        prog=f"sparring {call.command}",
        description=COMMANDS[call.command],
    )
    path = options.run / runs.RUN_FILE
    if not path.is_file():
        raise SparringError(f"{options.run} is no run: it has no {runs.RUN_FILE}")
    data = json.loads(path.read_text())["recipe"]
    pipeline = runs.pipelines()[data["pipeline"]]
    return pipeline, build(pipeline.recipe, data, str(path)), options


def _report(call: _Invocation) -> int:
    pipeline, recipe, options = _run_options(call)
    report = pipeline.report(recipe, options.run)
    summary = dict(pipeline.summary(recipe, options.run))
    text = summary.pop("table", "")
    call.show({"report": str(report), **summary}, f"{text}\n\nreport: {report}")
    return 0


def _track(call: _Invocation) -> int:
    import tyro

    from sparring.launch import runs
    from sparring.launch.progress import Reporter

    text = "tensorboard, wandb, trackio, or module:class"
    to = Annotated[tuple[str, ...], tyro.conf.arg(help=text, metavar="NAME [NAME ...]")]
    pipeline, recipe, options = _run_options(call, ("to", to))
    runs.track(pipeline, recipe, options.run, options.to, Reporter(quiet=call.as_json))
    call.show({"tracked": list(options.to)}, f"{options.run}: sent to {', '.join(options.to)}")
    return 0


def _no_options(call: _Invocation) -> None:
    """Answer --help and refuse unknown options, for commands that have none."""
    from sparring.launch.config import parse

    options_type = dataclasses.make_dataclass("Options", [])
    prog = f"sparring {call.command}"
    parse(options_type, call.arguments, prog=prog, description=COMMANDS[call.command])


def _recipes(call: _Invocation) -> int:
    from sparring.launch import runs

    _no_options(call)
    folder = recipe_folder()
    rows = []
    for path in sorted(folder.rglob("*.toml")):
        recipe: Any = runs.load_recipe(path)[1]
        name = path.relative_to(folder).with_suffix("").as_posix()
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        rows.append({"recipe": name, "algorithm": recipe.algorithm, "about": first})
    algorithms = [
        {"algorithm": name, "about": about}
        for pipeline in runs.pipelines().values()
        for name, about in pipeline.algorithms().items()
    ]
    lines = ["algorithms:"]
    lines += [f"  {row['algorithm']:<14} {row['about']}" for row in algorithms]
    lines += ["recipes:"]
    lines += [f"  {row['recipe']:<26} {row['about']}" for row in rows]
    call.show({"algorithms": algorithms, "recipes": rows}, "\n".join(lines))
    return 0


def _doctor(call: _Invocation) -> int:
    from sparring.launch.doctor import examine

    _no_options(call)
    findings = examine()
    lines = [f"  {'ok' if f.ok else 'NO':<3} {f.name:<30} {f.detail}" for f in findings]
    call.show([dataclasses.asdict(f) for f in findings], "\n".join(lines))
    return 0 if all(f.ok for f in findings) else 1


_HANDLERS: dict[str, Callable[[_Invocation], int]] = {
    "demo": _demo,
    "run": _run,
    "plan": _plan,
    "report": _report,
    "track": _track,
    "recipes": _recipes,
    "doctor": _doctor,
    **dict.fromkeys(STAGE_COMMANDS, _stage),
}


def _dispatch(arguments: Sequence[str]) -> int:
    command, *rest = joined(arguments) or HELP[:1]
    if command in HELP:
        print(usage())
        return 0
    if command == "--version":
        from sparring import __version__

        print(__version__)
        return 0
    if command not in _HANDLERS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {spoken(near[0])!r}?" if near else ""
        raise UsageError(f"unknown command {spoken(command)!r}{hint} (sparring --help lists all)")
    plain = [word for word in rest if word not in ("--json", "--changed")]
    as_json, changed = "--json" in rest, "--changed" in rest
    call = _Invocation(command, plain, as_json, changed, sys.stdout)
    # Libraries print what they like; with --json standard output is the result's alone.
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        return _HANDLERS[command](call)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 ok, 1 failed, 2 usage, 75 stopped and resumable."""
    # Progress is ours: the bars of the libraries that stages use would be drawn over it.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        return _dispatch(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print(f"\n{_RESUME}", file=sys.stderr)
        return Stopped.exit_code
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SparringError as error:
        print(f"sparring: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        print(f"sparring: {defect(error)}", file=sys.stderr)
        return SparringError.exit_code


if __name__ == "__main__":
    sys.exit(main())
