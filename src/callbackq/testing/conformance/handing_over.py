"""Results and the locks that follow from them, in one step: `SupportsHandover`."""

from __future__ import annotations

from datetime import timedelta
from functools import partial

from attrs import evolve

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackState
from callbackq.dataaccess import Acquired, AttemptRecord
from callbackq.errors import LockLostError
from callbackq.testing.conformance.base import (
    DELIVERED,
    DUE_AGAIN,
    HELD,
    LOCK_TIMEOUT,
    Conformance,
    an_attempt,
    check_whole,
    refuses,
)
from callbackq.testing.conformance.concurrency import race

__all__ = ["Handover"]


class Handover(Conformance):
    """record_and_acquire() does what record_attempts() does, and then what acquire_locks() does."""

    def test_the_next_of_a_queue_is_handed_over_with_the_result(self) -> None:
        """What the results have made due is among the locks."""
        first, second, third = (self.stored("queue") for _ in range(3))

        results, (acquired,) = self._hand_over([(self.acquire_only(first), DELIVERED)])

        assert results == [DELIVERED], "the written transition must be returned"
        assert self.state(first) is CallbackState.SUCCEEDED, "the result must be written"
        assert (acquired.id, acquired.lock.machine_name) == (second, "machine b"), "the next one must be locked"
        assert acquired.lock.timeout - acquired.lock.acquired == LOCK_TIMEOUT, "for as long as was asked"
        assert self.status(second).locks == (acquired.lock,), "the lock must be written"
        assert self.status(third).blocked_by == second, "the one after it must stay behind it"
        for id in (first, second, third):
            check_whole(self.status(id))

    def test_a_callback_that_is_to_be_tried_again_at_once_is_handed_over_itself(self) -> None:
        """A retry that is due is due like any other, and its queue waits for it."""
        id = self.stored("queue")
        self.stored("queue")
        before = self.acquire_only(id)

        _, (again,) = self._hand_over([(before, DUE_AGAIN)])

        assert (again.id, again.attempts_made) == (id, 1), "the same callback must be locked, with its attempt counted"
        assert again.lock.token > before.lock.token, "under a new token"

    def test_what_stays_closed_is_not_handed_over(self) -> None:
        """Heads only: not what waits for a retry, nor what is behind it or behind a callback that holds its queue."""
        for queue_id, transition in (("later", evolve(DUE_AGAIN, delay=timedelta(days=1))), ("held", HELD)):
            self.stored(queue_id)
            self.stored(queue_id)

            _, acquired = self._hand_over([(self.acquire_one(), transition)])

            assert acquired == [], "nothing is due"

    def test_other_queues_and_late_results_have_their_part(self) -> None:
        """Whatever is due is locked, up to the limit; a result under a lost lock is reported in its place."""
        stale = self.stored()
        lost = self.acquire_only(stale)
        present = self.take_over()
        done = self.stored("queue")
        held = self.acquire_only(done)
        others = {self.stored("queue"), *(self.stored(f"other {number}") for number in range(3))}

        results, acquired = self._hand_over([(lost, DELIVERED), (held, DELIVERED)], limit=3)

        assert isinstance(results[0], LockLostError), "the lost lock must be reported in its place"
        assert results[1:] == [DELIVERED], "and the other be recorded"
        assert self.status(stale).attempts[0].late, "what came late must be kept as late"
        assert self.status(stale).locks[-1] == present.lock, "the present holder's lock must stay"
        assert len(acquired) == 3, "no more than the limit must be locked"
        (last,) = self.acquire()
        assert {one.id for one in [*acquired, last]} == others, "each due callback must be locked once"

    def test_without_results_it_acquires(self) -> None:
        """Batches may be empty."""
        id = self.stored()

        results, (acquired,) = self._hand_over([])

        assert results == [], "nothing recorded, nothing returned"
        assert acquired.id == id, "what is due must be locked"

    def test_wrong_arguments_are_refused_before_anything_is_written(self) -> None:
        """InvalidRequestError: as acquire_locks()."""
        store, id = self.handing_over, self.stored()
        records = [AttemptRecord(acquired=self.acquire_only(id), attempt=an_attempt(200), transition=DELIVERED)]

        def hand_over(machine_name: str = "m", lock_timeout: timedelta = LOCK_TIMEOUT, limit: int = 1) -> object:
            return store.record_and_acquire(records, machine_name, lock_timeout=lock_timeout, limit=limit)

        refuses("machine_name", lambda value: hand_over(machine_name=value), None, "two\nlines")
        refuses("lock_timeout", lambda value: hand_over(lock_timeout=value), timedelta(0), 30)
        refuses("limit", lambda value: hand_over(limit=value), 0, -1, True)

        assert self.state(id) is CallbackState.LOCKED, "nothing must be recorded"

    def test_each_callback_is_handed_over_to_one_only(self) -> None:
        """Many hand over at the same time: nobody gets what another has, and each queue goes on in order."""
        store = self.handing_over
        ids = [[self.stored(f"queue {queue}") for _ in range(6)] for queue in range(4)]
        order: list[str] = []

        def walk(machine_name: str) -> None:
            records: list[AttemptRecord] = []
            while len(order) < sum(map(len, ids)):
                _, acquired = store.record_and_acquire(records, machine_name, lock_timeout=LOCK_TIMEOUT, limit=2)
                order.extend(one.id for one in acquired)
                records = [
                    AttemptRecord(acquired=one, attempt=an_attempt(200), transition=DELIVERED) for one in acquired
                ]
            store.record_and_acquire(records, machine_name, lock_timeout=LOCK_TIMEOUT, limit=1)

        race([partial(walk, f"machine {number}") for number in range(3)])

        assert sorted(order) == sorted(id for queue in ids for id in queue), "each callback must be locked once"
        for queue in ids:
            assert [id for id in order if id in queue] == queue, "a queue must go on in its order"
            assert all(len(self.status(id).attempts) == 1 for id in queue), "each result must be recorded once"

    def _hand_over(
        self, ends: list[tuple[Acquired, Transition]], *, limit: int = 1000
    ) -> tuple[list[Transition | LockLostError], list[Acquired]]:
        records = [
            AttemptRecord(acquired=acquired, attempt=an_attempt(200), transition=transition)
            for acquired, transition in ends
        ]
        return self.handing_over.record_and_acquire(records, "machine b", lock_timeout=LOCK_TIMEOUT, limit=limit)
