"""Several stores together keep every promise of a store, whatever their kind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from callbackq.dataaccess import DataAccess
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.stores.sharded import ShardedDataAccess
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import DataAccessConformance, FakeClock


class TestTwoMemoryStores(DataAccessConformance):
    one_order = False

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        return ShardedDataAccess([InMemoryDataAccess(clock=clock) for _ in range(2)], clock=clock)


@pytest.mark.thorough
class TestFourSQLiteFiles(DataAccessConformance):
    one_order = False

    def make_data_access(self, clock: FakeClock) -> DataAccess:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "shards"
        self.path.mkdir()
        return self.reopen(None, clock)

    def teardown_method(self, method: object = None) -> None:
        super().teardown_method(method)
        self.directory.cleanup()

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        paths = [self.path / f"{number}.db" for number in range(4)]
        patience = timedelta(seconds=20)
        return ShardedDataAccess(
            [SQLiteDataAccess(path, clock=clock, busy_timeout=patience) for path in paths], clock=clock
        )

    @contextmanager
    def outage(self, data_access: DataAccess) -> Iterator[None]:
        # The disk is gone for a while.
        data_access.close()
        away = self.path.rename(self.path.with_suffix(".away"))
        try:
            yield
        finally:
            away.rename(self.path)
