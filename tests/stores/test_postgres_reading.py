"""What a reader of the PostgreSQL store is shown while others store and deliver."""

from __future__ import annotations

import threading
from contextlib import closing
from datetime import timedelta

import psycopg
import pytest

from callbackq.core.lifecycle import Transition
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.stores.postgres.transaction import Profile
from callbackq.testing.conformance.base import DELIVERED, EXHAUSTED, LOCK_TIMEOUT, a_request, an_attempt
from support.postgres import PostgreSQL, until
from support.processes import LIMIT

WAITING_FOR_LOCKS = "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"


@pytest.fixture
def conninfo(postgres: PostgreSQL, migrated_database: str) -> str:
    return postgres.conninfo(migrated_database)


@pytest.mark.parametrize("many", [1, 3])
@pytest.mark.parametrize("profile", ["postgres", "distributed"])
def test_whoever_had_to_wait_for_a_queue_is_listed_where_its_number_is(
    postgres: PostgreSQL, migrated_database: str, conninfo: str, profile: Profile, many: int
) -> None:
    request = a_request(queue_id="queue")
    with PostgreSQLDataAccess(conninfo, profile=profile) as store, closing(psycopg.connect(conninfo)) as connection:
        store.store_callback_request(request, connection=connection)
        waiting = threading.Thread(target=store.store_callback_requests, args=[[request] * many])
        waiting.start()
        until(lambda: postgres.execute(WAITING_FOR_LOCKS, migrated_database), "the other to wait")
        store.store_callback_request(request, connection=connection)
        connection.commit()
        waiting.join(LIMIT)

        for queue_id in ("queue", None):
            listed = [one.sequence for one in store.list_callbacks(queue_id=queue_id)]
            assert listed == list(range(1, 3 + many))


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
@pytest.mark.parametrize("transition", [DELIVERED, EXHAUSTED], ids=["delivered", "exhausted"])
def test_behind_a_callback_that_has_ended_the_next_one_is_the_head_to_every_reader(
    conninfo: str, profile: Profile, transition: Transition
) -> None:
    request = a_request(queue_id="queue")
    with (
        PostgreSQLDataAccess(conninfo, profile=profile) as store,
        closing(psycopg.connect(conninfo)) as application,
        closing(psycopg.connect(conninfo, autocommit=True)) as people,
    ):
        store.store_callback_requests([request] * 3, ids=["ended", "next", "last"])
        # Its queue can't be opened as long as this is under way.
        store.store_callback_request(request, id="not-yet", connection=application)
        (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9)
        store.record_attempt(acquired, an_attempt(), transition)
        assert store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9) == []

        for id, blocked_by in {"ended": None, "next": None, "last": "next"}.items():
            assert store.get_callback_status(id).blocked_by == blocked_by
            seen = people.execute("SELECT behind FROM callbackq.overview WHERE id = %s", [id]).fetchone()
            assert seen == (blocked_by,)


@pytest.mark.parametrize("profile", ["postgres", "distributed"])
def test_behind_a_callback_that_has_ended_and_was_the_last_a_new_one_is_the_head(
    conninfo: str, profile: Profile
) -> None:
    request = a_request(queue_id="queue")
    with PostgreSQLDataAccess(conninfo, profile=profile) as store, closing(psycopg.connect(conninfo)) as application:
        store.store_callback_request(request, id="ended")
        store.store_callback_request(request, id="new", connection=application)
        (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9)
        store.record_attempt(acquired, an_attempt(), DELIVERED)
        application.commit()

        assert store.get_callback_status("new").blocked_by is None


def test_a_reader_that_freezes_does_not_keep_the_server_from_cleaning_up_for_ever(conninfo: str) -> None:
    with PostgreSQLDataAccess(conninfo, patience=timedelta(seconds=7)) as store:
        limit = store._database.read(
            lambda transaction: transaction._connection.execute(
                "SELECT current_setting('idle_in_transaction_session_timeout')"
            ).fetchone()
        )

    assert limit == ("7s",)
