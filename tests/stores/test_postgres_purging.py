"""What is purged from PostgreSQL while somebody acts on the same callbacks."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta

import psycopg
import pytest
from attrs import evolve

from callbackq.core.lifecycle import Action
from callbackq.core.models import CallbackState
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.stores.postgres import database as databases
from callbackq.stores.postgres.transaction import Profile
from callbackq.testing import FakeClock
from callbackq.testing.conformance.base import EXHAUSTED, LOCK_TIMEOUT, a_request, an_attempt
from support.postgres import PostgreSQL, until
from support.processes import LIMIT

# A purge stops at each row it looks at, after its statement has begun and before it locks the row, until the key is
# free. So the row can change at exactly that point.
GATE = """
CREATE FUNCTION callbackq.gate() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('test.purges', true) = 'yes' THEN
        PERFORM pg_advisory_xact_lock_shared(1);
    END IF;
    RETURN true;
END $$;
ALTER TABLE callbackq.callbacks ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY gate ON callbackq.callbacks USING (callbackq.gate());
"""
WAITING_FOR_LOCKS = "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"


@pytest.fixture
def conninfo(postgres: PostgreSQL, migrated_database: str) -> str:
    return postgres.conninfo(migrated_database)


@pytest.fixture
def gate(conninfo: str) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """Closed until ``pg_advisory_unlock(1)``."""
    with closing(psycopg.connect(conninfo, autocommit=True)) as connection:
        connection.execute(GATE)
        connection.execute("SELECT pg_advisory_lock(1)")
        yield connection


def fail(store: PostgreSQLDataAccess, *, notify: bool) -> None:
    (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9)
    store.record_attempt(acquired, an_attempt(), evolve(EXHAUSTED, notify=notify))


@pytest.mark.parametrize("fails_again", [True, False])
@pytest.mark.parametrize(
    ("profile", "isolation"),
    [("postgres", None), ("distributed", None), ("distributed", "READ COMMITTED")],
    ids=["postgres", "distributed", "distributed, not serializable"],
)
def test_what_was_redelivered_since_it_was_found_is_kept(
    postgres: PostgreSQL,
    migrated_database: str,
    conninfo: str,
    gate: psycopg.Connection[tuple[object, ...]],
    monkeypatch: pytest.MonkeyPatch,
    profile: Profile,
    isolation: str | None,
    fails_again: bool,
) -> None:
    if isolation is not None:
        monkeypatch.setitem(databases._BEGIN, profile, f"BEGIN ISOLATION LEVEL {isolation}; ")
    clock = FakeClock()
    purged: list[int] = []
    with (
        PostgreSQLDataAccess(conninfo, profile=profile, clock=clock) as store,
        PostgreSQLDataAccess(f"{conninfo} options='-c test.purges=yes'", profile=profile, clock=clock) as purger,
    ):
        store.store_callback_request(a_request(notification_email_address="somebody@receiver.example"), id="a")
        fail(store, notify=False)
        purging = threading.Thread(target=lambda: purged.append(purger.purge(finished_for=timedelta(0))))
        purging.start()
        until(lambda: postgres.execute(WAITING_FOR_LOCKS, migrated_database), "the purge to reach the row")
        store.request_transition("a", Action.REDELIVER)
        if fails_again:
            fail(store, notify=True)
        gate.execute("SELECT pg_advisory_unlock(1)")
        purging.join(LIMIT)

        assert purged == [0]
        state = CallbackState.FAILED if fails_again else CallbackState.WAITING
        assert store.get_callback_status("a").state is state
        owed = store.acquire_notifications(lock_timeout=LOCK_TIMEOUT, limit=9)
        assert [one.callback_ids for one in owed] == ([("a",)] if fails_again else [])
