"""The driver's lease: how ranks on other hosts learn that it lives, or that they are to stop.

Signals and process ids end at the host. A file in the step's work folder, which all hosts see, does
not: the driver renews it every two seconds, and a rank ends itself when it was not renewed for a
minute. The other way round each host gives signs of life, and is lost after three minutes without
one. Clocks are not compared.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from sparring.launch.artifacts import write_json

Order = Literal["work", "stop", "end"]
RENEWED = 2.0  # seconds
LOST = 60.0  # seconds without a renewal
SIGN = 10.0  # seconds between a host's signs of life
SILENT = 180.0  # seconds without one; longer than a network's file system may show an old folder
SIGNS = "alive"


class Lease:
    """The driver's side.

    Args:
        path: of the file.
        driver: what tells this driver from an earlier one, whose ranks may still be about.
        hosts: the host of every rank.
    """

    def __init__(self, path: Path, driver: str, hosts: Sequence[str]) -> None:
        self._path, self._driver, self._hosts, self._count = path, driver, hosts, 0
        self._signs: dict[str, tuple[dict[str, Any], float]] = {}
        self._looked = time.monotonic()
        self._write("work")

    def renew(self, order: Order = "work") -> None:
        """Say that the driver lives, and what ranks do: work on, end now, or save and stop."""
        with suppress(OSError):  # a file system that is held up; the next renewal comes soon
            self._write(order)

    def _write(self, order: Order) -> None:
        self._count += 1
        told = {"driver": self._driver, "count": self._count, "order": order}
        write_json(self._path, told)

    def missing(self, up: Collection[int]) -> list[str]:
        """Hosts with a rank that is not among those."""
        return sorted({host for rank, host in enumerate(self._hosts) if rank not in up})

    def lost(self) -> list[str]:
        """Hosts that gave signs of life to this driver and give none any more.

        To be asked again and again: a driver that was held up itself, by the file system say, gives
        them all of the time once more.
        """
        now = time.monotonic()
        waited, self._looked = now - self._looked, now
        if waited > SILENT / 4:
            self._signs = {rank: (sign, now) for rank, (sign, _) in self._signs.items()}
        for path in (self._path.parent / SIGNS).glob("rank*"):
            sign = _read(path)
            known, _ = self._signs.get(path.name, (None, 0.0))
            if sign and sign["driver"] == self._driver and sign != known:
                self._signs[path.name] = (sign, now)
        silent = [
            int(rank.removeprefix("rank"))
            for rank, (sign, since) in self._signs.items()
            if now - since > SILENT and not sign["done"]
        ]
        return sorted({self._hosts[rank] for rank in silent})


@contextmanager
def signs(work: Path, driver: str, rank: int) -> Iterator[None]:
    """On a host: give signs of a rank's life, in a thread, and at the end that it is done.

    To be called where no other thread can hold the interpreter up.
    """
    done = threading.Event()
    thread = threading.Thread(target=_give_signs, args=(work / SIGNS, driver, rank, done))
    thread.daemon = True
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _give_signs(folder: Path, driver: str, rank: int, done: threading.Event) -> None:
    for count in itertools.count():
        ended = done.is_set()
        with suppress(OSError):
            folder.mkdir(exist_ok=True)
            sign = {"driver": driver, "count": count, "done": ended}
            write_json(folder / f"rank{rank}", sign)
        if ended:
            return
        done.wait(SIGN)


def follow(path: Path, driver: str) -> None:
    """On a rank: obey the lease from now on, in a thread."""
    threading.Thread(target=_follow, args=(path, driver), daemon=True).start()


def _follow(path: Path, driver: str) -> None:
    seen, since, told = None, time.monotonic(), False
    while True:
        lease = _read(path)
        if lease is not None and lease != seen:
            seen, since = lease, time.monotonic()
        late = time.monotonic() - since > LOST
        if late or (seen and (seen["driver"] != driver or seen["order"] == "end")):
            os._exit(1)
        if seen and seen["order"] == "stop" and not told:
            told = True
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(RENEWED / 4)


def _read(path: Path) -> dict[str, Any] | None:
    """What a file says, or None while a network's file system does not show it."""
    with suppress(OSError, json.JSONDecodeError):
        told: dict[str, Any] = json.loads(path.read_text())
        return told
    return None
