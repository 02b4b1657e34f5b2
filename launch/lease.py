"""The driver's lease: how ranks on other hosts learn that it lives, or that they are to stop.

Signals and process ids end at the host. A file in the step's work folder, which all hosts see, does
not: the driver renews it every two seconds, and a rank ends itself when it was not renewed for a
minute. Clocks are not compared.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from sparring.launch.artifacts import write_json

Order = Literal["work", "stop", "end"]
RENEWED = 2.0  # seconds
LOST = 60.0  # seconds without a renewal


class Lease:
    """The driver's side.

    Args:
        path: of the file.
        driver: what tells this driver from an earlier one, whose ranks may still be about.
        hosts: the host of every rank.
    """

    def __init__(self, path: Path, driver: str, hosts: Sequence[str]) -> None:
        self._path, self._driver, self._hosts, self._count = path, driver, hosts, 0
        self.renew()

    def renew(self, order: Order = "work") -> None:
        """Say that the driver lives, and what ranks do: work on, end now, or save and stop."""
        self._count += 1
        told = {"driver": self._driver, "count": self._count, "order": order}
        write_json(self._path, told)

    def missing(self, up: Collection[int]) -> list[str]:
        """Hosts with a rank that is not among those."""
        return sorted({host for rank, host in enumerate(self._hosts) if rank not in up})


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
    """The lease, or None while a network's file system does not show it."""
    with suppress(OSError, json.JSONDecodeError):
        lease: dict[str, Any] = json.loads(path.read_text())
        return lease
    return None
