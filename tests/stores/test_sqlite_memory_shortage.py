"""Whoever runs out of memory in a transaction must not keep other processes' writers waiting until there is some."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from callbackq.errors import CallbackNotFoundError
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.stores.sqlite.checkpoints import CheckpointSchedule
from callbackq.testing.conformance.base import a_request


class Starved(sqlite3.Connection):
    """A connection for some of whose statements there is no memory: SQLITE_NOMEM comes as a MemoryError."""

    without_memory: frozenset[str] = frozenset()

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        if sql.split()[0] in Starved.without_memory:
            raise MemoryError
        return super().execute(sql, *parameters)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SQLiteDataAccess]:
    connect = sqlite3.connect
    with monkeypatch.context() as patched:
        patched.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, factory=Starved, **options))
        with SQLiteDataAccess(tmp_path / "callbacks.db") as store:
            store.store_callback_request(a_request(), id="before")
            assert store.get_callback_status("before") is not None
            yield store
            patched.setattr(Starved, "without_memory", frozenset())


@pytest.mark.parametrize("statement", ["SAVEPOINT", "RELEASE", "COMMIT"])
@pytest.mark.parametrize("rolls_back", [True, False], ids=["rolled back", "no memory to roll back"])
def test_a_write_without_memory_holds_up_nobody(
    store: SQLiteDataAccess, tmp_path: Path, statement: str, rolls_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {statement} if rolls_back else {statement, "ROLLBACK"}
    monkeypatch.setattr(Starved, "without_memory", frozenset(without))

    with pytest.raises(MemoryError):
        store.store_callback_request(a_request(), id="starved")

    monkeypatch.setattr(Starved, "without_memory", frozenset())
    with SQLiteDataAccess(tmp_path / "callbacks.db", busy_timeout=timedelta(0)) as other:
        with pytest.raises(CallbackNotFoundError):
            other.get_callback_status("starved")
        other.store_callback_request(a_request(), id="other")
    # Nobody had to be told, nothing has to be mended.
    store.store_callback_request(a_request(), id="starved")
    assert store.get_callback_status("other") is not None


@pytest.mark.parametrize("statement", ["BEGIN", "PRAGMA", "ROLLBACK"])
def test_a_checkpoint_without_memory_is_nobodys_failure(
    store: SQLiteDataAccess, tmp_path: Path, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    def is_due(*_: int) -> bool:
        # The write is committed, and from now on there is no memory.
        begun.append(statement)
        monkeypatch.setattr(Starved, "without_memory", frozenset({statement}))
        return True

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointSchedule, "is_due", is_due)
        store.store_callback_request(a_request(), id="written")
    monkeypatch.setattr(Starved, "without_memory", frozenset())

    assert begun == [statement]
    with SQLiteDataAccess(tmp_path / "callbacks.db", busy_timeout=timedelta(0)) as other:
        other.store_callback_request(a_request(), id="other")
    store.store_callback_request(a_request(), id="next")
    assert store.get_callback_status("written") is not None


@pytest.mark.parametrize("statement", ["SELECT", "COMMIT"])
def test_a_read_without_memory_leaves_no_transaction_behind(
    store: SQLiteDataAccess, statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Starved, "without_memory", frozenset({statement}))
    with pytest.raises(MemoryError):
        store.get_callback_status("before")
    monkeypatch.setattr(Starved, "without_memory", frozenset())
    store.store_callback_request(a_request(), id="after")

    assert store.get_callback_status("after") is not None
