"""What a reader of the PostgreSQL store is shown while others store and deliver."""

from __future__ import annotations

import threading
from contextlib import closing

import psycopg
import pytest

from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.stores.postgres.transaction import Profile
from callbackq.testing.conformance.base import a_request
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
