"""
Which shard a name belongs to. Pure, and the same in every language and release: stored callbacks depend on it.

The first eight bytes of the name's SHA-256, as a big-endian number, are put through a jump consistent hash
(arXiv:1406.2294). When a shard is added at the end, only the share of the names that falls to it moves, and none moves
between the others.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Final

from callbackq.stores._ids import rising_id

__all__ = ["draw_id", "shard_of"]

_MULTIPLIER: Final = 2862933555777941757
_ALL_BITS: Final = 2**64 - 1
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def shard_of(name: str, shards: int) -> int:
    """Say which of so many *shards*, counted from 0, the queue or the id *name* belongs to."""
    # A name with half a surrogate pair can't be stored, but may be asked for.
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()
    key = int.from_bytes(digest[:8], "big")
    shard, jump = 0, 0
    while jump < shards:
        shard = jump
        key = (key * _MULTIPLIER + 1) & _ALL_BITS
        jump = int((shard + 1) * (2**31 / ((key >> 33) + 1)))
    return shard


def draw_id(shard: int | None, shards: int, now: datetime) -> str:
    """
    Draw a new random id that belongs to *shard* itself, or to any if that is ``None``.

    So whoever is asked for it later finds it at the first try. One in so many shards does: it takes that many draws.
    """
    time_us = (now - _EPOCH) // timedelta(microseconds=1)
    while True:
        id = rising_id(time_us)
        if shard is None or shard_of(id, shards) == shard:
            return id
