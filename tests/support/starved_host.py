"""
A host whose machine runs out of something while its dispatcher is at work: a program of its own.

Arguments: the fault, and the store's file or the conninfo of its database. It prints ``at work``; told to go on, it
begins the fault and prints ``begun``; when its dispatcher has met it, ``met``; told to go on, it ends the fault, and
prints a JSON report when all callbacks have ended.
"""

from __future__ import annotations

import gc
import json
import logging
import mmap
import os
import resource
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from callbackq import Dispatcher, HTTPTransport, SQLiteDataAccess, TargetPolicy
from callbackq.clock import SystemClock
from callbackq.events import EventKind, ObservedEvent
from callbackq.notifier import FailureNotice
from support.sqlite_vfs import Kind, WatchedFiles

if TYPE_CHECKING:  # SQLite needs no driver for PostgreSQL
    from callbackq.stores.postgres import PostgreSQLDataAccess

_LIMIT_SECONDS = 20.0  # less than whoever reads the report waits
_NOBODY = 65534


class Fault(Protocol):
    """Something that can befall a machine. Within the block it can; between `begin` and `end` it does."""

    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> None: ...

    def begin(self) -> None: ...

    def end(self) -> None: ...


class _Nothing:
    def __enter__(self) -> object:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Elsewhere(_Nothing):
    """What befalls the machine of a server, which is not ours to do."""

    def begin(self) -> None:
        pass

    def end(self) -> None:
        pass


class BadDisk(_Nothing):
    """The system's answers to what SQLite asks of its files."""

    def __init__(self, code: int, *kinds: Kind) -> None:
        self._code = code
        self._kinds = kinds
        self._is_on = False
        self._files = WatchedFiles(refuse=self._refuse)

    def __enter__(self) -> object:
        return self._files.__enter__()

    def __exit__(self, *_: object) -> None:
        self._files.__exit__()

    def begin(self) -> None:
        self._is_on = True

    def end(self) -> None:
        self._is_on = False

    def _refuse(self, kind: Kind, file: str) -> int:
        return self._code if self._is_on and kind in self._kinds else sqlite3.SQLITE_OK


class ReadOnly(BadDisk):
    """Remounted so, as a file system is after a fault of its disk: what is open can't be written, nor opened again."""

    def __init__(self, path: Path) -> None:
        super().__init__(sqlite3.SQLITE_IOERR_WRITE, "write", "truncate")
        self._path = path

    def begin(self) -> None:
        super().begin()
        self._path.chmod(0o400)
        self._path.parent.chmod(0o500)

    def end(self) -> None:
        super().end()
        self._path.parent.chmod(0o700)
        self._path.chmod(0o600)


class NoDescriptors(_Nothing):
    def begin(self) -> None:
        self._limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        # All below it are in use, whatever is closed from now on.
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, self._limits[1]))

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self._limits)


class NoMemory(_Nothing):
    """No more address space; and what the allocators have in reserve is taken, too."""

    def begin(self) -> None:
        gc.collect()
        self._limits = resource.getrlimit(resource.RLIMIT_AS)
        self._taken: list[bytearray] = []
        size = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (size, self._limits[1]))
        for chunk in (1 << 20, 1 << 16, 1 << 12):
            try:
                while True:
                    self._taken.append(bytearray(chunk))
            except MemoryError:
                continue

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._limits)
        self._taken.clear()


class NoThreads(_Nothing):
    """None can be started, for want of memory for its stack."""

    def begin(self) -> None:
        self._usual = threading.stack_size(1 << 46)

    def end(self) -> None:
        threading.stack_size(self._usual)


def faults(path: Path) -> dict[str, Callable[[], Fault]]:
    return {
        "disk full": lambda: BadDisk(sqlite3.SQLITE_FULL, "write"),
        "disk that does not write": lambda: BadDisk(sqlite3.SQLITE_IOERR_WRITE, "write"),
        "disk that does not sync": lambda: BadDisk(sqlite3.SQLITE_IOERR_FSYNC, "sync"),
        "read-only file": lambda: ReadOnly(path),
        "no descriptors": NoDescriptors,
        "no memory": NoMemory,
        "no threads": NoThreads,
        "elsewhere": Elsewhere,
    }


def open_store(where: str) -> SQLiteDataAccess | PostgreSQLDataAccess:
    if where.startswith("/"):
        return SQLiteDataAccess(where)
    from callbackq.stores.postgres import PostgreSQLDataAccess

    return PostgreSQLDataAccess(where)


class Watcher(logging.Handler):
    """Counts what happens, what is logged and what is told by e-mail, and lets the host wait for it."""

    interval = timedelta(0)

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.events: Counter[EventKind] = Counter()
        self.lines: list[str] = []
        self.told = 0
        self._changed = threading.Condition()

    def observe(self, event: ObservedEvent) -> None:
        with self._changed:
            self.events[event.kind] += 1
            self._changed.notify_all()

    def notify(self, notice: FailureNotice) -> None:
        with self._changed:
            self.told += notice.count
            self._changed.notify_all()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def wait_until(self, has_happened: Callable[[], bool]) -> bool:
        """Look again with each event, and now and then without one: there may have been no memory for it."""
        end = time.monotonic() + _LIMIT_SECONDS
        while time.monotonic() < end:
            try:
                with self._changed:
                    if self._changed.wait_for(has_happened, 0.1):
                        return True
            except MemoryError:
                continue
        return False


def main(name: str, where: str) -> None:
    watcher = Watcher()
    logging.getLogger("callbackq").addHandler(watcher)
    fault = faults(Path(where))[name]()
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
    SystemClock().boot_id()
    if os.geteuid() == 0 and name == "read-only file":
        # Whom permissions bind; who may not be able, any more, to load what Python loads late, as the lines above do.
        os.setuid(_NOBODY)
    with fault, open_store(where) as store, closing(transport):
        dispatcher = Dispatcher(store, transport=transport, observer=watcher, notifier=watcher)
        dispatcher.start()
        print("at work", flush=True)
        input()
        fault.begin()
        # Bytes that are there already: there may be no memory for others.
        os.write(1, b"begun\n")
        # Not by the event of a store that fails: there may have been no memory for that.
        has_met = watcher.wait_until(
            lambda: dispatcher.health().store_is_failing or bool(watcher.events[EventKind.LOCAL_FAULT])
        )
        os.write(1, b"met\n" if has_met else b"not met\n")
        os.read(0, 1)
        fault.end()
        ended = time.monotonic()
        is_drained = watcher.wait_until(lambda: store.next_due() is None)
        report = {"drained": is_drained, "seconds": time.monotonic() - ended}
        # For want of memory it was perhaps put off, for a minute.
        report["told"] = name == "no memory" or watcher.wait_until(lambda: watcher.told == 1)
        report |= {"unrecorded": dispatcher.stop(1).unrecorded, "lines": watcher.lines}
        report["events"] = {kind.value: number for kind, number in watcher.events.items()}
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
