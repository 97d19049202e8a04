"""What operators ask for: cancel, redeliver, skip, in every state and position (section 4 of the contract)."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from attrs import evolve

from callbackq.core.models import CallbackState, CallbackStatus
from callbackq.dataaccess import Acquired, Action
from callbackq.errors import IllegalTransitionError, LockLostError
from callbackq.testing.conformance.base import (
    EXHAUSTED,
    LOCK_TIMEOUT,
    MOMENT,
    Conformance,
    an_attempt,
    raises,
)

__all__ = ["OperatorActions"]

_ALLOWED: Final = {
    "waiting head": {Action.CANCEL},
    "waiting behind": {Action.CANCEL},
    "locked": {Action.CANCEL},
    "lock timed out": {Action.CANCEL},
    "succeeded": set[Action](),
    "cancelled": set[Action](),
    "failed, queue open": {Action.REDELIVER},
    "failed, queue held": {Action.REDELIVER, Action.SKIP, Action.CANCEL},
    "failed, queue held and skipped": {Action.REDELIVER},
    "failed, no queue": {Action.REDELIVER, Action.SKIP, Action.CANCEL},
}


class OperatorActions(Conformance):
    """Operators' wishes: carried out in one step where the state allows them, refused without a trace elsewhere."""

    def _act(self, id: str, action: Action) -> CallbackStatus:
        status = self.store.request_transition(id, action)
        assert status == self.status(id), "the status afterwards must be returned"
        return status

    def _in(self, situation: str, queue: str) -> str:
        """Bring a callback into a situation of the table above."""
        if situation == "waiting behind":
            self.stored(queue)
        id = self.stored("" if situation == "failed, no queue" else queue)
        match situation:
            case "locked":
                self.acquire()
            case "lock timed out":
                self.acquire(lock_timeout=timedelta(seconds=1))
                self.clock.advance(timedelta(seconds=1) + MOMENT)
            case "succeeded":
                self.succeed(self._acquire(id))
            case "cancelled":
                self.store.request_transition(id, Action.CANCEL)
            case "failed, queue open" | "failed, no queue":
                self.give_up(self._acquire(id))
            case "failed, queue held":
                self.give_up(self._acquire(id), hold=True)
            case "failed, queue held and skipped":
                self.give_up(self._acquire(id), hold=True)
                self.store.request_transition(id, Action.SKIP)
        return id

    def _acquire(self, id: str) -> Acquired:
        return next(one for one in self.acquire() if one.id == id)

    def test_what_the_state_does_not_allow_is_refused_and_changes_nothing(self) -> None:
        """IllegalTransitionError: the state does not allow it; nothing was changed."""
        for situation, allowed in _ALLOWED.items():
            for action in (one for one in Action if one not in allowed):
                id = self._in(situation, f"{situation}: {action.value}")
                before = self.status(id)

                with raises(IllegalTransitionError, f"{action.value}: {situation}") as caught:
                    self.store.request_transition(id, action)

                error = caught.error
                assert (error.id, error.state, error.action) == (id, before.state.value, action.value), (
                    "the error must name the callback, its state and the action"
                )
                assert self.status(id) == before, f"{action.value}: {situation}: a refusal must change nothing"

    def test_what_the_state_allows_is_carried_out(self) -> None:
        """Every allowed action leads to the state of the table."""
        for situation, allowed in _ALLOWED.items():
            for action in allowed:
                id = self._in(situation, f"{situation}: {action.value}")

                status = self._act(id, action)

                expected = {
                    Action.CANCEL: CallbackState.LOCKED if situation == "locked" else CallbackState.CANCELLED,
                    Action.REDELIVER: CallbackState.WAITING,
                    Action.SKIP: CallbackState.FAILED,
                }[action]
                assert status.state is expected, f"{action.value}: {situation}: must be {expected.value}"

    def test_a_cancelled_callback_is_never_sent(self) -> None:
        """CANCELLED is final, and time changes nothing about it."""
        id = self.stored()
        status = self._act(id, Action.CANCEL)

        assert status.next_attempt_at is None, "a cancelled callback has no next attempt"
        self.clock.advance(timedelta(days=30))
        assert self.acquire() == [], "a cancelled callback must not be acquired"
        assert self.store.next_due() is None, "a cancelled callback is never due"

    def test_cancelling_the_head_opens_its_queue(self) -> None:
        """The queue opens."""
        first, second = self.stored("queue"), self.stored("queue")
        self._act(first, Action.CANCEL)

        assert self.status(second).blocked_by is None, "behind a cancelled head the next is the head"
        self.acquire_only(second)

    def test_cancelling_one_behind_the_head_closes_nothing(self) -> None:
        """The others keep their order."""
        ids = [self.stored("queue") for _ in range(4)]
        self._act(ids[1], Action.CANCEL)
        self._act(ids[3], Action.CANCEL)
        ids.append(self.stored("queue"))

        for id in (ids[0], ids[2], ids[4]):
            self.succeed(self.acquire_only(id))
        assert self.status(ids[4]).sequence == 5, "cancelled callbacks keep their numbers"

    def test_cancelling_a_callback_that_waits_for_a_retry_opens_its_queue(self) -> None:
        """A WAITING callback can be cancelled at any time."""
        first, second = self.stored("queue"), self.stored("queue")
        self.retry(self.acquire_only(first), delay=timedelta(hours=1))
        self._act(first, Action.CANCEL)

        self.acquire_only(second)

    def test_a_cancel_under_a_live_lock_is_carried_out_when_the_attempt_ends_undelivered(self) -> None:
        """Keep the wish: settle() is told of it when the lock ends."""
        for end in (self.retry, self.give_up, self.store.release_lock):
            first, second = self.stored("queue"), self.stored("queue")
            acquired = self.acquire_only(first)
            status = self._act(first, Action.CANCEL)
            assert status.state is CallbackState.LOCKED, "a callback stays LOCKED while its attempt is under way"
            assert self.acquire() == [], "a noted cancel must not open the queue"
            self._act(first, Action.CANCEL)  # asking twice is harmless

            end(acquired)

            status = self.status(first)
            assert status.state is CallbackState.CANCELLED, "a noted cancel must be carried out when the lock ends"
            assert status.failed_reason is None, "a cancelled callback has not failed"
            assert status.locks[0].completed, "its holder ended the lock"
            self.succeed(self.acquire_only(second))

    def test_a_cancel_under_a_live_lock_does_not_undo_a_delivery(self) -> None:
        """A callback whose attempt is under way is cancelled when that ends undelivered."""
        id = self.stored()
        acquired = self.acquire_one()
        self._act(id, Action.CANCEL)

        self.succeed(acquired)

        assert self.state(id) is CallbackState.SUCCEEDED, "a delivered callback can't be cancelled"

    def test_a_settled_record_returns_what_was_written(self) -> None:
        """The transition as it was settled and written."""
        id = self.stored()
        acquired = self.acquire_one()
        self._act(id, Action.CANCEL)

        written = self.store.record_attempt(acquired, an_attempt(), evolve(EXHAUSTED, hold=True))

        assert written.state is CallbackState.CANCELLED, "the settled transition must be returned"
        again = self.store.record_attempt(acquired, an_attempt(), evolve(EXHAUSTED, hold=True))
        assert again.state is CallbackState.CANCELLED, "a repeated record must return the state that was written"

    def test_a_cancel_after_the_lock_timed_out_is_carried_out_at_once(self) -> None:
        """State CANCELLED, the lock ended as abandoned; the queue opens."""
        first, second = self.stored("queue"), self.stored("queue")
        stale = self.acquire_one()
        self.clock.advance(LOCK_TIMEOUT + MOMENT)

        status = self._act(first, Action.CANCEL)

        assert status.state is CallbackState.CANCELLED, "nothing is under way any more"
        (lock,) = status.locks
        assert lock.ended, "the lock has ended"
        assert not lock.completed, "the lock was abandoned"
        with raises(LockLostError, "a record under a lock that a cancel ended"):
            self.succeed(stale)
        assert self.state(first) is CallbackState.CANCELLED, "a late result must not change the state"
        self.acquire_only(second)

    def test_redelivery_of_a_head_that_holds_its_queue_is_in_place(self) -> None:
        """Number and place kept; no longer held."""
        first, second = self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_one(), hold=True)
        self.clock.advance(timedelta(hours=1))

        status = self._act(first, Action.REDELIVER)

        assert status.sequence == 1, "redelivery in place must keep the number"
        assert status.next_attempt_at == self.store.now(), "a redelivered callback is due now"
        assert status.failed_reason is None, "a redelivered callback has not failed"
        assert status.blocked_by is None, "it is the head"
        assert self.status(second).blocked_by == first, "those behind must go on waiting"
        self.succeed(self.acquire_only(first))
        self.acquire_only(second)

    def test_redelivery_where_the_queue_has_moved_on_is_at_the_tail(self) -> None:
        """The same with the queue's next number: no receiver sees an old number after a newer one."""
        first, second = self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_one())

        status = self._act(first, Action.REDELIVER)

        assert status.sequence == 3, "redelivery at the tail must take the queue's next number"
        assert status.blocked_by == second, "it must wait for those before it"
        third = self.stored("queue")
        for id, sequence in ((second, 2), (first, 3), (third, 4)):
            acquired = self.acquire_only(id)
            assert acquired.sequence == sequence, "the queue must be delivered in the order of the numbers"
            self.succeed(acquired)

    def test_redelivery_of_the_last_of_a_queue_takes_a_new_number_too(self) -> None:
        """A failed callback that doesn't hold its queue always joins the tail."""
        id = self.stored("queue")
        self.give_up(self.acquire_one())

        assert self._act(id, Action.REDELIVER).sequence == 2, "the queue has moved on, though nobody is behind"
        assert self.acquire_only(id).sequence == 2, "the new number must be told to the holder"

    def test_redelivery_of_a_callback_without_a_queue_keeps_its_number(self) -> None:
        """It is the only one in a queue of its own."""
        for hold in (False, True):
            id = self.stored()
            self.give_up(self.acquire_one(), hold=hold)

            assert self._act(id, Action.REDELIVER).sequence == 1, "there is no other number in its queue"
            self.succeed(self.acquire_only(id))

    def test_redelivery_keeps_the_history_and_starts_the_counts_anew(self) -> None:
        """Tried again with all its attempts: counters of attempts and abandoned locks at 0."""
        id = self.stored()
        self.retry(self.acquire_one())
        self.acquire_one()
        self.give_up(self.take_over())
        history = self.status(id)

        status = self._act(id, Action.REDELIVER)

        assert (status.attempts, status.locks) == (history.attempts, history.locks), "history must be kept"
        acquired = self.acquire_one()
        assert (acquired.attempts_made, acquired.abandoned) == (0, 0), "counts must start anew"
        assert acquired.lock.token > history.locks[-1].token, "tokens must go on rising"

    def test_a_redelivered_callback_can_hold_its_queue_again(self) -> None:
        """Everything can happen to it again."""
        first, second = self.stored("queue"), self.stored("queue")
        for _ in range(2):
            self.give_up(self.acquire_only(first), hold=True)
            assert self.status(second).blocked_by == first, "a failed head must hold its queue each time"
            self._act(first, Action.REDELIVER)

        self.succeed(self.acquire_only(first))

        self.acquire_only(second)

    def test_a_skipped_callback_stays_failed_and_its_queue_opens(self) -> None:
        """The state stays FAILED; the next callback of the queue becomes its head."""
        first, second = self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_one(), hold=True)
        before = self.status(first)

        assert self._act(first, Action.SKIP) == before, "a skipped callback stays as it is"

        assert self.status(second).blocked_by is None, "behind a skipped head the next is the head"
        self.acquire_only(second)

    def test_a_skipped_callback_is_redelivered_at_the_tail(self) -> None:
        """Its queue has moved on."""
        first, second = self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_one(), hold=True)
        self._act(first, Action.SKIP)

        assert self._act(first, Action.REDELIVER).sequence == 3, "a skipped callback must join the tail"
        self.succeed(self.acquire_only(second))
        self.acquire_only(first)

    def test_cancelling_a_failed_head_opens_its_queue(self) -> None:
        """Cancel opens a held queue for good."""
        first, second = self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_one(), hold=True)

        status = self._act(first, Action.CANCEL)

        assert status.state is CallbackState.CANCELLED, "a failed head can be cancelled"
        assert status.failed_reason is None, "only a FAILED callback has a reason"
        self.acquire_only(second)

    def test_a_redelivered_callback_waits_behind_one_that_holds_the_queue(self) -> None:
        """A held queue stays closed until somebody redelivers, skips or cancels what holds it."""
        first, second = self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_only(first))
        self.give_up(self.acquire_only(second), hold=True)

        status = self._act(first, Action.REDELIVER)

        assert status.blocked_by == second, "a redelivered callback must wait behind what holds the queue"
        assert self.acquire() == [], "redelivery of another callback must not open a held queue"
