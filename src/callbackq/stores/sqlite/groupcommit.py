"""
Group commit: many threads' operations, one transaction.

A durable commit costs a disk sync, whatever it holds. So whoever comes while another thread's transaction is under
way waits, and one of those who wait runs the operations of all. No thread of its own is needed: nothing to start,
stop or lose in a fork.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from attrs import define, field

from callbackq.errors import DataAccessError, TransientDataAccessError

__all__ = ["MAX_GROUP", "GroupCommit", "Ticket"]

MAX_GROUP: Final = 1000
"""Operations in one transaction at most, so that none waits long for its end."""

_T = TypeVar("_T")


def _nothing(_: Any) -> None:
    pass


def _closed_gate() -> threading.Lock:
    gate = threading.Lock()
    gate.acquire()
    return gate


@define(eq=False)
class Ticket:
    """
    One caller's operation and what came of it.

    Attributes:
        operation: what to run.
        result: what it returned.
        error: what to raise in its caller instead.
        alone: the caller wants the turn for itself, and has nothing to run.
        waits: it stands in the queue.
        leads: it is the caller's turn to run the operations of all.
        gate: opens when the caller leads or has been served.
    """

    operation: Callable[[Any], Any]
    result: Any = None
    error: Exception | None = None
    alone: bool = False
    waits: bool = False
    leads: bool = False
    gate: threading.Lock = field(factory=_closed_gate)


class GroupCommit:
    """
    Let one thread at a time run the operations of all that wait.

    Args:
        run_group: runs the operations of some tickets in one transaction and sets each one's result or error. Must
            not raise anything but what ends the thread.
        afterwards: called when the group's callers have been answered, before the next group: room for upkeep. Must
            not raise.
        patience_seconds: how long a caller waits for its turn.
    """

    def __init__(
        self,
        run_group: Callable[[Sequence[Ticket]], None],
        *,
        afterwards: Callable[[], None],
        patience_seconds: float,
    ) -> None:
        self._run_group = run_group
        self._afterwards = afterwards
        self._patience_seconds = patience_seconds
        # Guards the two below. Without it two threads could both believe to lead, and would mix their transactions on
        # one connection. Held for a few instructions only.
        self._mutex = threading.Lock()
        self._waiting: deque[Ticket] = deque()
        self._has_leader = False

    def run(self, operation: Callable[[Any], _T]) -> _T:
        """
        Run an operation as part of some transaction, and return when that is committed.

        Raises:
            TransientDataAccessError: it wasn't its turn in time; it was not run.
            Exception: what the operation raised, or what befell the transaction.
        """
        ticket = Ticket(operation)
        try:
            self._await_turn(ticket)
            if ticket.leads:
                self._lead(ticket)
        finally:
            self._leave(ticket)
        if ticket.error is not None:
            raise ticket.error
        result: _T = ticket.result
        return result

    def pause(self) -> None:
        """Keep all operations waiting until `resume`. Raises TransientDataAccessError as `run` does."""
        ticket = Ticket(_nothing, alone=True)
        try:
            self._await_turn(ticket)
        except BaseException:
            self._leave(ticket)
            raise

    def resume(self) -> None:
        """Let the next caller have its turn."""
        with self._mutex:
            if not self._waiting:
                self._has_leader = False
                return
            successor = self._take_first()
            successor.leads = True
        successor.gate.release()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keep all operations waiting while the block runs."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _await_turn(self, ticket: Ticket) -> None:
        """Return when the ticket leads or has been served."""
        with self._mutex:
            if not self._has_leader:
                self._has_leader = ticket.leads = True
                return
            self._waiting.append(ticket)
            ticket.waits = True
        while not ticket.gate.acquire(timeout=self._patience_seconds):
            if self._withdraw(ticket):
                raise TransientDataAccessError(
                    f"another write to this store has taken more than {self._patience_seconds:g} s"
                )
            # Its transaction is under way: only its end tells what has become of the operation.

    def _lead(self, own: Ticket) -> None:
        group = [own]
        try:
            with self._mutex:
                while len(group) < MAX_GROUP and self._waiting and not self._waiting[0].alone:
                    group.append(self._take_first())
            self._run_group(group)
        except BaseException:
            # The leader's thread was interrupted: its followers' threads live on and must be told.
            for ticket in group:
                ticket.error = ticket.error or DataAccessError(
                    "the thread that was writing to the store was interrupted; whether this was written is unknown"
                )
            raise
        finally:
            for ticket in group[1:]:
                ticket.gate.release()
            self._afterwards()

    def _leave(self, ticket: Ticket) -> None:
        """Step back, whatever happened: a turn that an interrupted thread took with it would stop everybody."""
        if ticket.leads:
            self.resume()
        elif ticket.waits:
            self._withdraw(ticket)

    def _withdraw(self, ticket: Ticket) -> bool:
        """Take a ticket out of the queue, unless somebody has taken it to run it."""
        with self._mutex:
            if not ticket.waits:
                return False
            self._waiting.remove(ticket)
            ticket.waits = False
            return True

    def _take_first(self) -> Ticket:
        ticket = self._waiting.popleft()
        ticket.waits = False
        return ticket
