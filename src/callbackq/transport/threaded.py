"""Runs a blocking transport on a bounded pool of threads, so that the dispatcher sees one kind of transport."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Final

from callbackq.clock import Clock
from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure
from callbackq.faultlog import log_fault
from callbackq.transport.details import detail_of
from callbackq.transport.protocol import Transport

__all__ = ["ThreadedSender"]

_log = logging.getLogger("callbackq.transport")

# A thread that has had nothing to do for so long ends; another is started when there is work again.
_IDLE_SECONDS: Final = 30.0
# Half of the least margin that is kept free for recording: what a wait for a thread may use of it.
_SLACK_SECONDS: Final = 1.0


class ThreadedSender:
    """
    Gives a `Transport` without `SupportsSubmit` that ability.

    Args:
        transport: what sends, blocking. Must be usable from several threads.
        threads: how many at most; they are started as they are needed and end with `close`.
        clock: for the times of attempts that end without the transport's word.
    """

    def __init__(self, transport: Transport, *, threads: int, clock: Clock) -> None:
        self._transport = transport
        self._clock = clock
        self._limit = threads
        # Guards all below. Never held while sending or while calling back.
        self._changed = threading.Condition()
        self._waiting: deque[Delivery] = deque()
        self._callbacks: dict[int, Callable[[Outcome], None]] = {}
        self._threads = 0
        self._idle = 0
        self._closed = False

    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        with self._changed:
            self._callbacks[id(delivery)] = done
            self._waiting.append(delivery)
            if self._idle >= len(self._waiting) or self._threads >= self._limit:
                self._changed.notify()
                return
            self._threads += 1
            number = self._threads
        try:
            threading.Thread(target=self._work, name=f"callbackq-send-{number}", daemon=True).start()
        except RuntimeError as error:  # the system gives no more threads
            with self._changed:
                self._threads -= 1
                alone = self._threads == 0
                if alone:
                    self._waiting.remove(delivery)
            if alone:
                self._finish(delivery, NotSent(reason=NotSentReason.LOCAL_FAULT, detail=type(error).__name__))

    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        """
        Take those back that wait for a thread.

        A blocking send can't be ended from outside. To call it interrupted would make its callback due again while
        it is still being sent; so it goes on, and if nobody waits for it any more, its lock times out.
        """
        for delivery in deliveries:
            with self._changed:
                if delivery not in self._waiting:
                    continue
                self._waiting.remove(delivery)
            self._finish(delivery, NotSent(reason=NotSentReason.STOPPED))

    def close(self) -> None:
        """Let the threads end after what they are doing."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        while (delivery := self._next()) is not None:
            self._finish(delivery, self._send(delivery))

    def _send(self, delivery: Delivery) -> Outcome:
        # It may have waited for a thread. What is sent too late outlasts its lock, and is sent by somebody else, too.
        if self._clock.monotonic() + self._transport.deadline.total_seconds() > delivery.ends_at + _SLACK_SECONDS:
            return NotSent(reason=NotSentReason.TIME_IS_UP)
        try:
            return self._transport.send(delivery)
        except BaseException as error:
            # A user's transport may raise anything, the end of the program included; its thread and the callback must
            # survive that.
            log_fault(_log, "a transport raised instead of returning an answer", error)
            return Answer(
                status_code=0,
                time=self._clock.now(),
                duration=timedelta(0),
                failure=AttemptFailure.INTERNAL,
                detail=detail_of(error),
            )

    def _next(self) -> Delivery | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._waiting or self._closed, _IDLE_SECONDS)
            self._idle -= 1
            if self._waiting:
                return self._waiting.popleft()
            self._threads -= 1
            return None

    def _finish(self, delivery: Delivery, outcome: Outcome) -> None:
        with self._changed:
            done = self._callbacks.pop(id(delivery), None)
        if done is not None:
            done(outcome)
