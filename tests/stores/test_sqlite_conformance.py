"""The SQLite store keeps every promise of a store."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path

from callbackq.dataaccess import DataAccess
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import DataAccessConformance, FakeClock


class TestSQLiteConformance(DataAccessConformance):
    def make_data_access(self, clock: FakeClock) -> DataAccess:
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "callbacks.db"
        return self.reopen(None, clock)

    def teardown_method(self, method: object = None) -> None:
        super().teardown_method(method)
        self.directory.cleanup()

    def reopen(self, data_access: DataAccess | None, clock: FakeClock) -> DataAccess:
        return SQLiteDataAccess(self.path, clock=clock, busy_timeout=timedelta(seconds=20))

    def open_backup(self, path: Path, clock: FakeClock) -> DataAccess:
        return SQLiteDataAccess(path, clock=clock)

    @contextmanager
    def application_transaction(self, data_access: DataAccess) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=20)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection

    @contextmanager
    def outage(self, data_access: DataAccess) -> Iterator[None]:
        # The disk is gone for a while.
        data_access.close()
        away = self.path.parent.rename(self.path.parent.with_suffix(".away"))
        try:
            yield
        finally:
            away.rename(self.path.parent)
