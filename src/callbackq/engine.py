"""
One dispatcher's work as a step function: no thread, no waiting.

`Engine.step` takes what came in, records results, acquires locks, hands deliveries to the transport, and says how
long it may rest. The `Dispatcher` calls it from a thread; tests and simulations call it by hand.

The order of writes carries the promises:

* a lock is durable before its request is sent, so nobody else sends it too;
* a slot is busy until its result is durable, so the results that a crash can lose are bounded by the slots;
* an observer hears of a change after the store has taken it.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from attrs import frozen, mutable

from callbackq.clock import Clock
from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.fairness import Admission, HostLimits
from callbackq.core.lifecycle import Transition, abandon, after_attempt
from callbackq.core.models import AttemptFailure, CallbackAttempt, CallbackState, FailedReason
from callbackq.core.planning import backoff, margin_of, plan
from callbackq.core.retry import parse_retry_after
from callbackq.core.verdict import ResponsePolicy
from callbackq.dataaccess import AttemptRecord, DataAccess
from callbackq.events import EventKind
from callbackq.recorder import Recorder, Slot
from callbackq.reporting import Reporter
from callbackq.transport.protocol import SupportsSubmit

__all__ = ["Engine", "Settings"]

_log = logging.getLogger("callbackq")

_FIRST_REST_SECONDS: Final = 0.1
_LONGEST_REST_SECONDS: Final = 30.0
# The shortest rest when the store says that something is due but hands out nothing: somebody else is taking it.
_SHORTEST_REST_SECONDS: Final = 0.01


@frozen(kw_only=True)
class Settings:
    """What a dispatcher's host chose; `Dispatcher` says what each means."""

    machine_name: str
    concurrency: int
    host_concurrency: int
    lock_timeout: timedelta
    poll_interval: timedelta
    max_abandoned: int
    retry_jitter: float
    response_policy: ResponsePolicy


class Engine:
    """
    Acquires, sends and records for one dispatcher. Not thread-safe, except for `inbox` and `wake`.

    Args:
        data_access: the store.
        sender: the transport.
        settings: the host's choices.
        reporter: told of every change.
        clock: for waits and leases.
        random: chance, from 0 to 1.
        on_notification_owed: called when a failure that owes an e-mail was recorded.

    Attributes:
        inbox: everything that wakes the dispatcher. A SimpleQueue's ``put`` may be called from any thread and from a
            signal handler.
        recorder: results on their way into the store.
        polled_at: clock reading at the end of the last step in which the store did not fail.
    """

    def __init__(
        self,
        data_access: DataAccess,
        sender: SupportsSubmit,
        *,
        settings: Settings,
        reporter: Reporter,
        clock: Clock,
        random: Callable[[], float],
        on_notification_owed: Callable[[], None],
    ) -> None:
        self._data_access = data_access
        self._sender = sender
        self._settings = settings
        self._reporter = reporter
        self._clock = clock
        self._random = random

        self.inbox: queue.SimpleQueue[tuple[Slot, Outcome] | None] = queue.SimpleQueue()
        self.recorder = Recorder(
            data_access, reporter, record_of=self._record_of, on_notification_owed=on_notification_owed
        )
        self.polled_at = clock.monotonic()

        self._slots: dict[str, Slot] = {}
        self._hosts: HostLimits[Slot] = HostLimits(settings.host_concurrency)
        # Clock reading from which on the store may have something due.
        self._look_at = self.polled_at
        self._writing = _Rest()
        self._acquiring = _Rest()
        self._sending = _Rest()

    @property
    def busy(self) -> int:
        """Slots taken: requests under way, callbacks in line, results not yet durable."""
        return len(self._slots)

    @property
    def store_is_failing(self) -> bool:
        """Whether the store's last word, on writing or on acquiring, was an exception."""
        return self._writing.failures > 0 or self._acquiring.failures > 0

    def is_idle(self) -> bool:
        """Whether all that was due has been delivered and recorded."""
        return not self._slots and self.inbox.empty() and self._look_at > self._clock.monotonic()

    def wake(self) -> None:
        """Make the next step look into the store. Callable from any thread and from a signal handler."""
        self.inbox.put(None)

    def step(self, *, draining: bool = False) -> float:
        """
        Do what can be done now.

        Args:
            draining: acquire nothing more, and give back what has not been sent.

        Returns:
            Seconds after which it wants to be called again, unless something arrives in `inbox` first.
        """
        # As many as there are now: under a stream of messages, results must still be written in between.
        for _ in range(self.inbox.qsize()):
            self._take(self.inbox.get_nowait())
        self._clear_lines(everybody=draining)
        if self.recorder.has_work() and self._writing.is_over(self._clock.monotonic()):
            self._with_store(self._writing, self._write)
        wait = self._acquire_and_send(draining=draining)
        now = self._clock.monotonic()
        if not self.store_is_failing:
            self.polled_at = now
        if self.recorder.has_work():
            # More to write: what was just acquired can have ended at once, and what failed is tried again.
            wait = min(wait, max(self._writing.until - now, 0.0))
        return wait

    def rest(self, seconds: float) -> None:
        """Wait until something arrives, for *seconds* at most."""
        if seconds > 0:
            try:
                self._take(self.inbox.get(timeout=seconds))
            except queue.Empty:
                return

    def interrupt(self) -> None:
        """End all requests under way; their outcomes arrive in `inbox` as all others do."""
        self._sender.interrupt([slot.delivery for slot in self._slots.values() if slot.delivery is not None])

    # Outcomes coming in.

    def _take(self, message: tuple[Slot, Outcome] | None) -> None:
        if message is None:
            self._look_at = self._clock.monotonic()
        else:
            self._end_delivery(*message)

    def _end_delivery(self, slot: Slot, outcome: Outcome) -> None:
        slot.delivery = None
        if isinstance(outcome, NotSent):
            self.recorder.release(slot)
            if outcome.reason is NotSentReason.LOCAL_FAULT:
                self._rest_after_local_fault(outcome.detail)
        else:
            self._sending.failures = 0
            # A user's transport may return anything; what is no answer is a fault of its own.
            slot.answer = outcome if isinstance(outcome, Answer) else self._internal_failure()
            self.recorder.record(slot)
        follower = self._hosts.end(slot.host, slot, self._clock.monotonic())
        if follower is not None:
            self._send(follower)

    def _record_of(self, slot: Slot) -> AttemptRecord:
        acquired, answer = slot.acquired, slot.answer
        if answer is None or acquired.request is None:
            assert slot.ends_unsent is not None  # noqa: S101 - a slot that has ended has one or the other
            return AttemptRecord(acquired=acquired, attempt=None, transition=slot.ends_unsent)
        attempt = CallbackAttempt(
            status_code=answer.status_code,
            response=answer.response,
            time=answer.time,
            duration=answer.duration,
            failure=answer.failure,
            machine_name=self._settings.machine_name,
            truncated=answer.truncated,
        )
        policy = self._settings.response_policy
        transition = after_attempt(
            acquired.request,
            attempts_made=acquired.attempts_made,
            verdict=policy.judge(answer.status_code),
            failure=answer.failure,
            retry_after=_retry_after(answer) if policy.honour_retry_after else None,
            jitter=self._settings.retry_jitter,
            random=self._random(),
        )
        return AttemptRecord(acquired=acquired, attempt=attempt, transition=transition)

    # Results going out.

    def _write(self) -> None:
        for slot in self.recorder.write():
            del self._slots[slot.acquired.id]
        # The next callbacks of these queues may be due.
        self._look_at = self._clock.monotonic()

    # Acquiring and sending.

    def _acquire_and_send(self, *, draining: bool) -> float:
        now = self._clock.monotonic()
        step = plan(
            free_slots=self._settings.concurrency - len(self._slots),
            seconds_to_look=self._look_at - now,
            poll_interval=self._settings.poll_interval.total_seconds(),
            paused_for=max(self._acquiring.until, self._sending.until) - now,
            draining=draining,
        )
        if step.acquire:
            self._with_store(self._acquiring, lambda: self._acquire(step.acquire))
        return step.wait

    def _acquire(self, limit: int) -> None:
        # Read before the call: no lock can have begun earlier, so none can end earlier than reckoned here.
        now = self._clock.monotonic()
        lock_timeout = self._settings.lock_timeout
        acquired = self._data_access.acquire_locks(self._settings.machine_name, lock_timeout=lock_timeout, limit=limit)
        ends_at = now + (lock_timeout - margin_of(lock_timeout)).total_seconds()
        for one in acquired:
            self._reporter.callback(EventKind.LOCKED, one)
            slot = self._slots.get(one.id)
            if slot is not None:
                # Our own lock timed out while its attempt was under way or its result on the way into the store,
                # because this machine or the store stood still. That attempt goes on, under the new lock: sending
                # again would make the duplicate that nobody has to suffer without a kill.
                slot.acquired = one
            else:
                slot = self._slots[one.id] = Slot(acquired=one)
                self._begin(slot, ends_at)
        if len(acquired) < limit:
            self._look_at = self._clock.monotonic() + self._seconds_to_next_due()

    def _seconds_to_next_due(self) -> float:
        longest = self._settings.poll_interval.total_seconds()
        next_due = self._data_access.next_due()
        if next_due is None:
            return longest
        seconds = (next_due - self._data_access.now()).total_seconds()
        return min(max(seconds, _SHORTEST_REST_SECONDS), longest)

    def _begin(self, slot: Slot, ends_at: float) -> None:
        acquired = slot.acquired
        if acquired.request is None:
            slot.ends_unsent = Transition(state=CallbackState.FAILED, failed_reason=FailedReason.UNDECODABLE)
            self.recorder.record(slot)
            return
        slot.ends_unsent = abandon(
            acquired.request, abandoned=acquired.abandoned, max_abandoned=self._settings.max_abandoned
        )
        if slot.ends_unsent is not None:
            self.recorder.record(slot)
            return
        slot.host = acquired.request.target.origin
        slot.delivery = Delivery(
            callback_id=acquired.id,
            request=acquired.request,
            sequence=acquired.sequence,
            attempt=acquired.attempts_made + 1,
            token=acquired.lock.token,
            ends_at=ends_at,
        )
        now = self._clock.monotonic()
        match self._hosts.admit(slot.host, slot, now):
            case Admission.SEND:
                self._send(slot)
            case Admission.PARK:
                self._park(slot, now)
            case Admission.WAIT:
                pass  # `HostLimits.end` names it when its turn comes

    def _send(self, slot: Slot) -> None:
        assert slot.delivery is not None  # noqa: S101 - whoever is admitted has one
        try:
            self._sender.submit(slot.delivery, lambda outcome: self.inbox.put((slot, outcome)))
        except Exception:
            # A user's transport; the callback must not stay locked without anybody working on it.
            _log.exception("the transport raised on submit")
            self.inbox.put((slot, self._internal_failure()))

    def _internal_failure(self) -> Answer:
        return Answer(status_code=0, time=self._clock.now(), duration=timedelta(0), failure=AttemptFailure.INTERNAL)

    def _clear_lines(self, *, everybody: bool) -> None:
        now = self._clock.monotonic()
        for _, slot in self._hosts.leave_lines(None if everybody else now):
            if everybody:
                self.recorder.release(slot)
            else:
                self._park(slot, now)

    def _park(self, slot: Slot, now: float) -> None:
        self.recorder.release(slot, after=timedelta(seconds=self._hosts.parking_seconds(slot.host, now)))

    # Faults.

    def _with_store(self, rest: _Rest, call: Callable[[], None]) -> None:
        was_failing = self.store_is_failing
        try:
            call()
        except Exception as error:
            # Whatever a store raises, a custom one's bugs included, the dispatcher lives on and tries again.
            rest.begin(self._clock.monotonic(), self._random())
            if not was_failing:
                # Told once until all is well again, whatever the number of tries: an outage must not flood the log.
                _log.error("the store failed; trying again with growing rests", exc_info=error)
                self._reporter.dispatcher(EventKind.STORE_FAILED, type(error).__name__)
        else:
            rest.failures = 0
            if was_failing and not self.store_is_failing:
                self._reporter.dispatcher(EventKind.STORE_RECOVERED)

    def _rest_after_local_fault(self, detail: str) -> None:
        self._sending.begin(self._clock.monotonic(), self._random())
        if self._sending.failures == 1:
            self._reporter.dispatcher(EventKind.LOCAL_FAULT, detail)


@mutable
class _Rest:
    """How long to leave something alone that has failed so many times in a row."""

    failures: int = 0
    until: float = 0.0

    def begin(self, now: float, random: float) -> None:
        self.failures += 1
        self.until = now + backoff(
            self.failures, first=_FIRST_REST_SECONDS, longest=_LONGEST_REST_SECONDS, random=random
        )

    def is_over(self, now: float) -> bool:
        return now >= self.until


def _retry_after(answer: Answer) -> timedelta | None:
    for name, value in answer.response.headers.items():
        if name.lower() == "retry-after":
            return parse_retry_after(value, answer.time + answer.duration)
    return None
