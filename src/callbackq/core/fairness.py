"""
How many requests one host may have under way, so that a slow or dead one can't take all slots.

Pure bookkeeping: the dispatcher tells what it starts and ends, and asks before it starts. What waits in line is
any value of the dispatcher's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from enum import Enum
from typing import Final, Generic, TypeVar

__all__ = ["Admission", "HostLimits"]

# A host that has kept a request waiting this long is slow. Far above what a healthy receiver takes to acknowledge,
# far below any deadline.
_SLOW_AFTER_SECONDS: Final = 1.0
# How long a callback may stand in line, locked. Short beside any lock timeout.
_LONGEST_LINE_SECONDS: Final = 1.0
# How long the last in a line may have to wait, by what its host took lately: whoever stands there takes a slot that
# another host could use.
_LONGEST_EXPECTED_SECONDS: Final = 0.1
_LONGEST_PARKING_SECONDS: Final = 60.0
# How much of what a host took so far counts beside its latest answer.
_MEMORY: Final = 0.9

T = TypeVar("T", bound=Hashable)


class Admission(Enum):
    """What to do with a callback for a host."""

    SEND = "send"
    WAIT = "wait"
    """The host is busy and answers quickly: the callback stands in line, a place will be free in a moment."""
    PARK = "park"
    """The host is busy and slow: give the callback back to the store for a while."""


class HostLimits(Generic[T]):
    """
    Counts the requests under way to each host, and keeps a short line at each busy one.

    Args:
        limit: how many may be under way to one host.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._under_way: dict[str, dict[T, float]] = {}
        self._lines: dict[str, deque[tuple[T, float]]] = {}
        self._parked: dict[str, int] = {}
        # What a request took lately, for the hosts that have any under way.
        self._typical: dict[str, float] = {}

    def admit(self, host: str, item: T, now: float) -> Admission:
        """
        Take in *item* at clock reading *now* (seconds): count it as started, put it in line, or refuse it.

        The caller starts it only when it is told SEND.
        """
        under_way = self._under_way.setdefault(host, {})
        if len(under_way) < self._limit and host not in self._lines:
            under_way[item] = now
            return Admission.SEND
        line = self._lines.get(host, ())
        expected = self._typical.get(host, 0.0) * (len(line) + 1) / self._limit
        if self._age_of_oldest(host, now) > _SLOW_AFTER_SECONDS or expected > _LONGEST_EXPECTED_SECONDS:
            return Admission.PARK
        self._lines.setdefault(host, deque()).append((item, now + _LONGEST_LINE_SECONDS))
        return Admission.WAIT

    def end(self, host: str, item: T, now: float) -> T | None:
        """
        Count the end of *item*, whatever came of it.

        Returns:
            The next in line, counted as started; ``None`` when nobody stands there.
        """
        under_way = self._under_way[host]
        took = now - under_way.pop(item)
        self._typical[host] = took + _MEMORY * (self._typical.get(host, took) - took)
        if parked := self._parked.get(host):
            # A place is free again, so the line moves: those parked from here on come back sooner.
            self._parked[host] = parked - 1
        line = self._lines.get(host)
        if line:
            follower, _ = line.popleft()
            under_way[follower] = now
            if not line:
                del self._lines[host]
            return follower
        if not under_way:
            del self._under_way[host]
            self._typical.pop(host, None)
            self._parked.pop(host, None)
        return None

    def is_under_way(self, host: str, item: T) -> bool:
        """Whether *item* has been started and not ended."""
        return item in self._under_way.get(host, ())

    def leave_lines(self, now: float | None = None) -> list[tuple[str, T]]:
        """Take those out of all lines who have stood there too long at *now*; all of them when it is ``None``."""
        left: list[tuple[str, T]] = []
        for host, line in list(self._lines.items()):
            while line and (now is None or line[0][1] <= now):
                left.append((host, line.popleft()[0]))
            if not line:
                del self._lines[host]
        return left

    def parking_seconds(self, host: str, now: float) -> float:
        """
        Count one more callback given back, and say for how many seconds.

        The wait grows with the number parked: a host that frees *limit* places per slowness reaches the n-th
        callback after n / limit of them. Without this, a dead host's backlog would be acquired and given back in
        circles.
        """
        parked = self._parked[host] = self._parked.get(host, 0) + 1
        slowness = max(self._age_of_oldest(host, now), self._typical.get(host, 0.0))
        return min(slowness * (1 + parked / self._limit), _LONGEST_PARKING_SECONDS)

    def _age_of_oldest(self, host: str, now: float) -> float:
        # Dicts keep their order: the first entry is the one that has been under way the longest.
        under_way = self._under_way.get(host)
        return now - next(iter(under_way.values())) if under_way else 0.0
