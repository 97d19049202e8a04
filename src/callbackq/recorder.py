"""
Results on their way into the store.

A result is kept until the store has taken it: through an outage of any length, and in whatever batches the store takes
it. One result that the store can never take must not hold up all others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from attrs import field, mutable

from callbackq.core.delivery import Answer, Delivery
from callbackq.core.lifecycle import Transition
from callbackq.core.models import AttemptFailure
from callbackq.dataaccess import Acquired, AttemptRecord, DataAccess
from callbackq.errors import DataAccessError, LockLostError
from callbackq.events import EventKind
from callbackq.reporting import Reporter

__all__ = ["Recorder", "Slot"]

_log = logging.getLogger("callbackq")

# A result that fails this often by itself, while the store takes others, will never be taken.
_TRIES_ALONE: Final = 3


@mutable(kw_only=True, eq=False)
class Slot:
    """
    One acquired callback, from its lock to its durable result.

    Attributes:
        acquired: the callback and its newest lock.
        host: where it goes to.
        delivery: the attempt, while it is under way or waits for its turn.
        answer: what came of it.
        ends_unsent: what follows without an attempt, for a callback that must not be sent.
        release_after: when it is given back, it is due again after this.
    """

    acquired: Acquired
    host: str = ""
    delivery: Delivery | None = None
    answer: Answer | None = None
    ends_unsent: Transition | None = None
    release_after: timedelta = timedelta(0)
    _failures_alone: int = field(default=0, init=False)
    _failed_after: int = field(default=0, init=False)


class Recorder:
    """
    Writes results and releases, oldest first.

    Args:
        data_access: the store.
        reporter: told of every change after the store has taken it.
        record_of: makes the record of a slot that has ended, by its newest lock.
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
        record_of: Callable[[Slot], AttemptRecord],
        on_notification_owed: Callable[[], None],
    ) -> None:
        self._data_access = data_access
        self._reporter = reporter
        self._record_of = record_of
        self._on_notification_owed = on_notification_owed
        self.finished = 0
        self.interrupted = 0
        self.released = 0
        self._results: list[Slot] = []
        self._releases: list[Slot] = []
        # So many at the front are to be tried one by one, because they failed together.
        self._suspects = 0
        self._taken = 0

    @property
    def unrecorded(self) -> int:
        """Results the store has not taken yet."""
        return len(self._results)

    def has_work(self) -> bool:
        return bool(self._results or self._releases)

    def record(self, slot: Slot) -> None:
        """Take in a result."""
        self._results.append(slot)

    def release(self, slot: Slot, *, after: timedelta = timedelta(0)) -> None:
        """Take in a lock to be given back."""
        slot.delivery = None
        slot.release_after = after
        self._releases.append(slot)

    def write(self) -> list[Slot]:
        """
        Write some of what there is, in one transaction where the store can.

        Returns:
            The slots that are free now.

        Raises:
            Exception: what the store raised. What was not written is kept for the next call.
        """
        if self._suspects:
            return self._write_alone(self._results.pop(0))
        if self._results:
            return self._write_together(self._results)
        return self._write_releases(self._releases)

    def _write_together(self, slots: list[Slot]) -> list[Slot]:
        # Counted before the call: should it raise, they are tried one by one.
        self._suspects = len(slots)
        self._write_records(slots)
        self._suspects = 0
        self._results = []
        return slots

    def _write_alone(self, slot: Slot) -> list[Slot]:
        self._suspects -= 1
        try:
            self._write_records([slot])
        except Exception as error:
            if self._will_never_be_taken(slot, error):
                _log.error("the store can't record a result of callback %a; its lock will time out", slot.acquired.id)
                return [slot]
            self._results.append(slot)
            raise
        return [slot]

    def _write_records(self, slots: list[Slot]) -> None:
        records = [self._record_of(slot) for slot in slots]
        results = self._data_access.record_attempts(records)
        self._taken += len(slots)
        for record, result in zip(records, results, strict=True):
            self._report(record, result)

    def _write_releases(self, slots: list[Slot]) -> list[Slot]:
        self._data_access.release_locks([(slot.acquired, slot.release_after) for slot in slots])
        self._releases = []
        self.released += len(slots)
        for slot in slots:
            self._reporter.callback(EventKind.RELEASED, slot.acquired)
        return slots

    def _will_never_be_taken(self, slot: Slot, error: Exception) -> bool:
        # In an outage every result fails, and must be kept. It is this result's own fault when the store took others
        # in between, or raises what no store may.
        if slot._failed_after < self._taken or not isinstance(error, DataAccessError):
            slot._failures_alone += 1
        slot._failed_after = self._taken
        return slot._failures_alone >= _TRIES_ALONE

    def _report(self, record: AttemptRecord, result: Transition | LockLostError) -> None:
        if record.attempt is not None and record.attempt.failure is AttemptFailure.INTERRUPTED:
            self.interrupted += 1
        else:
            self.finished += 1
        if isinstance(result, LockLostError):
            self._reporter.callback(EventKind.LOCK_LOST, record.acquired, record.attempt)
        else:
            self._reporter.recorded(record.acquired, record.attempt, result)
            if result.notify:
                self._on_notification_owed()
