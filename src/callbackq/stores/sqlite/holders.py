"""
Signs of life: how the death of a process on this machine is noticed at once.

Each store object that takes locks on callbacks keeps a POSIX record lock on a small file of its own, beside the
database, as long as it is in use. The kernel gives it back the moment the process ends, however it ends. Whoever can
take it knows that the holder is dead. (Record locks, not flock: a forked child keeps a flock alive. Measured after
kill -9 of a holder whose child lived on: free after 0.8 ms with a record lock, only with the child's end with flock.)

Nothing depends on it. Where the system has no such locks, or a file is lost, callbacks are taken over when their
locks time out.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from attrs import frozen

from callbackq.stores.sqlite.forks import fork_safe_mutex

try:
    from fcntl import LOCK_EX, LOCK_NB, lockf
except ImportError:  # pragma: no cover - not POSIX: locks end by their timeout only
    _HAS_RECORD_LOCKS = False
else:
    _HAS_RECORD_LOCKS = True

__all__ = ["DeadHolder", "Holders", "remove_file"]

# The signs of life that this process itself keeps, with the process id, since a forked child inherits the set but not
# the locks. Record locks don't exclude within a process, and closing any descriptor of a file gives them up: without
# this set a store object would take its neighbour for dead, and kill its sign of life by looking.
_OWN: Final[set[tuple[int, Path]]] = set()
_OWN_MUTEX: Final = fork_safe_mutex()


def _file_of(database: Path, holder: int) -> Path:
    return database.with_name(f"{database.name}-holder-{holder:012x}")


def remove_file(database: Path, holder: int) -> None:
    """Remove what a holder of an earlier boot has left."""
    with suppress(OSError):
        _file_of(database, holder).unlink()


class Holders:
    """
    A store object's sign of life, and its eye on those of others.

    Args:
        database: the database file.
    """

    def __init__(self, database: Path) -> None:
        self._database = database
        self._own: _SignOfLife | None = None
        # Of those looked at the last time: the same, as a rule, a few times a second for as long as we live.
        self._files: dict[int, Path] = {}

    def own(self) -> int | None:
        """Begin the sign of life, unless there is one, and give its number; ``None`` where that can't be had."""
        with _OWN_MUTEX:
            if self._own is None and _HAS_RECORD_LOCKS:
                with suppress(OSError):
                    self._own = _SignOfLife.begin(self._database)
            return self.named()

    def named(self) -> int | None:
        """Give the number of the sign of life, if there is one."""
        own = self._own
        return own.holder if own is not None else None

    def end(self) -> None:
        """End the sign of life. First forget the holder in the database, or others will think that it died."""
        with _OWN_MUTEX:
            own, self._own = self._own, None
            if own is not None:
                own.end()

    def die(self) -> None:
        """Give the lock up and leave the file, as the death of the process does."""
        with _OWN_MUTEX:
            own, self._own = self._own, None
            if own is not None:
                own.die()

    def find_dead(self, holders: Iterable[int]) -> list[DeadHolder]:
        """Try the locks of all that aren't of this process. A file that is missing proves nothing."""
        if not _HAS_RECORD_LOCKS:  # pragma: no cover - not POSIX
            return []
        with _OWN_MUTEX:
            known = self._files
            self._files = {holder: known.get(holder) or _file_of(self._database, holder) for holder in holders}
            return [dead for holder, path in self._files.items() if (dead := _try_lock(path, holder))]


@frozen(eq=False)
class DeadHolder:
    """
    A holder whose process has ended, which is proved by holding its lock.

    Attributes:
        holder: its number.
    """

    holder: int
    _path: Path
    _descriptor: int

    def bury(self) -> None:
        """Remove its file, once the database doesn't name it any more."""
        with suppress(OSError):
            self._path.unlink()
        self.let_go()

    def let_go(self) -> None:
        """Leave it to be found again."""
        os.close(self._descriptor)


@frozen(eq=False)
class _SignOfLife:
    """A file that is locked while its owner lives, named by a random number that is never used again."""

    holder: int
    path: Path
    descriptor: int
    pid: int

    @classmethod
    def begin(cls, database: Path) -> _SignOfLife:
        holder = secrets.randbits(48)
        path = _file_of(database, holder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            lockf(descriptor, LOCK_EX | LOCK_NB)
        except OSError:
            os.close(descriptor)
            path.unlink()
            raise
        _OWN.add((os.getpid(), path))
        return cls(holder, path, descriptor, os.getpid())

    def end(self) -> None:
        if self.pid == os.getpid():
            with suppress(OSError):
                self.path.unlink()
        self.die()

    def die(self) -> None:
        if self.pid == os.getpid():
            _OWN.discard((self.pid, self.path))
        # In a forked child this closes the child's descriptor only: the parent's lock is the parent's.
        os.close(self.descriptor)


def _try_lock(path: Path, holder: int) -> DeadHolder | None:
    if (os.getpid(), path) in _OWN:
        return None
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return None
    try:
        lockf(descriptor, LOCK_EX | LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return DeadHolder(holder, path, descriptor)
