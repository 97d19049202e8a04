"""Clauses 11 and 12: reading disturbs nobody, and nobody depends on hints."""

from __future__ import annotations

import threading
from datetime import timedelta

from callbackq.core.models import CallbackState
from callbackq.dataaccess import Action
from callbackq.testing.conformance.base import Conformance, a_request, check_whole, refuses
from callbackq.testing.conformance.concurrency import race, while_threads_run

__all__ = ["Hints", "Reads"]


class Reads(Conformance):
    """Clause 11: reads see whole states and hold nothing open between pages."""

    def test_a_status_is_a_value(self) -> None:
        """A status shows one moment, and later changes leave it alone."""
        id = self.stored()
        before = self.status(id)
        self.succeed(self.acquire_one())

        assert before.state is CallbackState.WAITING, "a status that was read must not change"
        assert (before.attempts, before.locks) == ((), ()), "a status that was read must not grow"
        assert self.status(id) == self.status(id), "reading must change nothing"

    def test_a_status_is_read_as_of_one_moment(self) -> None:
        """State, locks, attempts and what closes the queue in front belong together."""
        ids = [self.stored("queue") for _ in range(6)]

        def look() -> None:
            for id in ids:
                check_whole(self.status(id))

        with while_threads_run(look, threads=2):
            for id in ids:
                self.retry(self.acquire_only(id))
                self.succeed(self.acquire_only(id))

    def test_listing_shows_all_in_the_order_of_storing(self) -> None:
        """Walk over callbacks in the order in which they were stored, whatever the size of a page."""
        ids = [self.stored(queue) for queue in ("a", "", "b", "a", "", "b", "a")]
        self.succeed(self.acquire(limit=1)[0])

        for page_size in (1, 2, 3, 7, 100):
            listed = list(self.listing.list_callbacks(page_size=page_size))
            shown = [status.id for status in listed]
            self.check_listed(shown, ids, f"pages of {page_size} must show all, in order")
            assert listed == [self.status(id) for id in shown], (
                "a listed status must say the same as one read by itself"
            )

    def test_listing_by_state_and_queue(self) -> None:
        """Only callbacks in the given state and queue."""
        a1, a2, b1, none = self.stored("a"), self.stored("a"), self.stored("b"), self.stored()
        for acquired in self.acquire():
            if acquired.id == a1:
                self.succeed(acquired)
            elif acquired.id == b1:
                self.give_up(acquired, hold=True)
        table: list[tuple[CallbackState | None, str | None, list[str]]] = [
            (None, None, [a1, a2, b1, none]),
            (CallbackState.SUCCEEDED, None, [a1]),
            (CallbackState.WAITING, None, [a2]),
            (CallbackState.FAILED, None, [b1]),
            (CallbackState.LOCKED, None, [none]),
            (CallbackState.CANCELLED, None, []),
            (None, "a", [a1, a2]),
            (None, "", [none]),
            (None, "unknown", []),
            (CallbackState.WAITING, "a", [a2]),
            (CallbackState.WAITING, "b", []),
        ]

        for state, queue_id, expected in table:
            for page_size in (1, 100):
                listed = self.listing.list_callbacks(state=state, queue_id=queue_id, page_size=page_size)
                promise = f"listing state {state}, queue {queue_id!r}"
                self.check_listed([status.id for status in listed], expected, promise)

    def test_a_listing_of_nothing_that_exists_is_refused(self) -> None:
        """A wrong argument is refused with InvalidRequestError, which names it."""
        listing = self.listing
        self.stored()

        refuses("state", lambda it: list(listing.list_callbacks(state=it)), "waiting", 0, CallbackState)
        refuses("queue_id", lambda it: list(listing.list_callbacks(queue_id=it)), 1, b"", [])
        refuses("page_size", lambda it: list(listing.list_callbacks(page_size=it)), None, 0, -1, 1.5, "1", True)

    def test_a_listing_under_way_holds_nobody_up(self) -> None:
        """Nothing is held open between pages."""
        ids = [self.stored() for _ in range(4)]
        pages = iter(self.listing.list_callbacks(page_size=2))
        seen = [next(pages).id]

        def work() -> None:
            self.stored("queue")
            for acquired in self.acquire():
                self.succeed(acquired)

        race([work] * 2)
        seen += [status.id for status in pages]

        before = [id for id in seen if id in ids]
        self.check_listed(before, ids, "what was there before must be shown, in order")

    def test_an_abandoned_listing_holds_nothing(self) -> None:
        """A listing that is not read to its end needs no closing."""
        for _ in range(4):
            self.stored()
        pages = iter(self.listing.list_callbacks(page_size=1))
        next(pages)

        race([lambda: self.store.request_transition(self.stored(), Action.CANCEL)])
        self.store.close()
        self.store.open()

        assert len(self.acquire()) == 4, "an abandoned listing must hold nothing"

    def test_a_purge_between_pages_hides_nothing(self) -> None:
        """Only callbacks stored or purged meanwhile may be missing."""
        purging = self.purging
        for number in range(6):
            id = self.stored(id=f"callback-{number}")
            if number < 3:
                self.succeed(self.acquire_only(id))
        pages = iter(self.listing.list_callbacks(page_size=2))
        seen = [next(pages).id for _ in range(2)]

        purging.purge(finished_for=timedelta(0))
        seen += [status.id for status in pages]

        left = [f"callback-{number}" for number in (3, 4, 5)]
        self.check_listed([id for id in seen if id in left], left, "a purge must not hide what it leaves")

    def test_a_listing_shows_whole_states(self) -> None:
        """Each status in a page is as of one moment."""
        listing = self.listing
        for _ in range(6):
            self.stored()

        def look() -> None:
            for status in listing.list_callbacks(page_size=3):
                check_whole(status)

        with while_threads_run(look):
            for _ in range(2):
                for acquired in self.acquire():
                    self.retry(acquired)
        look()


class Hints(Conformance):
    """Clause 12: hints only shorten the wait; polling finds everything."""

    def test_work_is_found_without_any_hint(self) -> None:
        """Nobody needs to subscribe."""
        first, second = self.stored("queue"), self.stored("queue")

        self.succeed(self.acquire_only(first))

        self.acquire_only(second)

    def test_work_that_came_before_the_subscription_is_found(self) -> None:
        """A hint may have been lost."""
        id = self.stored()
        unsubscribe = self.store.subscribe(lambda: None)

        self.acquire_only(id)
        unsubscribe()

    def test_subscribing_changes_nothing_about_the_work(self) -> None:
        """wake may be called too often or not at all, from any thread, and a subscription ends."""
        hinted = threading.Event()
        unsubscribe = self.store.subscribe(hinted.set)

        first, second = self.stored("queue"), self.stored("queue")
        self.retry(self.acquire_only(first))
        self.give_up(self.acquire_only(first), hold=True)
        self.store.request_transition(first, Action.SKIP)
        self.succeed(self.acquire_only(second))
        unsubscribe()

        third = self.stored("queue")
        self.acquire_only(third)

    def test_several_may_subscribe(self) -> None:
        """Each subscription ends by itself."""
        ends = [self.store.subscribe(lambda: None) for _ in range(3)]

        for unsubscribe in ends:
            self.store.store_callback_request(a_request())
            unsubscribe()

        assert len(self.acquire()) == 3, "subscriptions must not get in the way"
