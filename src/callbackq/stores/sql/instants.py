"""Instants and durations as whole microseconds, as the stores on SQL databases keep them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

__all__ = ["LAST_US", "earlier", "instant", "later", "microseconds", "span"]


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)
LAST_US: Final = (datetime.max.replace(tzinfo=UTC) - _EPOCH) // _MICROSECOND

_MOST_US: Final = 2**62


def microseconds(value: datetime) -> int:
    """Turn an instant into microseconds since 1970."""
    return (value - _EPOCH) // _MICROSECOND


def instant(value_us: int) -> datetime:
    """Turn microseconds since 1970 into an instant."""
    return _EPOCH + timedelta(microseconds=value_us)


def span(value: timedelta) -> int:
    """Turn a duration into microseconds; what a database's integers can't hold into the most they can."""
    return max(-_MOST_US, min(value // _MICROSECOND, _MOST_US))


def earlier(now_us: int, span_: timedelta) -> int:
    """Take a duration off."""
    return max(now_us - span(span_), -_MOST_US)


def later(now_us: int, delay: timedelta) -> int:
    """Add a duration; what would lie beyond the calendar lies at its end."""
    return min(now_us + span(delay), LAST_US)
