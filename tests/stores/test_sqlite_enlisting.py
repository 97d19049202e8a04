"""Callbacks stored in a transaction of the application's, on its own connection: with its rows, or not at all."""

from __future__ import annotations

import itertools
import random
import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from callbackq.core.models import CallbackData, CallbackRequest, RetryPhase
from callbackq.dataaccess import DataAccess, SupportsEnlist
from callbackq.dispatcher import Dispatcher
from callbackq.errors import (
    CallbackNotFoundError,
    ConflictError,
    DataAccessError,
    InvalidRequestError,
    SchemaVersionError,
    TransientDataAccessError,
)
from callbackq.events import EventKind
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.testing import FakeClock, ScriptedTransport
from callbackq.testing.conformance.base import DELIVERED, DUE_AGAIN, LOCK_TIMEOUT, a_request, an_attempt
from support.dispatching import LIMIT, HeldTransport, Witness
from support.processes import running

MODES = ["begun by hand", "begun by the driver"]
if hasattr(sqlite3.Connection, "autocommit"):
    MODES.append("never autocommit")  # since Python 3.12


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shop.db"


@pytest.fixture
def store(path: Path) -> Iterator[SQLiteDataAccess]:
    with SQLiteDataAccess(path) as store, closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE orders (name TEXT PRIMARY KEY)")
        yield store


@pytest.fixture
def connection(store: SQLiteDataAccess, path: Path) -> Iterator[sqlite3.Connection]:
    """The application's, with a transaction under way."""
    with closing(sqlite3.connect(path, isolation_level=None, timeout=LIMIT)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield connection


def connect(path: Path, mode: str) -> sqlite3.Connection:
    if mode == "never autocommit":
        options: dict[str, Any] = {"autocommit": False}
        return sqlite3.connect(path, **options)
    connection = sqlite3.connect(path)
    if mode == "begun by hand":
        connection.isolation_level = None
        connection.execute("BEGIN IMMEDIATE")
    return connection


def place(connection: sqlite3.Connection, order: str) -> None:
    connection.execute("INSERT INTO orders VALUES (?)", [order])


def orders(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM orders ORDER BY name")]


def ids(store: SQLiteDataAccess) -> list[str]:
    return [status.id for status in store.list_callbacks()]


# With the application's rows, or not at all.


@pytest.mark.parametrize("mode", MODES)
def test_a_commit_stores_the_callback_and_the_rows(store: SQLiteDataAccess, path: Path, mode: str) -> None:
    with closing(connect(path, mode)) as connection:
        returned = store.store_callback_request(a_request(queue_id="queue"), id="paid", connection=connection)
        place(connection, "1042")
        connection.commit()

    assert store.get_callback_status("paid") == returned
    assert orders(path) == ["1042"]
    (acquired,) = store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9)
    assert (acquired.id, acquired.sequence) == ("paid", 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rows_first", [False, True])
def test_a_rollback_stores_neither(store: SQLiteDataAccess, path: Path, mode: str, rows_first: bool) -> None:
    with closing(connect(path, mode)) as connection:
        if rows_first:
            place(connection, "1042")
        store.store_callback_request(a_request(), id="paid", connection=connection)
        if not rows_first:
            place(connection, "1042")
        connection.rollback()

    assert ids(store) == []
    assert orders(path) == []


@pytest.mark.parametrize("mode", MODES)
def test_an_exception_in_the_applications_block_stores_neither(store: SQLiteDataAccess, path: Path, mode: str) -> None:
    with closing(connect(path, mode)) as connection, suppress(ZeroDivisionError), connection:
        place(connection, "1042")
        store.store_callback_request(a_request(), connection=connection)
        print(1 / 0)

    assert ids(store) == []
    assert orders(path) == []


def test_a_connection_closed_without_a_commit_stores_neither(
    store: SQLiteDataAccess, path: Path, connection: sqlite3.Connection
) -> None:
    place(connection, "1042")
    store.store_callback_request(a_request(), connection=connection)

    connection.close()

    assert ids(store) == []
    assert orders(path) == []


def test_a_rollback_to_a_savepoint_takes_back_what_was_stored_behind_it(
    store: SQLiteDataAccess, connection: sqlite3.Connection
) -> None:
    store.store_callback_request(a_request(queue_id="queue"), id="before", connection=connection)
    connection.execute("SAVEPOINT part")
    store.store_callback_request(a_request(queue_id="queue"), id="in-it", connection=connection)
    store.store_callback_request(a_request(queue_id="new"), id="in-it-too", connection=connection)
    connection.execute("ROLLBACK TO part")
    connection.execute("RELEASE part")
    after = store.store_callback_request(a_request(queue_id="queue"), id="after", connection=connection)
    connection.commit()

    assert ids(store) == ["before", "after"]
    assert after.sequence == 2
    assert after.blocked_by == "before"


def test_nothing_is_seen_or_sent_before_the_commit(store: SQLiteDataAccess, connection: sqlite3.Connection) -> None:
    store.store_callback_request(a_request(), id="paid", connection=connection)

    with pytest.raises(CallbackNotFoundError):
        store.get_callback_status("paid")
    assert store.next_due() is None
    assert store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=9) == []


def test_storing_leaves_the_transaction_open(store: SQLiteDataAccess, connection: sqlite3.Connection) -> None:
    store.store_callback_requests([a_request(), a_request(queue_id="queue")], connection=connection)

    assert connection.in_transaction


def test_a_process_killed_before_its_commit_has_stored_neither(store: SQLiteDataAccess, path: Path) -> None:
    code = """
import sqlite3, sys
from callbackq import SQLiteDataAccess
from callbackq.testing.conformance.base import a_request

connection = sqlite3.connect(sys.argv[1], isolation_level=None)
with SQLiteDataAccess(sys.argv[1]) as store:
    for order in (1, 2):
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("INSERT INTO orders VALUES (?)", [f"order {order}"])
        store.store_callback_request(a_request(queue_id="queue"), id=f"callback-{order}", connection=connection)
        if order == 1:
            connection.execute("COMMIT")
    print("stored")
    input()
"""
    with running(code, path) as process:
        assert process.read_line() == "stored"
        process.kill()

    assert ids(store) == ["callback-1"]
    assert orders(path) == ["order 1"]
    assert store.store_callback_request(a_request(queue_id="queue")).sequence == 2


def test_several_are_stored_in_their_order(store: SQLiteDataAccess, connection: sqlite3.Connection) -> None:
    requests = [a_request(queue_id="queue"), a_request(), a_request(queue_id="queue")]

    statuses = store.store_callback_requests(requests, ids=["a", "b", "c"], connection=connection)
    connection.commit()

    assert [(status.id, status.sequence) for status in statuses] == [("a", 1), ("b", 1), ("c", 2)]
    assert list(store.list_callbacks()) == statuses


# Ids.


def test_an_id_is_stored_once_whichever_transaction_it_came_with(
    store: SQLiteDataAccess, connection: sqlite3.Connection
) -> None:
    connection.rollback()
    store.store_callback_request(a_request(), id="own")
    connection.execute("BEGIN")
    request = a_request(queue_id="queue")
    first = store.store_callback_request(request, id="theirs", connection=connection)

    assert store.store_callback_request(request, id="theirs", connection=connection) == first
    assert store.store_callback_request(a_request(), id="own", connection=connection).id == "own"
    connection.commit()
    assert store.store_callback_request(request, id="theirs") == first
    assert ids(store) == ["own", "theirs"]


def test_a_conflict_leaves_the_transaction_usable_and_nothing_half_written(
    store: SQLiteDataAccess, connection: sqlite3.Connection, path: Path
) -> None:
    store.store_callback_request(a_request(), id="taken", connection=connection)
    place(connection, "before")

    with pytest.raises(ConflictError):
        store.store_callback_requests(
            [a_request(queue_id="new"), a_request(method="PUT")], ids=["fresh", "taken"], connection=connection
        )
    place(connection, "after")
    store.store_callback_request(a_request(), id="other", connection=connection)
    connection.commit()

    assert ids(store) == ["taken", "other"]
    assert orders(path) == ["after", "before"]
    with closing(sqlite3.connect(path)) as looking:
        assert looking.execute("SELECT name FROM callbackq_queues").fetchall() == []


def test_a_refused_argument_leaves_the_transaction_usable(
    store: SQLiteDataAccess, connection: sqlite3.Connection
) -> None:
    store.store_callback_request(a_request(), id="good", connection=connection)

    with pytest.raises(InvalidRequestError, match="id: must"):
        store.store_callback_request(a_request(), id="not an id", connection=connection)
    with pytest.raises(InvalidRequestError, match="ids: must"):
        store.store_callback_requests([a_request()], ids=[], connection=connection)

    connection.commit()
    assert ids(store) == ["good"]


# Which connections.


def refusal(store: SQLiteDataAccess, connection: Any) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        store.store_callback_request(a_request(), connection=connection)
    ((argument, reason),) = caught.value.errors
    assert argument == "connection"
    assert ids(store) == []
    return reason


@pytest.mark.parametrize("wrong", [object(), "shop.db", 5])
def test_what_is_no_connection_is_refused(store: SQLiteDataAccess, wrong: object) -> None:
    assert "must be a sqlite3.Connection" in refusal(store, wrong)


@pytest.mark.parametrize("options", [{"isolation_level": None}, {"autocommit": True}])
def test_a_connection_that_commits_each_statement_is_refused(
    store: SQLiteDataAccess, path: Path, options: dict[str, Any]
) -> None:
    if "autocommit" in options and "never autocommit" not in MODES:
        pytest.skip("this Python has no such mode")
    with closing(sqlite3.connect(path, **options)) as connection:
        assert "begin it with BEGIN IMMEDIATE" in refusal(store, connection)
        assert not connection.in_transaction


def test_a_closed_connection_is_refused(store: SQLiteDataAccess, connection: sqlite3.Connection) -> None:
    connection.close()

    assert "must be open" in refusal(store, connection)


def test_a_connection_of_another_thread_is_refused(store: SQLiteDataAccess, connection: sqlite3.Connection) -> None:
    with ThreadPoolExecutor(1) as threads:
        reason = threads.submit(refusal, store, connection).result(LIMIT)

    assert "used by the thread that opened it" in reason


@pytest.mark.parametrize("other", [":memory:", "", "other.db", "another store"])
def test_a_connection_to_another_database_is_refused(store: SQLiteDataAccess, tmp_path: Path, other: str) -> None:
    file = other if other in (":memory:", "") else str(tmp_path / other)
    if other == "another store":
        with SQLiteDataAccess(file):
            pass
    with closing(sqlite3.connect(file)) as connection:
        assert "the store's file as its main database" in refusal(store, connection)
        connection.commit()
        if other == "another store":
            assert connection.execute("SELECT count(*) FROM callbackq_callbacks").fetchone() == (0,)


def test_a_store_that_is_only_attached_is_refused(store: SQLiteDataAccess, path: Path) -> None:
    # A commit across two files in WAL mode isn't atomic.
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("ATTACH ? AS shop", [str(path)])

        assert "as its main database" in refusal(store, connection)


def test_other_databases_may_be_attached_and_the_file_may_have_other_names(
    store: SQLiteDataAccess, path: Path, tmp_path: Path
) -> None:
    (tmp_path / "link.db").symlink_to(path)
    with closing(sqlite3.connect(tmp_path / "link.db")) as connection:
        connection.execute("ATTACH ':memory:' AS notes")
        store.store_callback_request(a_request(), id="stored", connection=connection)
        connection.commit()

    assert ids(store) == ["stored"]


def test_a_store_that_is_not_open_is_refused_without_waiting(path: Path) -> None:
    store = SQLiteDataAccess(path)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(DataAccessError, match=r"call open\(\) before the transaction begins"):
            store.store_callback_request(a_request(), connection=connection)
        connection.execute("ROLLBACK")
        store.open()
        store.close()
        connection.execute("BEGIN IMMEDIATE")
        with pytest.raises(DataAccessError, match=r"call open\(\)"):
            store.store_callback_request(a_request(), connection=connection)


def test_a_transaction_that_began_before_there_was_a_store_is_told_so(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = wal")
        connection.execute("CREATE TABLE orders (name TEXT)")
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM orders").fetchall()
        with SQLiteDataAccess(path) as store, pytest.raises(DataAccessError, match="open the store before"):
            store.store_callback_request(a_request(), connection=connection)


def test_a_file_that_was_replaced_is_noticed(
    store: SQLiteDataAccess, path: Path, connection: sqlite3.Connection
) -> None:
    path.rename(path.with_suffix(".away"))
    path.touch()

    with pytest.raises(DataAccessError, match="removed or replaced"):
        store.store_callback_request(a_request(), connection=connection)


# Waiting for other writers.


def test_a_transaction_that_read_before_others_wrote_is_told_to_begin_otherwise(
    store: SQLiteDataAccess, path: Path
) -> None:
    with closing(sqlite3.connect(path, isolation_level=None, timeout=LIMIT)) as connection:
        connection.execute("BEGIN")
        connection.execute("SELECT * FROM orders").fetchall()
        store.store_callback_request(a_request(), id="theirs")

        with pytest.raises(TransientDataAccessError, match="begun with BEGIN IMMEDIATE") as caught:
            store.store_callback_request(a_request(), id="ours", connection=connection)

        assert isinstance(caught.value.__cause__, sqlite3.OperationalError)
        connection.execute("ROLLBACK")
        connection.execute("BEGIN IMMEDIATE")
        store.store_callback_request(a_request(), id="ours", connection=connection)
        connection.execute("COMMIT")
    assert ids(store) == ["theirs", "ours"]


def test_a_transaction_that_has_read_nothing_waits_for_other_writers(
    store: SQLiteDataAccess, path: Path, connection: sqlite3.Connection
) -> None:
    tries_to_write = threading.Event()

    def store_deferred() -> int:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=LIMIT)) as deferred:
            deferred.execute("BEGIN")
            deferred.set_trace_callback(lambda statement: tries_to_write.set() if "DELETE" in statement else None)
            sequence = store.store_callback_request(a_request(queue_id="queue"), connection=deferred).sequence
            deferred.execute("COMMIT")
            return sequence

    store.store_callback_request(a_request(queue_id="queue"), connection=connection)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(store_deferred)
        assert tries_to_write.wait(LIMIT)
        connection.commit()

        assert waiting.result(LIMIT) == 2


def test_a_busy_file_is_a_passing_fault_and_writes_nothing(
    store: SQLiteDataAccess, path: Path, connection: sqlite3.Connection
) -> None:
    with closing(sqlite3.connect(path, timeout=0)) as other:
        with pytest.raises(TransientDataAccessError, match="SQLITE_BUSY"):
            store.store_callback_request(a_request(), id="other", connection=other)
        connection.rollback()

        store.store_callback_request(a_request(), id="other", connection=other)
        other.commit()

    assert ids(store) == ["other"]


def test_a_full_disk_is_a_passing_fault_that_leaves_nothing_half_written(
    store: SQLiteDataAccess, path: Path, connection: sqlite3.Connection
) -> None:
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 1}")
    place(connection, "1042")
    big = a_request(queue_id="queue", post_data=CallbackData(data=bytes(100_000)))

    with pytest.raises(TransientDataAccessError, match="free some space"):
        store.store_callback_requests([big, big], connection=connection)

    if connection.in_transaction:
        connection.commit()
    else:
        assert orders(path) == [], "SQLite has rolled back all of it"
    assert ids(store) == []
    with closing(sqlite3.connect(path)) as looking:
        assert looking.execute("SELECT count(*) FROM callbackq_queues").fetchone() == (0,)
    assert store.store_callback_request(big).sequence == 1


def test_a_store_that_a_newer_release_has_migrated_meanwhile_is_left_alone(
    store: SQLiteDataAccess, connection: sqlite3.Connection
) -> None:
    connection.execute("UPDATE callbackq_store SET schema_version = 99")

    with pytest.raises(SchemaVersionError):
        store.store_callback_request(a_request(), connection=connection)

    assert connection.execute("SELECT count(*) FROM callbackq_callbacks").fetchone() == (0,)


def test_a_fault_at_the_very_end_leaves_nothing_half_written(
    store: SQLiteDataAccess, connection: sqlite3.Connection
) -> None:
    refusals = iter([sqlite3.SQLITE_DENY])

    def authorize(action: int, operation: str | None, *_: str | None) -> int:
        is_release = action == sqlite3.SQLITE_SAVEPOINT and operation == "RELEASE"
        return next(refusals, sqlite3.SQLITE_OK) if is_release else sqlite3.SQLITE_OK

    connection.set_authorizer(authorize)
    with pytest.raises(DataAccessError, match="SQLITE_AUTH"):
        store.store_callback_request(a_request(), id="refused", connection=connection)
    connection.set_authorizer(None)
    store.store_callback_request(a_request(), id="stored", connection=connection)
    connection.commit()

    assert ids(store) == ["stored"]


# What the application does on its connection.


def test_a_statement_whose_rows_are_not_fetched_yet_is_refused_by_name(
    store: SQLiteDataAccess, connection: sqlite3.Connection
) -> None:
    returning = connection.execute("INSERT INTO orders VALUES ('1'), ('2') RETURNING name")

    with pytest.raises(InvalidRequestError, match="fetch the remaining rows"):
        store.store_callback_request(a_request(), connection=connection)

    assert returning.fetchall() == [("1",), ("2",)]
    store.store_callback_request(a_request(), id="stored", connection=connection)
    connection.commit()
    assert ids(store) == ["stored"]


def test_a_query_that_is_being_read_goes_on(store: SQLiteDataAccess, connection: sqlite3.Connection) -> None:
    for number in range(5):
        place(connection, str(number))
    reading = connection.execute("SELECT name FROM orders ORDER BY name")
    first = reading.fetchone()
    store.store_callback_request(a_request(), id="stored", connection=connection)
    with pytest.raises(ConflictError):
        store.store_callback_request(a_request(method="PUT"), id="stored", connection=connection)

    assert [first, *reading] == [(str(number),) for number in range(5)]
    connection.commit()


def upper_bytes(text: bytes) -> object:
    return {"text": text.upper()}


class ARow(sqlite3.Row):
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("a row of the application's own kind")


def no_conversion(value: bytes) -> object:
    raise AssertionError("a converter of the application's")


@pytest.fixture
def converters() -> Iterator[None]:
    for name in ("TEXT", "INTEGER", "BLOB"):
        sqlite3.register_converter(name, no_conversion)
    yield
    for name in ("TEXT", "INTEGER", "BLOB"):
        sqlite3.converters.pop(name)


@pytest.mark.usefixtures("converters")
@pytest.mark.parametrize("encoding", ["UTF-8", "UTF-16le", "UTF-16be"])
@pytest.mark.parametrize(
    ("row_factory", "text_factory", "detect_types"),
    [
        (None, str, 0),
        (sqlite3.Row, bytes, 0),
        (ARow, upper_bytes, 0),
        (lambda cursor, row: {"row": row}, bytearray, sqlite3.PARSE_DECLTYPES | sqlite3.PARSE_COLNAMES),
    ],
)
def test_what_the_application_has_set_changes_nothing_and_is_not_changed(
    path: Path, encoding: str, row_factory: Any, text_factory: Any, detect_types: int
) -> None:
    request = CallbackRequest(
        url="https://receiver.example/hook?x=%00",
        method="PUT",
        post_data=CallbackData(headers={"X-One": "a", "x-Two": "b, c"}, data=b"\0\xffbody"),
        retry_phases=[
            RetryPhase(retries=2, delay=timedelta(microseconds=1)),
            RetryPhase(retries=1, delay=LOCK_TIMEOUT),
        ],
        application_id="größe 😀",
        queue_id="queue ☃ 𝄞",
        notification_email_address="someone@host.example",
        on_exhausted="hold",
    )
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA encoding = '{encoding}'")
        connection.execute("CREATE TABLE orders (name TEXT)")
    with (
        SQLiteDataAccess(path) as store,
        closing(sqlite3.connect(path, detect_types=detect_types, isolation_level="IMMEDIATE")) as connection,
    ):
        connection.row_factory, connection.text_factory = row_factory, text_factory
        stored = store.store_callback_request(request, id="stored", connection=connection)
        behind = store.store_callback_request(request, id="behind", connection=connection)
        again = store.store_callback_request(request, id="behind", connection=connection)
        connection.commit()
        assert store.get_callback_status("stored") == stored
        assert store.get_callback_status("behind") == behind == again
        assert behind.blocked_by == "stored"
        for transition in (DUE_AGAIN, DUE_AGAIN, DELIVERED):
            (acquired,) = store.acquire_locks("machine ☃", lock_timeout=LOCK_TIMEOUT, limit=1)
            store.record_attempt(acquired, an_attempt(200), transition)

        with_history = store.store_callback_request(request, id="stored", connection=connection)

        assert with_history == store.get_callback_status("stored")
        assert len(with_history.attempts) == 3
        assert (connection.row_factory, connection.text_factory) == (row_factory, text_factory)
        assert connection.isolation_level == "IMMEDIATE"
        connection.rollback()


def settings_of(connection: sqlite3.Connection) -> dict[str, object]:
    names = ["synchronous", "wal_autocheckpoint", "journal_mode", "busy_timeout", "foreign_keys", "cache_size"]
    return {name: connection.execute(f"PRAGMA {name}").fetchone() for name in [*names, "query_only"]}


def test_settings_of_the_connection_stay(store: SQLiteDataAccess, connection: sqlite3.Connection) -> None:
    connection.execute("ROLLBACK")
    connection.execute("PRAGMA foreign_keys = 1")
    before = settings_of(connection)
    connection.execute("BEGIN")

    store.store_callback_request(a_request(), connection=connection)

    connection.execute("COMMIT")
    assert settings_of(connection) == before


@pytest.mark.parametrize("data", [None, b"", b"\0" * 10, bytes(range(256)) * 4096])
def test_bodies_come_back_as_they_were(
    store: SQLiteDataAccess, connection: sqlite3.Connection, data: bytes | None
) -> None:
    request = a_request(post_data=CallbackData(data=data))

    store.store_callback_request(request, id="stored", connection=connection)
    again = store.store_callback_request(request, id="stored", connection=connection)
    connection.commit()

    assert again.request == store.get_callback_status("stored").request == request


# Order.


def test_numbers_rise_in_the_order_of_commits_across_processes(store: SQLiteDataAccess, path: Path) -> None:
    # `time.monotonic` is one clock for all processes of the machine.
    code = """
import random, sqlite3, sys, time
from callbackq import SQLiteDataAccess
from callbackq.testing.conformance.base import a_request

seed = int(sys.argv[2])
chance = random.Random(seed)
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
with SQLiteDataAccess(sys.argv[1]) as store:
    input()
    for number in range(60):
        own = chance.random() < 0.2
        queue = f"queue {chance.randrange(3)}"
        if not own:
            connection.execute(chance.choice(["BEGIN", "BEGIN IMMEDIATE"]))
        began = time.monotonic()
        status = store.store_callback_request(a_request(queue_id=queue), connection=None if own else connection)
        if not own:
            for row in range(chance.choice([0, 1, 200])):
                connection.execute("INSERT INTO orders VALUES (?)", [f"{seed} {number} {row}"])
            gone = chance.random() < 0.2
            connection.execute("ROLLBACK" if gone else "COMMIT")
        if own or not gone:
            print(queue.split()[1], status.sequence, began, time.monotonic())
    print("end")
"""
    stored: list[tuple[int, int, float, float]] = []
    with running(code, path, 1) as one, running(code, path, 2) as other:
        for process in (one, other):
            process.write_line()
        for process in (one, other):
            while (line := process.read_line()) != "end":
                queue, sequence, began, committed = line.split()
                stored.append((int(queue), int(sequence), float(began), float(committed)))

    for queue in range(3):
        mine = [entry for entry in stored if entry[0] == queue]
        assert sorted(sequence for _, sequence, _, _ in mine) == list(range(1, len(mine) + 1)), "no gap, no repeat"
        for (_, a, _, a_committed), (_, b, b_began, _) in itertools.permutations(mine, 2):
            assert a < b or a_committed > b_began, "what was committed before the other began has the lower number"
    assert len(stored) > 60


def test_threads_with_connections_of_their_own_get_different_rising_numbers(
    store: SQLiteDataAccess, path: Path
) -> None:
    def enqueue(seed: int) -> list[int]:
        chance = random.Random(seed)
        numbers = []
        with closing(sqlite3.connect(path, timeout=LIMIT)) as connection:
            for _ in range(20):
                status = store.store_callback_request(a_request(queue_id="queue"), connection=connection)
                if chance.random() < 0.3:
                    connection.rollback()
                else:
                    connection.commit()
                    numbers.append(status.sequence)
        return numbers

    with ThreadPoolExecutor(4) as threads:
        numbers = list(threads.map(enqueue, range(4)))

    for mine in numbers:
        assert mine == sorted(mine)
    assert sorted(itertools.chain(*numbers)) == list(range(1, sum(map(len, numbers)) + 1))


# Dispatchers.


def test_a_hint_wakes_subscribers_and_storing_in_a_transaction_does_not(
    store: SQLiteDataAccess, connection: sqlite3.Connection
) -> None:
    hints: list[str] = []
    unsubscribe = store.subscribe(lambda: hints.append("hint"))

    store.store_callback_request(a_request(), connection=connection)
    connection.commit()
    assert hints == []
    store.hint()
    unsubscribe()
    store.hint()

    assert hints == ["hint"]


def test_a_hint_after_the_commit_is_heard_before_the_next_poll(
    store: SQLiteDataAccess, connection: sqlite3.Connection
) -> None:
    transport = ScriptedTransport()
    witness = Witness()
    with Dispatcher(store, transport=transport, observer=witness, poll_interval=timedelta(minutes=1)):
        store.store_callback_request(a_request(), id="first", connection=connection)
        connection.commit()
        store.hint()

        witness.wait_for(EventKind.SUCCEEDED)


def test_a_dispatcher_survives_a_long_transaction_and_counts_no_attempt_for_it(path: Path) -> None:
    clock = FakeClock()
    transport, witness = HeldTransport(clock), Witness()
    with (
        SQLiteDataAccess(path, busy_timeout=timedelta(milliseconds=20)) as store,
        closing(sqlite3.connect(path, isolation_level=None)) as connection,
        Dispatcher(store, transport=transport, observer=witness),
    ):
        store.store_callback_request(a_request(queue_id="queue"), id="in-flight")
        transport.wait_for(1)
        connection.execute("BEGIN IMMEDIATE")
        store.store_callback_request(a_request(queue_id="queue"), id="enlisted", connection=connection)

        transport.answer("in-flight", 200)
        witness.wait_for(EventKind.STORE_FAILED)
        connection.execute("COMMIT")
        store.hint()

        transport.wait_for(2)
        transport.answer("enlisted", 200)
        witness.wait_for(EventKind.SUCCEEDED, 2)
        statuses = [store.get_callback_status(id) for id in ("in-flight", "enlisted")]

    assert [delivery.callback_id for delivery in transport.deliveries] == ["in-flight", "enlisted"]
    for status in statuses:
        assert status.success
        assert [attempt.status_code for attempt in status.attempts] == [200]
        assert len(status.locks) == 1


# The protocol.


def test_stores_that_can_do_it_are_told_from_those_that_cannot(store: SQLiteDataAccess) -> None:
    stores: list[DataAccess] = [store, InMemoryDataAccess()]

    assert [isinstance(one, SupportsEnlist) for one in stores] == [True, False]
