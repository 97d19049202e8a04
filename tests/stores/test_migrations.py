"""Databases of every earlier version are brought to the newest, or not touched at all."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from callbackq.errors import DataAccessError
from callbackq.stores.sql.scripts import load_migrations, load_statements
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.stores.sqlite.schema import NEWEST_VERSION
from callbackq.testing.conformance.base import LOCK_TIMEOUT, a_request

MIGRATIONS = load_migrations("callbackq.stores.sqlite", "migrations.sql")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


def schema_of(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as connection:
        return {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}


@pytest.mark.parametrize("version", range(NEWEST_VERSION + 1))
def test_a_database_of_any_version_is_brought_to_the_newest_and_works(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statements in MIGRATIONS[:version]:
            for statement in statements:
                connection.execute(statement)
        if version:
            connection.execute("UPDATE callbackq_store SET schema_version = ?", [version])

    with SQLiteDataAccess(path) as store:
        store.store_callback_request(a_request(queue_id="queue"), id="kept")
        assert len(store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)) == 1

    with SQLiteDataAccess(path.with_name("new.db")) as fresh:
        fresh.open()
    assert schema_of(path) == schema_of(path.with_name("new.db"))
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT schema_version FROM callbackq_store").fetchall() == [(NEWEST_VERSION,)]


def test_opening_again_changes_nothing(path: Path) -> None:
    with SQLiteDataAccess(path) as store:
        store.store_callback_request(a_request(), id="kept")
    before = path.read_bytes()

    with SQLiteDataAccess(path) as store:
        assert store.get_callback_status("kept").id == "kept"

    assert path.read_bytes() == before


def test_a_migration_that_fails_leaves_no_half_of_itself(path: Path) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE callbackq_mailings (somebody, elses)")
    before = schema_of(path)

    with pytest.raises(DataAccessError, match="refused a statement"):
        SQLiteDataAccess(path).open()

    assert schema_of(path) == before


def test_a_store_without_its_row_is_refused(path: Path) -> None:
    with SQLiteDataAccess(path) as store:
        store.open()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM callbackq_store")

    with pytest.raises(DataAccessError, match="restore a backup"):
        SQLiteDataAccess(path).open()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "package_of_sql"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, folder.name, raising=False)
    return folder


def test_statements_are_read_by_name_without_their_comments(package: Path) -> None:
    (package / "statements.sql").write_text(
        "-- About the file.\n\n-- name: one\n-- Why.\nSELECT 1\n-- inside\n, 2;\n\n-- name: two\nSELECT ';';\n"
    )

    assert load_statements(package.name, "statements.sql") == {"one": "SELECT 1\n, 2", "two": "SELECT ';'"}


@pytest.mark.parametrize(
    "text",
    [
        "-- name: one\nSELECT 1;\n-- name: one\nSELECT 2;\n",
        "-- name: one\nSELECT 1;\nSELECT 2;\n",
        "-- migration: 1\nSELECT 1;\n",
    ],
    ids=["a name twice", "two statements", "a migration"],
)
def test_a_muddled_file_of_statements_is_refused(package: Path, text: str) -> None:
    (package / "statements.sql").write_text(text)

    with pytest.raises(ValueError):
        load_statements(package.name, "statements.sql")


def test_migrations_are_read_in_order(package: Path) -> None:
    (package / "migrations.sql").write_text("-- migration: 1\nA;\nB;\n-- migration: 2\n-- Why.\nC\nD;\n")

    assert load_migrations(package.name, "migrations.sql") == (("A", "B"), ("C\nD",))


def test_migrations_with_a_gap_are_refused(package: Path) -> None:
    (package / "migrations.sql").write_text("-- migration: 1\nA;\n-- migration: 3\nB;\n")

    with pytest.raises(ValueError, match="numbered 1, 2, 3"):
        load_migrations(package.name, "migrations.sql")
