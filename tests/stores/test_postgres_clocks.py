"""What time it is for locks and retries only the PostgreSQL server says, whatever the machines think."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from datetime import datetime, timedelta
from itertools import count, pairwise
from typing import Any, Final

import psycopg
import pytest

from callbackq import Dispatcher, HTTPTransport, TargetPolicy
from callbackq.clock import SystemClock
from callbackq.core.models import CallbackStatus, RetryPhase
from callbackq.events import EventKind
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from callbackq.testing.conformance.base import LOCK_TIMEOUT, a_request
from callbackq.testing.conformance.concurrency import Child
from support.dispatching import Witness
from support.postgres import PostgreSQL, until
from support.receivers import OK, Conversation, Receiver

HOUR = timedelta(hours=1)
LOOPBACK = TargetPolicy(allow=["127.0.0.0/8"])
AT_ONCE: Final[dict[str, Any]] = {
    "concurrency": 4,
    "host_concurrency": 4,
    "poll_interval": timedelta(milliseconds=20),
}


class WrongClock(SystemClock):
    """The clock of a machine on which somebody has set the time, and which sleeps and wakes as it likes."""

    def __init__(self, shift: timedelta) -> None:
        self._shift = shift

    def now(self) -> datetime:
        return super().now() + self._shift

    def monotonic(self) -> float:
        return super().monotonic() + self._shift.total_seconds()


@pytest.fixture
def conninfo(postgres: PostgreSQL, migrated_database: str) -> str:
    return postgres.conninfo(migrated_database)


def test_dispatchers_whose_clocks_are_hours_apart_send_nothing_twice(conninfo: str) -> None:
    witness = Witness()
    transports = [ScriptedTransport([500] * 5) for _ in range(3)]
    with ExitStack() as opened:
        store = opened.enter_context(PostgreSQLDataAccess(conninfo))
        phases = [RetryPhase(retries=20, delay=timedelta(milliseconds=20))]
        for number in range(60):
            store.store_callback_request(a_request(queue_id=f"queue {number % 6}", retry_phases=phases))
        for shift, transport in zip((-HOUR, timedelta(0), HOUR), transports, strict=True):
            own = opened.enter_context(PostgreSQLDataAccess(conninfo))
            dispatcher = Dispatcher(
                own,
                transport=transport,
                observer=witness,
                clock=WrongClock(shift),
                machine_name=f"machine {shift}",
                concurrency=2,
                poll_interval=timedelta(milliseconds=20),
            )
            opened.enter_context(dispatcher)
        witness.wait_for(EventKind.SUCCEEDED, 60)
        statuses = list(store.list_callbacks())

    sent = Counter(one.callback_id for transport in transports for one in transport.deliveries)
    assert sent == {one.id: len(one.attempts) for one in statuses}
    for status in statuses:
        assert [lock.completed for lock in status.locks] == [True] * len(status.attempts)
    check_that_no_locks_overlap(statuses)


def check_that_no_locks_overlap(statuses: list[CallbackStatus]) -> None:
    spans = sorted((lock.acquired, lock.ended, one.queue_id or one.id) for one in statuses for lock in one.locks)
    for queue in {one.queue_id or one.id for one in statuses}:
        of_queue = [span for span in spans if span[2] == queue]
        for (_, ended, _), (acquired, _, _) in pairwise(of_queue):
            assert ended is not None
            assert ended <= acquired


def dispatch(conninfo: str, shift: timedelta, told: Callable[[], None]) -> None:
    """Deliver until killed, on a machine with a wrong clock."""
    clock = WrongClock(shift)
    with (
        PostgreSQLDataAccess(conninfo) as store,
        closing(HTTPTransport(target_policy=LOOPBACK, clock=clock)) as transport,
        Dispatcher(store, transport=transport, clock=clock, machine_name="shifted", **AT_ONCE),
    ):
        told()
        threading.Event().wait()


@pytest.mark.parametrize("shift", [-HOUR, HOUR])
def test_a_machine_whose_clock_is_wrong_and_which_is_killed_leaves_others_nothing_but_what_it_did_not_record(
    conninfo: str, shift: timedelta
) -> None:
    accepted: list[tuple[str, int]] = []
    met: Counter[str] = Counter()
    numbers = count()

    def answer(conversation: Conversation) -> None:
        while request := conversation.read_request():
            id = request.fields["webhook-id"]
            met[id] += 1
            if id == "held" and met[id] == 1:
                conversation.hang()
                return
            conversation.wait(0.005)
            if id.endswith("3") and met[id] <= 2:
                conversation.send(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
            else:
                accepted.append((id, int(request.fields["callbackq-token"])))
                conversation.send(OK)

    def both_deliver() -> bool:
        number = next(numbers)
        given(f"queue {number % 6}", str(number))
        locks = [(one.id, lock) for one in store.list_callbacks() for lock in one.locks]
        return {lock.machine_name for id, lock in locks if (id, lock.token) in accepted} == {"shifted", "right"}

    def all_is_delivered() -> bool:
        with psycopg.connect(conninfo) as connection:
            # In place of waiting: the locks of the killed time out.
            now = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"
            connection.execute(
                f"UPDATE callbackq.callbacks SET due = {now}, ready = {now} "
                f"WHERE state = 1 AND machine = 'shifted' AND due > {now}"
            )
        return all(one.success for one in store.list_callbacks())

    shifted = Child(lambda told: dispatch(conninfo, shift, told))
    with ExitStack() as opened, ExitStack() as living:
        living.callback(shifted.kill)
        shifted.hear(1)
        receiver = opened.enter_context(closing(Receiver(answer)))
        store = opened.enter_context(PostgreSQLDataAccess(conninfo))
        phases = [RetryPhase(retries=20, delay=timedelta(milliseconds=20))]

        def given(queue_id: str, *ids: str) -> None:
            request = a_request(url=receiver.url(), queue_id=queue_id, retry_phases=phases)
            store.store_callback_requests([request] * len(ids), ids=ids)

        given("", "held")
        receiver.wait_for_requests(1)  # only the shifted one is there to have sent it
        transport = opened.enter_context(closing(HTTPTransport(target_policy=LOOPBACK)))
        opened.enter_context(Dispatcher(store, transport=transport, machine_name="right", **AT_ONCE))
        for queue in range(6):
            given(f"queue {queue}", *(f"{queue}-{number}" for number in range(5)))
        until(both_deliver, "both to deliver")
        living.close()
        until(all_is_delivered, "the other to deliver the rest")
        statuses = list(store.list_callbacks())

    locks = {(one.id, lock.token): lock for one in statuses for lock in one.locks}
    arrived = [(one.fields["webhook-id"], int(one.fields["callbackq-token"])) for one in receiver.requests]
    assert len(arrived) == len(set(arrived)), "nothing is sent twice under the same lock"
    assert set(arrived) <= set(locks)
    assert {locks[one].machine_name for one in locks if not locks[one].completed} == {"shifted"}
    assert [lock.completed for (id, _), lock in sorted(locks.items()) if id == "held"] == [False, True]
    # Once for each lock that was not lost with the killed.
    assert [id for id, _ in sorted(accepted) if locks[id, _].completed] == sorted(one.id for one in statuses)
    check_that_no_locks_overlap(statuses)


def test_locks_and_due_times_are_the_servers(conninfo: str) -> None:
    with PostgreSQLDataAccess(conninfo) as store, psycopg.connect(conninfo, autocommit=True) as connection:

        def server_time() -> datetime:
            row = connection.execute("SELECT clock_timestamp()").fetchone()
            assert row
            return row[0]

        times = [server_time()]
        status = store.store_callback_request(a_request())
        times += [status.next_attempt_at, server_time()]  # type: ignore[list-item]
        (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
        times += [acquired.lock.acquired, server_time(), store.now(), server_time()]

        assert times == sorted(times)
        assert acquired.lock.timeout - acquired.lock.acquired == LOCK_TIMEOUT


def test_what_is_stored_after_the_servers_clock_was_turned_back_is_found_at_once(conninfo: str) -> None:
    clock = FakeClock()
    with PostgreSQLDataAccess(conninfo, clock=clock) as store:
        clock.advance(HOUR)
        assert store.next_due() is None  # and so the store knows where to search next

        with PostgreSQLDataAccess(conninfo, clock=FakeClock()) as beside:
            beside.store_callback_request(a_request(), id="a")
        store._database._clock = FakeClock()

        assert [one.id for one in store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)] == ["a"]


def test_the_time_is_that_of_the_statement_not_of_the_transactions_beginning(conninfo: str) -> None:
    """Whoever waited for another transaction must not get a lock that is as old as his wish."""
    with PostgreSQLDataAccess(conninfo) as store, psycopg.connect(conninfo) as connection:
        row = connection.execute("SELECT now()").fetchone()
        connection.execute("SELECT pg_sleep(0.02)")

        status = store.store_callback_request(a_request(), connection=connection)

        assert row
        assert status.next_attempt_at is not None
        assert status.next_attempt_at - row[0] >= timedelta(milliseconds=20)
