"""Clauses 8 and 9: how a lock ends: once, and whole."""

from __future__ import annotations

from datetime import timedelta

from attrs import evolve

from callbackq.core.models import CallbackState, FailedReason
from callbackq.dataaccess import Acquired, Action, AttemptRecord, Transition
from callbackq.errors import LockLostError
from callbackq.testing.conformance.base import (
    DELIVERED,
    DUE_AGAIN,
    EXHAUSTED,
    HELD,
    MOMENT,
    Conformance,
    an_attempt,
    check_whole,
    raises,
)
from callbackq.testing.conformance.concurrency import while_threads_run

__all__ = ["AtomicRecord", "Fenced"]

_MINUTE = timedelta(minutes=1)


class Fenced(Conformance):
    """Clause 8: a stale token changes nothing but the late list, and says so."""

    def test_a_stale_record_is_kept_as_late_and_changes_nothing_else(self) -> None:
        """The attempt is appended with late=True; nothing else changes. LockLostError: the lock had been lost."""
        for transition in (DUE_AGAIN, EXHAUSTED, HELD):
            id = self.stored("queue")
            stale = self.acquire_one()
            present = self.take_over()
            before = self.status(id)

            self._refused(stale, transition)

            late = evolve(an_attempt(), late=True)
            assert self.status(id) == evolve(before, attempts=(late,)), "a stale record must change the late list only"
            self.succeed(present)
            assert self.state(id) is CallbackState.SUCCEEDED, "the present holder must be able to record"

    def test_a_stale_release_changes_nothing(self) -> None:
        """LockLostError: a later lock exists; nothing was changed."""
        id = self.stored()
        stale = self.acquire_one()
        self.take_over()
        before = self.status(id)

        with raises(LockLostError, "a release under a lost lock") as caught:
            self.store.release_lock(stale)

        assert (caught.error.id, caught.error.token) == (id, stale.lock.token), "the error must name id and token"
        assert self.status(id) == before, "a stale release must change nothing"
        assert self.acquire() == [], "a stale release must not free the present holder's lock"

    def test_a_result_under_a_released_lock_is_late(self) -> None:
        """A lock that its holder gave back is lost to it."""
        id = self.stored()
        acquired = self.acquire_one()
        self.store.release_lock(acquired)

        self._refused(acquired, EXHAUSTED)

        status = self.status(id)
        assert status.state is CallbackState.WAITING, "a result under a released lock must not change the state"
        assert [attempt.late for attempt in status.attempts] == [True], "a result under a released lock is late"

    def test_a_lock_is_released_once(self) -> None:
        """LockLostError: the callback is no longer LOCKED."""
        id = self.stored()
        acquired = self.acquire_one()
        self.store.release_lock(acquired, delay=_MINUTE)
        before = self.status(id)

        with raises(LockLostError, "a second release"):
            self.store.release_lock(acquired)

        assert self.status(id) == before, "a second release must change nothing"

    def test_a_lock_that_was_recorded_is_not_released(self) -> None:
        """LockLostError: the callback is no longer LOCKED, or has a later lock."""
        id = self.stored()
        acquired = self.acquire_one()
        self.retry(acquired, delay=_MINUTE)
        before = self.status(id)

        with raises(LockLostError, "a release after the record"):
            self.store.release_lock(acquired)

        assert self.status(id) == before, "a release after the record must change nothing"

    def test_a_result_for_a_finished_callback_is_late(self) -> None:
        """A callback that is no longer LOCKED keeps its state."""
        for transition, state in ((DELIVERED, CallbackState.SUCCEEDED), (EXHAUSTED, CallbackState.FAILED)):
            id = self.stored()
            stale = self.acquire_one()
            self.store.record_attempt(self.take_over(), an_attempt(), transition)

            self._refused(stale, DUE_AGAIN)

            status = self.status(id)
            assert status.state is state, "a late result must not open a finished callback"
            assert [attempt.late for attempt in status.attempts] == [True, False], "both attempts must be kept"

    def test_a_lock_from_before_a_redelivery_is_stale(self) -> None:
        """Redelivery doesn't bring old locks back."""
        id = self.stored()
        stale = self.acquire_one()
        self.give_up(self.take_over())
        self.store.request_transition(id, Action.REDELIVER)
        self._refused(stale, DUE_AGAIN)
        present = self.acquire_one()

        with raises(LockLostError, "a release under a lock from before the redelivery"):
            self.store.release_lock(stale)

        self.succeed(present)

    def test_a_repeated_record_changes_nothing_and_returns_as_the_first_did(self) -> None:
        """Repeating a call that was carried out changes nothing: nobody knows whether it had been."""
        for transition in (evolve(DUE_AGAIN, delay=_MINUTE), EXHAUSTED, DELIVERED):
            id = self.stored()
            acquired = self.acquire_only(id)
            first = self.store.record_attempt(acquired, an_attempt(), transition)
            before = self.status(id)
            self.clock.advance(MOMENT)

            again = self.store.record_attempt(acquired, an_attempt(), transition)

            assert again.state is first.state, "a repeated record must return the state that the first one wrote"
            assert self.status(id) == before, "a repeated record must change nothing"

    def test_a_record_may_be_repeated_when_others_have_gone_on(self) -> None:
        """The lock with this token has been ended by a record, whatever came after."""
        id = self.stored()
        acquired = self.acquire_one()
        self.retry(acquired)
        present = self.acquire_one()
        before = self.status(id)

        again = self.store.record_attempt(acquired, an_attempt(), DUE_AGAIN)

        assert again.state is CallbackState.WAITING, "a repeated record must return the state that the first one wrote"
        assert self.status(id) == before, "a repeated record must not touch the next holder's lock"
        self.succeed(present)

    def test_a_record_without_an_attempt_may_be_repeated(self) -> None:
        """That a record was carried out doesn't depend on an attempt."""
        id = self.stored()
        acquired = self.acquire_one()
        for _ in range(2):
            written = self.store.record_attempt(acquired, None, evolve(EXHAUSTED, counted=False))
            assert written.state is CallbackState.FAILED, "a record without an attempt can be repeated"

        assert self.status(id).attempts == (), "a record without an attempt must not add one"

    def test_a_repeated_late_result_is_kept_once(self) -> None:
        """Late attempts are kept once for each token."""
        id = self.stored()
        stale = self.acquire_one()
        self.take_over()

        for _ in range(2):
            self._refused(stale, DUE_AGAIN)

        assert len(self.status(id).attempts) == 1, "a repeated late result must be kept once"

    def test_attempts_stand_in_the_order_in_which_they_began(self) -> None:
        """A late attempt began before those of later locks, and stands before them."""
        id = self.stored()
        stale = self.acquire_one()
        present = self.take_over()
        first = an_attempt(0, time=stale.lock.acquired)
        second = an_attempt(500, time=present.lock.acquired)
        self.store.record_attempt(present, second, DUE_AGAIN)
        with raises(LockLostError, "a record under a lost lock"):
            self.store.record_attempt(stale, first, DUE_AGAIN)

        assert self.status(id).attempts == (evolve(first, late=True), second), "the earlier attempt must stand first"

    def test_a_late_acceptance_makes_the_present_holders_next_transition_succeed(self) -> None:
        """A late accepted result: whatever the present holder met, the callback has been delivered."""
        for transition in (DUE_AGAIN, HELD, evolve(EXHAUSTED, notify=True)):
            id = self.stored(notification_email_address="someone@host.example")
            stale = self.acquire_one()
            present = self.take_over()
            self._refused(stale, DELIVERED)
            assert self.state(id) is CallbackState.LOCKED, "a late acceptance must not change the state by itself"

            written = self.store.record_attempt(present, an_attempt(), transition)

            assert written == DELIVERED, "the transition that was written must be returned"
            status = self.status(id)
            assert status.state is CallbackState.SUCCEEDED, "after a late acceptance the holder's transition succeeds"
            assert status.failed_reason is None, "a callback that succeeded has not failed"

    def test_a_late_acceptance_makes_a_release_succeed(self) -> None:
        """What was learnt in the meantime applies to a release."""
        id, behind = self.stored("queue"), self.stored("queue")
        stale = self.acquire_one()
        present = self.take_over()
        self._refused(stale, DELIVERED)

        written = self.store.release_lock(present, delay=_MINUTE)

        assert written.state is CallbackState.SUCCEEDED, "the transition that was written must be returned"
        assert self.state(id) is CallbackState.SUCCEEDED, "after a late acceptance a release succeeds"
        self.acquire_only(behind)

    def test_a_late_acceptance_counts_for_the_next_holder(self) -> None:
        """The callback remembers it as accepted late until a lock ends."""
        id = self.stored()
        stale = self.acquire_one()
        self.retry(self.take_over())
        self._refused(stale, DELIVERED)
        assert self.state(id) is CallbackState.WAITING, "a late acceptance must not change the state by itself"

        self.retry(self.acquire_one())

        assert self.state(id) is CallbackState.SUCCEEDED, "a late acceptance must count when the next lock ends"

    def test_a_late_acceptance_outweighs_a_noted_cancel(self) -> None:
        """What the receiver has accepted is delivered, whatever was asked."""
        id = self.stored()
        stale = self.acquire_one()
        present = self.take_over()
        self.store.request_transition(id, Action.CANCEL)
        self._refused(stale, DELIVERED)

        self.retry(present)

        assert self.state(id) is CallbackState.SUCCEEDED, "a late acceptance must outweigh a cancel"

    def test_a_late_failure_does_not_touch_the_present_holders_transition(self) -> None:
        """Only an accepted late result is remembered."""
        id = self.stored()
        stale = self.acquire_one()
        present = self.take_over()
        self._refused(stale, EXHAUSTED)

        self.retry(present)

        assert self.state(id) is CallbackState.WAITING, "a late failure must not touch the holder's transition"

    def test_a_late_result_without_an_attempt_leaves_no_trace(self) -> None:
        """Without an attempt there is nothing to keep."""
        id = self.stored()
        stale = self.acquire_one()
        self.take_over()
        before = self.status(id)

        with raises(LockLostError, "a record under a lost lock"):
            self.store.record_attempt(stale, None, EXHAUSTED)

        assert self.status(id) == before, "a late result without an attempt must change nothing"

    def test_in_a_batch_each_record_meets_its_own_fate(self) -> None:
        """record_attempts(): for each the written transition, or the error that says that its lock had been lost."""
        ids = [self.stored() for _ in range(3)]
        held = {one.id: one for one in self.acquire()}
        self.store.release_lock(held[ids[1]])

        results = self.store.record_attempts(
            [AttemptRecord(acquired=held[id], attempt=an_attempt(200), transition=DELIVERED) for id in ids]
        )

        assert [getattr(result, "state", None) for result in results] == [
            CallbackState.SUCCEEDED,
            None,
            CallbackState.SUCCEEDED,
        ], "each record of a batch must have a result of its own, in order"
        lost = results[1]
        assert isinstance(lost, LockLostError), "a lost lock must be reported in its place"
        assert (lost.id, lost.token) == (ids[1], held[ids[1]].lock.token), "the error must name id and token"
        states = [self.state(id) for id in ids]
        expected = [CallbackState.SUCCEEDED, CallbackState.WAITING, CallbackState.SUCCEEDED]
        assert states == expected, "a lost lock must not keep the others from being recorded"

    def test_in_a_batch_each_release_meets_its_own_fate(self) -> None:
        """release_locks(): for each the written transition, or the error that says that its lock had been lost."""
        ids = [self.stored() for _ in range(3)]
        held = {one.id: one for one in self.acquire()}
        self.succeed(held[ids[0]])

        self.store.request_transition(ids[1], Action.CANCEL)

        results = self.store.release_locks([(held[id], _MINUTE * number) for number, id in enumerate(ids)])

        lost, *written = results
        assert isinstance(lost, LockLostError), "a lost lock must be reported in its place"
        assert [getattr(result, "state", None) for result in written] == [
            CallbackState.CANCELLED,
            CallbackState.WAITING,
        ], "each release of a batch must have a result of its own, in order: the transition that was written"
        states = [self.state(id) for id in ids]
        expected = [CallbackState.SUCCEEDED, CallbackState.CANCELLED, CallbackState.WAITING]
        assert states == expected, "a lost lock must not keep the others from being released"
        due = self.status(ids[2]).next_attempt_at
        assert due == self.store.now() + 2 * _MINUTE, "each lock has its own delay"

    def _refused(self, stale: Acquired, transition: Transition) -> None:
        with raises(LockLostError, "a record under a lost lock") as caught:
            self.store.record_attempt(stale, an_attempt(), transition)
        assert caught.error.id == stale.id, "the error must name the callback"
        assert caught.error.token == stale.lock.token, "the error must name the stale token"


class AtomicRecord(Conformance):
    """Clause 9: attempt, end of the lock, state, next time and owed e-mail are written all together or not at all."""

    def test_a_delivery_is_written_whole(self) -> None:
        """The attempt is appended, the lock ended as completed, the state is the transition's."""
        id = self.stored()
        acquired = self.acquire_one()
        self.clock.advance(timedelta(seconds=1))

        written = self.store.record_attempt(acquired, an_attempt(204), DELIVERED)

        assert written == DELIVERED, "the transition that was written must be returned"
        status = self.status(id)
        assert status.success, "a delivered callback has succeeded"
        assert status.attempts == (an_attempt(204),), "the attempt must be appended"
        assert status.locks == (evolve(acquired.lock, completed=True, ended=self.store.now()),), "the lock must end now"
        assert status.next_attempt_at is None, "a finished callback has no next attempt"
        assert self.acquire() == [], "a finished callback must not be acquired"

    def test_a_retry_is_written_whole(self) -> None:
        """WAITING is due delay from now."""
        id = self.stored()
        acquired = self.acquire_one()
        self.clock.advance(timedelta(seconds=1))

        self.retry(acquired, delay=_MINUTE)

        status = self.status(id)
        assert status.state is CallbackState.WAITING, "a callback to be tried again is WAITING"
        assert status.next_attempt_at == self.store.now() + _MINUTE, "it is due its delay from now"
        assert len(status.attempts) == 1, "the attempt must be appended"
        assert status.locks[0].completed, "the lock must be completed"
        assert status.locks[0].ended == self.store.now(), "the lock ends now"

    def test_a_final_failure_is_written_whole(self) -> None:
        """The callback has the transition's state, reason and hold."""
        for reason in FailedReason:
            id = self.stored()
            self.store.record_attempt(self.acquire_one(), an_attempt(), evolve(EXHAUSTED, failed_reason=reason))

            status = self.status(id)
            assert status.state is CallbackState.FAILED, "a callback that was given up is FAILED"
            assert status.failed_reason is reason, "the reason must be the transition's"
            assert status.next_attempt_at is None, "a finished callback has no next attempt"

    def test_the_transition_decides_not_the_request(self) -> None:
        """A store holds no policy: hold and state are the transition's."""
        held, behind_held = self.stored("held"), self.stored("held")
        free, behind_free = self.stored("free", on_exhausted="hold"), self.stored("free", on_exhausted="hold")
        acquired = {one.id: one for one in self.acquire()}

        self.give_up(acquired[held], hold=True)
        self.give_up(acquired[free], hold=False)

        assert self.status(behind_held).blocked_by == held, "the transition's hold must close the queue"
        self.acquire_only(behind_free)

    def test_a_callback_may_end_without_an_attempt(self) -> None:
        """The attempt, if any: an abandoned or unreadable callback ends without one."""
        id = self.stored()
        transition = evolve(EXHAUSTED, counted=False, failed_reason=FailedReason.ABANDONED)

        self.store.record_attempt(self.acquire_one(), None, transition)

        status = self.status(id)
        assert status.attempts == (), "no attempt must be invented"
        assert status.failed_reason is FailedReason.ABANDONED, "the reason must be the transition's"
        assert status.locks[0].completed, "the lock must be completed"

    def test_a_release_is_written_whole(self) -> None:
        """In one step the lock ends, completed, and the callback is WAITING; no attempt is recorded."""
        id = self.stored()
        acquired = self.acquire_one()
        self.clock.advance(timedelta(seconds=1))

        self.store.release_lock(acquired)

        status = self.status(id)
        assert status.state is CallbackState.WAITING, "a released callback is WAITING"
        assert status.attempts == (), "a release is no attempt"
        assert status.locks == (evolve(acquired.lock, completed=True, ended=self.store.now()),), "the lock must end now"
        assert status.next_attempt_at == self.store.now(), "it is due at once"
        assert self.acquire_one().attempts_made == 0, "a release uses up no attempt"

    def test_a_batch_is_written_in_order(self) -> None:
        """record_attempts() writes each record as record_attempt() does."""
        ids = [self.stored() for _ in range(3)]
        held = {one.id: one for one in self.acquire()}
        transitions = (DELIVERED, evolve(DUE_AGAIN, delay=_MINUTE), EXHAUSTED)

        results = self.store.record_attempts(
            [
                AttemptRecord(acquired=held[id], attempt=an_attempt(), transition=transition)
                for id, transition in zip(ids, transitions, strict=True)
            ]
        )

        assert results == list(transitions), "each written transition must be returned, in order"
        states = [self.state(id) for id in ids]
        expected = [CallbackState.SUCCEEDED, CallbackState.WAITING, CallbackState.FAILED]
        assert states == expected, "each record must be written"
        assert [len(self.status(id).attempts) for id in ids] == [1, 1, 1], "each attempt must be appended"

    def test_an_empty_batch_changes_nothing(self) -> None:
        """Batches may be empty."""
        id = self.stored()

        assert self.store.record_attempts([]) == [], "nothing recorded, nothing returned"
        assert self.store.store_callback_requests([]) == [], "nothing stored, nothing returned"
        self.store.release_locks([])

        self.acquire_only(id)

    def test_a_reader_sees_all_of_a_record_or_nothing(self) -> None:
        """All or nothing, also to those who look at the same moment."""
        ids = [f"callback-{number}" for number in range(6)]
        for id in ids:
            self.stored(id=id)

        def look() -> None:
            for id in ids:
                check_whole(self.status(id))

        with while_threads_run(look, threads=2):
            for _ in range(2):
                for acquired in self.acquire():
                    self.retry(acquired)
            for number, acquired in enumerate(self.acquire()):
                (self.give_up if number % 2 else self.succeed)(acquired)

        look()
