"""
The store's time: whole microseconds that never step within a boot and never run back across boots.

Due times and locks of all processes are judged on one line: the machine's boot-time clock plus an offset that the
first opener of a boot takes from wall time and keeps in the database. Stepping the wall clock changes nothing.
"""

from __future__ import annotations

from callbackq.clock import Clock
from callbackq.stores.sql.instants import microseconds

__all__ = ["TimeLine"]


class TimeLine:
    """
    Read the store's time: the boot-time clock plus an offset, or wall time as long as no offset is known.

    Args:
        clock: the machine's clocks.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._offset_us: int | None = None

    def now_us(self) -> int:
        if self._offset_us is None:
            return microseconds(self._clock.now())
        return self._counted_us() + self._offset_us

    def follow(self, offset_us: int | None) -> None:
        """Use the offset that the database holds for this boot; ``None``: there is none, use wall time."""
        self._offset_us = offset_us

    def offset_of_new_boot_us(self, *, latest_us: int) -> int:
        """Choose an offset: time starts at wall time, but not before *latest_us*."""
        return max(microseconds(self._clock.now()), latest_us) - self._counted_us()

    def _counted_us(self) -> int:
        return round(self._clock.monotonic() * 1_000_000)
