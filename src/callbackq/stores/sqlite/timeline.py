"""
The store's time: whole microseconds that never step within a boot and never run back across boots.

Due times and locks of all processes are judged on one line: the machine's boot-time clock plus an offset that the
first opener of a boot takes from wall time and keeps in the database. Stepping the wall clock changes nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from callbackq.clock import Clock

__all__ = ["TimeLine", "earlier", "instant", "later", "microseconds", "span"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
_LAST_US: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND

_MOST_US: Final = 2**62


def microseconds(value: datetime) -> int:
    """Turn an instant into microseconds since 1970."""
    return (value - _EPOCH) // _MICROSECOND


def instant(value_us: int) -> datetime:
    """Turn microseconds since 1970 into an instant."""
    return _EPOCH + timedelta(microseconds=value_us)


def span(value: timedelta) -> int:
    """Turn a duration into microseconds; what SQLite's integers can't hold into the most they can."""
    return max(-_MOST_US, min(value // _MICROSECOND, _MOST_US))


def earlier(now_us: int, span_: timedelta) -> int:
    """Take a duration off."""
    return max(now_us - span(span_), -_MOST_US)


def later(now_us: int, delay: timedelta) -> int:
    """Add a duration; what would lie beyond the calendar lies at its end."""
    return min(now_us + span(delay), _LAST_US)


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
