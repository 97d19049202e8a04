"""Clauses 13 and 14: errors that can be relied on, and use from many threads and from forked children."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from callbackq.core.models import CallbackState
from callbackq.dataaccess import Action, Durability
from callbackq.errors import (
    CallbackNotFoundError,
    DataAccessError,
    InvalidRequestError,
    TransientDataAccessError,
)
from callbackq.testing.conformance.base import (
    DELIVERED,
    LOCK_TIMEOUT,
    MOMENT,
    Conformance,
    a_request,
    an_attempt,
    raises,
    refuses,
)
from callbackq.testing.conformance.concurrency import Child, race, while_threads_run

__all__ = ["Errors", "ThreadsAndForks"]

_MALFORMED_IDS: Final = ("", ".", "a.b", "a b", "a\n", "\x00", "\x7f", "é", "\ud800", "\U0001f600", "x" * 256)


class Errors(Conformance):
    """Clause 13: only callbackq's own errors come out, and they tell the truth about what was written."""

    def test_an_unknown_id_is_not_found(self) -> None:
        """CallbackNotFoundError: nothing is stored under the id."""
        self.stored(id="known")

        for call in (self.status, lambda id: self.store.request_transition(id, Action.CANCEL)):
            with raises(CallbackNotFoundError, "an unknown id") as caught:
                call("unknown")
            assert caught.error.id == "unknown", "the error must name the id"
            with raises(CallbackNotFoundError, "an id of another case"):
                call("KNOWN")

    def test_a_malformed_id_is_not_found(self) -> None:
        """Nothing can be stored under a malformed id, and asking for it is no fault of the store."""
        for id in (*_MALFORMED_IDS, "x" * 100_000):
            with raises(CallbackNotFoundError, f"the status of {id[:20]!a}"):
                self.status(id)
            with raises(CallbackNotFoundError, f"a wish for {id[:20]!a}"):
                self.store.request_transition(id, Action.CANCEL)

    def test_what_is_no_string_is_not_found(self) -> None:
        """What can't be an id is not found, whatever its type."""
        self.stored(id="1")
        ids: list[Any] = [None, 1, b"1", ["1"], {}]

        for id in ids:
            with raises(CallbackNotFoundError, f"the status of {id!r}"):
                self.status(id)
            with raises(CallbackNotFoundError, f"a wish for {id!r}"):
                self.store.request_transition(id, Action.CANCEL)

    def test_a_wrong_argument_is_refused_by_its_name(self) -> None:
        """An argument of another type or out of bounds is refused with InvalidRequestError, which names it."""
        store, request = self.store, a_request(queue_id="queue")
        refuses("request", lambda it: store.store_callback_request(it), None, {}, "https://receiver.example/")
        refuses("id", lambda it: store.store_callback_request(request, id=it), 1, b"id", ["id"])
        refuses("requests[1]", lambda it: store.store_callback_requests([request, it]), None, "request")
        refuses("requests", lambda it: store.store_callback_requests(it), None, request, iter([request]))
        refuses("ids[1]", lambda it: store.store_callback_requests([request, request], ids=["a", it]), 1, "b.dot")
        refuses("ids", lambda it: store.store_callback_requests([request, request], ids=it), 2, "ab", ["a"])
        assert store.next_due() is None, "what was refused must not have been stored"

        id = self.stored("queue")
        assert self.status(id).sequence == 1, "what was refused must not have used up a number"
        before = self.status(id)
        refuses(
            "machine_name",
            lambda it: store.acquire_locks(it, lock_timeout=LOCK_TIMEOUT, limit=1),
            *(None, 1, b"machine", "a\nb", "\ud800", "x" * 256),
        )
        refuses(
            "lock_timeout",
            lambda it: store.acquire_locks("machine", lock_timeout=it, limit=1),
            *(None, 60, timedelta(0), -MOMENT, timedelta.max),
        )
        refuses(
            "limit",
            lambda it: store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=it),
            *(None, 0, -1, 1.0, "1", True),
        )
        refuses("action", lambda it: store.request_transition(id, it), None, "cancel", CallbackState.CANCELLED)
        assert self.status(id) == before, "what was refused must have changed nothing"

        acquired = self.acquire_one()
        refuses("delay", lambda it: store.release_lock(acquired, delay=it), None, 1, -MOMENT, timedelta.max)
        self.succeed(acquired)

    def test_a_malformed_id_is_refused_and_stores_nothing(self) -> None:
        """InvalidRequestError: the id is malformed."""
        for id in _MALFORMED_IDS:
            with raises(InvalidRequestError, f"storing under {id[:20]!a}") as caught:
                self.stored("queue", id=id)
            assert [path for path, _ in caught.error.errors] == ["id"], "the error must name the field"

        assert self.acquire() == [], "a refused callback must not be stored"
        assert self.status(self.stored("queue")).sequence == 1, "a refused callback must not use up a number"

    def test_a_fault_of_the_backend_is_a_dataaccess_error(self) -> None:
        """All methods may raise DataAccessError, with the driver's exception as the cause, and nothing else."""
        id = self.stored("queue", id="before")
        acquired = self.acquire_one()
        calls: dict[str, Callable[[], object]] = {
            "store_callback_request": lambda: self.stored("queue"),
            "get_callback_status": lambda: self.status(id),
            "acquire_locks": self.acquire,
            "release_lock": lambda: self.store.release_lock(acquired),
            "record_attempt": lambda: self.succeed(acquired),
            "request_transition": lambda: self.store.request_transition(id, Action.CANCEL),
            "next_due": self.store.next_due,
        }

        failed = 0
        for name, call in calls.items():
            with self.outage(self.store):
                error = _error_of(call)
            if error is not None:
                assert isinstance(error, DataAccessError), f"{name}: a fault of the backend must be a DataAccessError"
                assert error.__cause__ is not None, f"{name}: the driver's exception must be the cause"
                failed += 1
        assert failed, "outage() must keep the store from working"

    def test_after_a_fault_the_same_object_works_again(self) -> None:
        """After a fault the same object works again once the backend does."""
        self.stored("queue", id="before")
        with self.outage(self.store), raises(DataAccessError, "storing during an outage"):
            self.stored("queue", id="during")

        self.stored("queue", id="during")

        self.succeed(self.acquire_only("before"))
        self.succeed(self.acquire_only("during"))
        assert self.acquire() == [], "repeating a call that raised must store the callback once"

    def test_a_transient_fault_has_written_nothing(self) -> None:
        """TransientDataAccessError means that nothing was written."""
        id = self.stored("queue")
        acquired = self.acquire_one()
        before = self.status(id)
        calls: list[Callable[[], object]] = [
            lambda: self.stored("queue", id="during"),
            self.acquire,
            lambda: self.store.release_lock(acquired),
            lambda: self.store.record_attempt(acquired, an_attempt(200), DELIVERED),
            lambda: self.store.request_transition(id, Action.CANCEL),
        ]

        for call in calls:
            with self.outage(self.store), raises(DataAccessError, "a call during an outage") as caught:
                call()
            if not isinstance(caught.error, TransientDataAccessError):
                return
            assert self.status(id) == before, "a transient fault must have written nothing"

        with raises(CallbackNotFoundError, "what a transient fault kept from being stored"):
            self.status("during")
        self.succeed(acquired)


def _error_of(call: Callable[[], object]) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


class ThreadsAndForks(Conformance):
    """Clause 14: one object serves many threads, and goes on working in a forked child."""

    def test_threads_share_one_object(self) -> None:
        """One object may be used from many threads."""
        ids: list[str] = []

        def work() -> None:
            for number in range(3):
                ids.append(self.stored(f"queue {number}"))
                self.stored()
                for acquired in self.acquire(limit=2):
                    self.succeed(acquired)
                self.status(ids[-1])
                self.store.next_due()

        race([work] * 4)
        while batch := self.acquire():
            for acquired in batch:
                self.succeed(acquired)

        assert len(set(ids)) == 12, "each thread's callbacks must be stored"
        for id in ids:
            assert self.state(id) is CallbackState.SUCCEEDED, "what many threads store and record must all be done"

    def test_threads_may_open_and_close_under_each_other(self) -> None:
        """A close in one thread is no fault in another: calls open the store themselves."""

        def work() -> None:
            for _ in range(5):
                self.stored("queue")
                self.store.close()

        race([work] * 3)

        assert self.status(self.stored("queue")).sequence == 16, "a close elsewhere must lose nothing"

    def test_a_forked_child_can_use_the_object(self) -> None:
        """Other methods open the store themselves, also in a process that was forked while it was open."""
        first = self.stored("queue")

        def work() -> None:
            assert self.state(first) is CallbackState.WAITING, "the child must find what was stored"
            self.stored("queue", id="by-the-child")
            self.succeed(self.acquire_only(first))
            assert self.state(first) is CallbackState.SUCCEEDED, "the child must be able to record"

        Child(lambda _: work()).finish()

        if self.store.durability >= Durability.PROCESS:
            assert self.state(first) is CallbackState.SUCCEEDED, "what the child recorded must be there"
            self.acquire_only("by-the-child")
        else:
            self.acquire_only(first)

    def test_a_child_leaves_its_parents_object_alone(self) -> None:
        """After the child has used and closed its object, the parent's works on."""
        self.stored("queue")
        acquired = self.acquire_one()

        def work() -> None:
            self.status(acquired.id)
            self.store.close()

        Child(lambda _: work()).finish()

        self.succeed(acquired)
        assert self.status(self.stored("queue")).sequence == 2, "the parent's object must work on"

    def test_a_child_forked_while_threads_are_at_work_does_not_hang(self) -> None:
        """A fork in the middle of another thread's call leaves the child a whole store, and no lock nobody frees."""
        queues = iter(range(1_000_000))
        mutex = threading.Lock()

        def work() -> None:
            with mutex:
                queue = str(next(queues))
            id = self.stored(queue)
            self.status(id)

        def child() -> None:
            self.stored("queue", id=None)
            for acquired in self.acquire(limit=2, lock_timeout=timedelta(seconds=1)):
                self.store.release_lock(acquired)

        with while_threads_run(work, threads=2):
            for _ in range(6):
                Child(lambda _: child()).finish()

        assert self.store.store_callback_request(a_request()).sequence == 1, "the parent's object must work on"

    def test_a_child_of_a_child_can_use_the_object(self) -> None:
        """However often it is forked."""
        id = self.stored()

        def grandchild() -> None:
            self.succeed(self.acquire_only(id))

        def child() -> None:
            self.status(id)
            Child(lambda _: grandchild()).finish()
            self.stored()

        Child(lambda _: child()).finish()

        self.clock.advance(LOCK_TIMEOUT)
        expected = CallbackState.WAITING if self.store.durability is Durability.MEMORY else CallbackState.SUCCEEDED
        assert self.state(id) is expected, "a child of a child must be able to use the object"
