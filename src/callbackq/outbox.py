"""
The outbox: sees to it that every owed e-mail about final failures is sent, or given up after about a day.

The debts live in the store, written in the transaction of the failure itself. The outbox leases what one address is
owed about one queue, hands it to the notifier and records what came of it, apart from the delivery of callbacks: a mail
server that hangs slows no queue. Whoever dies between sending and recording leaves a lease that times out, and the
e-mail goes out a second time; none is lost.

After an e-mail its address is left alone about that queue for the notifier's interval; what fails meanwhile goes into
the next one. The store keeps that time with the debts, so it holds for all processes and machines.

Log lines name callbacks and queues by their id, never an address.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random as chance
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Final, Protocol

from callbackq.clock import Clock, SystemClock
from callbackq.core.models import CallbackStatus, RetryPhase
from callbackq.core.planning import backoff, margin_of
from callbackq.core.retry import delay_before_retry
from callbackq.core.validation import check_duration
from callbackq.dataaccess import Notification, SupportsNotifications
from callbackq.errors import (
    CallbackNotFoundError,
    CallbackqError,
    DataAccessError,
    InvalidRequestError,
    NotificationError,
    TransientDataAccessError,
)
from callbackq.faultlog import in_words
from callbackq.notifier import STANDARD_INTERVAL, FailureNotice, Notifier

__all__ = ["Outbox", "OutboxStore"]

_log = logging.getLogger("callbackq.outbox")

# A mail server that is restarted, one that is repaired, and one that nobody looks at before the next working day.
_RETRY_PHASES: Final = (
    RetryPhase(retries=5, delay=timedelta(minutes=1)),
    RetryPhase(retries=12, delay=timedelta(minutes=10)),
    RetryPhase(retries=24, delay=timedelta(hours=1)),
)
_LEAST_LOCK_TIMEOUT: Final = timedelta(minutes=2)
_FIRST_REST_SECONDS: Final = 1.0
_LONGEST_REST_SECONDS: Final = 60.0


class OutboxStore(SupportsNotifications, Protocol):
    """What the outbox asks of a store: every `callbackq.DataAccess` that keeps notifications can do it."""

    def get_callback_status(self, id: str) -> CallbackStatus: ...


class Outbox:
    """
    Sends owed e-mails, one after the other: by hand with `step`, or in a thread between `start` and `stop`.

    Several outboxes may share one store; each e-mail is leased to one of them. An outbox that was running when the
    process forked isn't in the child, and can be started there.

    Args:
        data_access: where the debts are.
        notifier: what sends. If it has a ``deadline``, that is taken for the longest a call takes; if it has an
            ``interval``, an address is left alone about a queue for so long after an e-mail, otherwise for an hour.
        lock_timeout: how long an e-mail is leased, and so how late it is taken over from a process that died; by
            default twice the notifier's deadline, at least two minutes.
        poll_interval: the longest rest between two looks into the store.
        clock: what measures the lease.
        random: chance, a function from nothing to 0 … 1, that spreads the rests after faults of the store.

    Raises:
        InvalidRequestError: a duration isn't positive, the interval is negative, or a lease could time out while its
            e-mail is being sent.
    """

    def __init__(
        self,
        data_access: OutboxStore,
        notifier: Notifier,
        *,
        lock_timeout: timedelta | None = None,
        poll_interval: timedelta = timedelta(seconds=15),
        clock: Clock | None = None,
        random: Callable[[], float] = chance.random,
    ) -> None:
        deadline = getattr(notifier, "deadline", None)
        self._deadline = deadline if isinstance(deadline, timedelta) else timedelta(0)
        self._lock_timeout = max(2 * self._deadline, _LEAST_LOCK_TIMEOUT) if lock_timeout is None else lock_timeout
        interval = getattr(notifier, "interval", None)
        self._interval = interval if isinstance(interval, timedelta) else STANDARD_INTERVAL
        _check_durations(self._lock_timeout, poll_interval, self._deadline, self._interval)
        self._data_access = data_access
        self._notifier = notifier
        self._poll_interval = poll_interval
        self._clock = clock or SystemClock()
        self._random = random
        self._failures = 0
        self._begin_life()

    def _begin_life(self) -> None:
        self._worker: _Worker | None = None
        # Two starts at once, or a stop before a start has kept what it started, would leave a thread that goes on.
        self._mutex = threading.Lock()
        self._pid = os.getpid()

    def step(self) -> float:
        """
        Send one e-mail, if one is due.

        Survives every `Exception` of store and notifier; they are logged.

        Returns:
            Seconds to rest before the next step: 0 when more may be due.
        """
        try:
            found = self._handle_next()
        except Exception as error:  # a store, or a fault of ours: the other e-mails are still owed
            self._failures += 1
            rest = backoff(
                self._failures, first=_FIRST_REST_SECONDS, longest=_LONGEST_REST_SECONDS, random=self._random()
            )
            _log.warning("the outbox can't go on: %s; next look in %.1f s", _in_words(error), rest)
            return rest
        self._failures = 0
        return 0.0 if found else self._poll_interval.total_seconds()

    def _handle_next(self) -> bool:
        # Read before the lease begins, so that it lasts at least until then.
        lease_ends = self._clock.monotonic() + self._lock_timeout.total_seconds()
        leased = self._data_access.acquire_notifications(lock_timeout=self._lock_timeout, limit=1)
        for notification in leased:
            self._handle(notification, lease_ends)
        return bool(leased)

    def _handle(self, notification: Notification, lease_ends: float) -> None:
        retry_in, quiet_for = None, timedelta(0)
        try:
            notice = self._notice_of(notification)
            if notice is not None:
                if self._clock.monotonic() + self._deadline.total_seconds() > lease_ends:
                    # A slow store, or a machine that slept. Others may have taken over, or will after the lease.
                    return
                # Also when it is refused for good: whoever stores callbacks must not make us knock all the time.
                quiet_for = self._interval
                self._notifier.notify(notice)
                _log.info("%s was accepted", _in_short(notification))
        except TransientDataAccessError:
            # The store's fault, not the mail server's: no try of the e-mail's. Its lease ends by itself.
            raise
        except Exception as error:  # the host's notifier may raise anything
            retry_in = self._after_failure(notification, error)
        # A death before this line means a second e-mail; recording before sending could mean none.
        self._data_access.record_notification(notification, retry_in=retry_in, quiet_for=quiet_for)

    def _notice_of(self, notification: Notification) -> FailureNotice | None:
        found, unreadable = self._read(notification.callback_ids)
        if not found and unreadable is not None:
            raise unreadable
        listed = sum(id in found for id in notification.callback_ids)
        if not found and notification.count == len(notification.callback_ids):
            _log.info("%s is dropped: there is nothing left to tell of", _in_short(notification))
            return None
        return FailureNotice(
            email_address=notification.email_address,
            queue_id=notification.queue_id,
            callbacks=tuple(found.values()),
            count=notification.count,
            unlisted=notification.count - listed,
            key=_key_of(notification),
        )

    def _read(self, ids: Iterable[str]) -> tuple[dict[str, CallbackStatus], DataAccessError | None]:
        """Read callbacks, each once. One that is gone or can't be read must not keep the others from being told."""
        found: dict[str, CallbackStatus] = {}
        unreadable = None
        for id in dict.fromkeys(ids):
            try:
                found[id] = self._data_access.get_callback_status(id)
            except CallbackNotFoundError:
                _log.info("callback %a is gone, and no e-mail will tell of it", id)
            except TransientDataAccessError:
                raise
            except DataAccessError as error:
                _log.warning("callback %a can't be read for an e-mail: %s", id, _in_words(error))
                unreadable = error
        return found, unreadable

    def _after_failure(self, notification: Notification, error: Exception) -> timedelta | None:
        tries = notification.tries + 1
        is_permanent = isinstance(error, NotificationError) and error.permanent
        retry_in = None if is_permanent else delay_before_retry(_RETRY_PHASES, tries)
        email, words = _in_short(notification), _in_words(error)
        if retry_in is None:
            _log.error("%s is given up after try %d: %s", email, tries, words)
        else:
            _log.warning("%s failed, try %d: %s; next in %s", email, tries, words, retry_in)
        return retry_in

    # The thread.

    def start(self) -> None:
        """Step in a thread of its own from now on. Does nothing while one is running."""
        self._notice_fork()
        with self._mutex:
            if self._worker is None or not self._worker.is_wanted():
                self._worker = _Worker(self.step)

    def stop(self, timeout: timedelta = timedelta(seconds=5)) -> bool:
        """
        End the thread. May be called twice, from any thread, and followed by `start`.

        An e-mail under way is not broken off: the thread ends after it.

        Args:
            timeout: how long to wait for that.

        Returns:
            Whether the thread has ended.
        """
        self._notice_fork()
        with self._mutex:
            worker = self._worker
        return worker is None or worker.stop(timeout.total_seconds())

    def wake(self) -> None:
        """Make the thread look into the store now. Never blocks; does nothing when there is none."""
        self._notice_fork()
        worker = self._worker
        if worker is not None:
            worker.wake()

    def _notice_fork(self) -> None:
        # The child has a copy of this object but not the thread, and the copied locks may be held for ever.
        if self._pid != os.getpid():
            self._begin_life()


class _Worker:
    """The thread from one start to the stop that follows it. A later start makes another one, which can't revive it."""

    def __init__(self, step: Callable[[], float]) -> None:
        self._step = step
        self._stop_asked = False
        self._something_happened = threading.Event()
        self._thread = threading.Thread(target=self._run, name="callbackq-outbox", daemon=True)
        self._thread.start()

    def is_wanted(self) -> bool:
        return self._thread.is_alive() and not self._stop_asked

    def wake(self) -> None:
        self._something_happened.set()

    def stop(self, timeout_seconds: float) -> bool:
        self._stop_asked = True
        self.wake()
        if self._thread is threading.current_thread():  # a notifier that stops its own dispatcher
            return False
        self._thread.join(timeout_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stop_asked:
            try:
                rest = self._survive_step()
                self._something_happened.wait(rest)
            except MemoryError:
                continue  # for the line in the log, or for the wait: without them, it tries again until there is some
            # Before the step: what happens from here on is either found by it or ends the next wait.
            self._something_happened.clear()

    def _survive_step(self) -> float:
        try:
            return self._step()
        except BaseException as error:  # sys.exit() in a notifier would end this thread without a word
            _log.error("the outbox can't go on: %s; next look in %.0f s", _in_words(error), _LONGEST_REST_SECONDS)
            return _LONGEST_REST_SECONDS


def _check_durations(
    lock_timeout: timedelta, poll_interval: timedelta, deadline: timedelta, interval: timedelta
) -> None:
    # The store would refuse the interval only when an e-mail was sent, and it would be sent again and again.
    faults = [("notifier.interval", reason) for _, reason in check_duration(interval)]
    # The margin is for reading the callback before and for recording after the call.
    if lock_timeout - margin_of(lock_timeout) < deadline:
        reason = "must be longer than the notifier's deadline by 2 s or a tenth of itself, whichever is longer"
        faults.append(("lock_timeout", f"{reason}; the deadline is {deadline.total_seconds():g} s"))
    if poll_interval <= timedelta(0):
        faults.append(("poll_interval", "must be longer than nothing"))
    if faults:
        raise InvalidRequestError(faults)


def _key_of(notification: Notification) -> str:
    # The token is one store's own, so the callback's id is needed to tell apart what two stores send to one address.
    facts = [str(notification.first_token), notification.email_address, *notification.callback_ids[:1]]
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:32]


def _in_short(notification: Notification) -> str:
    """Name an e-mail for the log, in which ids must not make lines of their own."""
    if notification.count == len(notification.callback_ids) == 1:
        return f"the e-mail about callback {notification.callback_ids[0]!a}"
    of_queue = f" of queue {notification.queue_id!a}" if notification.queue_id else ""
    return f"the e-mail about {notification.count} failures{of_queue}"


def _in_words(error: BaseException) -> str:
    """Say what was raised without quoting what isn't ours: the text of a mail library's error names addresses."""
    return ascii(str(error)) if isinstance(error, CallbackqError) else in_words(error)
