"""Two PostgreSQL servers as one store keep every promise of a store; and when one of them stops, the other goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import ClassVar

import pytest

from callbackq import Dispatcher
from callbackq.core.delivery import Delivery
from callbackq.core.models import CallbackState
from callbackq.dataaccess import DataAccess
from callbackq.events import EventKind
from callbackq.stores.postgres import PostgreSQLDataAccess, migrate
from callbackq.stores.postgres.transaction import Profile
from callbackq.stores.sharded import ShardedDataAccess
from callbackq.stores.sharded import shard as shard_module
from callbackq.stores.sharded.routing import shard_of
from callbackq.stores.sharded.shard import Shard
from callbackq.testing import DataAccessConformance, FakeClock, ScriptedTransport
from callbackq.testing.conformance.base import a_request
from support.dispatching import Witness
from support.postgres import PostgreSQL, PostgreSQLServer, PostgreSQLServers
from support.postgres_stores import empty, out_of_reach
from support.processes import LIMIT

QUEUES = [f"queue {number}" for number in range(8)]
STOPPED = 1


@pytest.mark.thorough
class TestTwoPostgreSQLServers(DataAccessConformance):
    one_order = False
    homes: ClassVar[list[tuple[PostgreSQL, str]]]

    @pytest.fixture(autouse=True, scope="class")
    @staticmethod
    def _homes(
        request: pytest.FixtureRequest,
        postgres: PostgreSQL,
        migrated: Callable[[Profile], str],
        postgres_servers: PostgreSQLServers,
    ) -> Iterator[None]:
        other = postgres_servers.start()
        with postgres.database(migrated("postgres")) as here, other.database() as there:
            migrate(other.conninfo(there))
            request.cls.homes = [(postgres, here), (other, there)]
            yield
        other.close()

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        for server, database in self.homes:
            empty(server, database)
        return self.reopen(None, clock)

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        shards = [PostgreSQLDataAccess(server.conninfo(database), clock=clock) for server, database in self.homes]
        return ShardedDataAccess(shards, clock=clock)

    @contextmanager
    def outage(self, data_access: DataAccess) -> Iterator[None]:
        with ExitStack() as outages:
            for server, database in self.homes:
                outages.enter_context(out_of_reach(server, database))
            yield


def test_while_a_server_is_stopped_the_others_queues_are_delivered_and_then_all(
    postgres: PostgreSQL, migrated_database: str, start_postgres: Callable[[], PostgreSQLServer]
) -> None:
    server = start_postgres()
    shards = [PostgreSQLDataAccess(postgres.conninfo(migrated_database)), PostgreSQLDataAccess(server.conninfo())]
    healthy = [queue for queue in QUEUES if shard_of(queue, len(shards)) != STOPPED]
    sick = [queue for queue in QUEUES if queue not in healthy]
    assert healthy
    assert sick
    stopping = threading.Lock()

    def answer(delivery: Delivery) -> int:
        # While requests of its queues are under way, whose results it can't take then.
        if delivery.request.queue_id in sick and delivery.sequence == 1:
            with stopping:
                if server.running:
                    server.stop("immediate")
        return 200

    witness, transport = Witness(), ScriptedTransport([answer] * 100)

    def sent(queues: list[str]) -> list[tuple[str, int]]:
        places = [(one.request.queue_id, one.sequence) for one in transport.deliveries]
        return [place for place in places if place[0] in queues]

    with (
        ShardedDataAccess(shards) as store,
        Dispatcher(store, transport=transport, observer=witness, poll_interval=timedelta(milliseconds=50)),
    ):
        store.store_callback_requests([a_request(queue_id=queue) for queue in QUEUES] * 3)
        witness.wait_for(EventKind.STORE_FAILED)
        store.store_callback_requests([a_request(queue_id=queue) for queue in healthy])
        witness.wait_for(EventKind.SUCCEEDED, 4 * len(healthy))
        assert {number for _, number in sent(sick)} == {1}
        assert not server.running

        server.start()
        witness.wait_for(EventKind.SUCCEEDED, 4 * len(healthy) + 3 * len(sick))

        for queue in QUEUES:
            numbers = [number for _, number in sent([queue])]
            assert numbers == list(range(1, 5 if queue in healthy else 4)), "in order, and nothing twice"
        statuses = list(store.list_callbacks())
        assert {status.state for status in statuses} == {CallbackState.SUCCEEDED}
        assert all(len(status.attempts) == 1 for status in statuses), "no fault of the store is an attempt"


def test_while_a_server_stands_still_the_others_queues_are_delivered_under_their_first_locks(
    postgres: PostgreSQL,
    migrated_database: str,
    start_postgres: Callable[[], PostgreSQLServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults: list[float] = []
    rest = Shard._rest_from_slow_fault

    def noting(self: Shard, began: float) -> None:
        faults.append(time.monotonic() - began)
        rest(self, began)

    monkeypatch.setattr(Shard, "_rest_from_slow_fault", noting)
    monkeypatch.setattr(shard_module, "_REST_PER_SECOND_OF_FAULT", 0.1)
    monkeypatch.setattr(shard_module, "_FIRST_RESULTS_REST_SECONDS", 0.1)
    server = start_postgres()
    shards = [
        PostgreSQLDataAccess(where, patience=timedelta(seconds=0.1), answer_timeout=timedelta(seconds=0.9))
        for where in (postgres.conninfo(migrated_database), server.conninfo())
    ]
    healthy = [queue for queue in QUEUES if shard_of(queue, len(shards)) != STOPPED]
    sick = [queue for queue in QUEUES if queue not in healthy]
    witness, under_way, may_end = Witness(), threading.Event(), threading.Event()

    def answer(delivery: Delivery) -> int:
        if delivery.request.queue_id in sick:
            under_way.set()
            assert may_end.wait(LIMIT)
        return 200

    transport = ScriptedTransport([answer] * 100)
    with (
        ShardedDataAccess(shards) as store,
        Dispatcher(store, transport=transport, observer=witness, poll_interval=timedelta(milliseconds=50)),
    ):
        store.store_callback_requests([a_request(queue_id=queue) for queue in sick])
        assert under_way.wait(LIMIT)
        with server.frozen():
            may_end.set()
            rounds = 0
            # Beyond the first fault it is met by connecting.
            while rounds < 3 or len(faults) < 4:
                store.store_callback_requests([a_request(queue_id=queue) for queue in healthy])
                rounds += 1
                witness.wait_for(EventKind.SUCCEEDED, rounds * len(healthy))
        witness.wait_for(EventKind.SUCCEEDED, rounds * len(healthy) + len(sick))
        statuses = list(store.list_callbacks())

    assert max(faults) < 4.0, "no longer than a silent statement, or connecting"
    assert len(transport.deliveries) == len(statuses), "nothing was sent twice"
    assert all(status.success and len(status.locks) == 1 for status in statuses)
