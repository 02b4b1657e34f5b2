"""Named seed streams: every random draw has a name, so that sharding and resuming change none."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 62-bit seed for the stream with these names, as in ``derive(seed, "generate", 2, id, k)``.

    The same (seed, names) give the same number on every machine; others an unrelated one.
    """
    # Doubling the separator inside names keeps different lists of names different.
    named = (f"{type(name).__name__}:{name}".replace("\x1f", "\x1f\x1f") for name in names)
    path = "\x1f".join([str(seed), *named])
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") >> 2
