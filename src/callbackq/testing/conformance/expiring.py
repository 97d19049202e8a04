"""Clause 10: how long a lock lives, and what becomes of its callback when nobody ends it."""

from __future__ import annotations

from datetime import UTC, timedelta

from attrs import evolve

from callbackq.core.models import CallbackState
from callbackq.dataaccess import Action
from callbackq.errors import LockLostError
from callbackq.testing.conformance.base import DUE_AGAIN, LOCK_TIMEOUT, MOMENT, Conformance, an_attempt, raises

__all__ = ["Expiry"]


class Expiry(Conformance):
    """Clause 10: the store's clock alone ends locks; nothing else must run for that, and a live lock stays."""

    def test_the_clock_is_in_utc_and_moves_with_time(self) -> None:
        """now(): aware, UTC."""
        before = self.store.now()
        self.clock.advance(timedelta(seconds=5, microseconds=7))

        assert before.tzinfo is UTC, "the store's clock must be in UTC"
        assert self.store.now() - before == timedelta(seconds=5, microseconds=7), "the store's clock must keep time"

    def test_a_lock_lives_for_its_timeout(self) -> None:
        """Acquired now, timing out lock_timeout from now."""
        self.stored()
        acquired = self.acquire_one(lock_timeout=timedelta(seconds=7))

        assert acquired.lock.acquired == self.store.now(), "a lock is acquired now, by the store's clock"
        assert acquired.lock.timeout == self.store.now() + timedelta(seconds=7), (
            "a lock times out lock_timeout from now"
        )

    def test_a_live_lock_is_never_taken(self) -> None:
        """A live lock never expires."""
        self.stored()
        self.acquire_one()

        self.clock.advance(LOCK_TIMEOUT - MOMENT)

        assert self.acquire() == [], "a lock must not be taken before its timeout"

    def test_a_lock_that_timed_out_is_taken_over_at_once(self) -> None:
        """A lock whose timeout has passed is found by the next call; no sweeper is needed."""
        id = self.stored()
        self.acquire_one()

        self.clock.advance(LOCK_TIMEOUT + MOMENT)

        self.acquire_only(id)

    def test_each_lock_times_out_by_its_own_length(self) -> None:
        """Locks of different length end at different times."""
        short, long = self.stored(), self.stored()
        first = self.acquire(limit=1, lock_timeout=timedelta(seconds=10))[0].id
        second = self.acquire_one(lock_timeout=timedelta(seconds=99)).id
        assert {first, second} == {short, long}, "both callbacks must be locked"

        self.clock.advance(timedelta(seconds=11))
        self.acquire_only(first)
        self.clock.advance(timedelta(seconds=89))

        assert second in {one.id for one in self.acquire()}, "each lock must end by its own timeout"

    def test_a_lock_that_timed_out_is_closed_as_abandoned(self) -> None:
        """ended set, completed false; it counts as abandoned and uses up no attempt."""
        id = self.stored()
        first = self.acquire_one()

        second = self.take_over()

        assert (second.abandoned, second.attempts_made) == (1, 0), "an abandoned lock counts, and is no attempt"
        closed, live = self.status(id).locks
        assert closed.token == first.lock.token, "locks must stand in the order in which they began"
        assert not closed.completed, "an abandoned lock is not completed"
        assert closed.ended is not None, "an abandoned lock has ended"
        assert closed.timeout <= closed.ended <= self.store.now(), "it ended between its timeout and the takeover"
        assert live == second.lock, "the new lock must be in the log"

    def test_abandoned_locks_are_counted_in_a_row(self) -> None:
        """A release keeps the count, a record starts it anew."""
        self.stored()
        self.acquire_one()
        assert self.take_over().abandoned == 1, "the first abandoned lock must be counted"
        acquired = self.take_over()
        assert acquired.abandoned == 2, "abandoned locks in a row must be counted"
        self.store.release_lock(acquired)
        acquired = self.acquire_one()
        assert acquired.abandoned == 2, "a release must keep the count of abandoned locks"
        self.store.record_attempt(acquired, an_attempt(), evolve(DUE_AGAIN, counted=False))

        assert self.acquire_one().abandoned == 0, "a record must start the count of abandoned locks anew"

    def test_a_late_result_keeps_the_count_of_abandoned_locks(self) -> None:
        """A result that came too late changes nothing but the late list."""
        self.stored()
        stale = self.acquire_one()
        self.take_over()
        with raises(LockLostError, "a record under a lost lock"):
            self.retry(stale)

        assert self.take_over().abandoned == 2, "a late result must not start the count of abandoned locks anew"

    def test_a_holder_may_record_after_the_timeout_if_nobody_took_over(self) -> None:
        """While the lock is still the newest and the callback LOCKED, also when the lock has timed out."""
        id = self.stored()
        acquired = self.acquire_one()
        self.clock.advance(LOCK_TIMEOUT + MOMENT)

        self.succeed(acquired)

        status = self.status(id)
        assert status.state is CallbackState.SUCCEEDED, "a result must count while nobody took over"
        assert [attempt.late for attempt in status.attempts] == [False], "it is not late"
        assert status.locks[0].completed, "its lock was completed by its holder"

    def test_a_holder_may_release_after_the_timeout_if_nobody_took_over(self) -> None:
        """Also a lock that has timed out can be given back."""
        id = self.stored()
        acquired = self.acquire_one()
        self.clock.advance(LOCK_TIMEOUT + MOMENT)

        self.store.release_lock(acquired)

        assert self.acquire_only(id).abandoned == 0, "a lock that was given back is not abandoned"

    def test_a_cancel_noted_under_a_lock_applies_when_that_times_out(self) -> None:
        """A wish is carried out when the lock ends, and a lock that times out has ended."""
        id, behind = self.stored("queue"), self.stored("queue")
        self.acquire_one()
        self.store.request_transition(id, Action.CANCEL)
        self.clock.advance(LOCK_TIMEOUT + MOMENT)

        acquired = self.acquire() or self.acquire()

        assert self.state(id) is CallbackState.CANCELLED, "a noted cancel must apply when the lock has timed out"
        assert [one.id for one in acquired] == [behind], "the queue must open behind it, and it must not be sent again"
        (lock,) = self.status(id).locks
        assert lock.ended, "its lock has ended"
        assert not lock.completed, "nobody completed its lock"

    def test_what_was_accepted_late_is_not_sent_again_when_a_lock_times_out(self) -> None:
        """A late acceptance settles the callback when the present lock ends, and a lock that times out has ended."""
        id = self.stored()
        stale = self.acquire_one()
        self.take_over()
        with raises(LockLostError, "a record under a lost lock"):
            self.succeed(stale)
        self.clock.advance(LOCK_TIMEOUT + MOMENT)

        assert self.acquire() == [], "what the receiver has accepted must not be sent again"
        assert self.state(id) is CallbackState.SUCCEEDED, "a late acceptance must count when the lock has timed out"

    def test_steps_of_the_wall_clock_change_nothing(self) -> None:
        """The store's clock never steps while the machine runs."""
        for step in (timedelta(days=1), timedelta(days=-2)):
            waiting, locked = self.stored(), self.stored()
            acquired = {one.id: one for one in self.acquire()}
            self.retry(acquired[waiting], delay=timedelta(seconds=10))
            before = self.store.now()

            self.clock.step_wall(step)

            assert self.store.now() == before, "a step of the wall clock must not move the store's clock"
            assert self.acquire() == [], "a step of the wall clock must end no lock and no wait"
            self.clock.advance(timedelta(seconds=11))
            self.succeed(self.acquire_only(waiting))
            self.clock.advance(LOCK_TIMEOUT)
            self.succeed(self.acquire_only(locked))

    def test_closing_and_opening_ends_no_lock(self) -> None:
        """Locks stay as they are and end by their timeout."""
        id = self.stored()
        holder = self.acquire_one()

        self.start_again()

        assert self.acquire() == [], "reopening must end no live lock"
        self.succeed(holder)
        assert self.state(id) is CallbackState.SUCCEEDED, "a holder's result must count after reopening"
