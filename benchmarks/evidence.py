"""
What receivers saw and a store said in the end, kept on disk in portions, and judged one portion at a time.

No rule of `callbackq.testing.history` looks from one queue to another. So all that belongs to a queue, or to a callback
without one, lies in one portion, and to judge a million callbacks takes no more memory than the largest portion.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO
from zlib import crc32

from attrs import field, frozen, mutable

from callbackq import CallbackLock, CallbackState, CallbackStatus, codec
from callbackq.testing.history import Arrival, History, Judgement

_PORTIONS = 64
_EXAMPLES = 5
DEADLINE = timedelta(seconds=1)
"""How long an attempt takes at most."""

# After a freeze, what could not be recorded meanwhile is, by one after another.
_TO_CATCH_UP = timedelta(seconds=1)


class Evidence:
    """
    One kind of it, in a folder. Only one process may write a kind.

    Args:
        folder: for all kinds of one run.
        kind: ``"arrivals"``, ``"acknowledged"`` or ``"statuses"``.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self._path: Callable[[int], Path] = lambda portion: folder / f"{kind}-{portion:02}"
        self._files: dict[int, TextIO] = {}

    def arrived(self, arrival: Arrival) -> None:
        fields = (arrival.sequence, arrival.token, arrival.started, arrival.accepted)
        self._write(arrival.queue_id, arrival.callback_id, [arrival.callback_id, arrival.queue_id, *fields])

    def acknowledged(self, id: str, queue_id: str) -> None:
        self._write(queue_id, id, id)

    def ended(self, status: CallbackStatus) -> None:
        self._write(status.queue_id, status.id, codec.dumps(status).decode())

    def _write(self, queue_id: str, id: str, value: object) -> None:
        portion = crc32((queue_id or id).encode()) % _PORTIONS
        if portion not in self._files:
            self._files[portion] = self._path(portion).open("a", encoding="ascii")
        self._files[portion].write(json.dumps(value) + "\n")

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, portion: int) -> Iterator[Any]:
        path = self._path(portion)
        if path.exists():
            with path.open(encoding="ascii") as file:
                yield from map(json.loads, file)


@frozen(kw_only=True)
class Interruption:
    """
    A dispatcher was killed, or stood still for longer than its locks live; or a server was away.

    Attributes:
        began: when, by the store's clock.
        ended: when it went on; ``None`` when it was killed.
        resumed: the same by the receivers' clock, in seconds; infinite when it was killed.
    """

    began: datetime
    ended: datetime | None = None
    resumed: float = float("inf")

    def explains(self, lock: CallbackLock) -> bool:
        """
        Tell whether it may be why the result of a request under *lock* was not recorded, or was not known.

        A lock that was abandoned was held at some time of it; one that was completed, by a dispatcher that never got
        an answer because it stood still, all the time.
        """
        if lock.ended is None:
            return False
        if lock.completed:
            return self.ended is not None and lock.acquired <= self.began and self.ended <= lock.ended
        return self.began <= lock.ended and (self.ended is None or lock.acquired <= self.ended)

    def holds_up(self, lock: CallbackLock) -> bool:
        """
        Tell whether it may be why another dispatcher's *lock* timed out: whoever is frozen in a transaction keeps
        others from recording, in SQLite everybody. That must have begun before the attempt had its result, and have
        lasted until the lock's time was up, or nearly.
        """
        if self.ended is None or self.began > lock.acquired + DEADLINE + _TO_CATCH_UP:
            return False
        return self.began <= lock.timeout <= self.ended + _TO_CATCH_UP

    def overlaps(self, lock: CallbackLock) -> bool:
        """Tell whether some of a lock's life fell into it."""
        return self.ended is not None and self.began <= lock.timeout and lock.acquired <= self.ended

    def is_late(self, started: float, lock: CallbackLock) -> bool:
        """Tell whether a request that started then, by the receivers' clock, left when it was over, and *lock*, too."""
        if self.ended is None:
            return False
        return started > self.resumed + max((lock.timeout - self.ended).total_seconds(), 0.0)


@mutable
class Verdict:
    """
    What became of a run. Counts of all portions.

    Attributes:
        in_flight: locks whose dispatcher was killed, or frozen for longer than they live.
        held_up: locks of other dispatchers that were abandoned because of one that was frozen, or while the server was
            away. With *in_flight* this is the bound of duplicates.
        hit: interruptions that hit a dispatcher which held locks, by the machine's name and its number.
        stopped_at_work: dispatchers that held a lock when they were told to stop, by their machines' names.
        abandoned_by_others: locks that were abandoned for another reason.
        undelivered: callbacks that ended otherwise than by an acceptance, though they may be tried again forever.
        late: outcomes that came when the lock was lost, and changed nothing.
        sent_late: requests of dispatchers that stood still between their last look at the clock and the first byte.
    """

    callbacks: int = 0
    arrivals: int = 0
    duplicates: int = 0
    in_flight: int = 0
    held_up: int = 0
    hit: set[tuple[str, int]] = field(factory=set)
    stopped_at_work: set[str] = field(factory=set)
    abandoned_by_others: int = 0
    undelivered: int = 0
    late: int = 0
    sent_late: Counter[tuple[str, int]] = field(factory=Counter)
    broken: Counter[str] = field(factory=Counter)
    examples: list[str] = field(factory=list)

    def is_ok(self) -> bool:
        # One network thread can stand still at one first byte.
        sent_once = max(self.sent_late.values(), default=0) <= 1
        faults = self.undelivered or self.abandoned_by_others
        return not self.broken and not faults and sent_once

    def figures(self) -> dict[str, Any]:
        return {
            "callbacks": self.callbacks,
            "requests": self.arrivals,
            "lost": self.broken["lost"] + self.broken["not drained"] + self.undelivered,
            "misordered": sum(self.broken[rule] for rule in ("order", "early start", "early lock", "stale")),
            "overlapping_locks": self.broken["lock overlap"] + self.broken["takeover"],
            "duplicates": self.duplicates,
            "duplicates_bound": self.in_flight + self.held_up,
            "duplicates_unexplained": self.broken["duplicates"],
            "in_flight_when_interrupted": self.in_flight,
            "held_up": self.held_up,
            "interruptions_with_work_in_flight": len(self.hit),
            "stops_with_work_in_flight": len(self.stopped_at_work),
            "abandoned_by_others": self.abandoned_by_others,
            "late_outcomes_fenced": self.late,
            "sent_late": self.sent_late.total(),
            "most_sent_late_after_one_freeze": max(self.sent_late.values(), default=0),
            "broken": dict(self.broken),
            "examples": self.examples,
        }

    def add(self, judgement: Judgement, statuses: Sequence[CallbackStatus]) -> None:
        self.callbacks += judgement.callbacks
        self.arrivals += judgement.arrivals
        self.duplicates += judgement.duplicates
        self.broken.update(judgement.broken())
        records = {status.id: status for status in statuses}
        for violation in judgement.violations:
            status = records.get(violation.callback_id)
            self.show(f"{violation}, of which is recorded {(status.locks, status.attempts) if status else None}")

    def show(self, example: str) -> None:
        if len(self.examples) < _EXAMPLES:
            self.examples.append(example)


def judge(
    folder: Path,
    interruptions: dict[str, list[Interruption]],
    outages: Sequence[Interruption] = (),
    stops: Mapping[str, datetime] = MappingProxyType({}),
    *,
    lease: timedelta,
    sees_deaths: bool,
) -> Verdict:
    """
    Judge what lies in a folder.

    Args:
        folder: with all three kinds of evidence.
        interruptions: of each machine, by its name.
        outages: when the server was away.
        stops: when a machine's dispatcher was told to stop, by the store's clock.
        lease: how long every lock must live, unless its holder ends it.
        sees_deaths: the store may end the locks of those who were killed at once, as SQLite's does.
    """
    verdict = Verdict()
    arrivals, acknowledged, statuses = (Evidence(folder, kind) for kind in ("arrivals", "acknowledged", "statuses"))
    for portion in range(_PORTIONS):
        _judge_portion(
            verdict,
            [Arrival(**dict(zip(_ARRIVAL, fields, strict=True))) for fields in arrivals.read(portion)],
            [codec.loads(text.encode(), CallbackStatus) for text in statuses.read(portion)],
            acknowledged.read(portion),
            interruptions,
            outages,
            stops,
            lease,
            sees_deaths=sees_deaths,
        )
    return verdict


_ARRIVAL = ("callback_id", "queue_id", "sequence", "token", "started", "accepted")


def _judge_portion(
    verdict: Verdict,
    arrivals: list[Arrival],
    statuses: list[CallbackStatus],
    acknowledged: Iterable[str],
    interruptions: dict[str, list[Interruption]],
    outages: Sequence[Interruption],
    stops: Mapping[str, datetime],
    lease: timedelta,
    *,
    sees_deaths: bool,
) -> None:
    freezes = [one for of_one in interruptions.values() for one in of_one if one.ended is not None]
    interrupted: dict[tuple[str, int], tuple[CallbackLock, tuple[str, int]]] = {}
    excused: set[tuple[str, int]] = set()
    for status in statuses:
        verdict.undelivered += not status.state.is_open and status.state is not CallbackState.SUCCEEDED
        verdict.late += sum(attempt.late for attempt in status.attempts)
        for lock in status.locks:
            told = stops.get(lock.machine_name)
            if told is not None and lock.acquired <= told and (lock.ended is None or told <= lock.ended):
                verdict.stopped_at_work.add(lock.machine_name)
            of_holder = interruptions.get(lock.machine_name, ())
            number = _number_of(of_holder, lock)
            is_early = _was_taken_early(lock, lease)
            if is_early and (number is None or of_holder[number].ended is not None or not sees_deaths):
                # No freeze of anybody explains that, its holder's least of all.
                verdict.broken["takeover"] += 1
                verdict.show(f"of {status.id} {lock} was taken over early")
            elif number is not None:
                interrupted[status.id, lock.token] = lock, (lock.machine_name, number)
                verdict.in_flight += 1
            elif lock.ended is None or lock.completed:
                continue
            elif any(one.holds_up(lock) for one in freezes) or any(one.overlaps(lock) for one in outages):
                verdict.held_up += 1
            else:
                verdict.abandoned_by_others += 1
                continue
            # Also what was taken early: that is told already, and what follows from it needn't be told again.
            excused.add((status.id, lock.token))
    stale = set()
    for arrival in arrivals:
        held, cause = interrupted.get((arrival.callback_id, arrival.token), (None, ("", 0)))
        if held is not None and interruptions[cause[0]][cause[1]].is_late(arrival.started, held):
            stale.add((arrival.callback_id, arrival.token))
            verdict.sent_late[cause] += 1
            verdict.show(f"{arrival} was sent late, under {held}")
    verdict.hit.update(cause for _, cause in interrupted.values())
    history = History(arrivals, statuses, acknowledged=acknowledged, stale_requests=stale, excused=excused)
    verdict.add(history.judge(), statuses)


def _was_taken_early(lock: CallbackLock, lease: timedelta) -> bool:
    # Not by its timeout: a store that ends locks of the dead brings that forward.
    return lock.ended is not None and not lock.completed and lock.ended < lock.acquired + lease


def _number_of(interruptions: Sequence[Interruption], lock: CallbackLock) -> int | None:
    """Give the latest that explains it."""
    return max((number for number, one in enumerate(interruptions) if one.explains(lock)), default=None)
