"""Whatever somebody writes into a callback's row: that callback fails by itself, and the others go on."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from callbackq import CallbackqError, Dispatcher, SQLiteDataAccess
from callbackq.core.models import CallbackState, FailedReason
from callbackq.errors import DataAccessError
from callbackq.stores.sql.scripts import load_migrations
from callbackq.testing import FakeClock, ScriptedTransport
from callbackq.testing.conformance.base import a_request

JUNK = ["NULL", "'junk'", "x'ff00'", "1.5", "-1", "7", "9223372036854775807", "-9223372036854775808"]
LIMIT = timedelta(seconds=30)


def columns(table: str) -> list[str]:
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        for statements in load_migrations("callbackq.stores.sqlite", "migrations.sql"):
            for statement in statements:
                connection.execute(statement)
        return [column[1] for column in connection.execute(f"PRAGMA table_info({table})")]


COLUMNS = [name for name in columns("callbackq_callbacks") if name != "callback"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteDataAccess]:
    with SQLiteDataAccess(path, clock=FakeClock()) as store:
        yield store


def write(path: Path, statement: str, *, past_all_checks: bool) -> bool:
    """Write as another program would; tell whether it could."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA ignore_check_constraints = {int(past_all_checks)}")
        with suppress(sqlite3.IntegrityError):
            connection.execute(statement)
            return True
    return False


@pytest.mark.thorough
@pytest.mark.parametrize("junk", JUNK)
@pytest.mark.parametrize("column", COLUMNS)
def test_a_damaged_row_holds_up_no_other_queue_and_fails_or_is_delivered(
    store: SQLiteDataAccess, path: Path, column: str, junk: str
) -> None:
    for queue_id in ("bad", "bad", "good", "good"):
        store.store_callback_request(a_request(queue_id=queue_id), id=f"{queue_id}-{len(list(store.list_callbacks()))}")
    store.store_callback_request(a_request(), id="alone")
    written = write(path, f"UPDATE callbackq_callbacks SET {column} = {junk} WHERE id = 'bad-0'", past_all_checks=True)
    transport = ScriptedTransport([])

    dispatcher = Dispatcher(store, transport=transport)
    assert dispatcher.run_until_idle(timeout=LIMIT)
    store.close()
    assert dispatcher.run_until_idle(timeout=LIMIT), "an opening may be needed to find it"

    for id in ("good-2", "good-3", "alone"):
        assert store.get_callback_status(id).success, id
    sent = [delivery.callback_id for delivery in transport.deliveries]
    assert len(sent) == len(set(sent))
    with suppress(CallbackqError):
        status = store.get_callback_status("bad-0")
        assert not written or status.state is not CallbackState.LOCKED
    assert all(isinstance(status.id, str) for status in store.list_callbacks())
    store.purge(finished_for=timedelta(0))


@pytest.mark.parametrize("column", ["attempts_made", "abandoned", "token", "state", "acquired", "machine"])
@pytest.mark.parametrize(
    ("on_exhausted", "follower"), [("continue", CallbackState.SUCCEEDED), ("hold", CallbackState.WAITING)]
)
def test_a_damaged_callback_fails_as_undecodable_and_its_queue_follows_its_policy(
    store: SQLiteDataAccess, path: Path, column: str, on_exhausted: str, follower: CallbackState
) -> None:
    store.store_callback_request(a_request(queue_id="queue", on_exhausted=on_exhausted), id="bad")
    store.store_callback_request(a_request(queue_id="queue"), id="behind")
    assert write(path, f"UPDATE callbackq_callbacks SET {column} = x'00' WHERE id = 'bad'", past_all_checks=True)
    store.close()
    transport = ScriptedTransport([])

    assert Dispatcher(store, transport=transport).run_until_idle(timeout=LIMIT)

    bad = store.get_callback_status("bad")
    assert (bad.state, bad.failed_reason) == (CallbackState.FAILED, FailedReason.UNDECODABLE)
    assert store.get_callback_status("behind").state is follower
    assert "bad" not in {delivery.callback_id for delivery in transport.deliveries}


def test_a_callback_whose_due_time_is_lost_is_due_when_the_store_is_opened(store: SQLiteDataAccess, path: Path) -> None:
    store.store_callback_request(a_request(queue_id="queue"), id="one")
    assert write(path, "UPDATE callbackq_callbacks SET due = 'junk'", past_all_checks=True)
    assert store.next_due() is None
    store.close()

    assert Dispatcher(store, transport=ScriptedTransport([])).run_until_idle(timeout=LIMIT)

    assert store.get_callback_status("one").success


def test_a_callback_without_a_readable_id_is_set_aside(
    store: SQLiteDataAccess, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.store_callback_request(a_request(queue_id="queue"), id="bad")
    store.store_callback_request(a_request(queue_id="queue"), id="behind")
    assert write(path, "UPDATE callbackq_callbacks SET id = x'ff' WHERE id = 'bad'", past_all_checks=True)

    for _ in range(2):
        assert Dispatcher(store, transport=ScriptedTransport([])).run_until_idle(timeout=LIMIT)

    assert store.get_callback_status("behind").success
    assert len([record for record in caplog.records if "whose id" in record.message]) == 1


@pytest.mark.parametrize("column", [name for name in COLUMNS if name not in ("holder",)])
def test_an_ordinary_program_can_not_write_a_blob_where_none_belongs(
    store: SQLiteDataAccess, path: Path, column: str
) -> None:
    store.store_callback_request(a_request(queue_id="queue"), id="one")

    assert not write(path, f"UPDATE callbackq_callbacks SET {column} = x'ff'", past_all_checks=False)


def test_a_queue_whose_tail_is_damaged_takes_no_callback_and_says_so(store: SQLiteDataAccess, path: Path) -> None:
    store.store_callback_request(a_request(queue_id="queue"))
    assert not write(path, "UPDATE callbackq_queues SET tail = 'junk'", past_all_checks=False)
    assert write(path, "UPDATE callbackq_queues SET tail = 'junk'", past_all_checks=True)

    with pytest.raises(DataAccessError, match="tail"):
        store.store_callback_request(a_request(queue_id="queue"))
