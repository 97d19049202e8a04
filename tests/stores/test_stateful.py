"""The SQLite store can't be told from the reference store by any sequence of operations."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings

from callbackq.dataaccess import DataAccess
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock
from callbackq.testing.stateful import DataAccessComparison


class SQLiteComparison(DataAccessComparison):
    def make_data_access(self, clock: FakeClock) -> DataAccess:
        self.directory = tempfile.TemporaryDirectory()
        return self.reopen(None, clock)

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        return SQLiteDataAccess(Path(self.directory.name) / "callbacks.db", clock=clock)

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "directory"):
            self.directory.cleanup()


class ReferenceComparison(DataAccessComparison):
    """The reference agrees with itself: what the machine compares depends on nothing but the operations."""

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        return InMemoryDataAccess(clock=clock)


TestSQLite = SQLiteComparison.TestCase
TestSQLite.settings = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TestReference = ReferenceComparison.TestCase
TestReference.settings = settings(TestSQLite.settings, max_examples=20)
