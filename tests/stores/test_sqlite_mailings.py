"""What final failures owe, in an SQLite file: many of them, faults on the way, and what is left over."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import pytest
from attrs import evolve

from callbackq.core.models import CallbackState
from callbackq.dataaccess import AttemptRecord, Notification
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock
from callbackq.testing.conformance.base import EXHAUSTED, LOCK_TIMEOUT, a_request, an_attempt
from support.processes import running

HOUR = timedelta(hours=1)
OWING = evolve(EXHAUSTED, notify=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(path: Path, clock: FakeClock) -> Iterator[SQLiteDataAccess]:
    with SQLiteDataAccess(path, clock=clock) as store:
        yield store


def fail(store: SQLiteDataAccess, count: int, *, queues: bool = False) -> None:
    store.store_callback_requests(
        [
            a_request(queue_id=f"queue {number}" if queues else "", notification_email_address="a@host.example")
            for number in range(count)
        ]
    )
    acquired = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=count)
    store.record_attempts([AttemptRecord(acquired=one, attempt=an_attempt(500), transition=OWING) for one in acquired])


def lease(store: SQLiteDataAccess) -> list[Notification]:
    return store.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=1000)


def run(path: Path, statement: str) -> list[tuple[int, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement).fetchall()


def rows(path: Path) -> tuple[int, ...]:
    """How many mailings and debts there are."""
    [counts] = run(path, "SELECT (SELECT count(*) FROM callbackq_mailings), (SELECT count(*) FROM callbackq_debts)")
    return counts


@pytest.fixture
def break_down(path: Path, store: SQLiteDataAccess) -> Iterator[None]:
    """Let no debt with a number above 600 be deleted."""
    run(
        path,
        """
        CREATE TRIGGER break_down BEFORE DELETE ON callbackq_debts WHEN old.number > 600
        BEGIN SELECT RAISE(ABORT, 'disk full'); END
        """,
    )
    yield
    run(path, "DROP TRIGGER IF EXISTS break_down")


@pytest.mark.usefixtures("break_down")
def test_payment_is_one_step_and_its_debts_are_deleted_in_small_ones_behind_it(
    store: SQLiteDataAccess, path: Path
) -> None:
    fail(store, 700)
    (owed,) = lease(store)

    store.record_notification(owed, retry_in=None, quiet_for=HOUR)

    assert rows(path) == (1, 200), "the first steps must have been written, each by itself"
    assert lease(store) == [], "a fault behind the payment is no fault of the payment"
    assert store.purge(finished_for=timedelta(0)) == 700, "a debt that was paid holds up no purge"


@pytest.mark.usefixtures("break_down")
def test_what_is_left_of_paid_debts_goes_with_the_next_payment(store: SQLiteDataAccess, path: Path) -> None:
    fail(store, 700)
    (owed,) = lease(store)
    store.record_notification(owed, retry_in=None)
    run(path, "DROP TRIGGER break_down")
    fail(store, 1)
    (owed,) = lease(store)
    assert (owed.count, len(owed.callback_ids)) == (1, 1)

    store.record_notification(owed, retry_in=None, quiet_for=HOUR)

    assert rows(path) == (1, 0)


@pytest.mark.usefixtures("break_down")
def test_what_is_left_of_paid_debts_goes_before_their_mailing(
    store: SQLiteDataAccess, path: Path, clock: FakeClock
) -> None:
    fail(store, 1000)
    (owed,) = lease(store)
    store.record_notification(owed, retry_in=None, quiet_for=HOUR)
    run(path, "DROP TRIGGER break_down")
    clock.advance(HOUR)

    left = []
    for _ in range(4):
        assert lease(store) == []
        left.append(rows(path))

    assert left == [(1, 250), (1, 0), (0, 0), (0, 0)]


def test_mailings_that_owe_nothing_do_not_pile_up(store: SQLiteDataAccess, path: Path, clock: FakeClock) -> None:
    fail(store, 250, queues=True)
    for owed in lease(store):
        store.record_notification(owed, retry_in=None, quiet_for=HOUR)
    assert lease(store) == []
    assert rows(path) == (250, 0), "they are remembered while they are quiet"
    clock.advance(HOUR)

    left = []
    for _ in range(3):
        assert lease(store) == []
        left.append(rows(path))

    assert left == [(150, 0), (50, 0), (0, 0)]


def test_forgetting_mailings_keeps_those_that_owe(store: SQLiteDataAccess, path: Path, clock: FakeClock) -> None:
    fail(store, 3, queues=True)
    for owed in lease(store):
        store.record_notification(owed, retry_in=None, quiet_for=HOUR)
    fail(store, 2, queues=True)
    clock.advance(HOUR)

    again = lease(store)

    assert sorted(owed.queue_id for owed in again) == ["queue 0", "queue 1"]
    assert rows(path) == (2, 2)


FAIL = """
import sys
from attrs import evolve
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing.conformance.base import EXHAUSTED, LOCK_TIMEOUT, a_request, an_attempt

store = SQLiteDataAccess(sys.argv[1])
while True:
    store.store_callback_request(a_request(notification_email_address="a@host.example"))
    for acquired in store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1):
        store.record_attempt(acquired, an_attempt(500), evolve(EXHAUSTED, notify=True))
        print(acquired.id, flush=True)
"""


def test_a_process_that_is_killed_while_callbacks_fail_loses_no_debt(path: Path) -> None:
    with running(FAIL, path) as process:
        for _ in range(20):
            assert process.read_line()
        process.kill()

    with SQLiteDataAccess(path) as store:
        failed = [status.id for status in store.list_callbacks(state=CallbackState.FAILED)]
        (owed,) = lease(store)
        assert owed.count == len(failed) >= 20
        assert owed.callback_ids == tuple(failed[:20])
