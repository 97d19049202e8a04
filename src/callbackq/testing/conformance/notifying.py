"""Clause 9, its e-mail: what a final failure owes, and how that is paid."""

from __future__ import annotations

from datetime import timedelta
from itertools import chain

from callbackq.core.models import CallbackState
from callbackq.dataaccess import Action, Notification
from callbackq.testing.conformance.base import LOCK_TIMEOUT, MOMENT, Conformance, refuses
from callbackq.testing.conformance.concurrency import race, while_threads_run

__all__ = ["Notifications"]


class Notifications(Conformance):
    """Clause 9, the e-mail: a final failure and the e-mail it owes are written together; the debt lives on its own."""

    def test_a_final_failure_owes_an_email(self) -> None:
        """An e-mail is owed if notify."""
        id = self._failed("someone@host.example")

        owed = self._lease_one()

        assert owed.callback_id == id, "the debt must name the callback"
        assert owed.email_address == "someone@host.example", "the debt must name whom to tell"
        assert owed.tries == 0, "nobody has tried yet"

    def test_nothing_else_owes_an_email(self) -> None:
        """No e-mail without notify, nor when the transition was settled into another."""
        self.notifications  # noqa: B018 - skips the test where there are none
        cancelled = self._stored()
        self.store.request_transition(cancelled, Action.CANCEL)
        for end in (self.retry, self.give_up):
            id = self._stored()
            end(self.acquire_only(id))
            self.succeed(self.acquire_only(id)) if end == self.retry else None
        settled = self._stored()
        acquired = self.acquire_only(settled)
        self.store.request_transition(settled, Action.CANCEL)
        self.give_up(acquired, notify=True)

        assert self._lease() == [], "only a final failure with notify may owe an e-mail"

    def test_a_leased_debt_is_leased_again_when_the_lease_has_timed_out(self) -> None:
        """Due: never leased, or its lease has timed out."""
        self._failed()
        first = self._lease_one()
        assert self._lease() == [], "a leased debt must not be leased again"
        self.clock.advance(LOCK_TIMEOUT - MOMENT)
        assert self._lease() == [], "a lease must not be taken before its timeout"

        self.clock.advance(2 * MOMENT)
        second = self._lease_one()

        assert second.callback_id == first.callback_id, "a debt must be leased again when its lease has timed out"
        assert second.token != first.token, "each lease must have a token of its own"
        assert second.tries == 0, "only a recorded try counts"

    def test_a_debt_that_could_not_be_paid_is_due_again(self) -> None:
        """Due again after retry_in, with one more try."""
        self._failed()

        for tries in (0, 1):
            owed = self._lease_one()
            assert owed.tries == tries, "each recorded try must be counted"
            self.notifications.record_notification(owed, retry_in=timedelta(seconds=30))
            self.clock.advance(timedelta(seconds=30) - MOMENT)
            assert self._lease() == [], "a debt must not be leased before it is due again"
            self.clock.advance(2 * MOMENT)

        assert self._lease_one().tries == 2, "each recorded try must be counted"

    def test_a_paid_debt_is_gone(self) -> None:
        """The debt is paid or given up."""
        self._failed()

        self.notifications.record_notification(self._lease_one(), retry_in=None)

        self.clock.advance(timedelta(days=30))
        assert self._lease() == [], "a paid debt must be gone"

    def test_a_lost_lease_changes_nothing(self) -> None:
        """A notification whose lease was lost is left alone, silently."""
        self._failed()
        stale = self._lease_one()
        self._expire()
        present = self._lease_one()

        self.notifications.record_notification(stale, retry_in=None)
        self.notifications.record_notification(stale, retry_in=timedelta(0))

        assert self._lease() == [], "a lost lease must not free the present one"
        self.notifications.record_notification(present, retry_in=timedelta(0))
        assert self._lease_one().tries == 1, "a lost lease must not pay, or count as a try"

    def test_a_paid_debt_is_not_paid_twice(self) -> None:
        """Repeating the end of a lease does nothing."""
        self._failed()
        owed = self._lease_one()
        self.notifications.record_notification(owed, retry_in=None)

        self.notifications.record_notification(owed, retry_in=timedelta(0))

        assert self._lease() == [], "a paid debt must not come back"

    def test_debts_are_leased_oldest_first_and_within_the_limit(self) -> None:
        """Oldest first."""
        ids = []
        for _ in range(3):
            ids.append(self._failed())
            self.clock.advance(MOMENT)

        batches = [[owed.callback_id for owed in self._lease(limit=limit)] for limit in (2, 9)]

        assert batches == [ids[:2], ids[2:]], "debts must be leased oldest first, within the limit"

    def test_a_lease_of_the_impossible_is_refused(self) -> None:
        """A wrong argument is refused with InvalidRequestError, which names it; nothing is leased or paid."""
        store = self.notifications
        self._failed()

        refuses(
            "lock_timeout", lambda it: store.acquire_notifications(lock_timeout=it, limit=1), None, 60, timedelta(0)
        )
        refuses("limit", lambda it: store.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=it), None, 0, -1, 1.5)
        owed = self._lease_one()
        refuses("retry_in", lambda it: store.record_notification(owed, retry_in=it), 60, -MOMENT, timedelta.max)

        self.clock.advance(LOCK_TIMEOUT + MOMENT)
        assert self._lease_one().tries == 0, "what was refused must have ended no lease"

    def test_racing_callers_lease_each_debt_once(self) -> None:
        """However many callers race, each debt goes to one of them."""
        for _ in range(5):
            ids = sorted(self._failed() for _ in range(4))

            leased = [*chain(*race([lambda: self._lease(limit=2)] * 6)), *self._lease()]

            assert sorted(owed.callback_id for owed in leased) == ids, "racing callers must lease each debt once"

    def test_a_redelivery_does_not_take_the_debt_back(self) -> None:
        """Redelivery doesn't take a debt back, and another final failure owes another."""
        id = self._failed()
        self.store.request_transition(id, Action.REDELIVER)
        self.give_up(self.acquire_one(), notify=True)

        owed = self._lease()

        assert [one.callback_id for one in owed] == [id, id], "each final failure owes an e-mail of its own"
        assert len({one.token for one in owed}) == 2, "each lease must have a token of its own"

    def test_debts_survive_reopening(self) -> None:
        """A debt is as durable as the failure, and so are its lease and its tries."""
        self._failed()
        self.notifications.record_notification(self._lease_one(), retry_in=timedelta(0))
        leased = self._lease_one()

        self.start_again()

        assert self._lease() == [], "a lease must survive reopening"
        self.notifications.record_notification(leased, retry_in=timedelta(0))
        assert self._lease_one().tries == 2, "a debt and its tries must survive reopening"

    def test_whoever_sees_the_failure_finds_the_debt(self) -> None:
        """A debt is written in the transaction that makes the callback FAILED."""
        id = self._stored()
        (acquired,) = self.acquire()
        seen: list[bool] = []

        def look() -> None:
            if not seen and self.state(id) is CallbackState.FAILED:
                seen.append(bool(self._lease()))

        with while_threads_run(look):
            self.give_up(acquired, notify=True)

        look()
        assert seen == [True], "the e-mail must be owed as soon as the failure can be seen"

    def _stored(self, address: str = "someone@host.example") -> str:
        return self.stored(notification_email_address=address)

    def _failed(self, address: str = "someone@host.example") -> str:
        self.notifications  # noqa: B018 - skips the test where there are none
        id = self._stored(address)
        self.give_up(self.acquire_only(id), notify=True)
        return id

    def _lease(self, *, limit: int = 1000) -> list[Notification]:
        return self.notifications.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=limit)

    def _lease_one(self) -> Notification:
        leased = self._lease()
        assert len(leased) == 1, f"exactly one e-mail is owed and due now, {len(leased)} are"
        return leased[0]

    def _expire(self) -> None:
        self.clock.advance(LOCK_TIMEOUT + MOMENT)
