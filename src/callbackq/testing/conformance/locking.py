"""Clauses 5 to 7: who may have which callback, when, and what tells one lock from another."""

from __future__ import annotations

import threading
from datetime import timedelta
from functools import partial
from itertools import chain
from unittest import SkipTest

from attrs import evolve

from callbackq.core.models import CallbackState
from callbackq.dataaccess import Acquired, Action, DataAccess, Durability
from callbackq.errors import LockLostError
from callbackq.testing.conformance.base import DUE_AGAIN, LOCK_TIMEOUT, MOMENT, Conformance, a_request, an_attempt
from callbackq.testing.conformance.concurrency import race

__all__ = ["Exclusive", "HeadOnly", "Tokens"]

# A store without exclusion would feed an open-ended race for ever.
_ROUNDS = 10
_CALLERS = 8


class Exclusive(Conformance):
    """Clause 5: concurrent callers never hold two live locks on a callback, nor on a queue."""

    def test_a_locked_callback_is_not_locked_again(self) -> None:
        """At most one live lock per callback."""
        self.stored()
        self.acquire_one()

        assert self.acquire() == [], "a callback with a live lock must not be locked again"

    def test_a_queue_with_a_locked_callback_gives_no_other(self) -> None:
        """At most one live lock per queue."""
        self.stored("queue"), self.stored("queue")
        self.acquire_one()

        assert self.acquire() == [], "a queue with a live lock must give no second one"

    def test_racing_callers_get_each_head_once(self) -> None:
        """However many callers race, each head goes to one of them."""
        for number in range(_ROUNDS):
            queues = [f"queue {number}-{letter}" for letter in "ab"]
            requests = [a_request(queue_id=queue) for queue in (*queues, *queues, "", "")]
            ids = [status.id for status in self.store.store_callback_requests(requests)]

            taken = list(chain(*race([lambda: self.acquire(limit=2)] * _CALLERS)))
            taken += self.acquire()

            heads = sorted(ids[:2] + ids[4:])
            assert sorted(one.id for one in taken) == heads, "racing callers must get each head exactly once"

    def test_racing_takeovers_go_to_one_caller_each(self) -> None:
        """Of those who find a lock that has timed out, one takes over."""
        for _ in range(4):
            self.stored("queue"), self.stored(), self.stored()
        heads = sorted(one.id for one in self.acquire())

        for _ in range(_ROUNDS // 3):
            self.clock.advance(LOCK_TIMEOUT + MOMENT)
            taken = list(chain(*race([self.acquire] * _CALLERS)))
            assert sorted(one.id for one in taken) == heads, "a lock that timed out must go to one caller only"

    def test_a_result_and_a_takeover_never_both_win(self) -> None:
        """Either the holder's result counts, or the callback has been taken over; never both."""
        for _ in range(_ROUNDS):
            id = self.stored()
            holder = self.acquire_one()
            self.clock.advance(LOCK_TIMEOUT + MOMENT)

            outcome: list[object] = race([partial(self._record, holder), self.acquire])

            recorded, taken = outcome
            assert recorded != bool(taken), "a result and a takeover of its lock must not both win"
            status = self.status(id)
            expected = CallbackState.SUCCEEDED if recorded else CallbackState.LOCKED
            assert status.state is expected, "the state must follow the one who won"
            assert [attempt.late for attempt in status.attempts] == [not recorded], "the loser's attempt is late"
            assert len(status.locks) == 1 + bool(taken), "only a takeover adds a lock"
            for acquired in self.acquire() + (taken if isinstance(taken, list) else []):
                self.succeed(acquired)

    def test_threads_that_drain_queues_keep_each_in_order(self) -> None:
        """No request for a callback starts while one with a lower number in its queue is open."""
        queues = [f"queue {letter}" for letter in "abc"]
        for queue in queues * 5:
            self.stored(queue)
        begun: list[Acquired] = []
        under_way: set[str] = set()
        mutex = threading.Lock()

        def drain() -> None:
            for _ in range(40):
                for acquired in self.acquire(limit=2):
                    with mutex:
                        assert acquired.queue_id not in under_way, "two callbacks of a queue were locked at once"
                        under_way.add(acquired.queue_id)
                        begun.append(acquired)
                    with mutex:
                        # Before the record: after it another thread may hold the queue's next callback at once.
                        under_way.remove(acquired.queue_id)
                    self.succeed(acquired)
                if len(begun) == 15:
                    return

        race([drain] * 4)
        while batch := self.acquire():
            for acquired in batch:
                begun.append(acquired)
                self.succeed(acquired)

        for queue in queues:
            numbers = [acquired.sequence for acquired in begun if acquired.queue_id == queue]
            assert numbers == [1, 2, 3, 4, 5], "a queue must be delivered in order, each callback once"

    def test_two_objects_on_the_same_data_never_share_a_head(self) -> None:
        """Exclusion holds between processes, not only within one."""
        other = self.another_object()

        for _ in range(_ROUNDS):
            ids = sorted(self.stored(queue) for queue in ("", "", ""))

            def acquire(store: DataAccess) -> list[Acquired]:
                return store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=2)

            taken = list(chain(*race([lambda: acquire(self.store), lambda: acquire(other)] * 2)))
            taken += self.acquire()

            assert sorted(one.id for one in taken) == ids, "two objects must not lock the same head"

    def _record(self, holder: Acquired) -> bool:
        try:
            self.succeed(holder)
        except LockLostError:
            return False
        return True


class HeadOnly(Conformance):
    """Clause 6: only due heads are acquired, those longest due first."""

    def test_what_was_acquired_says_all_about_the_callback(self) -> None:
        """An Acquired carries id, request, queue, number and lock, and starts at zero."""
        request = a_request(queue_id="queue")
        id = self.store.store_callback_request(request).id

        acquired = self.acquire_one(machine_name="machine x")

        assert (acquired.id, acquired.request) == (id, request), "id and request must be those of the callback"
        assert (acquired.queue_id, acquired.sequence) == ("queue", 1), "queue and number must be those of the callback"
        assert (acquired.attempts_made, acquired.abandoned) == (0, 0), "a new callback has no attempts or locks"
        assert acquired.lock.machine_name == "machine x", "the lock must carry the given name"
        assert not acquired.lock.completed, "a new lock is not completed"
        assert acquired.lock.ended is None, "a new lock is live"
        status = self.status(id)
        assert status.state is CallbackState.LOCKED, "an acquired callback is LOCKED"
        assert status.locks == (acquired.lock,), "the log must show the lock"
        assert status.next_attempt_at is None, "only a WAITING callback has a next attempt"

    def test_a_stored_callback_is_due_at_once(self) -> None:
        """It is WAITING, due now."""
        status = self.store.store_callback_request(a_request())

        assert status.state is CallbackState.WAITING, "a stored callback is WAITING"
        assert status.next_attempt_at == self.store.now(), "a stored callback is due now"
        assert (status.attempts, status.locks, status.failed_reason) == ((), (), None), "nothing has happened to it"
        self.acquire_only(status.id)

    def test_only_the_head_of_a_queue_is_acquired(self) -> None:
        """Of a queue the callback with the lowest number."""
        first = self.stored("queue")
        self.stored("queue"), self.stored("queue")

        self.acquire_only(first)

    def test_the_next_follows_when_the_head_has_succeeded(self) -> None:
        """When the state is final and doesn't hold the queue, the queue's next callback is its head."""
        _, second = self.stored("queue"), self.stored("queue")
        self.succeed(self.acquire_one())

        self.acquire_only(second)

    def test_the_next_follows_when_the_head_has_failed(self) -> None:
        """A FAILED callback that doesn't hold the queue lets the next one go."""
        _, second = self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_one())

        self.acquire_only(second)

    def test_a_failed_callback_that_holds_its_queue_closes_it(self) -> None:
        """A FAILED callback that holds the queue is its head, and is not acquired itself."""
        self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_one(), hold=True)
        self.stored("queue")

        assert self.acquire() == [], "a held queue must stay closed"
        self.clock.advance(timedelta(days=30))
        assert self.acquire() == [], "time alone must not open a held queue"

    def test_a_callback_that_waits_for_a_retry_closes_its_queue_only(self) -> None:
        """A waiting queue never slows another."""
        self.stored("queue"), self.stored("queue")
        self.retry(self.acquire_one(), delay=timedelta(hours=1))
        other = self.stored("other")

        self.acquire_only(other)

    def test_a_retry_is_due_after_its_delay_and_not_before(self) -> None:
        """WAITING is due delay from now."""
        id = self.stored()
        self.retry(self.acquire_one(), delay=timedelta(seconds=10))

        self.clock.advance(timedelta(seconds=10) - MOMENT)
        assert self.acquire() == [], "a retry must not be acquired before it is due"
        self.clock.advance(2 * MOMENT)
        assert self.acquire_only(id).attempts_made == 1, "the counted attempt must be told"

    def test_a_released_callback_is_due_after_its_delay(self) -> None:
        """The callback is WAITING and due delay from now."""
        id = self.stored()
        self.store.release_lock(self.acquire_one(), delay=timedelta(seconds=10))

        assert self.status(id).next_attempt_at == self.store.now() + timedelta(seconds=10), "due after the delay"
        assert self.acquire() == [], "a released callback must not be acquired before it is due"
        self.clock.advance(timedelta(seconds=10) + MOMENT)
        self.acquire_only(id)

    def test_a_callback_released_without_delay_is_due_at_once(self) -> None:
        """No delay: due now."""
        id = self.stored()
        self.store.release_lock(self.acquire_one())

        self.acquire_only(id)

    def test_a_retried_head_comes_before_those_behind_it(self) -> None:
        """Retries and takeovers don't let others overtake."""
        first = self.stored("queue")
        self.stored("queue")
        self.retry(self.acquire_one())
        self.store.release_lock(self.acquire_only(first))
        self.acquire_only(first)

        assert self.take_over().id == first, "a taken over head must come before those behind it"

    def test_no_more_than_the_limit_are_acquired(self) -> None:
        """At most limit."""
        for _ in range(5):
            self.stored()

        assert [len(self.acquire(limit=limit)) for limit in (2, 1, 9)] == [2, 1, 2], "the limit must be kept"

    def test_those_longest_due_are_acquired_first(self) -> None:
        """Those longest due first."""
        late = self.stored("late")
        self.retry(self.acquire_one(), delay=timedelta(seconds=30))
        expiring = self.stored("expiring")
        self.acquire_one(lock_timeout=timedelta(seconds=20))
        early = self.stored("early")
        self.retry(self.acquire_one(), delay=timedelta(seconds=10))
        self.clock.advance(timedelta(seconds=25))
        new = self.stored("new")
        self.clock.advance(timedelta(seconds=10))

        acquired = [one.id for _ in range(4) for one in self.acquire(limit=1)]

        assert acquired == [early, expiring, new, late], "those longest due must be acquired first"

    def test_one_call_acquires_those_longest_due(self) -> None:
        """The limit cuts off those due last."""
        ids = []
        for _ in range(4):
            ids.append(self.stored())
            self.clock.advance(MOMENT)

        assert {one.id for one in self.acquire(limit=2)} == set(ids[:2]), "the limit must cut off those due last"

    def test_a_callback_that_waited_behind_others_keeps_its_due_time(self) -> None:
        """The due time of a stored callback is when it was stored, also when it becomes a head later."""
        self.stored("queue")
        behind = self.stored("queue")
        due = self.status(behind).next_attempt_at
        self.clock.advance(MOMENT)
        self.stored("other")
        self.clock.advance(MOMENT)
        self.succeed(self.acquire(limit=1)[0])

        assert self.status(behind).next_attempt_at == due, "becoming a head must not change the due time"
        assert behind in {one.id for one in self.acquire(limit=2)}, "it is the head, and due"

    def test_many_closed_queues_hide_no_open_one(self) -> None:
        """However many queues wait, a due head is found."""
        for number in range(40):
            self.stored(f"queue {number}"), self.stored(f"queue {number}")
        for acquired in self.acquire():
            self.retry(acquired, delay=timedelta(hours=1))
        self.clock.advance(MOMENT)
        open_one = self.stored("open")

        assert [one.id for one in self.acquire(limit=1)] == [open_one], "closed queues must hide no due head"

    def test_callbacks_without_a_queue_never_wait_for_each_other(self) -> None:
        """Each is the only one in a queue of its own, and holds nobody up."""
        ids = {self.stored() for _ in range(3)}

        assert {one.id for one in self.acquire()} == ids, "callbacks without a queue must not wait for each other"

    def test_open_callbacks_say_what_closes_their_queue(self) -> None:
        """blocked_by names the head of its queue for an open callback that isn't the head."""
        head, behind = self.stored("queue"), self.stored("queue")
        other, alone = self.stored("other"), self.stored()

        def blocked_by() -> list[str | None]:
            return [self.status(id).blocked_by for id in (head, behind, other, alone)]

        assert blocked_by() == [None, head, None, None], "the head must be named while it is WAITING"
        acquired = next(one for one in self.acquire() if one.id == head)
        assert blocked_by() == [None, head, None, None], "the head must be named while it is LOCKED"
        self.retry(acquired, delay=timedelta(hours=1))
        assert blocked_by() == [None, head, None, None], "the head must be named while it waits for a retry"
        self.clock.advance(timedelta(hours=2))
        acquired = next(one for one in self.acquire() if one.id == head)
        self.give_up(acquired, hold=True)
        assert blocked_by() == [None, head, None, None], "a FAILED head that holds the queue must be named"
        self.store.request_transition(head, Action.SKIP)
        assert blocked_by() == [None, None, None, None], "an open queue's head is blocked by nothing"

    def test_the_store_says_when_something_is_due(self) -> None:
        """next_due() is the earliest of all heads' due times and locks' timeouts; None when there are none."""
        assert self.store.next_due() is None, "an empty store has nothing due"

        self.stored("queue"), self.stored("queue")
        stored_at = self.store.now()
        assert self.store.next_due() == stored_at, "a new callback is due when it was stored"
        self.clock.advance(timedelta(seconds=1))
        assert self.store.next_due() == stored_at, "what is due may lie in the past"
        acquired = self.acquire_one()
        assert self.store.next_due() == acquired.lock.timeout, "a locked head is due when its lock times out"
        self.retry(acquired, delay=timedelta(minutes=5))
        assert self.store.next_due() == self.store.now() + timedelta(minutes=5), "a retry is due after its delay"
        self.stored("other")
        assert self.store.next_due() == self.store.now(), "the earliest of all heads counts"
        self.succeed(self.acquire_one())
        self.clock.advance(timedelta(minutes=6))
        self.give_up(self.acquire_one(), hold=True)
        assert self.store.next_due() is None, "nothing becomes due behind a callback that holds its queue"

    def test_attempts_made_count_what_the_transition_counts(self) -> None:
        """The count of attempts made rises by one if counted."""
        self.stored()
        for counted, made in ((True, 0), (False, 1), (True, 1), (True, 2)):
            acquired = self.acquire_one()
            assert acquired.attempts_made == made, "only counted attempts must be counted"
            self.store.record_attempt(acquired, an_attempt(), evolve(DUE_AGAIN, counted=counted))

        assert self.acquire_one().attempts_made == 3, "only counted attempts must be counted"


class Tokens(Conformance):
    """Clause 7: a callback's tokens rise strictly and never repeat."""

    def test_each_lock_has_a_higher_token(self) -> None:
        """A token is higher than any this callback ever had, however its last lock ended."""
        id = self.stored()

        acquired = [self.acquire_one()]
        self.retry(acquired[-1])
        acquired.append(self.acquire_one())
        self.store.release_lock(acquired[-1])
        acquired.append(self.acquire_one())
        acquired.append(self.take_over())
        self.give_up(acquired[-1])
        self.store.request_transition(id, Action.REDELIVER)
        acquired.append(self.acquire_one())

        tokens = [one.lock.token for one in acquired]
        assert tokens == sorted(set(tokens)), "tokens must rise strictly"
        assert [lock.token for lock in self.status(id).locks] == tokens, "the log must show the tokens"

    def test_tokens_rise_when_the_store_is_opened_again(self) -> None:
        """Also across reopening."""
        self.stored()
        tokens = []

        for _ in range(3):
            acquired = self.acquire_one()
            tokens.append(acquired.lock.token)
            self.retry(acquired)
            self.start_again()

        assert tokens == sorted(set(tokens)), "tokens must rise strictly across reopening"

    def test_tokens_rise_when_the_holder_was_killed(self) -> None:
        """A token that was handed out counts, also when nothing was recorded under it."""
        self.stored()
        first = self.acquire_one()

        self.start_again()
        second = self.take_over()

        assert second.lock.token > first.lock.token, "a token must not be handed out again after a restart"

    def test_two_objects_never_hand_out_the_same_token(self) -> None:
        """Tokens of a callback rise whoever hands them out."""
        if self.store.durability < Durability.PROCESS:
            raise SkipTest("the store's callbacks end with their process")
        id = self.stored()
        stores = [self.store, self.another_object()]

        for turn in range(4):
            store = stores[turn % 2]
            (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
            store.release_lock(acquired)

        tokens = [lock.token for lock in self.status(id).locks]
        assert tokens == sorted(set(tokens)), "tokens must rise strictly, whichever object hands them out"
