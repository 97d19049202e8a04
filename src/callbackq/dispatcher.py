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
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Final, Self

from attrs import evolve, field, frozen, mutable

from callbackq.clock import Clock, SystemClock
from callbackq.core.validation import refuse
from callbackq.core.verdict import ResponsePolicy
from callbackq.dataaccess import DataAccess, SupportsNotifications
from callbackq.draining import Drain, StopReport
from callbackq.engine import Engine
from callbackq.errors import DispatcherStateError, InvalidRequestError
from callbackq.events import EventKind, LoggingObserver, Observer
from callbackq.faultlog import log_fault
from callbackq.notifier import Notifier
from callbackq.outbox import Outbox
from callbackq.reporting import Reporter
from callbackq.settings import Settings, check_collaborator
from callbackq.transport import HTTPTransport
from callbackq.transport.protocol import SupportsSubmit, Transport
from callbackq.transport.threaded import ThreadedSender

__all__ = ["Dispatcher", "Health", "StopReport"]

_log = logging.getLogger("callbackq")

# Threads for a transport that blocks: enough to wait on many receivers, few enough to be cheap.
_BLOCKING_THREADS: Final = 32
# How long `stop` waits beyond its timeout: for what was interrupted to be recorded, and for one more call of the store,
# which may hang.
_STOP_GRACE_SECONDS: Final = 12.0
_STOP_TIMEOUT: Final = timedelta(seconds=20)
# How long to rest after an exception that nobody foresaw.
_FAULT_REST_SECONDS: Final = 1.0
# A drain whose time is up has to go on, but not to spin, after such an exception.
_SHORTEST_DRAIN_REST_SECONDS: Final = 0.1
# What threading can wait for on every platform is about as long.
_LONGEST_WAIT_SECONDS: Final = 1e6
# How long a stop waits for an e-mail that is being sent.
_OUTBOX_GRACE: Final = timedelta(seconds=1)


@frozen(kw_only=True)
class Health:
    """
    How a dispatcher is, in this process.

    Attributes:
        state: ``"new"``, ``"running"``, ``"stopping"`` or ``"stopped"``. After a fork the child's is ``"new"``.
        last_poll_age: since the last look into the store that it answered; ``None`` when it isn't running. An age
            well above the poll interval means that nothing new is begun: the store fails, or all slots are busy.
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

    Several dispatchers may share one store: in one process, in many, and on many machines where the store can do that.

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
        InvalidRequestError: (a ValueError) with every setting that is of another type or impossible, above all a
            *lock_timeout* shorter than the transport's deadline plus a margin (2 seconds or a tenth of the lock
            timeout, whichever is longer): a lock could then time out while its request is under way, and the callback
            would be sent twice.
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
        self._clock = SystemClock() if clock is None else clock
        self._random = random
        observer = LoggingObserver() if observer is None else observer
        refuse(
            [
                *check_collaborator("data_access", data_access, "open", "acquire_locks", "record_attempts"),
                *check_collaborator("transport", _Nothing() if transport is None else transport, "send", "close"),
                *check_collaborator("notifier", _Nothing() if notifier is None else notifier, "notify"),
                *check_collaborator("observer", observer, "observe"),
                *check_collaborator("clock", self._clock, "now", "monotonic", "boot_id"),
                *([] if callable(random) else [("random", "must be a function from nothing to 0 … 1")]),
            ]
        )
        self._owns_transport = transport is None
        self._transport: Transport = HTTPTransport() if transport is None else transport
        self._settings = Settings(
            machine_name=socket.gethostname() if machine_name is None else machine_name,
            concurrency=concurrency,
            host_concurrency=_quarter(concurrency) if host_concurrency is None else host_concurrency,
            lock_timeout=lock_timeout,
            poll_interval=poll_interval,
            max_abandoned=max_abandoned,
            retry_jitter=retry_jitter,
            response_policy=ResponsePolicy() if response_policy is None else response_policy,
            deadline=getattr(self._transport, "deadline", timedelta(0)),
        )
        self._reporter = Reporter(observer, self._settings.machine_name)
        self._outbox = _outbox_for(data_access, notifier, self._clock)
        self._has_told_of_debts = False
        self._begin_anew()

    def _begin_anew(self) -> None:
        """Everything that doesn't survive a fork."""
        self._pid = os.getpid()
        # Keeps two threads from starting at once. Reentrant, because a signal handler may interrupt its holder.
        self._mutex = threading.RLock()
        self._life: _Life | None = None
        self._last_report: StopReport | None = None
        # A stop that is asked for while the store is being opened; ``None`` when nothing is being begun.
        self._stop_while_beginning: list[float] | None = None

    # What the host calls.

    def run(self) -> None:
        """
        Deliver callbacks in the calling thread until `stop` or `request_stop` is called from elsewhere.

        Survives every fault of store, transport, notifier and observer. An exception from outside (a
        `KeyboardInterrupt`) ends it like ``stop(timeout=0)`` and passes on.

        Raises:
            DispatcherStateError: it is running already.
            DataAccessError: the store can't be opened.
        """
        self._live(self._begin(threading.current_thread()))

    def start(self) -> None:
        """
        Deliver callbacks in a thread of its own until `stop` is called.

        The thread is a daemon: a process that ends without `stop` ends as if killed, which loses and reorders
        nothing.

        Raises:
            DispatcherStateError: it is running already.
            DataAccessError: the store can't be opened.
        """
        thread = threading.Thread(target=lambda: self._live(life), name="callbackq-dispatcher", daemon=True)
        life = self._begin(thread, is_own_thread=True)
        try:
            thread.start()
        except BaseException:  # whatever it is passes on; only what was begun is put in order first
            if thread.ident is None:  # the system gives no more threads
                self._end(life)
            else:  # it has begun, and somebody interrupted the wait for it
                self.request_stop(0)
            raise

    def request_stop(self, timeout: timedelta | float = _STOP_TIMEOUT) -> None:
        """
        Set a stop going and return at once.

        This is what a signal handler may call, whatever it interrupts. `stop` says what happens then.

        Args:
            timeout: how long requests under way may go on; a timedelta, or seconds.
        """
        self._notice_fork()
        reading = self._clock.monotonic() + _seconds(timeout)
        beginning = self._stop_while_beginning
        if beginning is not None:
            beginning.append(reading)
        # Read after the line before: whoever begins has either seen that wish, or is here already.
        life = self._life
        if life is not None:
            life.stops.append(reading)
            life.engine.wake()

    def stop(self, timeout: timedelta | float = _STOP_TIMEOUT) -> StopReport:
        """
        Stop acquiring, give back what has not been sent, let requests under way finish, then return.

        Requests that are not over after *timeout* are interrupted: recorded as such, not counted as retries, and due
        again at once. No callback reaches a final state that it would not have reached otherwise. May be called
        again with a shorter timeout, from any thread.

        Not for signal handlers: a handler that waits here may have interrupted a thread that holds what the stop needs.
        Use `request_stop` there. Called from the dispatcher's own thread (by an observer, or by a handler that
        interrupted `run`), it doesn't wait either.

        Args:
            timeout: how long requests under way may go on; a timedelta, or seconds.

        Returns:
            What became of the callbacks it held.
        """
        self.request_stop(timeout)
        longest = _seconds(timeout) + _STOP_GRACE_SECONDS
        if self._stop_while_beginning is not None and self._mutex.acquire(timeout=longest):
            self._mutex.release()  # the store was being opened, in another thread; now it is
        life = self._life
        if life is not None and threading.current_thread() is not life.thread:
            # The stop bounds itself; this is for a call of the store that hangs.
            life.ended.wait(longest)
        if life is not None and not life.ended.is_set():
            return StopReport(finished=0, released=0, interrupted=0, unrecorded=life.engine.busy)
        return self._last_report or StopReport(finished=0, released=0, interrupted=0, unrecorded=0)

    def run_until_idle(self, timeout: timedelta | float | None = None) -> bool:
        """
        Work on everything that is due, in the calling thread, then return.

        Retries whose time has not come are left for later; so are callbacks behind them. E-mails that are owed and
        due are sent, too.

        Args:
            timeout: give up waiting after that long; a timedelta, or seconds. What is under way then is interrupted.

        Returns:
            Whether nothing that is due is left. (How the callbacks fared, their statuses say.)

        Raises:
            DispatcherStateError: it is running already.
            DataAccessError: the store can't be opened.
        """
        life = self._begin(threading.current_thread(), with_outbox=False)
        until = float("inf") if timeout is None else self._clock.monotonic() + _seconds(timeout)
        idle = False
        try:
            self._reporter.dispatcher(EventKind.STARTED)
            while not idle and not life.is_stopping and self._clock.monotonic() < until:
                idle = not self._turn(life, life.engine.step_until_idle, longest=until - self._clock.monotonic())
            while idle and self._outbox is not None and not life.is_stopping and self._clock.monotonic() < until:
                if self._outbox.step() > 0:
                    break
        finally:
            self._end(life)
        return idle

    def health(self) -> Health:
        """Say how it is. Cheap; callable from any thread."""
        self._notice_fork()
        life = self._life
        if life is None:
            state = "new" if self._last_report is None else "stopped"
            return Health(state=state, last_poll_age=None, busy=0, unrecorded=0, store_is_failing=False)
        return Health(
            state="stopping" if life.is_stopping else "running",
            last_poll_age=timedelta(seconds=max(self._clock.monotonic() - life.engine.polled_at, 0.0)),
            busy=life.engine.busy,
            unrecorded=life.engine.recorder.unrecorded,
            store_is_failing=life.engine.store_is_failing,
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

    # One life, from start to stop.

    def _notice_fork(self) -> None:
        # The child has a copy of this object, but not the thread that ran it; the parent's mutex may be held for ever.
        if self._pid != os.getpid():
            self._begin_anew()

    def _begin(self, thread: threading.Thread, *, is_own_thread: bool = False, with_outbox: bool = True) -> _Life:
        self._notice_fork()
        with self._mutex:
            if self._life is not None:
                raise DispatcherStateError(self.health().state, "stop it first, or build another one")
            stops: list[float] = []
            self._stop_while_beginning = stops
            try:
                life = self._life = self._new_life(thread, is_own_thread)
            finally:
                self._stop_while_beginning = None
            life.stops.extend(stops)
        try:
            if with_outbox and self._outbox is not None:
                self._outbox.start()
        except BaseException:  # the system gives no more threads
            self._end(life)
            raise
        return life

    def _new_life(self, thread: threading.Thread, is_own_thread: bool) -> _Life:
        self._data_access.open()
        settings = self._settings
        if isinstance(self._transport, SupportsSubmit):
            sender: SupportsSubmit = self._transport
        else:
            threads = min(_BLOCKING_THREADS, settings.concurrency)
            # Slow hosts must not take all threads, whatever the number of slots.
            host_concurrency = min(settings.host_concurrency, _quarter(threads))
            settings = evolve(settings, host_concurrency=host_concurrency, under_way=threads)
            sender = ThreadedSender(self._transport, threads=threads, clock=self._clock)
        engine = Engine(
            self._data_access,
            sender,
            settings=settings,
            reporter=self._reporter,
            clock=self._clock,
            random=self._random,
            on_notification_owed=self._wake_outbox,
        )
        unsubscribe = self._data_access.subscribe(engine.wake)
        return _Life(engine=engine, unsubscribe=unsubscribe, thread=thread, is_own_thread=is_own_thread)

    def _live(self, life: _Life) -> None:
        try:
            # Told in this thread: an observer that stops the dispatcher at once must not wait for itself.
            self._reporter.dispatcher(EventKind.STARTED)
            while not life.is_stopping:
                self._turn(life, life.engine.step)
        finally:
            self._end(life)

    def _turn(self, life: _Life, step: Callable[[], float | None], *, longest: float = float("inf")) -> bool:
        """
        Step, then rest for as long as that says, and *longest* seconds at most.

        Returns:
            Whether there is more to do: the step named a time.
        """
        try:
            wait = step()
            if wait is None:
                return False
            life.engine.rest(min(wait, longest))
        except BaseException as error:
            # The last line of defence: a fault of our own, or a store on asyncio that is cancelled, must not end
            # deliveries while the process looks healthy. In the host's own thread the host's exceptions pass.
            if not isinstance(error, Exception) and not life.is_own_thread:
                raise
            log_fault(_log, "a dispatcher's step failed; going on", error)
            # Without memory for a rest, it tries again until there is some.
            with suppress(MemoryError):
                life.ended.wait(min(self._settings.poll_interval.total_seconds(), longest, _FAULT_REST_SECONDS))
        return True

    def _end(self, life: _Life) -> None:
        self._last_report = StopReport(finished=0, released=0, interrupted=0, unrecorded=life.engine.busy)
        try:
            self._last_report = self._drain(life)
        finally:
            self._put_away(life)

    def _put_away(self, life: _Life) -> None:
        try:
            for step in (life.unsubscribe, *self._closings(life)):
                try:
                    step()
                except Exception as error:
                    # A collaborator of the host's. What it leaves behind must not keep this life from ending.
                    log_fault(_log, "a dispatcher could not put everything away", error)
            self._reporter.dispatcher(EventKind.STOPPED)
        finally:
            self._life = None
            life.ended.set()

    def _closings(self, life: _Life) -> Iterator[Callable[[], object]]:
        if isinstance(life.engine.sender, ThreadedSender):
            yield life.engine.sender.close
        if self._owns_transport:
            yield self._transport.close
        if self._outbox is not None:
            # An e-mail under way isn't broken off; its thread ends after it, and its lease is its own.
            yield partial(self._outbox.stop, _OUTBOX_GRACE)

    def _drain(self, life: _Life) -> StopReport:
        drain = Drain(life.engine, clock=self._clock, grace=time.monotonic)
        while self._turn(
            life,
            lambda: drain.step(life.stops_at),
            longest=max(life.stops_at - self._clock.monotonic(), _SHORTEST_DRAIN_REST_SECONDS),
        ):
            pass
        return drain.report()

    def _wake_outbox(self) -> None:
        if self._outbox is not None:
            self._outbox.wake()
        elif not self._has_told_of_debts:
            self._has_told_of_debts = True
            _log.warning("failures owe e-mails, but this dispatcher has no notifier: they wait for one that has")


@mutable(kw_only=True, eq=False)
class _Life:
    """
    What belongs to one run, from start to stop, so that a later one can't be confused with it.

    Attributes:
        engine: what works.
        unsubscribe: ends the store's hints.
        thread: in which it runs.
        is_own_thread: nobody else's code runs in that thread.
        ended: it is over.
    """

    engine: Engine
    unsubscribe: Callable[[], None]
    thread: threading.Thread
    is_own_thread: bool
    # Wishes to stop, as clock readings. Appending is one step, so that signal handlers need no lock.
    stops: list[float] = field(factory=list)
    ended: threading.Event = field(factory=threading.Event)

    @property
    def is_stopping(self) -> bool:
        """Whether a stop was asked for."""
        return bool(self.stops)

    @property
    def stops_at(self) -> float:
        """Clock reading at which what is under way is interrupted: at once, after an exception from outside."""
        return min(self.stops, default=0.0)


class _Nothing:
    """Stands for a collaborator that was not given, and passes every check."""

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: None


def _quarter(concurrency: int) -> int:
    return max(1, concurrency // 4) if type(concurrency) is int else 1


def _seconds(timeout: timedelta | float) -> float:
    seconds = timeout.total_seconds() if isinstance(timeout, timedelta) else float(timeout)
    return min(seconds, _LONGEST_WAIT_SECONDS)


def _outbox_for(data_access: DataAccess, notifier: Notifier | None, clock: Clock) -> Outbox | None:
    if notifier is None:
        return None
    if not isinstance(data_access, SupportsNotifications):
        raise InvalidRequestError(
            [
                (
                    "notifier",
                    "this store does not keep owed e-mails; implement callbackq.dataaccess.SupportsNotifications",
                )
            ]
        )
    return Outbox(data_access, notifier, clock=clock)
