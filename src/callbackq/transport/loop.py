"""
The network thread: one selector, one heap of deadlines, many attempts.

It resumes an attempt when its connection is ready, ends it when its deadline has passed, and calls back what became
of it. It knows nothing of HTTP. Everything but the posting of tasks happens in the one thread, so nothing else here
is locked.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Final

from callbackq.clock import Clock
from callbackq.core.delivery import Delivery, NotSent, NotSentReason, Outcome
from callbackq.faultlog import log_fault
from callbackq.transport.attempt import Attempt, AttemptSettings, DeadlinePassed, Interrupted, Network
from callbackq.transport.connections import Connection, KeptConnections
from callbackq.transport.deadlines import Deadlines
from callbackq.transport.resolver import ResolverPool

__all__ = ["NetworkLoop"]

_log = logging.getLogger("callbackq.transport")

# A thread that nobody has used for so long ends; the next attempt starts another. So a transport that was forgotten
# without being closed costs nothing.
_REST_SECONDS: Final = 60.0
_NO_MEMORY_REST_SECONDS: Final = 0.1
_JOIN_SECONDS: Final = 5.0

Task = Callable[[], None]


class NetworkLoop:
    """
    A network thread and all that it owns.

    Args:
        settings: for the attempts.
        kept: the connections to use again.
        clock: for deadlines.

    Raises:
        OSError: this machine has no descriptors left.
    """

    def __init__(self, settings: AttemptSettings, kept: KeptConnections, clock: Clock) -> None:
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        try:
            self._wake_receiver, self._wake_sender = socket.socketpair()
        except OSError:
            self._selector.close()
            raise
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ)

        self._network = Network(
            settings=settings,
            clock=clock,
            selector=self._selector,
            deadlines=Deadlines(),
            kept=kept,
            resolver=ResolverPool(),
            resume=lambda attempt: self._post(partial(self._resume_if_waiting, attempt)),
        )
        self._under_way: set[Attempt] = set()
        self._finished: list[tuple[Attempt, Outcome]] = []
        self._used_at = clock.monotonic()
        self._is_stopping = False

        # Guards these three: without it, a task posted while the thread decides to rest, or to end, would lie there.
        self._mutex = threading.Lock()
        self._posted: list[Task] = []
        self._is_resting = False
        self._has_ended = False

        self._thread = threading.Thread(target=self._run, name="callbackq-network", daemon=True)

    def start(self) -> None:
        """
        Start the thread.

        Raises:
            RuntimeError: the system gives none.
        """
        try:
            self._thread.start()
        except RuntimeError:
            self._close_all()
            raise

    def submit(self, attempt: Attempt) -> bool:
        """Begin an attempt. Returns False, having done nothing, when the thread has ended."""
        return self._post(partial(self._begin, attempt))

    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        """End the attempts at these deliveries."""
        self._post(partial(self._interrupt, set(deliveries)))

    def stop(self) -> None:
        """End all attempts and the thread. All callbacks have been called on return, unless one of them hangs."""
        self._post(self._begin_to_stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)

    def abandon(self) -> None:
        """
        Leave everything, in a forked child, to the parent.

        Nothing is closed. The selector's insides are shared: taking a connection out here would make the parent deaf
        on it. And a host that closed all descriptors after its fork may have other files under their numbers by now.
        """
        registered = self._selector.get_map() or {}  # none when the thread has ended
        for key in registered.values():
            if isinstance(key.data, Connection):
                key.data.abandon()

    @property
    def attempts_under_way(self) -> int:
        """How many attempts have begun and not ended."""
        return len(self._under_way)

    # From any thread.

    def _post(self, task: Task) -> bool:
        with self._mutex:
            if self._has_ended:
                return False
            self._posted.append(task)
            must_wake, self._is_resting = self._is_resting, False
        if must_wake:
            with suppress(OSError):  # it has ended meanwhile, and has taken the task along
                self._wake_sender.send(b"\0")
        return True

    # In the network thread.

    def _run(self) -> None:
        try:
            while not self._is_stopping and not self._is_forgotten():
                self._round()
        except Exception as error:
            # Nothing an attempt does comes here. It is the selector that broke, for example because the host closed
            # all descriptors; the next attempt gets a new thread with a new one.
            log_fault(_log, "the network thread failed", error)
        finally:
            self._end()

    def _round(self) -> None:
        self._serve_who_is_ready(self._seconds_to_rest())
        for task in self._take_posted():
            task()
        now = self._clock.monotonic()
        earliest = self._network.deadlines.next()
        if earliest is not None and earliest <= now:
            # After this process stood still, the wait above ends without a look: its time is up. An answer that came
            # meanwhile is worth more than the deadline, for without it an accepted request would be sent again.
            self._serve_who_is_ready(0.0)
        for attempt in self._network.deadlines.pop_passed(now):
            self._resume(attempt, DeadlinePassed())
        self._network.kept.drop_expired(now)
        self._call_back()

    def _serve_who_is_ready(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, Connection):
                self._serve(key.data)
            else:
                self._wake_receiver.recv(64)

    def _is_forgotten(self) -> bool:
        if self._under_way or self._clock.monotonic() < self._used_at + _REST_SECONDS:
            return False
        with self._mutex:
            # From here on tasks are refused, so that none can come too late to be noticed.
            self._has_ended = not self._posted
            return self._has_ended

    def _seconds_to_rest(self) -> float:
        with self._mutex:
            if self._posted:
                return 0.0
            self._is_resting = True
        now = self._clock.monotonic()
        longest = _NO_MEMORY_REST_SECONDS if self._finished else _REST_SECONDS
        wishes = [self._network.deadlines.next(), self._network.kept.next_expiry(), now + longest]
        return max(0.0, min(at for at in wishes if at is not None) - now)

    def _serve(self, connection: Connection) -> None:
        if not connection.is_open:
            return  # closed earlier in this round
        if isinstance(connection.user, Attempt):
            self._resume(connection.user)
        else:
            self._network.kept.drop(connection)

    def _take_posted(self) -> list[Task]:
        with self._mutex:
            self._is_resting = False
            posted, self._posted = self._posted, []
        return posted

    def _begin(self, attempt: Attempt) -> None:
        if self._is_stopping:
            self._finished.append((attempt, NotSent(reason=NotSentReason.STOPPED)))
            return
        self._under_way.add(attempt)
        self._network.kept.allow(len(self._under_way))
        self._used_at = self._clock.monotonic()
        attempt.life = attempt.live(self._network)
        self._resume(attempt)

    def _resume_if_waiting(self, attempt: Attempt) -> None:
        if attempt in self._under_way:
            self._resume(attempt)

    def _resume(self, attempt: Attempt, message: Exception | None = None) -> None:
        try:
            if message is None:
                next(attempt.life)
            else:
                attempt.life.throw(message)
        except StopIteration as end:
            outcome: Outcome = end.value
        except Exception as error:
            # The last line: whatever happened, somebody waits for an outcome, and the thread for the next attempt.
            log_fault(_log, "an attempt broke", error)
            outcome = attempt.broken(error)
        else:
            return
        self._under_way.discard(attempt)
        self._network.deadlines.clear(attempt)
        self._finished.append((attempt, outcome))

    def _interrupt(self, deliveries: set[Delivery]) -> None:
        for attempt in [attempt for attempt in self._under_way if attempt.delivery in deliveries]:
            self._resume(attempt, Interrupted())

    def _begin_to_stop(self) -> None:
        self._is_stopping = True

    def _call_back(self) -> None:
        finished, self._finished = self._finished, []
        for attempt, outcome in finished:
            try:
                attempt.done(outcome)
            except MemoryError:
                self._finished.append((attempt, outcome))  # told again: whoever waits for it would wait for ever
            except BaseException as error:
                # Somebody else's code, which may even call sys.exit(); the outcomes of others are still to be told.
                log_fault(_log, "a callback of the transport raised", error)

    def _end(self) -> None:
        with self._mutex:
            self._has_ended = True
            posted, self._posted = self._posted, []
        self._is_stopping = True
        for task in posted:
            task()
        for attempt in list(self._under_way):
            self._resume(attempt, Interrupted())
        self._call_back()
        self._close_all()

    def _close_all(self) -> None:
        self._network.kept.drop_all()
        self._network.resolver.close()
        for closable in (self._selector, self._wake_receiver, self._wake_sender):
            with suppress(OSError):  # it is broken, and so was the thread
                closable.close()
