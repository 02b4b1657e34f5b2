"""The finished runs of mars_lm.py, a file each."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparring.launch.artifacts import write_atomically

TUNING_SEED = 0
Record = dict[str, Any]


class Runs:
    """The finished runs of one setting in a folder, by arm, learning rate and seed."""

    def __init__(self, folder: Path, setting: Record) -> None:
        self.folder, self.setting = folder, setting
        canonical = json.dumps(setting, sort_keys=True)
        self._hash = hashlib.sha256(canonical.encode()).hexdigest()[:12]
        files = sorted(folder.glob(f"*-{self._hash}.json"))
        records = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        self.found = {(r["arm"], r["lr"], r["seed"]): r for r in records if r["setting"] == setting}

    def add(self, record: Record) -> None:
        name, lr, seed = record["arm"], record["lr"], record["seed"]
        text = json.dumps({**record, "setting": self.setting}, allow_nan=False)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / f"{name}-lr{lr:g}-seed{seed}-{self._hash}.json", text + "\n")
        self.found[name, lr, seed] = record

    def tuning(self, arm: str) -> dict[float, float]:
        """Validation loss by learning rate in ascending order, infinite where a run diverged."""
        losses = {
            lr: math.inf if record["validation"] is None else float(record["validation"])
            for (name, lr, seed), record in self.found.items()
            if (name, seed) == (arm, TUNING_SEED)
        }
        return dict(sorted(losses.items()))

    def best(self, arm: str) -> float:
        """Of equals the lowest, so that a grid on which all runs diverge goes on downwards."""
        losses = self.tuning(arm)
        return min(losses, key=losses.__getitem__)

    def at_edge(self, arm: str) -> bool:
        """Whether the best learning rate may lie beyond those that were tried."""
        return self.best(arm) in (min(self.tuning(arm)), max(self.tuning(arm)))

    def next(self, arm: str) -> float:
        """The learning rate to try next: beyond the edge with the lower loss, of equals the low."""
        losses = self.tuning(arm)
        low, high = min(losses), max(losses)
        return low / 2 if losses[low] <= losses[high] else high * 2

    def at_best(self, arm: str, seeds: Sequence[int]) -> dict[int, Record]:
        """The runs by seed that the figures of an arm are made of."""
        keys = {seed: (arm, self.best(arm), seed) for seed in seeds}
        return {seed: self.found[key] for seed, key in keys.items() if key in self.found}
