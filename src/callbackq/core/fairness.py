"""
How many requests may be under way to whom, so that slow and dead hosts can't take all slots.

Each host has a limit. That alone would let a handful of hosts that never answer hold every slot until their deadlines,
again and again. So most slots are for hosts that have answered: those of which nothing is known yet share a part of
the slots, and those that let their last request hang share a smaller one, with one request at a time for each.

Pure bookkeeping: the dispatcher tells what it starts and ends, and asks before it starts. What waits in line is
any value of the dispatcher's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from enum import Enum
from math import inf
from typing import Final, Generic, TypeVar

from attrs import define, field

__all__ = ["Admission", "HostLimits"]

# A host that has kept a request waiting this long is slow. Far above what a healthy receiver takes to acknowledge,
# far below any deadline.
_SLOW_AFTER_SECONDS: Final = 1.0
# How long a callback may stand in line, locked. Short beside any lock timeout.
_LONGEST_LINE_SECONDS: Final = 1.0
# How long the last in a line may have to wait, by what its host took lately: whoever stands there takes a slot that
# another host could use.
_LONGEST_EXPECTED_SECONDS: Final = 0.1
# Where too many hosts are under way that have not answered: at first they may be as quick as any.
_SHORTEST_PARKING_SECONDS: Final = 0.1
_LONGEST_PARKING_SECONDS: Final = 60.0
# With fewer slots there is nothing to be kept for others.
_FEWEST_TO_SHARE: Final = 4
# How much of what a host took so far counts beside its latest answer.
_MEMORY: Final = 0.9
# Of how many hosts to remember how their last request ended.
_MOST_REMEMBERED: Final = 10_000

T = TypeVar("T", bound=Hashable)


class Admission(Enum):
    """What to do with a callback for a host."""

    SEND = "send"
    WAIT = "wait"
    """The host is busy and answers quickly: the callback stands in line, a place will be free in a moment."""
    PARK = "park"
    """
    The host is busy and slow, or too many hosts are under way that have not answered: give the callback back to the
    store for a while.
    """


@define(eq=False)
class _Places(Generic[T]):
    """
    What is under way to one host, or to all hosts of one kind.

    Attributes:
        limit: how many may be.
        under_way: since when each is. Dicts keep their order: the first is the one that has been so the longest.
        typical: what a request took lately.
        parked: how many were given back lately.
        forgets_parked_at: clock reading by which those have come back.
    """

    limit: int
    under_way: dict[T, float] = field(factory=dict)
    typical: float | None = None
    parked: int = 0
    forgets_parked_at: float = -inf

    @property
    def is_full(self) -> bool:
        return len(self.under_way) >= self.limit

    def end(self, item: T, now: float) -> float:
        """Count an end, and say how long *item* took."""
        took = now - self.under_way.pop(item)
        typical = took if self.typical is None else self.typical
        self.typical = took + _MEMORY * (typical - took)
        # A place is free again, so the line moves: those parked from here on come back sooner.
        self.parked = max(self.parked - 1, 0)
        return took

    def age_of_oldest(self, now: float) -> float:
        return now - next(iter(self.under_way.values())) if self.under_way else 0.0

    def slowness(self, now: float) -> float:
        return max(self.age_of_oldest(now), self.typical or 0.0)

    def park(self, now: float, slowness: float, limit: int) -> float:
        """Count one more given back, and say for how many seconds: until those before it have had their turn."""
        if now >= self.forgets_parked_at:
            self.parked = 0
            self.forgets_parked_at = now + _LONGEST_PARKING_SECONDS
        self.parked += 1
        return min(slowness * (1 + self.parked / limit), _LONGEST_PARKING_SECONDS)


class HostLimits(Generic[T]):
    """
    Counts the requests under way to each host, and keeps a short line at each busy one.

    Args:
        limit: how many may be under way to one host.
        slots: how many may be under way to all of them. Hosts of which nothing is known share half of these, or
            *limit* if that is more; those whose last request hung, a quarter.
    """

    def __init__(self, limit: int, *, slots: int) -> None:
        self._limit = limit
        self._hosts: dict[str, _Places[T]] = {}
        self._lines: dict[str, deque[tuple[T, float]]] = {}
        self._unknown: _Places[T] = _Places(max(limit, slots // 2 if slots >= _FEWEST_TO_SHARE else slots))
        self._suspect: _Places[T] = _Places(max(1, slots // 4))
        # Where what is under way to a host that has not answered is counted, too.
        self._on_trial: dict[T, _Places[T]] = {}
        # For how long a host's last request hung, 0 if it didn't; the longest known come first.
        self._hung: dict[str, float] = {}

    def admit(self, host: str, item: T, now: float) -> Admission:
        """
        Take in *item* at clock reading *now* (seconds): count it as started, put it in line, or refuse it.

        The caller starts it only when it is told SEND.
        """
        trial, limit = self._trial_of(host), self._limit_of(host)
        if trial is not None and trial.is_full:
            return Admission.PARK
        places = self._hosts.get(host)
        if places is None or (len(places.under_way) < limit and host not in self._lines):
            self._start(host, item, now)
            return Admission.SEND
        line = self._lines.get(host, ())
        expected = (places.typical or 0.0) * (len(line) + 1) / limit
        is_slow = places.age_of_oldest(now) > _SLOW_AFTER_SECONDS or expected > _LONGEST_EXPECTED_SECONDS
        if is_slow or trial is self._suspect:
            return Admission.PARK
        self._lines.setdefault(host, deque()).append((item, now + _LONGEST_LINE_SECONDS))
        return Admission.WAIT

    def end(self, host: str, item: T, now: float, *, answered: bool | None = None) -> T | None:
        """
        Count the end of *item*.

        Args:
            host: where it went to.
            item: what has ended.
            now: clock reading.
            answered: whether its host did; ``None`` when its end says nothing about that.

        Returns:
            The next in line, counted as started; ``None`` when nobody stands there.
        """
        places = self._hosts[host]
        took = places.end(item, now)
        if (trial := self._on_trial.pop(item, None)) is not None:
            trial.end(item, now)
        if answered is not None:
            # Who refuses at once takes no slot from anybody.
            self._remember(host, 0.0 if answered or took <= _SLOW_AFTER_SECONDS else took)
        line = self._lines.get(host)
        if line and len(places.under_way) < self._limit_of(host):
            follower, _ = line.popleft()
            if not line:
                del self._lines[host]
            self._start(host, follower, now)
            return follower
        if not places.under_way:
            del self._hosts[host]
        return None

    def is_under_way(self, host: str, item: T) -> bool:
        """Whether *item* has been started and not ended."""
        places = self._hosts.get(host)
        return places is not None and item in places.under_way

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
        circles. The same goes for all hosts that have not answered.
        """
        trial, seconds = self._trial_of(host), 0.0
        if (places := self._hosts.get(host)) is not None:
            slowness = max(places.slowness(now), self._hung.get(host, 0.0))
            seconds = places.park(now, slowness, self._limit_of(host))
        if trial is not None and trial.is_full:
            slowness = max(trial.slowness(now), _SHORTEST_PARKING_SECONDS)
            seconds = max(seconds, trial.park(now, slowness, trial.limit))
        return seconds

    def _start(self, host: str, item: T, now: float) -> None:
        self._hosts.setdefault(host, _Places(self._limit)).under_way[item] = now
        if (trial := self._trial_of(host)) is not None:
            trial.under_way[item] = now
            self._on_trial[item] = trial

    def _limit_of(self, host: str) -> int:
        return 1 if self._hung.get(host) else self._limit

    def _trial_of(self, host: str) -> _Places[T] | None:
        hung = self._hung.get(host)
        if hung is None:
            return self._unknown
        return self._suspect if hung else None

    def _remember(self, host: str, hung: float) -> None:
        self._hung.pop(host, None)
        self._hung[host] = hung
        if len(self._hung) > _MOST_REMEMBERED:
            del self._hung[next(iter(self._hung))]
