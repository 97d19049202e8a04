"""
The Dispatcher: what the host runs in a thread to get its callbacks delivered.

It owns the life of an `Engine` (start, stop, fork, faults) and knows nothing of how a callback is delivered.
"""

from __future__ import annotations

import logging
import os
import random as chance
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Final, Self

from attrs import frozen

from callbackq.clock import Clock, SystemClock
from callbackq.core.planning import margin_of
from callbackq.core.validation import check_text
from callbackq.core.verdict import ResponsePolicy
from callbackq.dataaccess import DataAccess, SupportsNotifications
from callbackq.engine import Engine, Settings
from callbackq.errors import DispatcherStateError
from callbackq.events import EventKind, LoggingObserver, Observer
from callbackq.notifier import Notifier
from callbackq.outbox import Outbox
from callbackq.reporting import Reporter
from callbackq.transport import HTTPTransport
from callbackq.transport.protocol import SupportsSubmit, Transport
from callbackq.transport.threaded import ThreadedSender

__all__ = ["Dispatcher", "Health", "StopReport"]

_log = logging.getLogger("callbackq")

# Threads for a transport that blocks: enough to wait on many receivers, few enough to be cheap.
_BLOCKING_THREADS: Final = 32
# After requests were interrupted, how long their outcomes may take to be recorded.
_INTERRUPT_GRACE_SECONDS: Final = 2.0
# How long a stop waits for an e-mail that is being sent.
_OUTBOX_GRACE: Final = timedelta(seconds=1)


@frozen(kw_only=True)
class StopReport:
    """
    What became of the callbacks a dispatcher held when it was stopped.

    Attributes:
        finished: attempts that ended by themselves and were recorded during the stop.
        released: locks given back; nothing had been sent.
        interrupted: attempts that were ended by the stop, recorded and not counted as retries.
        unrecorded: results the store would not take. Their locks time out, and the callbacks are sent again.
    """

    finished: int
    released: int
    interrupted: int
    unrecorded: int


@frozen(kw_only=True)
class Health:
    """
    How a dispatcher is, in this process.

    Attributes:
        state: ``"new"``, ``"running"``, ``"stopping"`` or ``"stopped"``. After a fork the child's is ``"new"``.
        last_poll_age: since the last successful look into the store; ``None`` when it isn't running. An age well
            above the poll interval means that nothing is being delivered.
        busy: callbacks it holds: under way, in line at a busy host, or not recorded yet.
        unrecorded: results not yet durable.
        store_is_failing: whether the last call to the store raised.
    """

    state: str
    last_poll_age: timedelta | None
    busy: int
    unrecorded: int
    store_is_failing: bool


class Dispatcher:
    """
    Acquires locks, delivers callbacks and records attempts, until it is stopped.

    Several dispatchers may share one store, in one process, in many, or on many machines.

    Args:
        data_access: the store. It is opened when the dispatcher starts and left open.
        machine_name: a label in locks and attempts; the host name by default.
        concurrency: callbacks held at a time. Each costs memory for its request and answer, no thread.
        host_concurrency: requests under way to one ``scheme://host:port``, so that a slow receiver can't take all
            slots; a quarter of *concurrency* by default.
        lock_timeout: how long a lock lives. The longest wait before another machine takes over from a dead one.
        poll_interval: the longest rest between two looks into the store. Callbacks stored through the same object
            are noticed at once, those of other processes after this time at most.
        max_abandoned: so many locks of one callback in a row may time out without a result before it fails for good.
        retry_jitter: the greatest share, 0 to 1, that chance adds to a retry's delay. It never takes any off.
        transport: what sends; an `HTTPTransport` by default. One that was passed in is left open.
        notifier: what tells people about final failures; nobody is told by default.
        observer: told of every change; a `LoggingObserver` by default.
        response_policy: which answers are final.
        clock: for tests.
        random: chance, a function from nothing to 0 … 1; for tests.

    Raises:
        ValueError: a setting is impossible, above all a *lock_timeout* shorter than the transport's deadline plus a
            margin (2 seconds or a tenth of the lock timeout, whichever is longer): a lock could then time out while
            its request is under way, and the callback would be sent twice.
    """

    def __init__(
        self,
        data_access: DataAccess,
        *,
        machine_name: str | None = None,
        concurrency: int = 256,
        host_concurrency: int | None = None,
        lock_timeout: timedelta = timedelta(seconds=30),
        poll_interval: timedelta = timedelta(milliseconds=250),
        max_abandoned: int = 5,
        retry_jitter: float = 0.0,
        transport: Transport | None = None,
        notifier: Notifier | None = None,
        observer: Observer | None = None,
        response_policy: ResponsePolicy | None = None,
        clock: Clock | None = None,
        random: Callable[[], float] = chance.random,
    ) -> None:
        self._data_access = data_access
        self._own_transport = HTTPTransport() if transport is None else None
        self._transport: Transport = transport or self._own_transport  # type: ignore[assignment]
        self._settings = Settings(
            machine_name=socket.gethostname() if machine_name is None else machine_name,
            concurrency=concurrency,
            host_concurrency=max(1, concurrency // 4) if host_concurrency is None else host_concurrency,
            lock_timeout=lock_timeout,
            poll_interval=poll_interval,
            max_abandoned=max_abandoned,
            retry_jitter=retry_jitter,
            response_policy=response_policy or ResponsePolicy(),
        )
        _check(self._settings, self._transport.deadline)
        self._clock = clock or SystemClock()
        self._random = random
        self._reporter = Reporter(observer or LoggingObserver(), self._settings.machine_name)
        self._outbox = _outbox_for(data_access, notifier, self._clock)
        self._begin_life()

    def _begin_life(self) -> None:
        """Everything that doesn't survive a fork."""
        self._pid = os.getpid()
        # Guards `_state`. Reentrant, because stop() may be called by a signal handler that interrupts any of this.
        self._mutex = threading.RLock()
        self._state = "new"
        self._engine: Engine | None = None
        self._running_thread: threading.Thread | None = None
        self._stop_by: float | None = None
        self._stopped = threading.Event()
        self._report = StopReport(finished=0, released=0, interrupted=0, unrecorded=0)

    # What the host calls.

    def run(self) -> None:
        """
        Deliver callbacks in the calling thread until `stop` is called from elsewhere.

        Survives every fault of store, transport, notifier and observer. An exception from outside (a
        `KeyboardInterrupt`) ends it like ``stop(timeout=0)`` and passes on.

        Raises:
            DispatcherStateError: it is running already.
            DataAccessError: the store can't be opened.
        """
        self._run(self._enter())

    def start(self) -> None:
        """
        Deliver callbacks in a thread of its own until `stop` is called.

        The thread is a daemon: a process that ends without `stop` ends as if killed, which loses and reorders
        nothing.

        Raises:
            DispatcherStateError: it is running already.
            DataAccessError: the store can't be opened.
        """
        engine = self._enter()
        thread = threading.Thread(target=self._run, args=(engine,), name="callbackq-dispatcher", daemon=True)
        self._running_thread = thread
        try:
            thread.start()
        except RuntimeError:
            self._leave(engine)
            raise

    def stop(self, timeout: timedelta | float = timedelta(seconds=20)) -> StopReport:
        """
        Stop acquiring, give back what has not been sent, let requests under way finish, then return.

        Requests that are not over after *timeout* are interrupted: recorded as such, not counted as retries, and due
        again at once. No callback reaches a final state that it would not have reached otherwise. May be called
        again with a shorter timeout, from any thread. From a signal handler, or from an observer, it sets the stop
        going and returns at once, since it can't wait for the thread it interrupts.

        Args:
            timeout: how long requests under way may go on; a timedelta, or seconds.

        Returns:
            What became of the callbacks it held. Of no use when the call could not wait.
        """
        self._notice_fork()
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
        with self._mutex:
            if self._state not in ("running", "stopping") or self._engine is None:
                return self._report
            self._state = "stopping"
            stop_by = self._clock.monotonic() + seconds
            self._stop_by = stop_by if self._stop_by is None else min(self._stop_by, stop_by)
            engine = self._engine
            stopped = self._stopped
        engine.wake()
        if threading.current_thread() is not self._running_thread:
            # Bounded by the stop itself: its deadline, the grace for recording, and one call of a store that hangs.
            stopped.wait(seconds + 2 * _INTERRUPT_GRACE_SECONDS + self._settings.lock_timeout.total_seconds())
        return self._report

    def run_until_idle(self, timeout: timedelta | float | None = None) -> bool:
        """
        Deliver everything that is due, in the calling thread, then return.

        Retries whose time has not come are left for later; so are callbacks behind them. E-mails that are owed and
        due are sent, too.

        Args:
            timeout: give up waiting after that long; a timedelta, or seconds. What is under way then is interrupted.

        Returns:
            Whether everything that was due has been delivered.

        Raises:
            DispatcherStateError: it is running already.
            DataAccessError: the store can't be opened.
        """
        seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else timeout
        engine = self._enter(with_outbox=False)
        self._running_thread = threading.current_thread()
        idle = False
        try:
            until = None if seconds is None else self._clock.monotonic() + seconds
            while not idle and self._state == "running" and (until is None or self._clock.monotonic() < until):
                rest = self._step(engine)
                idle = engine.is_idle()
                if not idle:
                    engine.rest(rest if until is None else min(rest, until - self._clock.monotonic()))
            while idle and self._outbox is not None and (until is None or self._clock.monotonic() < until):
                if self._outbox.step() > 0:
                    break
        finally:
            self._drain(engine, until=self._stop_by or 0.0)
            self._leave(engine)
        return idle

    def health(self) -> Health:
        """Say how it is. Cheap; callable from any thread."""
        self._notice_fork()
        engine = self._engine
        if engine is None:
            return Health(state=self._state, last_poll_age=None, busy=0, unrecorded=0, store_is_failing=False)
        return Health(
            state=self._state,
            last_poll_age=timedelta(seconds=max(self._clock.monotonic() - engine.polled_at, 0.0)),
            busy=engine.busy,
            unrecorded=engine.recorder.unrecorded,
            store_is_failing=engine.store_is_failing,
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        health = self.health()
        words = [health.state]
        if health.last_poll_age is not None:
            words.append(f"{health.busy}/{self._settings.concurrency} slots busy")
            words.append(f"last poll {health.last_poll_age.total_seconds():.1f} s ago")
        if health.store_is_failing:
            words.append("store failing")
        return f"<Dispatcher {self._settings.machine_name!a} {', '.join(words)}>"

    # Its life.

    def _notice_fork(self) -> None:
        # The child has a copy of this object, but not the thread that ran it; the parent's mutex may be held for ever.
        if self._pid != os.getpid():
            self._begin_life()

    def _enter(self, *, with_outbox: bool = True) -> Engine:
        self._notice_fork()
        with self._mutex:
            if self._state in ("running", "stopping"):
                raise DispatcherStateError(self._state, "stop it first, or build another one")
            before, self._state = self._state, "running"
            self._stop_by = None
            self._stopped = threading.Event()
        try:
            self._data_access.open()
        except BaseException:
            self._state = before
            raise
        sender = (
            self._transport
            if isinstance(self._transport, SupportsSubmit)
            else ThreadedSender(
                self._transport, threads=min(_BLOCKING_THREADS, self._settings.concurrency), clock=self._clock
            )
        )
        engine = self._engine = Engine(
            self._data_access,
            sender,
            settings=self._settings,
            reporter=self._reporter,
            clock=self._clock,
            random=self._random,
            on_notification_owed=self._wake_outbox,
        )
        self._unsubscribe = self._data_access.subscribe(engine.wake)
        self._sender = sender
        if with_outbox and self._outbox is not None:
            self._outbox.start()
        self._reporter.dispatcher(EventKind.STARTED)
        return engine

    def _leave(self, engine: Engine) -> None:
        self._unsubscribe()
        if isinstance(self._sender, ThreadedSender):
            self._sender.close()
        if self._own_transport is not None:
            self._own_transport.close()
        if self._outbox is not None:
            # An e-mail under way isn't broken off; its thread ends after it, and its lease is its own.
            self._outbox.stop(_OUTBOX_GRACE)
        self._reporter.dispatcher(EventKind.STOPPED)
        with self._mutex:
            self._engine = None
            self._running_thread = None
            self._state = "stopped"
            self._stopped.set()

    def _run(self, engine: Engine) -> None:
        self._running_thread = threading.current_thread()
        try:
            while self._stop_by is None:
                engine.rest(self._step(engine))
        finally:
            self._drain(engine, until=self._stop_by or 0.0)
            self._leave(engine)

    def _step(self, engine: Engine, *, draining: bool = False) -> float:
        try:
            return engine.step(draining=draining)
        except Exception:
            # The last line of defence: a fault of our own must not end deliveries while the process looks healthy.
            _log.exception("a dispatcher step failed; going on")
            return self._settings.poll_interval.total_seconds()

    def _drain(self, engine: Engine, until: float) -> None:
        recorder = engine.recorder
        finished, released, interrupted = recorder.finished, recorder.released, recorder.interrupted
        self._step(engine, draining=True)
        while engine.busy and self._clock.monotonic() < (until := min(until, self._stop_by or until)):
            engine.rest(min(self._step(engine, draining=True), until - self._clock.monotonic()))
        if engine.busy:
            engine.interrupt()
            # Real time, whatever the clock: threads are handing over their last outcomes.
            grace = SystemClock().monotonic() + _INTERRUPT_GRACE_SECONDS
            while engine.busy and SystemClock().monotonic() < grace:
                engine.rest(min(self._step(engine, draining=True), 0.1))
        self._report = StopReport(
            finished=recorder.finished - finished,
            released=recorder.released - released,
            interrupted=recorder.interrupted - interrupted,
            unrecorded=engine.busy,
        )

    def _wake_outbox(self) -> None:
        if self._outbox is not None:
            self._outbox.wake()


def _outbox_for(data_access: DataAccess, notifier: Notifier | None, clock: Clock) -> Outbox | None:
    if notifier is None:
        return None
    if not isinstance(data_access, SupportsNotifications):
        raise ValueError(
            "notifier: this store does not keep owed e-mails; implement callbackq.dataaccess.SupportsNotifications"
        )
    return Outbox(data_access, notifier, clock=clock)


def _check(settings: Settings, deadline: timedelta) -> None:
    faults = [f"machine_name: {reason}" for _, reason in check_text(settings.machine_name)]
    for name in ("concurrency", "host_concurrency", "max_abandoned"):
        if getattr(settings, name) < 1:
            faults.append(f"{name}: must be at least 1")
    if settings.poll_interval <= timedelta(0):
        faults.append("poll_interval: must be longer than nothing")
    if not 0 <= settings.retry_jitter <= 1:
        faults.append("retry_jitter: must be from 0 to 1")
    if settings.lock_timeout < deadline + margin_of(settings.lock_timeout):
        faults.append(
            "lock_timeout: must not be shorter than the transport's deadline plus a margin of 2 s or a tenth of it, "
            f"whichever is longer; the deadline is {deadline.total_seconds():g} s"
        )
    if faults:
        raise ValueError("; ".join(faults))
