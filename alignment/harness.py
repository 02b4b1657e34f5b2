"""Leaderboard tasks by EleutherAI's lm-evaluation-harness, an optional extra."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparring.launch.errors import SparringError, UsageError


def leaderboards(
    model: Path,
    tasks: Sequence[str],
    *,
    own_tasks: Path | None = None,
    dtype: str = "float32",
    batch: int = 16,
    device: str = "cpu",
    devices: int = 1,
    limit: int = 0,
) -> dict[str, Any]:
    """Run tasks of the harness on a checkpoint.

    Prompts are the tasks' own, without the model's chat template, and seeds are the harness's, as
    published figures have them.

    Args:
        model: policy folder.
        tasks: names of tasks or groups; patterns such as "mmlu_*".
        own_tasks: folder of task YAML files, beside the harness's own tasks.
        dtype, batch, device: of the forward passes.
        devices: more than one: the model's layers are dealt out to all accelerators in sight.
        limit: examples a task; 0: all. A limit is for trying things out, not for figures.

    Returns:
        `lm_eval`: {task: {metric: {"value": float, "stderr": float or None}}}, a metric being named
        with its filter unless that is "none"; and `lm_eval_version`.

    Raises:
        SparringError: the harness is missing or fails.
        UsageError: an unknown task.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        raise SparringError(
            f"evaluate.lm_eval needs lm-evaluation-harness ({error}): pip install 'sparring[eval]'"
        ) from None
    if own_tasks is not None and not own_tasks.is_dir():
        raise UsageError(f"evaluate.lm_eval_path {str(own_tasks)!r} is no folder of task files")
    manager = TaskManager(include_path=str(own_tasks) if own_tasks else None)
    names = _known(tasks, manager)
    try:
        found = lm_eval.simple_evaluate(
            model="hf",
            model_args={
                "pretrained": str(model),
                "dtype": dtype,
                "trust_remote_code": False,
                "parallelize": devices > 1 and device != "cpu",
            },
            tasks=names,
            task_manager=manager,
            batch_size=batch,
            device=device,
            limit=limit or None,
            log_samples=False,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise SparringError(
            f"lm-evaluation-harness failed on {', '.join(names)}: {type(error).__name__}: {error}"
        ) from error
    results = {task: _metrics(row) for task, row in found["results"].items()}
    return {"lm_eval": results, "lm_eval_version": lm_eval.__version__}


def _known(tasks: Sequence[str], manager: Any) -> list[str]:
    """Names of tasks that patterns stand for."""
    names: list[str] = []
    for task in tasks:
        matched = manager.match_tasks([task])
        if not matched:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise UsageError(
                f"lm-evaluation-harness has no task {task!r}{hint} (own tasks: --lm-eval-path "
                "FOLDER with YAML files)"
            )
        names += matched
    return list(dict.fromkeys(names))


def _metrics(row: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """A task's results: keys are "metric,filter" and "metric_stderr,filter"."""
    found: dict[str, dict[str, float | None]] = {}
    for key, value in row.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = row.get(f"{metric}_stderr,{kind}")
        found[metric if kind == "none" else key] = {
            "value": float(value),
            "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
        }
    return found
