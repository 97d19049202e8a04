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
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Final

from attrs import evolve

from callbackq.clock import Clock
from callbackq.core.delivery import Delivery, NotSent, NotSentReason
from callbackq.core.fairness import Admission, HostLimits
from callbackq.core.lifecycle import Transition
from callbackq.core.models import AttemptFailure
from callbackq.core.planning import Plan, margin_of, plan
from callbackq.dataaccess import Acquired, AttemptRecord, DataAccess, handover_of
from callbackq.errors import LockLostError
from callbackq.events import EventKind
from callbackq.faultlog import log_fault
from callbackq.judging import Judge
from callbackq.recorder import Line, Recorder, Rest, Slot
from callbackq.reporting import Reporter
from callbackq.settings import Settings
from callbackq.transport.protocol import SupportsSubmit

__all__ = ["Engine"]

_log = logging.getLogger("callbackq")

_LONGEST_REST_SECONDS: Final = 30.0
# Nothing was sent, and nobody is to blame: long enough not to spin, short enough not to matter.
_NOT_SENT_REST: Final = timedelta(milliseconds=100)
# To this is added as much again by chance, so that a customer's callbacks don't all come back at once.
_NO_SECRETS_REST: Final = timedelta(seconds=15)
_NO_MEMORY_REST_SECONDS: Final = 0.1
# For how long a receiver's Retry-After is granted where no attempt is recorded.
_LONGEST_PATIENCE: Final = timedelta(minutes=1)
# How an attempt can end that says nothing about its host.
_OUR_DOING: Final = frozenset({AttemptFailure.INTERRUPTED, AttemptFailure.INTERNAL})
# Until the next look into a store that has handed out all that was due; also when it says that something is due, but
# hands out nothing: somebody else is taking it.
_SHORTEST_REST_SECONDS: Final = 0.01


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
        sender: the transport.
        recorder: results on their way into the store.
        polled_at: clock reading of the last look into the store that it answered.
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
        self._handover = handover_of(data_access)
        # What was acquired with results, and is still to be taken in.
        self._handed_over: Callable[[], None] | None = None
        self._is_draining = False
        self.sender = sender
        self._settings = settings
        self._reporter = reporter
        self._clock = clock
        self._random = random
        self._judge = Judge(settings, clock, random)
        self._lock_seconds = settings.lock_timeout.total_seconds()

        self.inbox: queue.SimpleQueue[tuple[Slot, Delivery, object] | None] = queue.SimpleQueue()
        self.recorder = Recorder(
            data_access,
            reporter,
            record=self._record,
            after_attempt=self._judge.after_attempt,
            on_notification_owed=on_notification_owed,
        )
        self.polled_at = clock.monotonic()

        self._slots: dict[str, Slot] = {}
        # Messages for which there was no memory. An outcome that is lost would hold its slot, and its queue, for ever.
        self._untaken: list[tuple[Slot, Delivery, object]] = []
        self._hosts: HostLimits[Slot] = HostLimits(settings.host_concurrency, slots=settings.under_way)
        # Clock reading from which on the store may have something due.
        self._look_at = self.polled_at
        # Clock reading up to which callbacks that were due may have been put off.
        self._parked_until = self.polled_at
        # Clock reading of the next look for attempts that never end.
        self._look_for_overstaying_at = self.polled_at
        self._acquiring = Rest(longest=_LONGEST_REST_SECONDS)
        self._sending = Rest(longest=_LONGEST_REST_SECONDS)

    @property
    def busy(self) -> int:
        """Slots taken: requests under way, callbacks in line, results not yet durable."""
        return len(self._slots)

    @property
    def store_is_failing(self) -> bool:
        """Whether the store's last word, on writing or on acquiring, was an exception."""
        return self.recorder.store_is_failing or self._acquiring.failures > 0

    def is_idle(self) -> bool:
        """Whether all that was due has been delivered and recorded."""
        now = self._clock.monotonic()
        return not self._slots and self.inbox.empty() and self._look_at > now >= self._parked_until

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
        self._is_draining = draining
        if draining:
            # First of all: an outcome that comes in now must not let the next in line begin.
            for _, slot in self._hosts.leave_lines():
                self.recorder.release(slot)
        self._take_all()
        self._park_those_who_stand_too_long()
        self._end_those_who_overstay()
        for line in self.recorder.ready_lines(self._clock.monotonic()):
            self._with_store(line.rest, partial(self._write, line), is_struggling=line.is_struggling)
        wait = self._acquire_and_send()
        # More to write: what was just acquired can have ended at once, and what failed is tried again.
        wait = min(wait, self.recorder.seconds_to_write(self._clock.monotonic()))
        return min(wait, _NO_MEMORY_REST_SECONDS) if self._untaken else wait

    def step_until_idle(self) -> float | None:
        """Do what can be done now, and say as `step` does for how long to rest: ``None`` when all is done."""
        wait = self.step()
        return None if self.is_idle() else wait

    def rest(self, seconds: float) -> None:
        """Wait until something arrives, for *seconds* at most."""
        if seconds > 0:
            try:
                self._take(self.inbox.get(timeout=seconds))
            except queue.Empty:
                return

    def interrupt(self) -> None:
        """End all requests under way; their outcomes arrive in `inbox` as all others do."""
        # A rest after a fault of the store would outlast the stop: what is there is tried once more now.
        self.recorder.end_rests(self._clock.monotonic())
        try:
            self.sender.interrupt([slot.delivery for slot in self._slots.values() if slot.delivery is not None])
        except Exception as error:
            # A user's transport; the stop must go on without it.
            what = "the transport raised on interrupt; what it has under way is left to its locks' timeouts"
            log_fault(_log, what, error)

    # Outcomes coming in.

    def _take_all(self) -> None:
        untaken, self._untaken = self._untaken, []
        for message in untaken:
            self._take(message)
        # As many as there are now: under a stream of messages, results must still be written in between.
        for _ in range(self.inbox.qsize()):
            self._take(self.inbox.get_nowait())

    def _take(self, message: tuple[Slot, Delivery, object] | None) -> None:
        if message is None:
            self._look_at = self._clock.monotonic()
            return
        slot, delivery, outcome = message
        # A transport may tell twice, or after its attempt was given up: only the first word counts.
        if slot.delivery is delivery:
            try:
                self._end_delivery(slot, outcome)
            except MemoryError:
                self._untaken.append(message)

    def _end_delivery(self, slot: Slot, outcome: object) -> None:
        answered = None
        if isinstance(outcome, NotSent):
            self.recorder.release(slot, after=self._rest_after(outcome.reason))
            if outcome.reason is NotSentReason.LOCAL_FAULT:
                self._rest_after_local_fault(outcome.detail)
        else:
            attempt, retry_after = self._judge.attempt(outcome)
            if attempt.failure not in _OUR_DOING:
                answered = attempt.failure is None
            if slot.was_overtaken and self._judge.wants_retry(attempt):
                # Another attempt was made meanwhile, and counted. This is no retry, but may ask for patience.
                self.recorder.release(slot, after=min(retry_after or timedelta(0), _LONGEST_PATIENCE))
            else:
                slot.attempt, slot.retry_after = attempt, retry_after
                self.recorder.record(slot)
            self._sending.failures = 0
        slot.delivery = None
        follower = self._hosts.end(slot.host, slot, self._clock.monotonic(), answered=answered)
        if follower is not None:
            self._send(follower)

    def _rest_after(self, reason: NotSentReason) -> timedelta:
        match reason:
            case NotSentReason.STOPPED:
                return timedelta(0)
            case NotSentReason.NO_SECRETS:
                return _NO_SECRETS_REST * (1 + self._random())
            case _:
                return _NOT_SENT_REST

    # Results going out.

    def _record(self, records: Sequence[AttemptRecord]) -> list[Transition | LockLostError]:
        """
        Record results and, if the store does both in one commit, acquire what may take their places.

        That spares a strict queue every second commit: twice as many callbacks a second, with two thirds of the CPU.
        """
        handover, limit = self._handover, 0
        if handover is not None and self._handed_over is None and not self.store_is_failing:
            limit = self._plan(freed=len(records)).acquire
        if handover is None or not limit:
            return self._data_access.record_attempts(records)
        now = self._clock.monotonic()
        results, acquired = handover.record_and_acquire(
            records, self._settings.machine_name, lock_timeout=self._settings.lock_timeout, limit=limit
        )
        # Later, when the results have been reported and their slots are free: one of them may be due again.
        self._handed_over = partial(self._take_all_in, acquired, now, limit)
        return results

    def _write(self, line: Line) -> None:
        for slot in line.write():
            del self._slots[slot.acquired.id]
            if slot.release_after:
                until = self._clock.monotonic() + slot.release_after.total_seconds()
                self._parked_until = max(self._parked_until, until)
        # The next callbacks of these queues may be due.
        self._look_at = self._clock.monotonic()

    # Acquiring and sending.

    def _acquire_and_send(self) -> float:
        handed_over, self._handed_over = self._handed_over, None
        if handed_over is not None:
            self._with_store(self._acquiring, handed_over)
        step = self._plan()
        if step.acquire:
            self._with_store(self._acquiring, lambda: self._acquire(step.acquire))
        return step.wait

    def _plan(self, *, freed: int = 0) -> Plan:
        """Plan the next step, or that after so many results are recorded, which may make something due."""
        now = self._clock.monotonic()
        return plan(
            free_slots=self._settings.concurrency - len(self._slots) + freed,
            seconds_to_look=0.0 if freed else self._look_at - now,
            poll_interval=self._settings.poll_interval.total_seconds(),
            paused_for=max(self._acquiring.until, self._sending.until) - now,
            draining=self._is_draining,
        )

    def _acquire(self, limit: int) -> None:
        now = self._clock.monotonic()
        acquired = self._data_access.acquire_locks(
            self._settings.machine_name, lock_timeout=self._settings.lock_timeout, limit=limit
        )
        self._take_all_in(acquired, now, limit)

    def _take_all_in(self, acquired: list[Acquired], asked_at: float, limit: int) -> None:
        """
        Begin the attempts of what the store has locked.

        Args:
            acquired: what that is.
            asked_at: clock reading before the store was asked: no lock can have begun earlier, so none can end earlier
                than is reckoned from here.
            limit: how many it was asked for.
        """
        lock_timeout = self._settings.lock_timeout
        ends_at = asked_at + (lock_timeout - margin_of(lock_timeout)).total_seconds()
        # While the store was at it, outcomes may have come: an answer that is there is no attempt that overstays.
        self._take_all()
        fresh, renewed = [], []
        for one in acquired:
            if one.abandoned:
                self._tell_if_just_abandoned(one)
            self._reporter.callback(EventKind.LOCKED, one)
            slot = self._slots.get(one.id)
            if slot is not None and self._is_still_the_same_attempt(slot, one):
                # Our own lock timed out while its attempt was under way or its result on the way into the store,
                # because this machine or the store stood still. That attempt goes on, under the new lock: sending
                # again would make the duplicate that nobody has to suffer without a kill.
                slot.was_overtaken = slot.was_overtaken or not _was_only_abandoned(slot.acquired, one)
                slot.acquired = one
                renewed.append(slot)
            else:
                if slot is not None:
                    # The store had taken the result, and raised all the same. The callback is due again by right.
                    self.recorder.forget(slot)
                fresh.append(one)
        self._renew(renewed, ends_at)
        for one in fresh:
            self._take_in(one, ends_at)
        self.polled_at = self._clock.monotonic()
        if len(acquired) < limit:
            # Who found something doesn't ask what is due next. Under load a result comes first, and opens more; with
            # receivers that take longer, one claim more finds nothing, and asks.
            rest = _SHORTEST_REST_SECONDS if acquired else self._seconds_to_next_due()
            self._look_at = self._clock.monotonic() + rest

    def _tell_if_just_abandoned(self, acquired: Acquired) -> None:
        # The count alone doesn't say whether it rose just now: it stays when a lock is given back unused.
        try:
            before = self._data_access.get_callback_status(acquired.id).locks[-2]
        except Exception:
            # A record that can't be read, or a store that fails right now. The takeover goes on all the same.
            return
        if not before.completed:
            self._reporter.callback(EventKind.ABANDONED, acquired, abandoned_by=before.machine_name)

    @staticmethod
    def _is_still_the_same_attempt(slot: Slot, acquired: Acquired) -> bool:
        return slot.delivery is not None or _was_only_abandoned(slot.acquired, acquired)

    def _renew(self, slots: list[Slot], ends_at: float) -> None:
        for slot in slots:
            delivery = slot.delivery
            # Without one, its result or its release waits to be written, by the new lock now.
            if delivery is not None and not self._hosts.is_under_way(slot.host, slot):
                acquired, slot.was_overtaken = slot.acquired, False
                slot.delivery = evolve(
                    delivery, attempt=acquired.attempts_made + 1, token=acquired.lock.token, ends_at=ends_at
                )

    def _end_those_who_overstay(self) -> None:
        """
        Give up attempts that go on a whole lock beyond their end: their transport has broken its promise for good.

        They would hold their slots, and their places at a host, for ever. Not at the first sight: when this process
        stood still, its transport did so, too, and may have more to say.
        """
        now = self._clock.monotonic()
        if now < self._look_for_overstaying_at:
            return
        self._look_for_overstaying_at = now + self._lock_seconds / 4
        # All are found before one is ended: that lets the next in its line begin.
        overstaying = [slot for slot in self._slots.values() if self._overstays(slot, now)]
        for slot in overstaying:
            if slot.is_overdue:
                no_answer = self._judge.no_answer(AttemptFailure.TIMEOUT, "the transport never ended it")
                self._end_delivery(slot, no_answer)
            slot.is_overdue = True

    def _overstays(self, slot: Slot, now: float) -> bool:
        delivery = slot.delivery
        if delivery is None or delivery.ends_at + self._lock_seconds >= now:
            return False
        return self._hosts.is_under_way(slot.host, slot)

    def _take_in(self, acquired: Acquired, ends_at: float) -> None:
        slot = self._slots[acquired.id] = Slot(acquired=acquired)
        try:
            self._begin(slot, ends_at)
        except MemoryError as error:
            # A fault of this machine, which passes: it must not look like one of the callback's.
            self.recorder.release(slot, after=_NOT_SENT_REST)
            self._rest_after_local_fault(type(error).__name__)
        except Exception as error:
            # A row that was damaged by hand, say. The others that were acquired with it must not suffer.
            log_fault(_log, f"callback {acquired.id!a} can't be sent", error)
            slot.delivery = None
            slot.ends_unsent = self._judge.undecodable(acquired)
            self.recorder.record(slot)

    def _seconds_to_next_due(self) -> float:
        longest = self._settings.poll_interval.total_seconds()
        next_due = self._data_access.next_due()
        if next_due is None:
            return longest
        seconds = (next_due - self._data_access.now()).total_seconds()
        return min(max(seconds, _SHORTEST_REST_SECONDS), longest)

    def _begin(self, slot: Slot, ends_at: float) -> None:
        acquired = slot.acquired
        slot.ends_unsent = self._judge.unsent(acquired)
        if acquired.request is None or slot.ends_unsent is not None:
            self.recorder.record(slot)
            return
        # Not its origin: one host must not get the slots of several by its ports.
        slot.host = acquired.request.target.host
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
        delivery = slot.delivery
        assert delivery is not None  # noqa: S101 - whoever is admitted has one
        try:
            self.sender.submit(delivery, lambda outcome: self.inbox.put((slot, delivery, outcome)))
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # A user's transport, or a hook of his; the callback must not stay locked without anybody working on it, nor
            # those that were acquired with it.
            log_fault(_log, "the transport raised on submit", error)
            no_answer = self._judge.no_answer(AttemptFailure.INTERNAL, type(error).__name__)
            self.inbox.put((slot, delivery, no_answer))

    def _park_those_who_stand_too_long(self) -> None:
        now = self._clock.monotonic()
        for _, slot in self._hosts.leave_lines(now):
            self._park(slot, now)

    def _park(self, slot: Slot, now: float) -> None:
        self.recorder.release(slot, after=timedelta(seconds=self._hosts.parking_seconds(slot.host, now)))

    # Faults.

    def _with_store(
        self, rest: Rest, call: Callable[[], None], *, is_struggling: Callable[[], bool] = lambda: False
    ) -> None:
        was_failing = self.store_is_failing
        try:
            call()
        except Exception as error:
            # Whatever a store raises, a custom one's bugs included, the dispatcher lives on and tries again.
            rest.begin(self._clock.monotonic(), self._random())
            if not was_failing:
                # Told once until all is well again, whatever the number of tries: an outage must not flood the log.
                log_fault(_log, "the store failed; trying again with growing rests", error)
                self._reporter.dispatcher(EventKind.STORE_FAILED, type(error).__name__)
        else:
            # A good write among bad ones is no recovery yet.
            if not is_struggling():
                rest.failures = 0
            if was_failing and not self.store_is_failing:
                self._reporter.dispatcher(EventKind.STORE_RECOVERED)

    def _rest_after_local_fault(self, detail: str) -> None:
        # All that were under way meet the same fault: that is one, not many in a row.
        if not self._sending.is_over(self._clock.monotonic()):
            return
        self._sending.begin(self._clock.monotonic(), self._random())
        if self._sending.failures == 1:
            self._reporter.dispatcher(EventKind.LOCAL_FAULT, detail)


def _was_only_abandoned(before: Acquired, after: Acquired) -> bool:
    """Tell whether nobody has tried or redelivered a callback between two of its locks."""
    return after.abandoned > before.abandoned and after.attempts_made == before.attempts_made
