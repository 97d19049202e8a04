"""Checkpoints, backups, listings and batches of the SQLite store."""

from __future__ import annotations

import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path, PurePath

import pytest

from callbackq.core.models import CallbackData, CallbackState
from callbackq.dataaccess import AttemptRecord
from callbackq.errors import ConflictError, DataAccessError, LockLostError
from callbackq.stores.sql.reading import LIST_BATCH
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.stores.sqlite.database import Database
from callbackq.stores.sqlite.file import create
from callbackq.testing import FakeClock
from callbackq.testing.conformance.base import DELIVERED, LOCK_TIMEOUT, a_request, an_attempt

MIB = 1024 * 1024


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(path: Path, clock: FakeClock) -> Iterator[SQLiteDataAccess]:
    with SQLiteDataAccess(path, clock=clock) as store:
        yield store


def wal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


# What lives for long.


def test_everyday_steps_make_no_paths(
    store: SQLiteDataAccess, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    with_name = PurePath.with_name

    def noting(path: PurePath, name: str) -> PurePath:
        made.append(name)
        return with_name(path, name)

    def deliver_one() -> None:
        store.store_callback_request(a_request())
        (acquired,) = store.acquire_locks("m", lock_timeout=LOCK_TIMEOUT, limit=1)
        store.record_attempt(acquired, an_attempt(), DELIVERED)
        clock.advance(1)  # so that the next step looks for holders that died

    for _ in range(2):
        deliver_one()

    # Their parts are interned: the interpreter's table would fill with them, and be rebuilt, for ever.
    monkeypatch.setattr(PurePath, "with_name", noting)
    for _ in range(3):
        deliver_one()

    assert made == []


# Checkpoints.


@pytest.mark.parametrize("body_bytes", [100, 100_000])
def test_the_write_ahead_log_stays_bounded(store: SQLiteDataAccess, path: Path, body_bytes: int) -> None:
    request = a_request(post_data=CallbackData(data=bytes(body_bytes)))
    written = 0
    greatest = 0

    while written < 24 * MIB:
        store.store_callback_requests([request] * 20)
        # Two pages for a small callback: its own, and those of the indexes.
        written += 20 * max(body_bytes, 2 * 4096)
        greatest = max(greatest, wal_of(path).stat().st_size)

    assert greatest < 9 * MIB


def last_copied(path: Path) -> int:
    """When the database file was last written to. (Reading it would give up SQLite's locks on it in this process.)"""
    return path.stat().st_mtime_ns


def test_no_checkpoint_runs_while_another_program_writes(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with SQLiteDataAccess(path, busy_timeout=timedelta(milliseconds=20)) as store:
        store.store_callback_request(a_request())
        before = last_copied(path)
        with (
            closing(sqlite3.connect(path, isolation_level=None)) as other,
            store._database._group.paused(),
        ):
            other.execute("BEGIN IMMEDIATE")

            store._database._checkpoint()

            assert last_copied(path) == before, "a checkpoint beside a writer may lose a commit"
            other.execute("COMMIT")
            store._database._checkpoint()

            assert last_copied(path) != before
    assert [record.levelname for record in caplog.records if "SQLITE_BUSY" in record.message] == ["WARNING"]


def test_sqlite_itself_never_checkpoints(store: SQLiteDataAccess) -> None:
    def autocheckpoint(connection: sqlite3.Connection) -> object:
        return connection.execute("PRAGMA wal_autocheckpoint").fetchone()

    assert store._database.write(lambda transaction: autocheckpoint(transaction._connection)) == (0,)
    assert store._database.read(lambda transaction: autocheckpoint(transaction._connection)) == (0,)
    with store._database.lent_connection() as connection:
        assert autocheckpoint(connection) == (0,)


def test_an_idle_store_copies_what_was_written_ahead(store: SQLiteDataAccess, path: Path) -> None:
    for _ in range(20):
        store.store_callback_requests([a_request()] * 50)
        assert len(store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=50)) == 50
        before = last_copied(path)

        assert store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=50) == []

        if last_copied(path) != before:
            return
    raise AssertionError("an idle moment was never used")


# Where no write-ahead log can be had.


@pytest.mark.parametrize(("durable", "synchronous"), [(True, 3), (False, 2)])
def test_a_rollback_journal_serves_where_write_ahead_cannot_be_had(path: Path, durable: bool, synchronous: int) -> None:
    database = Database(
        path,
        locate=lambda: create(path) is not None,
        prepare=lambda transaction: None,
        forget=lambda: None,
        durable=durable,
        busy_timeout=timedelta(seconds=10),
    )

    database.write(lambda transaction: transaction.add("add_queue", {"name": "queue"}))

    def pragmas(transaction: object) -> list[object]:
        connection = transaction._connection  # type: ignore[attr-defined]
        return [connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")]

    assert database.write(pragmas) == ["delete", synchronous]
    assert database.read(lambda transaction: transaction.one("queue", name="queue")) == (1, 0, None)
    assert not wal_of(path).exists()
    database.close()


# Backups.


def test_a_backup_is_one_private_file(store: SQLiteDataAccess, path: Path) -> None:
    store.store_callback_request(a_request(), id="kept")
    directory = path.parent / "backups"
    directory.mkdir()
    target = directory / "copy.db"

    store.backup(target)

    assert list(directory.iterdir()) == [target]
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with SQLiteDataAccess(target) as copy:
        assert copy.get_callback_status("kept").id == "kept"


def test_a_backup_that_fails_leaves_nothing_behind(store: SQLiteDataAccess, path: Path) -> None:
    target = path.parent / "missing" / "copy.db"

    with pytest.raises(DataAccessError, match=r"copy\.db can't be written"):
        store.backup(target)

    assert not target.parent.exists()


def test_a_backup_of_a_damaged_database_is_thrown_away(store: SQLiteDataAccess, path: Path) -> None:
    store.store_callback_requests([a_request()] * 500)
    store.close()
    content = bytearray(path.read_bytes())
    # The last leaf of an index: nothing but a thorough look comes upon it.
    leaf = max(page for page in range(0, len(content), 4096) if content[page] == 10)
    content[leaf : leaf + 4096] = bytes(4096)
    path.write_bytes(content)
    target = path.with_name("copy.db")

    with pytest.raises(DataAccessError, match="damaged, so its copy was thrown away"):
        store.backup(target)

    assert not target.exists()
    assert not list(path.parent.glob("*.part-*"))


# Listings.


def test_a_listing_goes_on_over_stretches_of_keys_that_are_empty(path: Path, store: SQLiteDataAccess) -> None:
    first = store.store_callback_request(a_request(queue_id="queue")).id
    store.store_callback_request(a_request())
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for table in ("callbackq_callbacks", "callbackq_requests"):
            connection.execute(f"UPDATE {table} SET callback = ? WHERE callback = 2", [5 * LIST_BATCH])
    last = store.store_callback_request(a_request(queue_id="queue")).id

    assert [status.id for status in store.list_callbacks(page_size=1)][::2] == [first, last]
    assert [status.id for status in store.list_callbacks(queue_id="queue", page_size=1)] == [first, last]
    assert [status.queue_id for status in store.list_callbacks(queue_id="")] == [""]
    assert list(store.list_callbacks(queue_id="no such queue")) == list(store.list_callbacks(queue_id="\ud800")) == []


def test_a_listing_shows_no_callback_that_left_the_state_meanwhile(store: SQLiteDataAccess) -> None:
    for number in range(4):
        store.store_callback_request(a_request(), id=str(number))
    listing = store.list_callbacks(state=CallbackState.WAITING, page_size=2)
    assert next(listing).id == "0"

    for acquired in store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=3):
        store.record_attempt(acquired, an_attempt(200), DELIVERED)

    assert [status.id for status in listing] == ["1", "3"], "a page is of one moment"


# Batches.


def test_a_batch_is_stored_all_or_none(store: SQLiteDataAccess) -> None:
    store.store_callback_request(a_request(), id="taken")
    requests = [a_request(queue_id="queue"), a_request(method="GET")]

    with pytest.raises(ConflictError):
        store.store_callback_requests(requests, ids=["new", "taken"])

    assert [status.id for status in store.list_callbacks()] == ["taken"]
    assert store.store_callback_request(a_request(queue_id="queue")).sequence == 1


def test_records_of_one_callback_in_one_batch_are_written_in_their_order(
    store: SQLiteDataAccess, clock: FakeClock
) -> None:
    store.store_callback_request(a_request(), id="twice")
    (stale,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
    clock.advance(LOCK_TIMEOUT)
    (current,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
    records = [
        AttemptRecord(acquired=acquired, attempt=an_attempt(200), transition=DELIVERED)
        for acquired in (stale, current, current, stale)
    ]

    outcomes = store.record_attempts(records)

    assert isinstance(outcomes[0], LockLostError)
    assert outcomes[1] == DELIVERED
    assert outcomes[2] == type(DELIVERED)(state=CallbackState.SUCCEEDED), "a repeated record changes nothing"
    assert isinstance(outcomes[3], LockLostError)
    assert [attempt.late for attempt in store.get_callback_status("twice").attempts] == [True, False]


def test_a_purge_of_many_goes_in_small_steps(store: SQLiteDataAccess, clock: FakeClock) -> None:
    store.store_callback_requests([a_request()] * 700)
    acquired = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=700)
    store.record_attempts(
        [AttemptRecord(acquired=one, attempt=an_attempt(200), transition=DELIVERED) for one in acquired]
    )

    assert store.purge(finished_for=timedelta(0), limit=600) == 600
    assert store.purge(finished_for=timedelta(0), limit=600) == 100
    assert store.purge(finished_for=timedelta(0), limit=600) == 0
