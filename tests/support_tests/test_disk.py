"""The layer under SQLite sees all that happens to its files, and the simulated disk keeps what it must."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from support.disk import Disk
from support.sqlite_vfs import Event, WatchedFiles

pytestmark = pytest.mark.thorough


def write_rows(path: Path, journal: str, rows: int = 200) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA journal_mode = {journal}")
        connection.execute("CREATE TABLE t (x)")
        for number in range(rows):
            connection.execute("INSERT INTO t VALUES (?)", (str(number) * 50,))


@pytest.mark.parametrize("journal", ["wal", "delete", "truncate"])
def test_the_files_can_be_made_again_from_what_was_seen(tmp_path: Path, journal: str) -> None:
    seen: list[Event] = []
    with WatchedFiles(tell=seen.append):
        write_rows(tmp_path / "x.db", journal)
    disk = Disk()
    for event in seen:
        disk.apply(event)
    disk.apply(Event("sync directory", ""))

    files = disk.after_power_cut(random.Random(1))

    assert files["x.db"] == (tmp_path / "x.db").read_bytes()


def test_syncs_can_be_watched_without_the_writes(tmp_path: Path) -> None:
    seen: list[Event] = []
    with WatchedFiles(tell=seen.append, watches_writes=False):
        write_rows(tmp_path / "x.db", "wal", rows=20)

    kinds = [event.kind for event in seen]
    assert kinds.count("sync") >= 20
    assert not {"write", "truncate"} & set(kinds)


def test_other_connections_are_not_watched_afterwards(tmp_path: Path) -> None:
    seen: list[Event] = []
    with WatchedFiles(tell=seen.append):
        pass

    write_rows(tmp_path / "x.db", "wal", rows=1)

    assert not seen


@pytest.mark.parametrize(("code", "words"), [(sqlite3.SQLITE_FULL, "is full"), (sqlite3.SQLITE_IOERR_WRITE, "I/O")])
def test_what_is_refused_does_not_happen(tmp_path: Path, code: int, words: str) -> None:
    refused = False
    with WatchedFiles(refuse=lambda kind, file: code if refused and kind == "write" else 0):
        write_rows(tmp_path / "x.db", "wal", rows=3)
        with closing(sqlite3.connect(tmp_path / "x.db", isolation_level=None)) as connection:
            refused = True
            with pytest.raises(sqlite3.Error, match=words):
                connection.execute("INSERT INTO t VALUES ('never')")
            refused = False
            assert connection.execute("SELECT count(*) FROM t").fetchone() == (3,)


def disk_with(*events: Event) -> Disk:
    disk = Disk()
    for event in events:
        disk.apply(event)
    return disk


OPENED = Event("open", "f")
SYNCED = (Event("sync", "f"), Event("sync directory", ""))


def test_what_was_synced_is_always_there() -> None:
    disk = disk_with(OPENED, Event("write", "f", 0, b"a" * 1000), *SYNCED, Event("write", "f", 1000, b"b" * 1000))

    for seed in range(200):
        assert disk.after_power_cut(random.Random(seed))["f"].startswith(b"a" * 1000)


def test_what_was_not_synced_is_there_or_not_or_in_part() -> None:
    disk = disk_with(OPENED, *SYNCED, Event("write", "f", 0, b"a" * 1024), Event("write", "f", 1024, b"b" * 512))

    found = {disk.after_power_cut(random.Random(seed))["f"] for seed in range(500)}

    nothing, all_of_it, first, torn = b"", b"a" * 1024 + b"b" * 512, b"a" * 1024, b"a" * 512
    assert {nothing, all_of_it, first, torn} <= found
    assert bytes(1024) + b"b" * 512 in found


def test_names_come_and_go_with_the_folders_sync() -> None:
    created = disk_with(OPENED, Event("sync", "f"))
    removed = disk_with(OPENED, *SYNCED, Event("delete", "f"))
    gone = disk_with(OPENED, *SYNCED, Event("delete", "f"), Event("sync directory", ""))

    def is_found(disk: Disk) -> set[bool]:
        return {"f" in disk.after_power_cut(random.Random(seed)) for seed in range(50)}

    assert is_found(created) == is_found(removed) == {True, False}
    assert is_found(gone) == {False}
