"""
What becomes of callbacks, collected and then written in few statements.

All decisions are the core's; this knows how they look in rows. It is used within one write transaction: rows are
read, changed here, and written at the end, many at once.
"""

from __future__ import annotations

from typing import Final

from attrs import define, field

from callbackq.core.lifecycle import Transition, settle
from callbackq.core.models import CallbackAttempt, CallbackState
from callbackq.stores.sql.instants import later
from callbackq.stores.sql.rows import LOCKED, WAITING, CallbackRow, Values, attempt_values, code_of
from callbackq.stores.sql.transaction import Transaction, Wait

__all__ = ["Changes"]

_NEXT_TRY_US: Final = 100_000
_LONGEST_REST_US: Final = 2_000_000


# Without a repr: the history's values hold answers.
@define(repr=False)
class Changes:
    """
    Attributes:
        now: the store's time of the transaction.
        made_due: whether a callback has become due; certain after `write`.
        wait: for others who have queues that are to be opened.
    """

    now: int
    made_due: bool = False
    wait: Wait = "a moment"
    _rows: list[CallbackRow] = field(factory=list, init=False)
    _history: list[Values] = field(factory=list, init=False)
    _leaving: list[CallbackRow] = field(factory=list, init=False)
    _owed: list[Values] = field(factory=list, init=False)

    def settle(self, row: CallbackRow, transition: Transition) -> Transition:
        """Combine a transition with what happened while the lock was held."""
        return settle(transition, accepted_late=bool(row.accepted_late), cancel_requested=bool(row.cancel_requested))

    def end_lock(
        self, row: CallbackRow, *, settled: Transition | None = None, attempt: CallbackAttempt | None = None
    ) -> None:
        """End the newest lock by its holder, who may have come to a result."""
        self._keep_lock(row, ended=self.now, completed=1, settled=settled, attempt=attempt)

    def lose_lock(self, row: CallbackRow) -> None:
        """End a lock that has timed out."""
        self._keep_lock(row, ended=row.due, completed=0, settled=None, attempt=None)

    def apply(self, row: CallbackRow, transition: Transition) -> None:
        """Write what follows from a lock's end."""
        row.attempts_made += transition.counted
        if transition.state is CallbackState.WAITING:
            row.state = WAITING
            row.due = later(self.now, transition.delay)
            self.made_due = self.made_due or row.due <= self.now
            self.keep(row)
            return
        row.holds = int(transition.hold)
        row.failed_reason = transition.failed_reason and transition.failed_reason.value
        if transition.notify:
            self._owed.append({"callback": row.callback, "now": self.now})
        self.finish(row, transition.state)

    def finish(self, row: CallbackRow, state: CallbackState) -> None:
        """End a callback; unless it holds its queue, the next one is the head."""
        row.state = code_of(state)
        row.due = None
        row.finished = self.now
        if not row.holds:
            self.leave_queue(row)
        self.keep(row)

    def cancel(self, row: CallbackRow) -> None:
        """End a callback because somebody wished so."""
        if row.state == LOCKED:
            self.lose_lock(row)
        row.holds = 0
        row.failed_reason = None
        self.finish(row, CallbackState.CANCELLED)

    def revive(self, row: CallbackRow, *, is_head: bool) -> None:
        """Begin a failed callback again."""
        row.state = WAITING
        row.due = self.now
        row.finished = None
        row.attempts_made = row.abandoned = row.holds = 0
        row.failed_reason = None
        row.is_head = int(is_head)
        self.made_due = self.made_due or is_head
        self.keep(row)

    def leave_queue(self, row: CallbackRow) -> None:
        """Let the next callback be the head, if this was it."""
        if row.is_head and row.queue is not None:
            self._leaving.append(row)
        row.is_head = 0

    def open_queue_behind(self, row: CallbackRow) -> None:
        """Try again what could not be done when the callback ended."""
        row.due = None
        self.leave_queue(row)
        self.keep(row)

    def keep(self, row: CallbackRow) -> None:
        """Remember to write a row, as it will be then."""
        self._rows.append(row)

    def write(self, transaction: Transaction) -> None:
        """Write all of it."""
        opened = self._lock_queues(transaction)
        # Old heads step down before new ones rise: two at once would break the index that forbids it.
        if self._rows:
            transaction.run_many("write_callback", map(vars, self._rows))
        if opened and transaction.run_many("open_queue", opened) > 0:
            self.made_due = True
        if self._history:
            transaction.run_many("add_history", self._history)
        if self._owed:
            transaction.owe(self._owed)

    def _lock_queues(self, transaction: Transaction) -> list[Values]:
        """Say which queues can be opened. In one that is locked by others for too long, the old head stays for now."""
        if not self._leaving:
            return []
        queues = {row.queue for row in self._leaving if row.queue is not None}
        locked = transaction.lock_queues(queues, wait=self.wait)
        for row in self._leaving:
            if row.queue not in locked:
                # The longer it has been owed, the longer it may rest: the next time doubles that.
                owed_for = self.now - (row.finished or self.now)
                row.is_head, row.due = 1, self.now + min(max(owed_for, _NEXT_TRY_US), _LONGEST_REST_US)
        return [
            {"queue": row.queue, "sequence": row.sequence, "now": self.now, "leaving": row.callback}
            for row in self._leaving
            if row.queue in locked
        ]

    def _keep_lock(
        self,
        row: CallbackRow,
        *,
        ended: int | None,
        completed: int,
        settled: Transition | None,
        attempt: CallbackAttempt | None,
    ) -> None:
        self._history.append(
            {
                "token": row.token,
                "callback": row.callback,
                "acquired": row.acquired or 0,
                "timeout": row.due,
                "ended": ended,
                "completed": completed,
                "machine": row.machine or "",
                "settled": None if settled is None else code_of(settled.state),
                **attempt_values(attempt, lock_machine=row.machine),
            }
        )
