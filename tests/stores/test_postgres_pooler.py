"""The PostgreSQL store behind a pooler that gives each transaction another session, and dispatchers there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import ClassVar

import psycopg
import pytest

from callbackq import Dispatcher
from callbackq.dataaccess import DataAccess
from callbackq.events import EventKind
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from callbackq.testing.conformance import Exclusive, Reads, SequenceNumbers, ThreadsAndForks
from callbackq.testing.conformance.base import a_request
from support.dispatching import Witness
from support.postgres import PostgreSQL, until
from support.postgres_pooler import SwappingPooler
from support.postgres_stores import PostgreSQLHooks


@pytest.mark.thorough
class TestPooledConformance(PostgreSQLHooks, Exclusive, SequenceNumbers, Reads, ThreadsAndForks):
    profile = "postgres"
    pooler: ClassVar[SwappingPooler]

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _pooler(request: pytest.FixtureRequest, _database: None) -> Iterator[None]:
        with SwappingPooler(request.cls.server.conninfo(request.cls.database)) as request.cls.pooler:
            yield

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        return PostgreSQLDataAccess(self.pooler.conninfo, profile=self.profile, clock=clock)


def test_a_dispatcher_finds_everything_where_no_hint_comes_through(
    postgres: PostgreSQL, migrated_database: str
) -> None:
    witness, transport = Witness(), ScriptedTransport([500])
    with (
        SwappingPooler(postgres.conninfo(migrated_database)) as pooler,
        PostgreSQLDataAccess(pooler.conninfo) as store,
        PostgreSQLDataAccess(pooler.conninfo) as enqueuer,
        Dispatcher(store, transport=transport, observer=witness, poll_interval=timedelta(milliseconds=50)),
    ):
        # More than a session's first, of whom the pooler still knows.
        for number in range(40):
            enqueuer.store_callback_request(a_request(queue_id=f"queue {number % 4}"))
            if number % 10 == 0:
                witness.wait_for(EventKind.SUCCEEDED, number // 2)
        witness.wait_for(EventKind.FAILED, 1)
        witness.wait_for(EventKind.SUCCEEDED, 39)
        with psycopg.connect(pooler.conninfo, autocommit=True, prepare_threshold=None) as stranger:
            heard = [stranger.execute("SELECT pg_listening_channels()").fetchall() for _ in range(10)]

    assert heard == [[]] * 10  # or whoever comes next would be told what is none of his business
    assert len(transport.deliveries) == 40
    # Those that sent for the host's transport end by themselves.
    until(lambda: not [one for one in threading.enumerate() if "callbackq" in one.name], "the end of all threads")
