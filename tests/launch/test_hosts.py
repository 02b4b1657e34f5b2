"""Hosts of a cluster: which they are, what starts their ranks, and how those follow the driver."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from sparring.launch import artifacts, hosts, lease, processes, runs, stages
from sparring.launch.artifacts import write_json
from sparring.launch.errors import SparringError, Stopped
from sparring.launch.hosts import Hosts
from sparring.launch.lease import Lease
from sparring.launch.stages import LaunchConfig, Step

JOB = Path("/shared/job.json")
# Stands for SLURM, which needs daemons: as many tasks as asked for, each told its node's number.
SRUN = """#!/bin/sh
count=$2
shift 8  # --nodes N --ntasks N --ntasks-per-node 1 --cpu-bind=none --export=ALL
for node in $(seq 0 $((count - 1))); do SLURM_NODEID=$node "$@" & pids="$pids $!"; done
worst=0
for pid in $pids; do wait $pid || worst=$?; done
exit $worst
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts programs on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def put(**texts: str) -> None:
        for name, text in texts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    return put


def test_a_hostfile_is_deepspeeds(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# two of them\nnode2  slots=8\n\nnode1\tslots=4 # the smaller one\n")
    found = hosts.read_hostfile(path)
    assert list(found.items()) == [("node2", 8), ("node1", 4)]  # in the order of the ranks
    assert Hosts(found).total == 12
    assert Hosts({"b": 2, "a": 1}).names() == ["b", "b", "a"]
    # As DeepSpeed reads what it is given.
    from deepspeed.launcher.runner import fetch_hostfile

    assert dict(fetch_hostfile(str(path))) == found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("node1", "line 1: 'node1' is not of the form 'NAME slots=RANKS'"),
        ("node1 slots=0", "line 1: 'node1 slots=0' is not"),
        ("a slots=1\nb slots=two", "line 2: 'b slots=two' is not"),
        ("a slots=1\na slots=2", "line 2: a is there twice"),
        ("# nothing\n", "names no host"),
    ],
)
def test_a_broken_hostfile_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(SparringError) as caught:
        hosts.read_hostfile(path)
    assert said in str(caught.value)
    with pytest.raises(SparringError, match=r"cannot read .*nothing: No such file"):
        hosts.read_hostfile(tmp_path / "nothing")


def test_hosts_are_asked_for_once() -> None:
    with pytest.raises(ValueError, match=r"launch\.hostfile and launch\.slurm exclude"):
        LaunchConfig(hostfile="hosts", slurm=True)


def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, programs: Callable[..., None]
) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    programs(srun=SRUN)
    with pytest.raises(SparringError, match="not inside a SLURM allocation"):
        hosts.find(1, slurm=True)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    programs(scontrol="#!/bin/sh\necho Invalid hostlist >&2; exit 1\n")
    with pytest.raises(SparringError, match=r"does not know the nodes node\[1-2\]: Invalid"):
        hosts.find(1, slurm=True)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SparringError, match=r"launch\.hostfile starts ranks with pdsh"):
        hosts.find(1, "hosts")
    with pytest.raises(SparringError, match=r"launch\.slurm starts ranks with srun"):
        hosts.find(1, slurm=True)


def test_a_wrong_hostfile_stops_a_run_before_its_first_step(tmp_path: Path) -> None:
    from toy_pipeline import Toy, ToyRecipe

    recipe = ToyRecipe(launch=LaunchConfig(hostfile="/no/hosts"))
    with pytest.raises(SparringError, match=r"launch\.hostfile"):
        runs.execute(Toy(), recipe, tmp_path / "run", None)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_the_commands() -> None:
    here = hosts.command("python", JOB, Hosts({"localhost": 1}))
    assert here == ["python", "-m", "sparring.launch.worker", str(JOB)]
    several = hosts.command("python", JOB, Hosts({"localhost": 3}))
    assert several[:3] == ["python", "-m", "deepspeed.launcher.runner"]
    assert several[several.index("--num_gpus") + 1] == "3"
    assert several[several.index("--hostfile") + 1] == "/dev/null"
    assert several[-3:] == ["--module", "sparring.launch.worker", str(JOB)]
    # One rank on one other host needs the launcher too.
    pdsh = hosts.command("python", JOB, Hosts({"node1": 1}, "pdsh", Path("/etc/hosts-8")))
    assert pdsh[pdsh.index("--hostfile") + 1] == "/etc/hosts-8"
    assert "--force_multi" in pdsh
    assert "--num_gpus" not in pdsh


def test_srun_starts_a_launcher_on_each_node() -> None:
    command = hosts.command("/a b/python", JOB, Hosts({"node2": 2, "node1": 2}, "srun"))
    assert command[:5] == ["srun", "--nodes", "2", "--ntasks", "2"]
    shell, text = command[-2:]
    assert shell == "-c"
    assert "; exec '/a b/python' -u -m deepspeed.launcher.launch " in text
    assert "--node_rank=$SLURM_NODEID --module sparring.launch.worker /shared/job.json" in text
    assert "--master_addr=node2 " in text
    world = text.partition("--world_info=")[2].split()[0].strip("'")
    assert json.loads(base64.urlsafe_b64decode(world)) == {"node2": [0, 1], "node1": [0, 1]}


@pytest.mark.dist
def test_a_stage_over_two_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: Callable[..., None]
) -> None:
    """Through DeepSpeed's launcher, once a node: ranks 0 and 1 on one, 2 and 3 on the other."""
    from toy_pipeline import ADD, Add

    programs(srun=SRUN, scontrol="#!/bin/sh\necho node1\necho node2\n")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")  # the launcher would make it 0,1
    artifact, _ = stages.execute(
        Step("one", ADD, Add(mode="world"), {}),
        {},
        tmp_path / "one",
        LaunchConfig(processes=2, slurm=True),
        logs=tmp_path / "logs",
        on_event=lambda _: None,
    )
    worlds = sorted((artifact.path / "worlds").glob("*"))
    assert [path.read_text() for path in worlds] == ["0 4 0 2", "1 4 1 2", "2 4 0 2", "3 4 1 2"]
    assert [path.read_text() for path in (artifact.path / "devices").glob("*")] == ["4,6"] * 4
    assert artifact.manifest["processes"] == 4


FOLLOWER = """
import signal, sys, time
from pathlib import Path
from sparring.launch import lease, processes
lease.RENEWED, lease.LOST = 0.1, float(sys.argv[2])
with processes.stop_flag() as stopped:
    lease.follow(Path(sys.argv[1]), "mine")
    print("up", flush=True)
    while not stopped():
        time.sleep(0.01)
    sys.exit(75)
"""


def follower(path: Path, lost: float = 60.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FOLLOWER, str(path), str(lost)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def ended(process: subprocess.Popen[str]) -> int:
    with process:
        try:
            return process.wait(120)
        finally:
            process.kill()  # one that does not end fails the test instead of holding it up


def test_a_rank_obeys_the_lease(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    driver = Lease(path, "mine", ["a"])
    stopping, ending = follower(path), follower(path)
    driver.renew("stop")
    assert ended(stopping) == Stopped.exit_code
    assert ended(ending) == Stopped.exit_code
    driver.renew()
    ending = follower(path)
    assert ending.poll() is None
    driver.renew("end")
    assert ended(ending) == 1


def test_a_rank_ends_without_its_driver(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    assert ended(follower(path, lost=0.3)) == 1  # none was ever there
    Lease(path, "mine", ["a"])
    assert ended(follower(path, lost=0.3)) == 1  # not renewed
    rank = follower(path)
    Lease(path, "another", ["a"])  # that of the next try
    assert ended(rank) == 1


def test_a_renewed_lease_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "lease.json"
    driver = Lease(path, "mine", ["a"])
    rank = follower(path, lost=3.0)
    end = time.monotonic() + 6
    while time.monotonic() < end:
        driver.renew()
        time.sleep(0.1)
    assert rank.poll() is None
    rank.kill()
    ended(rank)


def test_hosts_without_ranks_are_known(tmp_path: Path) -> None:
    driver = Lease(tmp_path / "lease.json", "mine", ["b", "b", "a"])
    assert driver.missing({0, 1, 2}) == []
    assert driver.missing({0}) == ["a", "b"]


def test_a_silent_host_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(lease.time, "monotonic", lambda: clock[0])
    driver = Lease(tmp_path / "lease.json", "mine", ["b", "b", "a", "a"])
    signs = tmp_path / lease.SIGNS
    signs.mkdir()

    def after(seconds: float, *ranks: int, of: str = "mine") -> list[str]:
        clock[0] += seconds
        for rank in ranks:
            sign = {"driver": of, "count": clock[0], "done": rank in done}
            write_json(signs / f"rank{rank}", sign)
        return driver.lost()

    done: set[int] = set()

    assert after(lease.SIGN, 2, of="an earlier one") == []
    for _ in range(30):  # nothing of a, whose launcher may take its time
        assert after(lease.SIGN, 0) == []
    assert after(lease.SIGN, 0, 2) == []
    for _ in range(int(lease.SILENT / lease.SIGN)):
        assert after(lease.SIGN, 0) == []
    assert after(2 * lease.SILENT, 0) == []  # the driver itself was held up
    for _ in range(int(lease.SILENT / lease.SIGN)):
        assert after(lease.SIGN, 0) == []
    assert after(lease.SIGN, 0) == ["a"]
    done.add(2)  # it was only late, and has done its part
    assert after(lease.SIGN, 0, 2) == []
    for _ in range(3 * int(lease.SILENT / lease.SIGN)):
        assert after(lease.SIGN, 0) == []


def test_a_host_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SIGN", 0.05)
    path, seen = tmp_path / lease.SIGNS / "rank3", set()
    with lease.signs(tmp_path, "mine", 3):
        end = time.monotonic() + 120
        while len(seen) < 3 and time.monotonic() < end:
            with suppress(FileNotFoundError):
                seen.add(path.read_text())
            time.sleep(0.01)
    assert len(seen) == 3
    assert not any(json.loads(text)["done"] for text in seen)
    assert json.loads(path.read_text())["done"]


def test_the_ranks_of_another_host_show_it(tmp_path: Path) -> None:
    from toy_pipeline import ADD, Add

    (tmp_path / artifacts.WORK).mkdir()
    job = stages.write_job(Step("one", ADD, Add(mode="wait"), {}), {}, tmp_path)
    told = json.loads(job.read_text())
    told["driver"]["host"] = "elsewhere"
    write_json(job, told)
    driver = Lease(job.with_name(stages.LEASE), told["driver"]["name"], ["here", "here"])
    world = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    worker = [sys.executable, "-m", "sparring.launch.worker", str(job)]
    sign, saved = job.parent / lease.SIGNS / "rank1", job.parent / "saved1"
    with subprocess.Popen(worker, env={**os.environ, **world}) as process:
        try:
            for path in (job.parent / "pid1", sign, saved):
                end = time.monotonic() + 120
                while not path.exists() and time.monotonic() < end:
                    time.sleep(0.1)
                    driver.renew("stop" if path == saved else "work")
            assert process.wait(120) == 0
        finally:
            process.kill()
    assert saved.exists()
    last = json.loads(sign.read_text())
    assert (last["driver"], last["done"]) == (told["driver"]["name"], True)


def remote(
    folder: Path, code: str, *, names: list[str], monkeypatch: pytest.MonkeyPatch, **waits: float
) -> None:
    """Run code as the launchers of a stage whose ranks are on hosts of these names."""
    monkeypatch.setattr(processes, "RENEWED", 0.1)
    for name, seconds in waits.items():
        monkeypatch.setattr(processes, name, seconds)
    processes.run(
        [sys.executable, "-c", f"from sparring.launch.processes import emit\n{code}"],
        log=folder / "log",
        errors=folder / "errors",
        environment={},
        on_event=lambda _: None,
        lease=Lease(folder / "lease.json", "mine", names),
    )


UP = "emit(pid=1, rank=0, here=False)\n"


def test_a_failed_rank_takes_the_other_hosts_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes.record_error(tmp_path / "errors", 1, SparringError("no more disk"))
    code = UP + "import time; time.sleep(60)"
    with pytest.raises(SparringError, match=r"^no more disk$"):
        remote(tmp_path, code, names=["a", "b"], monkeypatch=monkeypatch, _GRACE=0.3)
    assert json.loads((tmp_path / "lease.json").read_text())["order"] == "end"


def test_a_host_that_never_comes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = UP + "import time; time.sleep(60)"
    with pytest.raises(SparringError, match=r"^no rank was started on b; the output is in .*log"):
        remote(tmp_path, code, names=["a", "b"], monkeypatch=monkeypatch, _START=10)
    # It ended by itself: ssh did not come through, and the other host has done its part.
    with pytest.raises(SparringError, match=r"^no rank was started on b; the output is in .*log"):
        remote(tmp_path, UP + "raise SystemExit(255)", names=["a", "b"], monkeypatch=monkeypatch)


def test_a_run_ends_when_a_host_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SILENT", 1.0)
    signs = tmp_path / lease.SIGNS
    signs.mkdir()
    write_json(signs / "rank1", {"driver": "mine", "count": 0, "done": False})
    code = UP + "emit(pid=2, rank=1, here=False)\nimport time; time.sleep(60)"
    with pytest.raises(SparringError, match=r"^no sign of life from b any more"):
        remote(tmp_path, code, names=["a", "b"], monkeypatch=monkeypatch)
    assert json.loads((tmp_path / "lease.json").read_text())["order"] == "end"


def test_a_rank_without_the_folder_says_so(tmp_path: Path) -> None:
    worker = [sys.executable, "-m", "sparring.launch.worker", str(tmp_path / "job.json")]
    with pytest.raises(SparringError, match=r"rank 0 on \S+ finds no .*job\.json: the folder of"):
        processes.run(
            worker, log=tmp_path / "log", errors=tmp_path, environment={}, on_event=lambda _: None
        )


def test_the_last_line_is_told_where_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "print('node1 is not reachable', flush=True); raise SystemExit(1)"
    with pytest.raises(SparringError, match=r"its last line is: node1 is not reachable$"):
        remote(tmp_path, code, names=["node1"], monkeypatch=monkeypatch)


def test_ranks_of_other_hosts_are_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launchers are not signalled: they would take the ranks' connections with them."""
    code = (
        UP
        + f"""
import json, os, signal, sys, time
from pathlib import Path
os.kill({os.getpid()}, signal.SIGTERM)
while json.loads(Path({str(tmp_path / "lease.json")!r}).read_text())["order"] != "stop":
    time.sleep(0.01)
time.sleep(0.5)
Path({str(tmp_path / "saved")!r}).touch()
"""
    )
    with runs.sigterm_stops(), pytest.raises(Stopped):
        remote(tmp_path, code, names=["a"], monkeypatch=monkeypatch)
    assert (tmp_path / "saved").exists()


SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm.sh"


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (75, True)])
def test_the_slurm_script_queues_again_what_was_stopped(
    tmp_path: Path, programs: Callable[..., None], code: int, again: bool
) -> None:
    programs(
        sparring=f"#!/bin/sh\necho $@ > {tmp_path}/run; exit {code}\n",
        scontrol=f"#!/bin/sh\necho $@ > {tmp_path}/queue\n",
    )
    environment = {**os.environ, "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "8"}
    done = subprocess.run([SCRIPT, "demo", "--out", "x"], env=environment, check=False)
    assert done.returncode == code
    options = "run demo --out x --launch.slurm --launch.processes 8\n"
    assert (tmp_path / "run").read_text() == options
    assert (tmp_path / "queue").exists() == again
    if again:
        assert (tmp_path / "queue").read_text() == "requeue 7\n"


def test_the_slurm_script_waits_for_the_run_to_save(
    tmp_path: Path, programs: Callable[..., None]
) -> None:
    programs(
        sparring=f"""#!/bin/sh
trap 'sleep 1; touch {tmp_path}/saved; exit 75' TERM
touch {tmp_path}/up
while true; do sleep 0.1; done
""",
        scontrol=f"#!/bin/sh\necho $@ > {tmp_path}/queue\n",
    )
    process = subprocess.Popen([SCRIPT, "demo"], env={**os.environ, "SLURM_JOB_ID": "7"})
    while not (tmp_path / "up").exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait(120) == 75
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "queue").read_text() == "requeue 7\n"
