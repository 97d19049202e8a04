"""What time it is for locks and retries only the PostgreSQL server says, whatever the machines think."""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from datetime import datetime, timedelta
from itertools import pairwise

import psycopg
import pytest

from callbackq import Dispatcher
from callbackq.clock import SystemClock
from callbackq.core.models import RetryPhase
from callbackq.events import EventKind
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from callbackq.testing.conformance.base import LOCK_TIMEOUT, a_request
from support.dispatching import Witness
from support.postgres import PostgreSQL

HOUR = timedelta(hours=1)


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
    spans = sorted((lock.acquired, lock.ended, one.queue_id) for one in statuses for lock in one.locks)
    for queue in {one.queue_id for one in statuses}:
        of_queue = [span for span in spans if span[2] == queue]
        for (_, ended, _), (acquired, _, _) in pairwise(of_queue):
            assert ended is not None
            assert ended <= acquired


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
