"""
Results on their way into the store.

A result is kept until the store has taken it: through an outage of any length, and in whatever batches the store takes
it. One result that the store can never take must not hold up all others, nor must one kind of call that fails hold up
the other, nor a shard that fails those that work.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from math import inf
from typing import Final

from attrs import field, mutable

from callbackq.core.delivery import Delivery
from callbackq.core.lifecycle import Transition
from callbackq.core.models import AttemptFailure, CallbackAttempt
from callbackq.core.planning import backoff
from callbackq.dataaccess import Acquired, AttemptRecord, DataAccess, SupportsShards
from callbackq.errors import DataAccessError, LockLostError, TransientDataAccessError
from callbackq.events import EventKind
from callbackq.reporting import Reporter

__all__ = ["Line", "Recorder", "Rest", "Slot"]

_log = logging.getLogger("callbackq")

# What fails this often by itself, while the store takes others, will never be taken.
_TRIES_ALONE: Final = 3
_FIRST_REST_SECONDS: Final = 0.1
_LONGEST_WRITING_REST_SECONDS: Final = 1.0


@mutable(kw_only=True, eq=False)
class Slot:
    """
    One acquired callback, from its lock to its durable result.

    Attributes:
        acquired: the callback and its newest lock.
        host: where it goes to.
        delivery: the attempt, while it is under way or waits for its turn.
        attempt: what came of it.
        retry_after: what the receiver asked for.
        ends_unsent: what follows without an attempt, for a callback that must not be sent.
        release_after: when it is given back, it is due again after this.
        was_refused: the store has refused it by itself.
        tries_alone: how often the store refused its result while it took others.
        refused_at: how much the store had taken when it refused it last.
        is_overdue: its attempt has been seen to go on far beyond its end.
        was_overtaken: since its request left, somebody else has tried the callback, or it was redelivered.
    """

    acquired: Acquired
    host: str = ""
    delivery: Delivery | None = None
    attempt: CallbackAttempt | None = None
    retry_after: timedelta | None = None
    ends_unsent: Transition | None = None
    release_after: timedelta = timedelta(0)
    was_refused: bool = False
    tries_alone: int = 0
    refused_at: int | None = None
    is_overdue: bool = False
    was_overtaken: bool = False


@mutable
class Rest:
    """How long to leave something alone that has failed so many times in a row."""

    longest: float
    failures: int = 0
    until: float = 0.0

    def begin(self, now: float, random: float) -> None:
        self.failures += 1
        self.until = now + backoff(self.failures, first=_FIRST_REST_SECONDS, longest=self.longest, random=random)

    def is_over(self, now: float) -> bool:
        return now >= self.until


@mutable(eq=False)
class Line:
    """
    Slots that wait to be written, by one kind of call into one shard.

    Attributes:
        slots: who waits, oldest first.
        rest: from the last fault.
        suspects: so many at the front are to be tried one by one, because they failed together.
        taken: how many the store has taken.
    """

    _write: Callable[[Sequence[Slot]], None]
    slots: list[Slot] = field(factory=list)
    # A result that waits much longer than this may see its lock time out.
    rest: Rest = field(factory=lambda: Rest(longest=_LONGEST_WRITING_REST_SECONDS))
    suspects: int = 0
    taken: int = 0

    def is_struggling(self) -> bool:
        """Whether something waits that the store has refused."""
        return bool(self.suspects) or any(slot.was_refused for slot in self.slots)

    def write(self) -> list[Slot]:
        """
        Write some of what there is.

        Returns:
            The slots that are free now.

        Raises:
            Exception: what the store raised. What was not written is kept for the next call.
        """
        self.suspects = min(self.suspects, len(self.slots))
        if self.suspects:
            return self._write_alone()
        slots = list(self.slots)
        # Counted before the call: should it raise, they are tried one by one.
        self.suspects = len(slots)
        self._write(slots)
        self.suspects = 0
        del self.slots[: len(slots)]
        self.taken += len(slots)
        return slots

    def _write_alone(self) -> list[Slot]:
        slot = self.slots[0]
        try:
            self._write([slot])
        except Exception as error:
            # Whatever a store raises, a custom one's bugs included. To the end, so that the others get their turn.
            self.slots.append(self.slots.pop(0))
            self.suspects -= 1
            slot.was_refused = True
            if not _will_never_be_taken(slot, error, taken=self.taken):
                raise
            self.slots.remove(slot)
            _log.error("the store can't record a result of callback %a; its lock will time out", slot.acquired.id)
            return [slot]
        del self.slots[0]
        self.suspects -= 1
        self.taken += 1
        return [slot]


class Recorder:
    """
    Keeps results and releases, each in the line of its kind and shard, and writes them, oldest first.

    Args:
        data_access: the store.
        reporter: told of every change after the store has taken it.
        record: has the store record results; returns what `DataAccess.record_attempts` does.
        after_attempt: decides what follows from a slot's attempt, by its newest lock.
        on_notification_owed: called when a failure that owes an e-mail was recorded.

    Attributes:
        finished: attempts recorded so far that ended by themselves.
        interrupted: attempts recorded so far that a stop ended.
        released: locks given back so far.
    """

    def __init__(
        self,
        data_access: DataAccess,
        reporter: Reporter,
        *,
        record: Callable[[Sequence[AttemptRecord]], list[Transition | LockLostError]],
        after_attempt: Callable[[Acquired, CallbackAttempt, timedelta | None], Transition],
        on_notification_owed: Callable[[], None],
    ) -> None:
        self._data_access = data_access
        self._shard_of = data_access.shard_of if isinstance(data_access, SupportsShards) else _the_only_shard
        self._reporter = reporter
        self._record_all = record
        self._after_attempt = after_attempt
        self._on_notification_owed = on_notification_owed
        self.finished = 0
        self.interrupted = 0
        self.released = 0
        self._results: dict[int, Line] = defaultdict(lambda: Line(self._write_results))
        self._releases: dict[int, Line] = defaultdict(lambda: Line(self._write_releases))

    @property
    def unrecorded(self) -> int:
        """Results the store has not taken yet."""
        return sum(len(line.slots) for line in self._results.values())

    @property
    def store_is_failing(self) -> bool:
        """Whether something waits in a line whose last write failed."""
        return any(line.slots and line.rest.failures for line in self._lines())

    def has_work(self) -> bool:
        """Whether anything waits to be written."""
        return any(line.slots for line in self._lines())

    def ready_lines(self, now: float) -> list[Line]:
        """Where something can be written at clock reading *now*."""
        return [line for line in self._lines() if line.slots and line.rest.is_over(now)]

    def seconds_to_write(self, now: float) -> float:
        """How long until something can be written; infinite when nothing waits."""
        return min((max(line.rest.until - now, 0.0) for line in self._lines() if line.slots), default=inf)

    def end_rests(self, now: float) -> None:
        """Try everything once more now."""
        for line in self._lines():
            line.rest.until = now

    def record(self, slot: Slot) -> None:
        """Take in a result."""
        self._results[self._shard_of(slot.acquired)].slots.append(slot)

    def release(self, slot: Slot, *, after: timedelta = timedelta(0)) -> None:
        """Take in a lock to be given back."""
        slot.delivery = None
        slot.release_after = after
        self._releases[self._shard_of(slot.acquired)].slots.append(slot)

    def forget(self, slot: Slot) -> None:
        """Drop what waits for *slot*: it is known to be durable already."""
        for line in self._lines():
            if slot in line.slots:
                line.slots.remove(slot)

    def _lines(self) -> Iterator[Line]:
        yield from self._results.values()
        yield from self._releases.values()

    def _write_results(self, slots: Sequence[Slot]) -> None:
        records = [self._record_of(slot) for slot in slots]
        results = self._record_all(records)
        for record, result in zip(records, results, strict=True):
            self._report(record, result)

    def _write_releases(self, slots: Sequence[Slot]) -> None:
        results = self._data_access.release_locks([(slot.acquired, slot.release_after) for slot in slots])
        for slot, result in zip(slots, results, strict=True):
            if isinstance(result, LockLostError):
                self._reporter.callback(EventKind.LOCK_LOST, slot.acquired)
            else:
                self.released += 1
                self._reporter.released(slot.acquired, result)

    def _record_of(self, slot: Slot) -> AttemptRecord:
        # Now, not when the answer came: by the newest lock, of which there may be another since.
        transition = slot.ends_unsent
        if slot.attempt is not None:
            transition = self._after_attempt(slot.acquired, slot.attempt, slot.retry_after)
        assert transition is not None  # noqa: S101 - a slot that has ended has one or the other
        return AttemptRecord(acquired=slot.acquired, attempt=slot.attempt, transition=transition)

    def _report(self, record: AttemptRecord, result: Transition | LockLostError) -> None:
        if record.attempt is not None and record.attempt.failure is AttemptFailure.INTERRUPTED:
            self.interrupted += 1
        elif record.attempt is not None:
            self.finished += 1
        if isinstance(result, LockLostError):
            self._reporter.callback(EventKind.LOCK_LOST, record.acquired, record.attempt)
        else:
            self._reporter.recorded(record.acquired, record.attempt, result)
            if result.notify:
                self._on_notification_owed()


def _the_only_shard(acquired: Acquired) -> int:
    return 0


def _will_never_be_taken(slot: Slot, error: Exception, *, taken: int) -> bool:
    # In an outage everything fails, and must be kept. It is this slot's own fault when the store took others of its
    # kind in between, or raises what no store may.
    if isinstance(error, TransientDataAccessError):
        return False
    took_others = slot.refused_at is not None and slot.refused_at < taken
    if took_others or not isinstance(error, DataAccessError):
        slot.tries_alone += 1
    slot.refused_at = taken
    return slot.tries_alone >= _TRIES_ALONE
