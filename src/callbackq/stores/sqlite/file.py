"""
The file on disk: where it may lie, who may read it, and what is known to go wrong there.

Never opens the database file itself once it may be in use: closing any descriptor of it would give up all locks that
SQLite holds on it in this process.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sqlite3
from functools import cache
from pathlib import Path
from typing import Final

from callbackq.core.validation import is_path_text
from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.stores.sqlite.forks import fork_safe_mutex

__all__ = [
    "carries_wal_reset_bug",
    "create",
    "identity",
    "is_path",
    "lies_on_network",
    "lost",
    "network_filesystem",
    "on_network",
    "warn_of_wal_reset",
]

_LOG = logging.getLogger("callbackq.stores")

_MOUNTS: Final = Path("/proc/self/mountinfo")
# Locks, or the memory that WAL readers and writers share, don't reach from one machine to the other.
_NETWORK: Final = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|virtiofs|vboxsf|prl_fs|ceph|lustre|glusterfs|beegfs\w*|afs|ncpfs|coda|gfs2?|ocfs2|gpfs"
    r"|fuse\.(?:sshfs|glusterfs|ceph\S*|s3fs|gcsfuse|rclone|vmhgfs\S*|davfs2?|juicefs|goofys|mfs\S*)"
)
_PASSING: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})
_OCTAL: Final = re.compile(r"\\([0-7]{3})")

# Two store objects of one process may create the same file. Without the mutex one could be locking it already while
# the other still holds, and closes, the descriptor it created it with.
_CREATING: Final = fork_safe_mutex()


def is_path(path: object) -> bool:
    """Tell whether this can be the path of a file, and isn't a name that means something else to SQLite."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    return isinstance(text, str) and is_path_text(text) and not text.startswith((":memory:", "file:"))


def create(path: Path) -> None:
    """
    Make sure that the file exists.

    A new one can be read by its owner only. SQLite gives the files beside it the same mode.
    """
    with _CREATING:
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            if path.is_dir():
                raise DataAccessError(f"{path} is a directory: give the path of a file") from None
        except FileNotFoundError as error:
            raise DataAccessError(f"the directory {path.parent} does not exist: create it first") from error
        except OSError as error:
            kind = TransientDataAccessError if error.errno in _PASSING else DataAccessError
            raise kind(f"{path} can't be created: {error.strerror}") from error


def identity(path: Path) -> tuple[int, int]:
    """
    Tell one file from another, whatever they are called.

    Raises:
        DataAccessError: there is none.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise lost(path) from error
    return found.st_dev, found.st_ino


def lost(path: Path) -> DataAccessError:
    """Say that the file which is open isn't the one under its path any more."""
    return DataAccessError(
        f"{path} was removed or replaced while in use, and what would be written now could not be found again: close "
        "this store, put the file in its place, and open the store again"
    )


def on_network(path: Path, kind: str) -> DataAccessError:
    """Say why a file on a network file system is refused."""
    return DataAccessError(
        f"{path} lies on a network file system ({kind}), where SQLite's locks can't be relied on: choose a local disk, "
        "or pass allow_network_fs=True if you know that they work there"
    )


def lies_on_network(path: Path) -> str | None:
    """Name the network file system a file lies on, if any."""
    try:
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return None
    return network_filesystem(mounts, str(path))


def network_filesystem(mountinfo: str, path: str) -> str | None:
    """
    Find the network file system that a path lies on.

    Args:
        mountinfo: the text of Linux's ``/proc/self/mountinfo`` (proc_pid_mountinfo(5)).
        path: an absolute path without links.

    Returns:
        The file system's type, or ``None`` when it is local or unknown.
    """
    kind, options = "", ""
    covering = -1
    for line in mountinfo.splitlines():
        fields = line.split(" ")
        if "-" not in fields[6:]:
            continue
        separator = fields.index("-", 6)
        mount_point = _OCTAL.sub(lambda match: chr(int(match[1], 8)), fields[4])
        prefix = mount_point.rstrip("/")
        # Of equal mount points the later one covers the earlier.
        if (path == prefix or path.startswith(f"{prefix}/")) and len(prefix) >= covering:
            covering = len(prefix)
            kind, options = fields[separator + 1], fields[-1]
    if _NETWORK.fullmatch(kind):
        return kind
    upper = re.search(r"(?:^|,)upperdir=([^,]+)", options) if kind == "overlay" else None
    # What is written to an overlay goes to its upper directory. An overlay on itself would go round for ever.
    if upper and not upper[1].startswith(path):
        return network_filesystem("\n".join(line for line in mountinfo.splitlines() if upper[0] not in line), upper[1])
    return None


def carries_wal_reset_bug(version: tuple[int, int, int]) -> bool:
    """
    Tell whether a version of SQLite may lose a commit when a checkpoint runs beside a writer.

    The second of two checkpoints in a row can overlook that a writer has begun the write-ahead log anew in between,
    and then counts what that writer put there as copied already (sqlite.org/wal.html, "The WAL-Reset Bug").
    """
    fixed = version >= (3, 51, 3) or (3, 50, 7) <= version < (3, 51) or (3, 44, 6) <= version < (3, 45)
    return version >= (3, 7, 0) and not fixed


@cache
def warn_of_wal_reset() -> None:
    """Say once in a process what its operator should know about this version of SQLite."""
    if carries_wal_reset_bug(sqlite3.sqlite_version_info[:3]):
        _LOG.warning(
            "this is SQLite %s, which has a known fault (fixed in 3.44.6, 3.50.7 and 3.51.3): a checkpoint beside a "
            "writer may lose a commit. callbackq works around it in its own files, and there is nothing to do unless "
            'another program, or a connection of your own, writes to the same file: run "PRAGMA wal_autocheckpoint = '
            '0" on each connection there, or use a newer SQLite',
            sqlite3.sqlite_version,
        )
