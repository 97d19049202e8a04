"""Storing in a transaction of the application's: with its changes, or not at all."""

from __future__ import annotations

from itertools import chain

from callbackq.errors import CallbackNotFoundError, ConflictError, InvalidRequestError
from callbackq.testing.conformance.base import LOCK_TIMEOUT, Conformance, a_request, raises, refuses
from callbackq.testing.conformance.concurrency import race

__all__ = ["Enlisting"]


class Enlisting(Conformance):
    """What is stored on the application's connection shares the fate of its transaction."""

    def test_a_commit_stores_the_callback(self) -> None:
        """The callback is there when the application commits, and the status that was returned holds."""
        with self.transaction() as connection:
            returned = self.enlisting.store_callback_request(a_request(queue_id="queue"), connection=connection)
            connection.commit()

        assert self.status(returned.id) == returned, "the status that was returned must hold after the commit"
        self.acquire_only(returned.id)

    def test_a_rollback_stores_nothing(self) -> None:
        """When the application rolls back, the callback never was."""
        before = self.stored("queue")
        with self.transaction() as connection:
            for id, queue in (("a", "queue"), ("b", "new"), ("c", "")):
                self.enlisting.store_callback_request(a_request(queue_id=queue), id=id, connection=connection)
            connection.rollback()

        for id in ("a", "b", "c"):
            with raises(CallbackNotFoundError, "after a rollback the callback must not be there"):
                self.status(id)
        self.succeed(self.acquire_only(before))
        assert self.acquire() == [], "what was rolled back must not be acquired"
        self.acquire_only(self.stored("queue"))

    def test_a_connection_that_is_lost_stores_nothing(self) -> None:
        """Without a commit nothing is stored."""
        with self.transaction() as connection:
            self.enlisting.store_callback_request(a_request(), id="lost", connection=connection)

        with raises(CallbackNotFoundError, "without a commit the callback must not be there"):
            self.status("lost")

    def test_nothing_is_seen_before_the_commit(self) -> None:
        """The callback is nowhere to be seen before, and the store doesn't end the transaction."""
        with self.transaction() as connection:
            self.enlisting.store_callback_request(a_request(), id="hidden", connection=connection)

            with raises(CallbackNotFoundError, "before the commit the callback must not be seen"):
                self.status("hidden")
            assert self.store.next_due() is None, "before the commit nothing may be due"
            assert self.store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9) == [], (
                "before the commit the callback must not be acquired"
            )
            connection.commit()

        self.acquire_only("hidden")

    def test_several_of_one_transaction_are_stored_in_their_order(self) -> None:
        """Several callbacks are stored within the transaction, in this order."""
        requests = [a_request(queue_id="queue"), a_request(), a_request(queue_id="queue")]
        with self.transaction() as connection:
            returned = self.enlisting.store_callback_requests(requests, ids=["a", "b", "c"], connection=connection)
            connection.commit()

        assert [(one.id, one.sequence) for one in returned] == [("a", 1), ("b", 1), ("c", 2)], (
            "callbacks stored together must have numbers in their order"
        )
        assert [self.status(one.id) for one in returned] == returned, "every one must be stored"

    def test_an_id_is_stored_once_whichever_transaction_it_came_with(self) -> None:
        """An id stored with an equal request: nothing is written, the stored callback's status is returned."""
        before = self.status(self.stored(id="before"))
        with self.transaction() as connection:
            assert self.enlisting.store_callback_request(a_request(), id="before", connection=connection) == before, (
                "an id that was stored before must be found in a transaction"
            )
            first = self.enlisting.store_callback_request(a_request(), id="new", connection=connection)
            again = self.enlisting.store_callback_request(a_request(), id="new", connection=connection)
            connection.commit()

        assert first == again == self.store.store_callback_request(a_request(), id="new"), (
            "an id that was stored in a transaction must be found in it and after it"
        )
        assert len(self.acquire()) == 2, "an id must be stored once"

    def test_a_conflict_leaves_the_transaction_usable(self) -> None:
        """When it raises, nothing of the callbacks was written, and the transaction can go on."""
        self.stored(id="taken")
        with self.transaction() as connection:
            self.enlisting.store_callback_request(a_request(queue_id="queue"), id="before", connection=connection)
            with raises(ConflictError, "an id is taken by another request"):
                self.enlisting.store_callback_requests(
                    [a_request(queue_id="queue"), a_request(method="PUT")], ids=["half", "taken"], connection=connection
                )
            after = self.enlisting.store_callback_request(
                a_request(queue_id="queue"), id="after", connection=connection
            )
            connection.commit()

        with raises(CallbackNotFoundError, "nothing may be stored of what was refused"):
            self.status("half")
        assert self.status("before").sequence == 1, "what was stored before a conflict must stay"
        assert self.status("after") == after, "a transaction must go on after a conflict"
        assert after.blocked_by == "before", "a transaction must go on after a conflict as if it hadn't been"

    def test_a_wrong_argument_leaves_the_transaction_usable(self) -> None:
        """A wrong argument is refused with InvalidRequestError, and the transaction can go on."""
        with self.transaction() as connection:
            with raises(InvalidRequestError, "an id that is none"):
                self.enlisting.store_callback_request(a_request(), id="not an id", connection=connection)
            id = self.enlisting.store_callback_request(a_request(), connection=connection).id
            connection.commit()

        self.acquire_only(id)

    def test_what_is_no_connection_is_refused(self) -> None:
        """A connection of another type is refused with InvalidRequestError; nothing is stored."""
        store = self.enlisting

        refuses("connection", lambda it: store.store_callback_request(a_request(), connection=it), object(), "shop.db")
        refuses("connection", lambda it: store.store_callback_requests([a_request()], connection=it), object(), 5)

        assert self.acquire() == [], "what was refused must not be stored"

    def test_racing_transactions_get_different_rising_numbers(self) -> None:
        """Numbers rise in the order of commits, whoever stores in whatever transaction."""
        self.enlisting.open()

        def in_transactions(commits: int) -> list[int]:
            numbers = []
            for number in range(8):
                with self.transaction() as connection:
                    status = self.enlisting.store_callback_request(a_request(queue_id="queue"), connection=connection)
                    if number % 3 < commits:
                        connection.commit()
                        numbers.append(status.sequence)
                    else:
                        connection.rollback()
            return numbers

        def alone() -> list[int]:
            return [self.status(self.stored("queue")).sequence for _ in range(8)]

        numbers = race([alone, lambda: in_transactions(1), lambda: in_transactions(2), lambda: in_transactions(3)])

        for mine in numbers:
            assert mine == sorted(mine), "what a writer commits later must have a higher number"
        given = sorted(chain(*numbers))
        assert given == sorted(set(given)), "no number may be given twice"
        for number in given:
            acquired = self.acquire_one()
            assert acquired.sequence == number, "callbacks must be acquired in the order of their numbers"
            self.succeed(acquired)

    def test_a_hint_reaches_subscribers(self) -> None:
        """hint() tells subscribers that something may be due."""
        hints: list[None] = []
        store = self.enlisting
        unsubscribe = self.store.subscribe(lambda: hints.append(None))

        store.hint()
        heard = len(hints)
        unsubscribe()
        store.hint()

        assert heard == 1, "a hint must reach whoever has subscribed"
        assert len(hints) == heard, "a subscription must end"
