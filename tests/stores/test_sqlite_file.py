"""Where the SQLite store's file may lie, and what happens to files that aren't right."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from callbackq.dataaccess import Action, Durability
from callbackq.errors import DataAccessError, InvalidRequestError, SchemaVersionError, TransientDataAccessError
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.stores.sqlite.file import carries_wal_reset_bug, network_filesystem
from callbackq.stores.sqlite.schema import NEWEST_VERSION
from callbackq.testing.conformance.base import LOCK_TIMEOUT, a_request
from callbackq.testing.conformance.concurrency import Child
from support.processes import running, sqlite_files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "callbacks.db"


@pytest.fixture
def filled(path: Path) -> Path:
    """A database with one callback."""
    with SQLiteDataAccess(path) as store:
        store.store_callback_request(a_request(), id="kept")
    return path


def execute(path: Path, *statements: str) -> list[Any]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return [connection.execute(statement).fetchall() for statement in statements]


def test_files_can_be_read_by_their_owner_only(path: Path) -> None:
    umask = os.umask(0)
    try:
        with SQLiteDataAccess(path) as store:
            store.store_callback_request(a_request())
            store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1)
            store.backup(path.with_name("copy.db"))

            modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()}
    finally:
        os.umask(umask)

    assert len(modes) == 5, "database, write-ahead log, its index, sign of life, backup"
    assert set(modes.values()) == {0o600}


def test_nothing_but_the_database_is_left_after_closing(filled: Path) -> None:
    assert list(filled.parent.iterdir()) == [filled]


def test_an_existing_empty_file_is_used(path: Path) -> None:
    path.touch()

    with SQLiteDataAccess(path) as store:
        assert store.store_callback_request(a_request()).sequence == 1


@pytest.mark.parametrize(
    "path",
    ["", ":memory:", "file:callbacks.db?mode=memory", "call\0backs", "call\ud800backs", b"callbacks.db", None, 1],
)
def test_what_is_no_path_of_a_file_is_refused_with_the_remedy(path: Any) -> None:
    with pytest.raises(InvalidRequestError, match="InMemoryDataAccess") as refused:
        SQLiteDataAccess(path)

    assert [name for name, _ in refused.value.errors] == ["path"]


def test_an_unknown_durability_is_refused(path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"durability: must be 'power' or 'process'"):
        SQLiteDataAccess(path, durability="none")  # type: ignore[arg-type]


@pytest.mark.parametrize("busy_timeout", [timedelta(microseconds=-1), timedelta.max, 5, None])
def test_an_absurd_busy_timeout_is_refused(path: Path, busy_timeout: Any) -> None:
    with pytest.raises(InvalidRequestError, match="busy_timeout: must be a timedelta from 0 to 1 day"):
        SQLiteDataAccess(path, busy_timeout=busy_timeout)


def test_all_wrong_arguments_are_named_at_once() -> None:
    wrong: Any = {"clock": 0, "durability": [], "allow_network_fs": "yes", "busy_timeout": 5}

    with pytest.raises(InvalidRequestError) as refused:
        SQLiteDataAccess(None, **wrong)  # type: ignore[arg-type]

    assert [name for name, _ in refused.value.errors] == ["path", *wrong]


def test_a_missing_directory_is_named_and_not_created(path: Path) -> None:
    store = SQLiteDataAccess(path.parent / "missing" / path.name)

    with pytest.raises(DataAccessError, match="missing does not exist: create it first") as refused:
        store.open()

    assert type(refused.value) is DataAccessError, "calling again doesn't help"
    assert list(path.parent.iterdir()) == []


def test_a_directory_is_no_database(tmp_path: Path) -> None:
    with pytest.raises(DataAccessError, match="is a directory"):
        SQLiteDataAccess(tmp_path).open()


def test_a_file_holds_no_database_below_it(filled: Path) -> None:
    with pytest.raises(DataAccessError, match="can't be created") as refused:
        SQLiteDataAccess(filled / "callbacks.db").open()

    assert type(refused.value) is DataAccessError, "calling again doesn't help"


def test_the_path_is_that_of_the_moment_of_construction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    store = SQLiteDataAccess(path.name)
    monkeypatch.chdir("/")

    with store:
        pass

    assert path.exists()


def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path: Path) -> None:
    path.write_bytes(b"These are the notes of somebody who does not expect them to become a database. " * 30)
    before = sqlite_files(path)

    with pytest.raises(DataAccessError, match="is not an SQLite database") as refused:
        SQLiteDataAccess(path).open()

    assert isinstance(refused.value.__cause__, sqlite3.DatabaseError)
    assert not isinstance(refused.value, TransientDataAccessError)
    assert sqlite_files(path) == before


def test_a_damaged_database_is_refused_and_left_as_it_is(filled: Path) -> None:
    content = bytearray(filled.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    filled.write_bytes(content)
    before = sqlite_files(filled)

    with pytest.raises(DataAccessError, match="is damaged: restore a backup"):
        SQLiteDataAccess(filled).open()

    assert sqlite_files(filled) == before


def test_a_database_of_a_newer_release_is_refused_and_left_as_it_is(filled: Path) -> None:
    execute(filled, "UPDATE callbackq_store SET schema_version = 99")
    before = sqlite_files(filled)

    with pytest.raises(SchemaVersionError) as refused:
        SQLiteDataAccess(filled).get_callback_status("kept")

    assert (refused.value.found, refused.value.expected) == (99, NEWEST_VERSION)
    assert sqlite_files(filled) == before


def test_the_application_may_keep_its_tables_in_the_same_file(path: Path) -> None:
    execute(path, "CREATE TABLE orders (number)", "PRAGMA user_version = 7", "PRAGMA application_id = 8")

    with SQLiteDataAccess(path) as store:
        store.store_callback_request(a_request(), id="kept")
        execute(path, "INSERT INTO orders VALUES (1)")
        assert store.get_callback_status("kept").sequence == 1

    found = execute(path, "SELECT * FROM orders", "PRAGMA user_version", "PRAGMA application_id")
    assert found == [[(1,)], [(7,)], [(8,)]], "labels of a shared file are the application's"


def test_a_file_of_its_own_is_labelled(filled: Path) -> None:
    assert execute(filled, "PRAGMA user_version", "PRAGMA application_id") == [[(NEWEST_VERSION,)], [(0x63626B71,)]]


def test_a_file_that_vanished_is_not_replaced_by_an_empty_one(filled: Path) -> None:
    store = SQLiteDataAccess(filled)
    store.open()
    store.close()
    filled.rename(filled.with_suffix(".away"))

    with pytest.raises(DataAccessError, match="can't be opened: check that it is there") as refused:
        store.store_callback_request(a_request())
    assert type(refused.value) is DataAccessError, "calling again doesn't help"
    filled.with_suffix(".away").rename(filled)

    assert store.get_callback_status("kept").id == "kept"
    store.close()


def remove(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    with SQLiteDataAccess(path.with_name("other.db")) as other:
        other.store_callback_request(a_request(), id="other")
    path.with_name("other.db").replace(path)


def move_its_directory(path: Path) -> None:
    path.parent.rename(path.parent.with_suffix(".away"))


@pytest.mark.parametrize("lose", [remove, replace, move_its_directory])
def test_a_file_that_is_lost_while_open_is_noticed_by_every_call(tmp_path: Path, lose: Callable[[Path], None]) -> None:
    path = tmp_path / "folder" / "callbacks.db"
    path.parent.mkdir()
    store = SQLiteDataAccess(path)
    store.store_callback_request(a_request(), id="kept")
    calls: list[Callable[[], object]] = [
        lambda: store.store_callback_request(a_request()),
        lambda: store.get_callback_status("kept"),
        lambda: store.acquire_locks("machine", lock_timeout=LOCK_TIMEOUT, limit=1),
        lambda: store.request_transition("kept", Action.CANCEL),
        lambda: list(store.list_callbacks()),
        lambda: store.purge(finished_for=timedelta(0)),
        lambda: store.backup(tmp_path / "copy.db"),
        store.next_due,
        store.now,
        store.open,
    ]

    lose(path)

    for call in calls:
        with pytest.raises(DataAccessError, match="was removed or replaced while in use") as refused:
            call()
        assert type(refused.value) is DataAccessError, "calling again doesn't help"
    store.close()


def test_a_file_that_comes_back_is_used_again(filled: Path) -> None:
    with SQLiteDataAccess(filled) as store:
        away = filled.rename(filled.with_suffix(".away"))
        with pytest.raises(DataAccessError, match="removed or replaced"):
            store.get_callback_status("kept")

        away.rename(filled)

        assert store.get_callback_status("kept").id == "kept"


def test_a_store_that_was_closed_opens_what_is_there_then(filled: Path) -> None:
    store = SQLiteDataAccess(filled)
    store.open()
    replace(filled)
    store.close()

    assert [status.id for status in store.list_callbacks()] == ["other"]
    store.close()


def test_a_replaced_file_is_noticed_after_a_fork_and_left_as_it_is(filled: Path) -> None:
    # A fork closes the connections, and the next call opens new ones.
    store = SQLiteDataAccess(filled)
    store.open()
    Child(lambda _: None).finish()
    replace(filled)
    before = sqlite_files(filled)

    def store_one() -> None:
        with pytest.raises(DataAccessError, match="removed or replaced"):
            store.store_callback_request(a_request())

    Child(lambda _: store_one()).finish()
    store_one()

    assert sqlite_files(filled) == before
    store.close()


def test_a_disk_that_takes_no_more_loses_nothing_and_is_used_again_later(path: Path) -> None:
    # A limit on the size of files stands for the disk.
    code = """
import resource, sys
from callbackq.core.models import CallbackData, CallbackRequest
from callbackq.errors import DataAccessError
from callbackq.stores.sqlite import SQLiteDataAccess

request = CallbackRequest(url="https://receiver.example/", post_data=CallbackData(data=bytes(100_000)))
store = SQLiteDataAccess(sys.argv[1])
stored = []

def store_all(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    while len(stored) < 50:
        store.store_callback_request(request, id=str(len(stored)))
        stored.append(str(len(stored)))

try:
    store_all(1_000_000)
except DataAccessError as error:
    print("refused after", len(stored), type(error.__cause__).__name__)
store_all(resource.RLIM_INFINITY)
print([status.id for status in store.list_callbacks()] == stored)
store.close()
"""
    with running(code, path) as process:
        assert process.read_line() in [f"refused after {number} OperationalError" for number in range(1, 49)]
        assert process.read_line() == "True"

    assert execute(path, "PRAGMA integrity_check") == [[("ok",)]]


def test_durability_says_what_a_callback_survives(path: Path) -> None:
    assert SQLiteDataAccess(path).durability is Durability.POWER
    assert SQLiteDataAccess(path, durability="process").durability is Durability.PROCESS


@pytest.mark.parametrize(("durability", "synchronous"), [("power", 2), ("process", 1)])
def test_every_commit_is_synced_unless_that_was_given_up(path: Path, durability: Any, synchronous: int) -> None:
    with SQLiteDataAccess(path, durability=durability) as store:
        found = store._database.write(lambda tx: tx._connection.execute("PRAGMA synchronous").fetchone())

    assert found == (synchronous,)


@pytest.mark.parametrize(
    ("version", "affected"),
    [
        ((3, 6, 23), False),
        ((3, 7, 0), True),
        ((3, 40, 1), True),
        ((3, 44, 5), True),
        ((3, 44, 6), False),
        ((3, 45, 0), True),
        ((3, 50, 6), True),
        ((3, 50, 7), False),
        ((3, 51, 0), True),
        ((3, 51, 2), True),
        ((3, 51, 3), False),
        ((3, 52, 0), False),
        ((4, 0, 0), False),
    ],
)
def test_versions_with_the_wal_reset_bug_are_known(version: tuple[int, int, int], affected: bool) -> None:
    assert carries_wal_reset_bug(version) is affected


def test_a_version_with_the_wal_reset_bug_is_named_once_in_a_process(path: Path) -> None:
    code = """
import logging, os, sys
from callbackq.stores.sqlite import SQLiteDataAccess

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(name)s %(message)s")
for path in sys.argv[1:]:
    for _ in range(2):
        with SQLiteDataAccess(path) as store:
            store.now()
"""
    with running(code, path, path.with_name("other.db")) as process:
        lines = process.remaining_lines()

    assert len(lines) == carries_wal_reset_bug(sqlite3.sqlite_version_info[:3])
    for line in lines:
        assert line.startswith("WARNING callbackq.stores this is SQLite ")
        assert "there is nothing to do unless" in line
        assert "PRAGMA wal_autocheckpoint = 0" in line


MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:21 / /proc rw,nosuid shared:12 - proc proc rw
40 22 0:50 / /srv/nfs rw,relatime shared:20 - nfs4 server:/export rw,vers=4.2
41 40 254:1 / /srv/nfs/local rw,relatime - ext4 /dev/vdb1 rw
42 22 0:51 / /mnt/two\\040words rw - cifs //server/share rw
43 22 0:52 / /home/user/ssh rw,relatime shared:30 - fuse.sshfs user@server: rw
44 22 0:53 / /data rw,relatime - overlay overlay rw,lowerdir=/lower,upperdir=/srv/nfs/upper,workdir=/srv/nfs/work
45 22 0:54 / /box rw,relatime - overlay overlay rw,lowerdir=/lower,upperdir=/var/upper,workdir=/var/work
46 22 0:55 / /covered rw - nfs server:/old rw
47 22 254:2 / /covered rw - xfs /dev/vdc1 rw
48 22 0:56 / /host rw - 9p host rw
broken line
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/lib/callbacks.db", None),
        ("/srv/callbacks.db", None),
        ("/srv/nfs/callbacks.db", "nfs4"),
        ("/srv/nfsother/callbacks.db", None),
        ("/srv/nfs/local/callbacks.db", None),
        ("/mnt/two words/callbacks.db", "cifs"),
        ("/home/user/ssh/callbacks.db", "fuse.sshfs"),
        ("/data/callbacks.db", "nfs4"),
        ("/box/callbacks.db", None),
        ("/covered/callbacks.db", None),
        ("/host/callbacks.db", "9p"),
    ],
)
def test_network_file_systems_are_recognised(path: str, kind: str | None) -> None:
    assert network_filesystem(MOUNTS, path) == kind


def test_without_a_list_of_mounts_every_file_system_is_local() -> None:
    assert network_filesystem("", "/srv/callbacks.db") is None
