"""Verdicts kept across calls and runs, found again by what was judged.

A folder of append-only parquet parts. Any number of processes on any number of hosts may write to
it: each part has a name of its own and appears at once, complete. Nothing in it is needed; a folder
that is deleted costs computing, never results.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparring.launch.errors import SparringError

Triple = tuple[str, str, str]
"""Prompt text, first response, second response."""

_SCHEMA = pa.schema(
    [
        pa.field("key", pa.binary(32), nullable=False),
        pa.field("logit", pa.float64(), nullable=False),
    ]
)
_PART_ROWS = 4096
_PART_SECONDS = 60.0  # what a kill may cost of slow (or paid) verdicts


def verdict_key(identity: str, triple: Triple) -> bytes:
    """SHA-256 of a judge's identity and what it is asked, each preceded by its length.

    The lengths keep ("ab", "c") and ("a", "bc") apart.
    """
    digest = hashlib.sha256()
    for text in (identity, *triple):
        # A response cut inside a character may hold a lone surrogate.
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()


class VerdictCache:
    """One judge's logits by content.

    Parts are read once, at opening; what others add later is not seen. A part that cannot be read,
    or holds anything but 32-byte keys and finite numbers, is left out and named in `notes`.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        """Open a folder, which is made when it is not there.

        Args:
            folder: shared by judges; each reads only the parts of its own identity.
            identity: the judge's, as its property says.

        Raises:
            SparringError: the folder cannot be made or written to.
        """
        self.folder = Path(folder).expanduser()
        self.identity = identity
        self.notes: list[str] = []
        self._values: dict[bytes, float] = {}
        self._new: dict[bytes, float] = {}
        self._written = time.monotonic()
        self._prefix = hashlib.sha256(identity.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SparringError(
                f"judge.cache {str(folder)!r} cannot be a folder ({error}); name another place, "
                f"or leave judge.cache empty"
            ) from None
        for path in sorted(self.folder.glob(f"{self._prefix}-*.parquet")):
            self._read(path)

    def __len__(self) -> int:
        return len(self._values)

    def find(self, triples: Iterable[Triple]) -> dict[Triple, float]:
        """The logits of those triples that are known."""
        keys = ((triple, verdict_key(self.identity, triple)) for triple in triples)
        return {triple: self._values[key] for triple, key in keys if key in self._values}

    def add(self, values: Mapping[Triple, float]) -> None:
        """Remember logits; those that are not finite are left out.

        They reach the disk in parts of 4096, once a minute, and at `flush`.
        """
        for triple, value in values.items():
            if np.isfinite(value):
                key = verdict_key(self.identity, triple)
                self._new[key] = self._values[key] = float(value)
        late = time.monotonic() - self._written > _PART_SECONDS
        if len(self._new) >= _PART_ROWS or late:
            self.flush()

    def flush(self) -> None:
        """Write what is new as one part: temporary file, fsync, rename.

        Raises:
            SparringError: the part cannot be written.
        """
        self._written = time.monotonic()
        if not self._new:
            return
        name = f"{self._prefix}-{uuid.uuid4().hex}"
        temporary = self.folder / f".{name}.tmp"
        columns = [list(self._new), list(self._new.values())]
        table = pa.Table.from_arrays(
            [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)], schema=_SCHEMA
        )
        try:
            with temporary.open("wb") as file:
                pq.write_table(table, file, compression="zstd", write_page_checksum=True)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.folder / f"{name}.parquet")
        except OSError as error:
            raise SparringError(
                f"judge.cache {self.folder}: verdicts cannot be written there ({error})"
            ) from None
        self._new.clear()

    def _read(self, path: Path) -> None:
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            self.notes.append(f"{path.name} ignored: {str(error).splitlines()[0]}")
            return
        if not table.schema.equals(_SCHEMA):
            self.notes.append(f"{path.name} ignored: its columns are {table.column_names}")
            return
        logits = table["logit"].to_numpy()
        if table["key"].null_count or not np.isfinite(logits).all():
            self.notes.append(f"{path.name} ignored: it holds numbers that are not finite")
            return
        self._values.update(zip(table["key"].to_pylist(), logits.tolist(), strict=True))
