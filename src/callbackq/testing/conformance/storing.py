"""Clauses 1 to 3: what is stored stays, once, in order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any, Final
from unittest import SkipTest

from attrs import evolve

from callbackq.core.models import (
    CallbackData,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    RetryPhase,
)
from callbackq.dataaccess import Action, Durability
from callbackq.errors import ConflictError, InvalidRequestError, LockLostError
from callbackq.testing.conformance.base import (
    LOCK_TIMEOUT,
    MOMENT,
    Conformance,
    a_request,
    raises,
)
from callbackq.testing.conformance.concurrency import Child, race

__all__ = ["Durable", "Idempotent", "SequenceNumbers"]


class Durable(Conformance):
    """Clause 1: what a call returned for survives closing, reopening and the death of the process."""

    def test_the_store_declares_what_its_callbacks_survive(self) -> None:
        """durability: what a stored callback survives."""
        assert isinstance(self.store.durability, Durability), "durability must be one of Durability's words"

    def test_opening_and_closing_may_be_repeated(self) -> None:
        """open() and close() are idempotent."""
        self.store.open()
        self.store.open()
        self.store.close()
        self.store.close()

    def test_a_closed_store_opens_itself_when_it_is_used(self) -> None:
        """Other methods open the store themselves when it isn't open."""
        self.store.open()
        self.store.close()

        id = self.stored()

        assert self.state(id) is CallbackState.WAITING, "a call after close() must open the store and work"

    def test_leaving_the_context_closes_and_entering_opens(self) -> None:
        """A store is a context manager that opens and closes it."""
        with self.store as entered:
            assert entered is self.store, "the context manager must give the store itself"
            self.stored()

    def test_a_stored_callback_is_there_when_the_store_is_opened_again(self) -> None:
        """When store_callback_request() returns, the callback survives what durability says."""
        status = self.store.store_callback_request(a_request(queue_id="queue"))

        self.start_again()

        assert self.status(status.id) == status, "a stored callback must be the same after reopening"

    def test_states_attempts_and_locks_are_there_when_the_store_is_opened_again(self) -> None:
        """What record_attempt(), release_lock() and request_transition() wrote is durable when they return."""
        before = self._one_callback_in_each_state()

        self.start_again()

        for status in before:
            assert self.status(status.id) == status, f"a {status.state.value} callback must be the same after reopening"

    def test_counts_go_on_when_the_store_is_opened_again(self) -> None:
        """The counts of attempts made and of abandoned locks in a row are stored."""
        self.stored()
        self.retry(self.acquire_one())
        self.acquire_one()
        self.take_over()

        self.start_again()
        acquired = self.take_over()

        assert acquired.attempts_made == 1, "counted attempts must survive reopening"
        assert acquired.abandoned == 2, "the count of abandoned locks must survive reopening"

    def test_a_noted_cancel_is_remembered_when_the_store_is_opened_again(self) -> None:
        """A wish that waits for the end of a lock is stored."""
        id = self.stored()
        acquired = self.acquire_one()
        self.store.request_transition(id, Action.CANCEL)

        self.start_again()
        self.retry(acquired)

        assert self.state(id) is CallbackState.CANCELLED, "a noted cancel must survive reopening"

    def test_a_late_acceptance_is_remembered_when_the_store_is_opened_again(self) -> None:
        """What came late and was accepted is stored."""
        id = self.stored()
        stale = self.acquire_one()
        present = self.take_over()
        with raises(LockLostError, "a record under a lost lock"):
            self.succeed(stale)

        self.start_again()
        self.retry(present)

        assert self.state(id) is CallbackState.SUCCEEDED, "a late acceptance must survive reopening"

    def test_queues_go_on_when_the_store_is_opened_again(self) -> None:
        """Heads, numbers and the callbacks behind them are stored."""
        first, second = self.stored("queue"), self.stored("queue")

        self.start_again()
        third = self.stored("queue")

        assert self.status(third).sequence == 3, "numbers must go on after reopening"
        for id in (first, second, third):
            self.succeed(self.acquire_only(id))

    def test_a_held_queue_stays_closed_when_the_store_is_opened_again(self) -> None:
        """That a failed callback holds its queue is stored."""
        failed, behind = self.stored("queue"), self.stored("queue")
        self.give_up(self.acquire_one(), hold=True)

        self.start_again()

        assert self.acquire() == [], "a held queue must stay closed after reopening"
        assert self.status(behind).blocked_by == failed, "the held queue must name what closes it after reopening"
        self.store.request_transition(failed, Action.SKIP)
        self.acquire_only(behind)

    def test_a_callback_survives_the_kill_of_the_process_that_stored_it(self) -> None:
        """When the call has returned, the death of any process loses nothing."""
        self._skip_unless_shared()
        self.stored("queue", id="before")

        def store_and_die() -> None:
            self.stored("queue", id="by-the-child")
            os.kill(os.getpid(), signal.SIGKILL)

        Child(lambda _: store_and_die()).finish()

        assert self.status("by-the-child").sequence == 2, "what a killed process had stored must be there"

    def test_a_killed_process_leaves_every_callback_whole(self) -> None:
        """A process that is killed at any moment leaves nothing half written."""
        self._skip_unless_shared()
        for number in range(3):

            def deliver_without_end(tell: Callable[[], None], queue: str = f"queue {number}") -> None:
                while True:
                    id = self.stored(queue)
                    for acquired in self.acquire():
                        (self.retry if not acquired.attempts_made else self.succeed)(acquired)
                    tell()
                    self.status(id)

            child = Child(deliver_without_end)
            child.hear(3 + number)
            child.kill()

            # Whatever it held is released by time alone; nothing may be stuck, doubled or half written.
            self.clock.advance(LOCK_TIMEOUT + MOMENT)
            while batch := self.acquire():
                for acquired in batch:
                    self._check_whole(self.status(acquired.id))
                    self.succeed(acquired)
            assert self.store.next_due() is None, "after a kill every callback can be brought to its end"

    def _check_whole(self, status: CallbackStatus) -> None:
        completed = [lock for lock in status.locks if lock.completed]
        assert len(completed) == len(status.attempts), "each completed lock must have its attempt after a kill"
        assert sum(not lock.ended for lock in status.locks) == 1, "only the newest lock may be live after a kill"

    def _skip_unless_shared(self) -> None:
        if self.store.durability < Durability.PROCESS:
            raise SkipTest("the store's callbacks end with their process")

    def _one_callback_in_each_state(self) -> list[CallbackStatus]:
        self.stored(id="cancelled")
        self.store.request_transition("cancelled", Action.CANCEL)
        self.stored(id="succeeded")
        self.succeed(self.acquire_one())
        self.stored("held", id="failed")
        self.give_up(self.acquire_one(), hold=True)
        self.stored("held", id="blocked")
        self.stored(id="waiting")
        self.retry(self.acquire_one(), delay=timedelta(hours=1))
        self.stored(id="released")
        self.store.release_lock(self.acquire_one(), delay=timedelta(hours=2))
        self.stored(id="locked")
        self.acquire_one()
        self.take_over(lock_timeout=timedelta(hours=3))
        ids = ("cancelled", "succeeded", "failed", "blocked", "waiting", "released", "locked")
        return [self.status(id) for id in ids]


_OTHER_CONTENT: Final[dict[str, dict[str, Any]]] = {
    "url": {"url": "https://receiver.example/other"},
    "method": {"method": "PUT"},
    "headers": {"post_data": CallbackData(headers={"x-name": "Value"}, data=b"body")},
    "case of a header": {"post_data": CallbackData(headers={"x-name": "value"}, data=b"body")},
    "body": {"post_data": CallbackData(headers={"X-Name": "value"}, data=b"other")},
    "empty body": {"post_data": CallbackData(headers={"X-Name": "value"}, data=b"")},
    "no body": {"post_data": CallbackData(headers={"X-Name": "value"})},
    "retry phases": {"retry_phases": (RetryPhase(retries=1, delay=timedelta(seconds=2)),)},
    "application": {"application_id": "other"},
    "queue": {"queue_id": "other"},
    "no queue": {"queue_id": ""},
    "e-mail address": {"notification_email_address": "other@host.example"},
    "on_exhausted": {"on_exhausted": "hold"},
}


class Idempotent(Conformance):
    """Clause 2: one id, one callback."""

    request: Final = a_request(
        queue_id="queue",
        post_data=CallbackData(headers={"X-Name": "value"}, data=b"body"),
        retry_phases=(RetryPhase(retries=1, delay=timedelta(seconds=1)),),
    )

    def test_repeating_a_call_stores_the_callback_once(self) -> None:
        """An id that is stored with an equal request: nothing is written, the stored callback's status is returned."""
        first = self.store.store_callback_request(self.request, id="repeated")

        again = self.store.store_callback_request(evolve(self.request), id="repeated")

        assert again == first, "repeating the call must return the stored callback"
        self.succeed(self.acquire_only("repeated"))
        assert self.acquire() == [], "a callback that was stored twice must be delivered once"

    def test_repeating_a_call_uses_up_no_number(self) -> None:
        """A repeated call writes nothing."""
        for _ in range(2):
            self.store.store_callback_request(self.request, id="repeated")

        assert self.status(self.stored("queue")).sequence == 2, "a repeated call must not use up a number"

    def test_repeating_a_call_later_does_not_revive_the_callback(self) -> None:
        """The stored callback's status is returned, whatever has become of it."""
        self.store.store_callback_request(self.request, id="repeated")
        self.succeed(self.acquire_one())
        delivered = self.status("repeated")

        again = self.store.store_callback_request(self.request, id="repeated")

        assert again == delivered, "repeating the call must return the callback as it stands"
        assert self.acquire() == [], "repeating the call must not deliver the callback again"

    def test_repeating_a_batch_with_its_ids_stores_each_callback_once(self) -> None:
        """Repeating store_callback_requests() with the same ids is harmless, also when a first call came half way."""
        requests = [evolve(self.request, application_id=str(number)) for number in range(3)]
        self.store.store_callback_request(requests[0], id="a")

        first = self.store.store_callback_requests(requests, ids=["a", "b", "c"])
        again = self.store.store_callback_requests(requests, ids=["a", "b", "c"])

        assert [status.id for status in first] == ["a", "b", "c"], "the given ids must be used, in their order"
        assert again == first, "repeating the batch must return the stored callbacks"
        assert self.status(self.stored("queue")).sequence == 4, "a repeated batch must use up no number"

    def test_a_batch_may_leave_ids_to_the_store(self) -> None:
        """None: a new random one."""
        requests = [a_request(application_id=str(number)) for number in range(3)]

        statuses = self.store.store_callback_requests(requests, ids=["first", None, None])

        assert statuses[0].id == "first", "a given id must be used"
        assert len({status.id for status in statuses}) == 3, "a request without an id must get one of its own"
        assert [self.status(status.id).request for status in statuses] == requests, "ids must not be mixed up"

    def test_an_id_that_comes_twice_in_a_batch_is_one_callback(self) -> None:
        """One id, one callback, also within a batch."""
        requests = [self.request, evolve(self.request)]

        statuses = self.store.store_callback_requests(requests, ids=["same", "same"])

        assert [status.id for status in statuses] == ["same", "same"], "both must name the one callback"
        assert [one.id for one in self.acquire()] == ["same"], "it must be stored once"
        with raises(ConflictError, "other content under an id of the same batch"):
            self.store.store_callback_requests([self.request, evolve(self.request, queue_id="x")], ids=["y", "y"])

    def test_ids_that_do_not_match_the_batch_are_refused(self) -> None:
        """InvalidRequestError: an id is malformed, or there are more or fewer ids than requests."""
        for ids in (["a"], ["a", "b", "c"], ["good", "bad.dot"]):
            with raises(InvalidRequestError, f"the ids {ids} for two requests"):
                self.store.store_callback_requests([self.request, self.request], ids=ids)

    def test_other_content_under_the_same_id_is_refused(self) -> None:
        """ConflictError: the id is stored with another request."""
        before = self.store.store_callback_request(self.request, id="taken")

        for name, change in _OTHER_CONTENT.items():
            with raises(ConflictError, f"another {name} under a taken id") as caught:
                self.store.store_callback_request(evolve(self.request, **change), id="taken")
            assert caught.error.id == "taken", "the error must name the id"

        assert self.status("taken") == before, "a refused request must not change the stored callback"

    def test_a_refused_request_uses_up_no_number(self) -> None:
        """A conflict stores nothing."""
        self.stored("queue", id="taken")
        with raises(ConflictError, "another method under a taken id"):
            self.stored("queue", id="taken", method="PUT")

        assert self.status(self.stored("queue")).sequence == 2, "a refused request must not use up a number"

    def test_racing_repetitions_store_the_callback_once(self) -> None:
        """However many callers repeat a call at once, one callback is stored."""
        for number in range(10):
            id = f"repeated-{number}"
            statuses = race([partial(self.store.store_callback_request, self.request, id=id)] * 4)

            assert {status.sequence for status in statuses} == {number + 1}, (
                "racing repetitions must store one callback"
            )

    def test_of_racing_contents_one_is_stored(self) -> None:
        """However many callers store under one id at once, one wins and the others are told."""
        for number in range(10):

            def store(content: int, id: str = f"raced-{number}") -> CallbackRequest | None:
                try:
                    return self.store.store_callback_request(a_request(application_id=str(content)), id=id).request
                except ConflictError:
                    return None

            stored = [request for request in race([partial(store, content) for content in range(4)]) if request]

            assert len(stored) == 1, "of several contents under one id exactly one must be stored"
            assert self.status(f"raced-{number}").request == stored[0], "the winner must be what is stored"

    def test_callbacks_without_an_id_get_one_of_their_own(self) -> None:
        """No id: a new random one, within the limits for ids."""
        ids = {self.stored() for _ in range(20)}

        assert len(ids) == 20, "each callback must get an id of its own"
        for id in ids:
            self.store.store_callback_request(a_request(), id=id)


class SequenceNumbers(Conformance):
    """Clause 3: numbers rise in the order of storing, from 1, without gaps or repetition."""

    def test_numbers_count_from_one_in_each_queue(self) -> None:
        """A callback has the next number of its queue; numbers start at 1."""
        stored = [self.status(self.stored(queue)) for queue in ("a", "b", "a", "a", "b")]

        assert [status.sequence for status in stored] == [1, 1, 2, 3, 2], "each queue must count from 1"

    def test_a_callback_without_a_queue_has_number_one(self) -> None:
        """A callback without a queue is the only one in a queue of its own."""
        for _ in range(2):
            status = self.status(self.stored(""))
            assert (status.queue_id, status.sequence) == ("", 1), "a callback without a queue must have number 1"

    def test_queue_names_are_compared_exactly(self) -> None:
        """Names that only look alike are different queues."""
        alike = ["a", "A", " a", "a ", "á", "a\u0301", "ａ", "a\u200b", "0", "00", "null", "None", "%", "_", "'"]

        for queue in alike:
            assert self.status(self.stored(queue)).sequence == 1, f"the queue {queue!a} must be one of its own"

        assert len(self.acquire()) == len(alike), "queues that only look alike must not wait for each other"

    def test_several_are_stored_in_their_order(self) -> None:
        """store_callback_requests() stores in the given order."""
        requests = [a_request(queue_id="queue", application_id=str(number)) for number in range(5)]

        statuses = self.store.store_callback_requests(requests)

        assert [status.request for status in statuses] == requests, "statuses must come in the order of the requests"
        assert [status.sequence for status in statuses] == [1, 2, 3, 4, 5], "requests must be numbered in their order"
        assert [self.status(status.id) for status in statuses] == statuses, "every one must be stored"

    def test_no_number_is_used_twice_when_a_queue_runs_empty(self) -> None:
        """Numbers are never used twice."""
        for number in (1, 2, 3):
            assert self.status(self.stored("queue")).sequence == number, "an empty queue must go on counting"
            self.succeed(self.acquire_one())

    def test_concurrent_writers_get_different_rising_numbers(self) -> None:
        """If storing a had returned before storing b began, a's number is lower, whoever stored them."""

        def write() -> list[int]:
            return [self.status(self.stored("queue")).sequence for _ in range(6)]

        numbers = race([write] * 4)

        for mine in numbers:
            assert mine == sorted(mine), "what a writer stores later must have a higher number"
        assert sorted(chain(*numbers)) == list(range(1, 25)), "concurrent writers must get each number once"

    def test_callbacks_are_acquired_in_the_order_of_their_numbers(self) -> None:
        """The head of a queue is the open callback with the lowest number."""
        race([lambda: [self.stored("queue") for _ in range(3)]] * 4)

        for number in range(1, 13):
            acquired = self.acquire_one()
            assert acquired.sequence == number, "callbacks must be acquired in the order of their numbers"
            self.succeed(acquired)
