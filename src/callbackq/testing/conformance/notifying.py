"""Clause 9, its e-mails: what final failures owe, how that is told together, and how it is paid."""

from __future__ import annotations

import threading
from datetime import timedelta
from itertools import chain
from unittest import SkipTest

from callbackq.core.models import CallbackState
from callbackq.dataaccess import MOST_LISTED, Action, Notification
from callbackq.testing.conformance.base import LOCK_TIMEOUT, MOMENT, Conformance, refuses
from callbackq.testing.conformance.concurrency import race, while_threads_run

__all__ = ["Notifications"]

_ADDRESS = "someone@host.example"
_QUIET = timedelta(hours=1)


class Notifications(Conformance):
    """
    Clause 9, the e-mails: a final failure and what it owes are written together; the debt lives on its own.

    What one address is owed about one queue is told in one e-mail, and after that for a while in no other.
    """

    def test_a_final_failure_owes_an_email(self) -> None:
        """An e-mail is owed if notify."""
        id = self._failed(queue_id="queue")

        owed = self._lease_one()

        assert owed.callback_ids == (id,), "the debt must name the callback"
        assert owed.email_address == _ADDRESS, "the debt must name whom to tell"
        assert owed.queue_id == "queue", "the debt must name the queue"
        assert owed.count == 1, "one failure owes one debt"
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

    # Which debts are told together.

    def test_failures_of_one_queue_are_one_email_to_an_address(self) -> None:
        """Debts with the same e-mail address and queue id form a mailing."""
        ids = [self._failed(queue_id="queue") for _ in range(3)]

        owed = self._lease_one()

        assert owed.callback_ids == tuple(ids), "an e-mail must tell of all failures of its queue, oldest first"
        assert owed.count == 3, "an e-mail must say of how many failures it tells"

    def test_failures_without_a_queue_are_one_email_to_an_address(self) -> None:
        """Those without a queue id form a mailing, too."""
        if not self.one_order:
            raise SkipTest("callbacks without a queue lie in several places, and are an e-mail for each")
        ids = [self._failed() for _ in range(3)]

        owed = self._lease_one()

        assert owed.queue_id == "", "callbacks without a queue are told of without one"
        assert owed.callback_ids == tuple(ids), "failures without a queue must be told together"

    def test_other_addresses_and_queues_are_other_emails(self) -> None:
        """Debts with another e-mail address or queue id form another mailing."""
        expected = set()
        for address in (_ADDRESS, "other@host.example"):
            for queue_id in ("queue", "other queue", ""):
                expected.add((address, queue_id, (self._failed(address, queue_id=queue_id),)))

        leased = {(owed.email_address, owed.queue_id, owed.callback_ids) for owed in self._lease()}

        assert leased == expected, "each address must get an e-mail of its own about each queue"

    def test_an_email_about_many_names_the_first_and_counts_all(self) -> None:
        """At most MOST_LISTED; count: how many failures it tells of, those that aren't listed included."""
        ids = [self._failed(queue_id="queue") for _ in range(MOST_LISTED + 5)]

        owed = self._lease_one()

        assert owed.callback_ids == tuple(ids[:MOST_LISTED]), "only so many may be listed, and those that failed first"
        assert owed.count == len(ids), "all must be counted"
        self.notifications.record_notification(owed, retry_in=None)
        assert self._lease() == [], "paid means all that were counted, not only those that were listed"

    def test_a_redelivery_does_not_take_the_debt_back(self) -> None:
        """Redelivery doesn't take a debt back, and another final failure owes another."""
        id = self._failed()
        self.store.request_transition(id, Action.REDELIVER)
        self.give_up(self.acquire_one(), notify=True)

        owed = self._lease_one()

        assert (owed.count, owed.callback_ids) == (2, (id, id)), "each final failure owes a debt of its own"

    # Leases.

    def test_a_leased_email_is_leased_again_when_the_lease_has_timed_out(self) -> None:
        """Due again lock_timeout from now, under a new token."""
        self._failed()
        first = self._lease_one()
        assert self._lease() == [], "a leased e-mail must not be leased again"
        self.clock.advance(LOCK_TIMEOUT - MOMENT)
        assert self._lease() == [], "a lease must not be taken before its timeout"

        self.clock.advance(2 * MOMENT)
        second = self._lease_one()

        assert second.callback_ids == first.callback_ids, "an e-mail must be leased again when its lease has timed out"
        assert second.token != first.token, "each lease must have a token of its own"
        assert second.tries == 0, "only a recorded try counts"

    def test_an_email_that_could_not_be_sent_is_due_again(self) -> None:
        """Due retry_in from now, with one more try."""
        self._failed()

        for tries in (0, 1):
            owed = self._lease_one()
            assert owed.tries == tries, "each recorded try must be counted"
            self.notifications.record_notification(owed, retry_in=timedelta(seconds=30), quiet_for=_QUIET)
            self.clock.advance(timedelta(seconds=30) - MOMENT)
            assert self._lease() == [], "an e-mail must not be leased before it is due again"
            self.clock.advance(2 * MOMENT)

        assert self._lease_one().tries == 2, "each recorded try must be counted"

    def test_an_email_tells_of_the_same_failures_until_it_is_sent(self) -> None:
        """It tells of the same until it is ended; debts that come later are left to the next e-mail."""
        first = self._failed(queue_id="queue")
        leased = self._lease_one()
        second = self._failed(queue_id="queue")
        self._expire()
        after_the_lease = self._lease_one()
        self.notifications.record_notification(after_the_lease, retry_in=timedelta(0))
        after_the_try = self._lease_one()

        for owed in (leased, after_the_lease, after_the_try):
            assert (owed.callback_ids, owed.count) == ((first,), 1), "a repeated e-mail must tell of the same failures"
            assert owed.first_token == leased.token, "a repeated e-mail must be known as the same"
        self.notifications.record_notification(after_the_try, retry_in=None)
        following = self._lease_one()
        assert (following.callback_ids, following.count) == ((second,), 1), "what came later is the next e-mail's"
        assert following.first_token == following.token != leased.token, "the next e-mail must be known as another"
        assert following.tries == 0, "the next e-mail begins without tries"

    def test_a_sent_email_is_not_owed_any_more(self) -> None:
        """The debts that it tells of are gone."""
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

    def test_a_lease_ends_once(self) -> None:
        """One whose lease has been ended is left alone, silently."""
        self._failed(queue_id="queue")
        owed = self._lease_one()
        self._failed(queue_id="queue")
        self.notifications.record_notification(owed, retry_in=None, quiet_for=_QUIET)

        self.notifications.record_notification(owed, retry_in=None)
        self.notifications.record_notification(owed, retry_in=timedelta(0))

        assert self._lease() == [], "a lease that was ended must not end the quiet time"
        self._pass_quiet_time()
        assert self._lease_one().count == 1, "a lease that was ended must not pay what it didn't tell of"

    def test_emails_are_leased_oldest_first_and_within_the_limit(self) -> None:
        """Those longest due first; at most limit."""
        ids = []
        for queue_id in ("a", "b", "c"):
            ids.append((self._failed(queue_id=queue_id),))
            self.clock.advance(MOMENT)

        batches = [[owed.callback_ids for owed in self._lease(limit=limit)] for limit in (2, 9)]

        assert [len(batch) for batch in batches] == [2, 1], "each e-mail must be leased once, within the limit"
        leased = [told for batch in batches for told in batch]
        if self.one_order:
            assert leased == ids, "e-mails must be leased oldest first"

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
        refuses(
            "quiet_for",
            lambda it: store.record_notification(owed, retry_in=None, quiet_for=it),
            None,
            60,
            -MOMENT,
            timedelta.max,
        )

        self._expire()
        assert self._lease_one().tries == 0, "what was refused must have ended no lease"

    # The quiet time.

    def test_after_an_email_its_address_is_left_alone_about_the_queue(self) -> None:
        """Due quiet_for from now."""
        self._failed(queue_id="queue")
        meanwhile = [self._fail_while_leased("queue")]
        self.clock.advance(_QUIET / 2)
        meanwhile.append(self._failed(queue_id="queue"))
        self.clock.advance(_QUIET / 2 - MOMENT)
        assert self._lease() == [], "no e-mail may be leased within the quiet time"

        self.clock.advance(2 * MOMENT)

        owed = self._lease_one()
        assert owed.callback_ids == tuple(meanwhile), "the next e-mail must tell of all that failed in the quiet time"

    def test_a_quiet_time_that_found_nothing_to_tell_is_kept(self) -> None:
        """A mailing that owes nothing is remembered until its due time."""
        self._failed(queue_id="queue")
        self.notifications.record_notification(self._lease_one(), retry_in=None, quiet_for=_QUIET)
        self.clock.advance(_QUIET / 2)
        assert self._lease() == [], "nothing is owed"

        self._failed(queue_id="queue")

        assert self._lease() == [], "a failure must not end the quiet time"
        self.clock.advance(_QUIET / 2 + MOMENT)
        self._lease_one()

    def test_when_the_quiet_time_is_over_the_next_failure_is_told_at_once(self) -> None:
        """After that it is forgotten."""
        self._failed(queue_id="queue")
        self.notifications.record_notification(self._lease_one(), retry_in=None, quiet_for=_QUIET)
        self._pass_quiet_time()
        for _ in range(2):
            assert self._lease() == [], "nothing is owed"

        id = self._failed(queue_id="queue")

        owed = self._lease_one()
        assert (owed.callback_ids, owed.count, owed.tries) == ((id,), 1, 0), "it is an e-mail like the first"

    def test_others_are_not_quiet(self) -> None:
        """The quiet time is that of one address and one queue."""
        self._failed(queue_id="queue")
        self.notifications.record_notification(self._lease_one(), retry_in=None, quiet_for=_QUIET)

        self._failed("other@host.example", queue_id="queue")
        self._failed(queue_id="other queue")
        self._failed()

        assert len(self._lease()) == 3, "other addresses and other queues have not been told anything"

    def test_without_a_quiet_time_the_next_email_is_due_at_once(self) -> None:
        """Nothing is held back by default."""
        self._failed(queue_id="queue")
        id = self._fail_while_leased("queue", quiet_for=timedelta(0))

        assert self._lease_one().callback_ids == (id,), "without a quiet time the next e-mail is due at once"

    # Under load, and after it.

    def test_racing_callers_lease_each_email_once(self) -> None:
        """However many callers race, each goes to one of them."""
        for _ in range(5):
            ids = sorted((self._failed(queue_id=queue_id),) for queue_id in "abcd")

            leased = [*chain(*race([lambda: self._lease(limit=2)] * 6)), *self._lease()]

            assert sorted(owed.callback_ids for owed in leased) == ids, "racing callers must lease each e-mail once"
            for owed in leased:
                self.notifications.record_notification(owed, retry_in=None)

    def test_failures_while_others_are_paid_are_all_told_once(self) -> None:
        """The debts that it tells of are gone, no others."""
        self.notifications  # noqa: B018 - skips the test where there are none
        told: list[Notification] = []
        one_at_a_time = threading.Lock()

        def tell() -> None:
            with one_at_a_time:
                for owed in self._lease():
                    told.append(owed)
                    self.notifications.record_notification(owed, retry_in=None)

        for _ in range(10):
            self._stored()
        failing = self.acquire()
        with while_threads_run(tell):
            for acquired in failing:
                self.give_up(acquired, notify=True)
        tell()

        ids = [id for owed in told for id in owed.callback_ids]
        assert sorted(ids) == sorted(one.id for one in failing), "each failure must be told, and once"
        assert sum(owed.count for owed in told) == len(failing), "each failure must be counted, and once"

    def test_debts_and_quiet_times_survive_reopening(self) -> None:
        """A debt is as durable as the failure, and so are its lease, its tries and the quiet time."""
        self._failed(queue_id="quiet")
        self.notifications.record_notification(self._lease_one(), retry_in=None, quiet_for=_QUIET)
        self._failed(queue_id="quiet")
        id = self._failed(queue_id="queue")
        self.notifications.record_notification(self._lease_one(), retry_in=timedelta(0))
        leased = self._lease_one()
        self._failed(queue_id="queue")

        self.start_again()

        assert self._lease() == [], "leases and quiet times must survive reopening"
        self.notifications.record_notification(leased, retry_in=timedelta(0))
        again = self._lease_one()
        assert again.tries == 2, "an e-mail and its tries must survive reopening"
        assert (again.callback_ids, again.first_token) == ((id,), leased.first_token), "it must be the same e-mail"
        self._pass_quiet_time()
        assert "quiet" in {owed.queue_id for owed in self._lease()}, "a quiet time ends, reopening or not"

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

    def _stored(self, address: str = _ADDRESS, *, queue_id: str = "") -> str:
        return self.stored(queue_id, notification_email_address=address)

    def _failed(self, address: str = _ADDRESS, *, queue_id: str = "") -> str:
        self.notifications  # noqa: B018 - skips the test where there are none
        id = self._stored(address, queue_id=queue_id)
        self.give_up(self.acquire_only(id), notify=True)
        return id

    def _fail_while_leased(self, queue_id: str, *, quiet_for: timedelta = _QUIET) -> str:
        """Lease the only e-mail, let another callback fail, then pay."""
        owed = self._lease_one()
        id = self._failed(queue_id=queue_id)
        self.notifications.record_notification(owed, retry_in=None, quiet_for=quiet_for)
        return id

    def _lease(self, *, limit: int = 1000) -> list[Notification]:
        return self.notifications.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=limit)

    def _lease_one(self) -> Notification:
        leased = self._lease()
        assert len(leased) == 1, f"exactly one e-mail is owed and due now, {len(leased)} are"
        return leased[0]

    def _expire(self) -> None:
        self.clock.advance(LOCK_TIMEOUT + MOMENT)

    def _pass_quiet_time(self) -> None:
        self.clock.advance(_QUIET + MOMENT)
