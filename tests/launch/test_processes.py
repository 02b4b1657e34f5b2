"""Processes of stages: how they fail, how they are stopped, and that none is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparring.launch import processes, runs, stages
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.processes import World
from sparring.launch.stages import LaunchConfig, Step


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited too long"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def execute(folder: Path, mode: str, **launch: Any) -> Any:
    """The toy stage in a process of its own."""
    from toy_pipeline import ADD, Add

    events: list[dict[str, Any]] = []
    artifact, fresh = stages.execute(
        Step("one", ADD, Add(mode=mode), {}),
        {},
        folder / "one",
        LaunchConfig(**launch),
        logs=folder / "logs",
        on_event=events.append,
    )
    return artifact, fresh, events


def test_a_stage_in_its_own_process(tmp_path: Path) -> None:
    artifact, fresh, events = execute(tmp_path, "ok")
    assert fresh
    assert artifact.figures == {"total": 1}
    assert events == [{"done": 1, "total": 1, "unit": "numbers"}]
    assert not (tmp_path / "one" / "work").exists()


def test_the_same_in_the_driver(tmp_path: Path) -> None:
    apart = execute(tmp_path / "apart", "ok")[0]
    inline = execute(tmp_path / "inline", "ok", inline=("add",))[0]
    assert (apart.key, apart.digest) == (inline.key, inline.digest)


def test_killed_by_a_signal(tmp_path: Path) -> None:
    with pytest.raises(SparringError, match=r"killed by SIGKILL; .*its output is in .*one\.log"):
        execute(tmp_path, "kill")


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("greedy", "can't allocate memory"),
        ("gpu", "CUDA out of memory"),
        ("python", "MemoryError"),
        ("kill", "the host may have run out of memory"),
    ],
)
def test_where_memory_runs_out_its_settings_are_named(tmp_path: Path, mode: str, why: str) -> None:
    with pytest.raises(SparringError, match=why) as caught:
        execute(tmp_path, mode)
    advice = "This stage has settings of memory and speed, which change no result: memory = 1"
    assert str(caught.value).splitlines()[-1] == advice


def test_other_failures_say_nothing_of_memory(tmp_path: Path) -> None:
    with pytest.raises(SparringError) as caught:
        execute(tmp_path, "bug")
    assert "memory" not in str(caught.value)


def test_an_error_for_users_is_its_message_alone(tmp_path: Path) -> None:
    with pytest.raises(SparringError) as caught:
        execute(tmp_path, "user")
    assert str(caught.value) == "the toy is broken; buy another"


def test_a_bug_points_at_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(SparringError) as caught:
        execute(tmp_path, "bug")
    text = str(caught.value)
    assert text.startswith("rank0 failed: ValueError: an unexpected toy\n")
    path = tmp_path / "one" / "work" / "errors" / "rank0.txt"
    assert str(path) in text
    assert "in add" in path.read_text()
    assert "ValueError: an unexpected toy" in (tmp_path / "logs" / "one.log").read_text()


def test_an_old_error_is_not_told_again(tmp_path: Path) -> None:
    """The record of an earlier try must not stand for a later failure without one."""
    with pytest.raises(SparringError, match="buy another"):
        execute(tmp_path, "user")
    errors = tmp_path / "one" / "work" / "errors"
    assert errors.is_dir()
    from toy_pipeline import ADD, Add

    # The same folder and key, but now the process dies without a word.
    step = Step("one", ADD, Add(mode="user"), {})
    original = stages.write_job

    def deadly(*args: Any) -> Path:
        path = original(*args)
        path.write_text(path.read_text().replace('"mode": "user"', '"mode": "kill"'))
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "write_job", deadly)
        with pytest.raises(SparringError, match="killed by SIGKILL"):
            stages.execute(
                step, {}, tmp_path / "one", LaunchConfig(), logs=tmp_path, on_event=lambda _: None
            )


def test_the_rank_that_failed_first_is_told(tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    processes.record_error(errors, 1, ValueError("the cause"))
    time.sleep(0.01)
    processes.record_error(errors, 0, ValueError("a consequence"))
    command = [sys.executable, "-c", "raise SystemExit(1)"]
    with pytest.raises(SparringError, match=r"^rank1 failed: ValueError: the cause"):
        processes.run(
            command, log=tmp_path / "log", errors=errors, environment={}, on_event=lambda _: None
        )


def test_a_rank_that_failed_takes_those_of_its_host_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_GRACE", 0.3)
    processes.record_error(tmp_path / "errors", 1, SparringError("no more disk"))
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(SparringError, match=r"^no more disk$"):
        processes.run(
            command,
            log=tmp_path / "log",
            errors=tmp_path / "errors",
            environment={},
            on_event=lambda _: None,
        )


def test_output_goes_to_the_log_and_events_to_the_driver(tmp_path: Path) -> None:
    code = "import os; print('hello', os.environ['SAID']); print('@sparring {\"done\": 1}')"
    events: list[dict[str, Any]] = []
    processes.run(
        [sys.executable, "-c", code],
        log=tmp_path / "logs" / "log",
        errors=tmp_path,
        environment={"SAID": "you"},
        on_event=events.append,
    )
    assert (tmp_path / "logs" / "log").read_text() == "hello you\n"
    assert events == [{"done": 1}]


DRIVER = """
import signal, sys
from pathlib import Path
from toy_pipeline import ADD, Add
from sparring.launch import runs, stages
from sparring.launch.errors import Stopped
# What a shell starts in the background ignores Ctrl-C, and so would this.
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])
try:
    with runs.sigterm_stops():
        stages.execute(
            stages.Step("one", ADD, Add(mode="wait"), {}), {}, folder / "one",
            stages.LaunchConfig(), logs=folder, on_event=print,
        )
except (Stopped, KeyboardInterrupt) as error:
    sys.exit(75 if isinstance(error, Stopped) else 1)
"""


def start_driver(folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A driver whose stage waits; returns it with the pid of the stage."""
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(folder)])
    path = folder / "one" / "work" / "pid0"
    until(lambda: path.exists() and path.read_text() != "")
    return driver, int(path.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_the_driver_lets_the_stage_save(tmp_path: Path, number: signal.Signals) -> None:
    driver, stage = start_driver(tmp_path)
    driver.send_signal(number)
    assert driver.wait(120) == Stopped.exit_code
    assert (tmp_path / "one" / "work" / "saved0").read_text() == "yes"
    assert not alive(stage)


SLOW_RANK = """
import os, signal, sys, time
from pathlib import Path
from sparring.launch import processes
from sparring.launch.processes import World
folder, rank = Path(sys.argv[-1]), World.from_environment().rank
with processes.stop_flag() as stopped:
    processes.emit(pid=os.getpid(), rank=rank, here=True)
    (folder / f"up{rank}").touch()
    while not stopped():
        time.sleep(0.01)
    time.sleep(2)  # a checkpoint
    (folder / f"saved{rank}").touch()
    sys.exit(75)
"""


@pytest.mark.dist
def test_all_ranks_have_time_to_save(tmp_path: Path) -> None:
    """DeepSpeed's launcher dies of a signal at once; its ranks must not."""
    worker = tmp_path / "worker.py"
    worker.write_text(SLOW_RANK)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null"]
    ranks = ["--num_gpus", "2", "--master_port", str(processes.free_port())]

    def interrupt() -> None:
        until(lambda: all((tmp_path / f"up{rank}").exists() for rank in (0, 1)))
        time.sleep(0.5)  # the reader has their ids
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with runs.sigterm_stops(), pytest.raises(Stopped):
        processes.run(
            [*launcher, *ranks, str(worker), str(tmp_path)],
            log=tmp_path / "log",
            errors=tmp_path,
            environment={},
            on_event=lambda _: None,
        )
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))


@pytest.mark.dist
def test_a_rank_that_stops_leaves_time_to_the_others(tmp_path: Path) -> None:
    """DeepSpeed's launcher takes a rank that ends by any code but 0 for failed, and ends all."""
    work = tmp_path / "one" / "work"
    paths = [work / f"pid{rank}" for rank in (0, 1)]

    def interrupt() -> None:
        until(lambda: all(path.exists() and path.read_text() != "" for path in paths))
        for path in paths:  # as SLURM does; the driver learns of it from them
            os.kill(int(path.read_text()), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(Stopped):
        execute(tmp_path, "wait", processes=2)
    assert all((work / f"saved{rank}").exists() for rank in (0, 1))
    log = (tmp_path / "logs" / "one.log").read_text()
    assert "exits successfully" in log
    assert "Killing subprocess" not in log


@pytest.mark.dist
def test_a_rank_that_is_killed_leaves_a_message(tmp_path: Path) -> None:
    with pytest.raises(SparringError) as caught:
        execute(tmp_path, "kill", processes=2)
    said = rf"rank [01] on {socket.gethostname()} was killed by SIGKILL; the host may have run out"
    assert re.match(said, str(caught.value))


@pytest.mark.dist
def test_ranks_see_the_accelerators_that_the_driver_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")  # the launcher would make it 0,1
    artifact, _, _ = execute(tmp_path, "world", processes=2)
    assert [path.read_text() for path in (artifact.path / "devices").glob("*")] == ["4,6"] * 2


def test_events_of_two_writers_do_not_mix(tmp_path: Path) -> None:
    code = """
import os, sys
from sparring.launch.processes import emit
other = os.fork()
for n in range(2000):
    sys.stdout.write("half a line")
    emit(done=n, padding="x" * 100)
if other:
    os.waitpid(other, 0)
"""
    events: list[dict[str, Any]] = []
    processes.run(
        [sys.executable, "-c", code],
        log=tmp_path / "log",
        errors=tmp_path,
        environment={"PYTHONUNBUFFERED": "1"},
        on_event=events.append,
    )
    assert sorted(event["done"] for event in events) == sorted([*range(2000)] * 2)
    assert (tmp_path / "log").read_text() == "half a line" * 4000


def test_a_line_that_is_no_event_is_kept(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    code = "print('@sparring {broken'); print('@sparring {\"done\": 2}')"
    processes.run(
        [sys.executable, "-c", code],
        log=tmp_path / "log",
        errors=tmp_path,
        environment={},
        on_event=events.append,
    )
    assert events == [{"done": 2}]
    assert (tmp_path / "log").read_text() == "@sparring {broken\n"


def test_no_orphan_outlives_a_killed_driver(tmp_path: Path) -> None:
    driver, stage = start_driver(tmp_path)
    assert alive(stage)
    driver.kill()
    driver.wait()
    until(lambda: not alive(stage), 5)
    assert not (tmp_path / "one" / "work" / "saved0").exists()


def test_leaving_writes_all_out_and_skips_the_end_of_the_interpreter() -> None:
    script = """
import atexit
from sparring.launch.processes import leave

class Ends:
    def __del__(self):
        print("taken down")

kept = Ends()
atexit.register(print, "handler", end="")
leave(3)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "handler", "")


def test_the_interpreter_of_a_stage_may_be_named(tmp_path: Path) -> None:
    with pytest.raises(SparringError, match=r"launch\.python\.add: /no/python does not exist"):
        execute(tmp_path, "ok", python={"add": "/no/python"})
    marker = tmp_path / "used"
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\ntouch {marker}\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    execute(tmp_path, "ok", python={"add": str(wrapper)}, inline=("add",))
    assert marker.exists()


def test_the_world_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert World.from_environment() == World(0, 1, 0, 1)
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert World.from_environment() == World(5, 8, 1, 8)
    monkeypatch.setenv("LOCAL_SIZE", "4")  # DeepSpeed's launcher; torchrun's is LOCAL_WORLD_SIZE
    assert World.from_environment() == World(5, 8, 1, 4)


def test_ranks_that_share_accelerators() -> None:
    hosts, slots = 2, 4
    ranks = [World(n, hosts * slots, n % slots, slots) for n in range(hosts * slots)]
    heads = [rank.sharing(2) for rank in ranks]
    assert heads[1::2] == [None] * 4
    assert heads[::2] == [World(n, 4, n % 2, 2) for n in range(4)]
    assert [rank.sharing(1) for rank in ranks] == ranks
    assert World().sharing(8) == World()  # without a launcher one rank has all that it needs
    with pytest.raises(SparringError, match=r"^devices = 3 does not divide the 4 ranks"):
        ranks[0].sharing(3)


def test_stop_flag_turns_sigterm_into_a_question() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with processes.stop_flag() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
    assert signal.getsignal(signal.SIGTERM) is before
