"""The SQLite store, and several stores as one, can't be told from the reference by any sequence of operations."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from callbackq.core.models import CallbackStatus
from callbackq.dataaccess import DataAccess
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.stores.sharded import ShardedDataAccess
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock
from callbackq.testing.stateful import DataAccessComparison
from conformance import mutants

# Thousands of operations, which take a while on a busy machine.
pytestmark = [pytest.mark.timeout(240), pytest.mark.thorough]

SETTINGS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class SQLiteComparison(DataAccessComparison):
    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        super().__init__()

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        return self.reopen(None, clock)

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        return SQLiteDataAccess(Path(self.directory.name) / "callbacks.db", clock=clock)

    def teardown(self) -> None:
        super().teardown()
        self.directory.cleanup()


TestSQLite = SQLiteComparison.TestCase
TestSQLite.settings = SETTINGS


class ShardedComparison(DataAccessComparison):
    def make_data_access(self, clock: FakeClock) -> DataAccess:
        return ShardedDataAccess([InMemoryDataAccess(clock=clock) for _ in range(3)], clock=clock)

    def _address_for(self, id: str, queue_id: str) -> str:
        # Failures without a queue are one e-mail for each shard.
        return super()._address_for(id, queue_id) if queue_id else f"{id}@host.example"

    def _all(self, store: DataAccess) -> list[CallbackStatus]:
        # There is no order across shards.
        return sorted(super()._all(store), key=lambda status: status.id)


TestSharded = ShardedComparison.TestCase
TestSharded.settings = SETTINGS


def comparison_of(kind: type[mutants.Sturdy]) -> type[DataAccessComparison]:
    class Comparison(DataAccessComparison):
        def make_data_access(self, clock: FakeClock) -> DataAccess:
            return kind(clock=clock)

        def reopen(self, data_access: DataAccess, clock: FakeClock) -> DataAccess:
            assert isinstance(data_access, kind)
            return data_access.reopened(clock)

    return Comparison


def test_the_reference_agrees_with_itself() -> None:
    run_state_machine_as_test(comparison_of(mutants.Sturdy), settings=settings(SETTINGS, max_examples=20))


@pytest.mark.parametrize(
    "mutant",
    [
        mutants.CountsAbandonedLocksAsAttempts,
        mutants.ForgetsLateAcceptances,
        mutants.IgnoresHolds,
        mutants.LetsANewHeadQueueUpAgain,
        mutants.KnowsNoQuietTime,
        mutants.LosesTheEmail,
        mutants.PurgesTheYoungToo,
        mutants.RecordsUnderAnyLock,
        mutants.RedeliversInPlaceAlways,
        mutants.TellsTheWallTime,
    ],
)
def test_a_store_that_behaves_otherwise_is_noticed(mutant: type[mutants.Sturdy]) -> None:
    # The first sequence that shows it will do: nobody is going to read the shortest.
    found = settings(SETTINGS, max_examples=1000, phases=[Phase.generate])

    with pytest.raises((AssertionError, LookupError)):
        run_state_machine_as_test(comparison_of(mutant), settings=found)
