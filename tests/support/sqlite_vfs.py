"""
A layer between SQLite and its files that sees every write and sync, and can refuse them.

It is a VFS (sqlite.org/vfs.html) that hands everything on to the system's own, and is made with ctypes in the very
library that Python's `sqlite3` uses: nothing has to be compiled. While it is installed it is the default, so stores
use it without knowing.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import os
import sqlite3
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, Structure, c_char_p, c_int, c_int64, c_void_p, cast, pointer, sizeof
from pathlib import Path
from typing import Any, Literal, Self

from attrs import frozen

__all__ = ["Event", "WatchedFiles"]

Kind = Literal["open", "write", "truncate", "sync", "delete", "sync directory"]


@frozen
class Event:
    """
    Something that happened to a file.

    Attributes:
        file: its name, without the folder; empty for the folder itself.
        at: where a write begins, or the size after a truncation.
        data: what was written.
    """

    kind: Kind
    file: str
    at: int = 0
    data: bytes = b""


class _IOMethods(Structure):
    _fields_ = [
        ("iVersion", c_int),
        *((name, c_void_p) for name in ("xClose", "xRead", "xWrite", "xTruncate", "xSync", "xFileSize", "xLock")),
        *((name, c_void_p) for name in ("xUnlock", "xCheckReservedLock", "xFileControl", "xSectorSize")),
        *((name, c_void_p) for name in ("xDeviceCharacteristics", "xShmMap", "xShmLock", "xShmBarrier")),
        *((name, c_void_p) for name in ("xShmUnmap", "xFetch", "xUnfetch")),
    ]


class _File(Structure):
    _fields_ = [("pMethods", POINTER(_IOMethods))]


class _VFS(Structure):
    _fields_ = [
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        *((name, c_void_p) for name in ("xOpen", "xDelete", "xAccess", "xFullPathname", "xDlOpen", "xDlError")),
        *((name, c_void_p) for name in ("xDlSym", "xDlClose", "xRandomness", "xSleep", "xCurrentTime")),
        *((name, c_void_p) for name in ("xGetLastError", "xCurrentTimeInt64", "xSetSystemCall", "xGetSystemCall")),
        ("xNextSystemCall", c_void_p),
    ]


_FileP = POINTER(_File)
# The path as an address, not as text: SQLite goes on using its memory.
_Open = CFUNCTYPE(c_int, POINTER(_VFS), c_void_p, _FileP, c_int, POINTER(c_int))
_Delete = CFUNCTYPE(c_int, POINTER(_VFS), c_char_p, c_int)
_Close = CFUNCTYPE(c_int, _FileP)
_Write = CFUNCTYPE(c_int, _FileP, c_void_p, c_int, c_int64)
_Truncate = CFUNCTYPE(c_int, _FileP, c_int64)
_Sync = CFUNCTYPE(c_int, _FileP, c_int)
_ShmMap = CFUNCTYPE(c_int, _FileP, c_int, c_int, c_int, POINTER(c_void_p))
_SetSystemCall = CFUNCTYPE(c_int, POINTER(_VFS), c_char_p, c_void_p)
_GetSystemCall = CFUNCTYPE(c_void_p, POINTER(_VFS), c_char_p)
_OpenDirectory = CFUNCTYPE(c_int, c_char_p, POINTER(c_int))


def _library() -> ctypes.CDLL:
    # Names are looked up in what the module itself is linked with, too: it is the same library, not one like it.
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    library.sqlite3_libversion.restype = c_char_p
    assert library.sqlite3_libversion().decode() == sqlite3.sqlite_version
    library.sqlite3_vfs_find.restype = POINTER(_VFS)
    library.sqlite3_vfs_find.argtypes = [c_char_p]
    library.sqlite3_vfs_register.argtypes = [POINTER(_VFS), c_int]
    library.sqlite3_vfs_unregister.argtypes = [POINTER(_VFS)]
    return library


class WatchedFiles:
    """
    Watch all files that SQLite opens in this process while the block runs. All must be closed before it ends.

    Args:
        tell: called after each event, in the thread that works for SQLite.
        refuse: called before each event with its kind and file; gives SQLite's code for the error, or 0. For a write
            that is ``SQLITE_FULL`` or ``SQLITE_IOERR_WRITE``: SQLite is not made for others, and may crash.
        watches_writes: whether to tell of writes and truncations, and ask about them. Each costs a call of Python.
        shares_memory: whether files can have the memory beside them that write-ahead logs need. Without it SQLite keeps
            a rollback journal, as on a system that lacks such memory.
    """

    def __init__(
        self,
        *,
        tell: Callable[[Event], object] = lambda event: None,
        refuse: Callable[[Kind, str], int] = lambda kind, file: sqlite3.SQLITE_OK,
        watches_writes: bool = True,
        shares_memory: bool = True,
    ) -> None:
        self._tell = tell
        self._refuse = refuse
        self._watches_writes = watches_writes
        self._shares_memory = shares_memory
        self._sqlite = _library()
        self._names: dict[int, str] = {}
        # Of each kind of file the system's methods and ours. Both must live as long as any file.
        self._methods: dict[int, tuple[_IOMethods, _IOMethods]] = {}
        self._originals: dict[int, _IOMethods] = {}

    def __enter__(self) -> Self:
        self._system = self._sqlite.sqlite3_vfs_find(None)
        self._vfs = _VFS.from_buffer_copy(self._system.contents)
        self._vfs.zName = b"watched"
        self._vfs.pNext = None
        self._open, self._delete = _Open(self._on_open), _Delete(self._on_delete)
        self._close, self._write, self._truncate = (
            _Close(self._on_close),
            _Write(self._on_write),
            _Truncate(self._on_truncate),
        )
        self._sync, self._shm_map = _Sync(self._on_sync), _ShmMap(self._on_shm_map)
        self._vfs.xOpen, self._vfs.xDelete = _address(self._open), _address(self._delete)
        # SQLite syncs a folder by opening it for that; this is the only way to learn of it.
        system = self._system.contents
        self._system_directory = _GetSystemCall(system.xGetSystemCall)(self._system, b"openDirectory")
        self._open_directory = _OpenDirectory(self._on_open_directory)
        _SetSystemCall(system.xSetSystemCall)(self._system, b"openDirectory", _address(self._open_directory))
        assert self._sqlite.sqlite3_vfs_register(pointer(self._vfs), 1) == sqlite3.SQLITE_OK
        return self

    def __exit__(self, *_: object) -> None:
        self._sqlite.sqlite3_vfs_unregister(pointer(self._vfs))
        self._sqlite.sqlite3_vfs_register(self._system, 1)
        system = self._system.contents
        _SetSystemCall(system.xSetSystemCall)(self._system, b"openDirectory", self._system_directory)
        assert not self._names, f"still open: {sorted(self._names.values())}"

    def _on_open(self, _: Any, path: int | None, file: Any, flags: int, out_flags: Any) -> int:
        name = Path(os.fsdecode(ctypes.string_at(path))).name if path else ""
        if name and (code := self._refuse("open", name)):
            file.contents.pMethods = None
            return code
        code = _Open(self._system.contents.xOpen)(self._system, path, file, flags, out_flags)
        if code == sqlite3.SQLITE_OK and name:
            address = ctypes.addressof(file.contents)
            self._originals[address] = self._wrap(file)
            self._names[address] = name
            self._tell(Event("open", name))
        return int(code)

    def _wrap(self, file: Any) -> _IOMethods:
        original = file.contents.pMethods.contents
        key = ctypes.addressof(original)
        if key not in self._methods:
            ours = _IOMethods()
            known = sizeof(_IOMethods) if original.iVersion >= 3 else _IOMethods.xFetch.offset
            ctypes.memmove(pointer(ours), pointer(original), known)
            ours.iVersion = min(original.iVersion, 2) if self._shares_memory else 1
            ours.xClose, ours.xSync, ours.xShmMap = map(_address, (self._close, self._sync, self._shm_map))
            if self._watches_writes:
                ours.xWrite, ours.xTruncate = map(_address, (self._write, self._truncate))
            self._methods[key] = (original, ours)
        original, ours = self._methods[key]
        file.contents.pMethods = pointer(ours)
        return original

    def _of(self, file: Any) -> tuple[_IOMethods, str]:
        address = ctypes.addressof(file.contents)
        return self._originals[address], self._names[address]

    def _on_close(self, file: Any) -> int:
        original, _ = self._of(file)
        address = ctypes.addressof(file.contents)
        del self._originals[address], self._names[address]
        return int(_Close(original.xClose)(file))

    def _on_write(self, file: Any, data: int, size: int, at: int) -> int:
        original, name = self._of(file)
        if code := self._refuse("write", name):
            return code
        code = _Write(original.xWrite)(file, data, size, at)
        if code == sqlite3.SQLITE_OK:
            self._tell(Event("write", name, at, ctypes.string_at(data, size)))
        return int(code)

    def _on_truncate(self, file: Any, size: int) -> int:
        original, name = self._of(file)
        if code := self._refuse("truncate", name):
            return code
        code = _Truncate(original.xTruncate)(file, size)
        if code == sqlite3.SQLITE_OK:
            self._tell(Event("truncate", name, size))
        return int(code)

    def _on_sync(self, file: Any, flags: int) -> int:
        original, name = self._of(file)
        if code := self._refuse("sync", name):
            return code
        code = _Sync(original.xSync)(file, flags)
        if code == sqlite3.SQLITE_OK:
            self._tell(Event("sync", name))
        return int(code)

    def _on_shm_map(self, file: Any, region: int, size: int, extends: int, out: Any) -> int:
        original, name = self._of(file)
        if extends and (code := self._refuse("write", f"{name}-shm")):
            return code
        return int(_ShmMap(original.xShmMap)(file, region, size, extends, out))

    def _on_delete(self, _: Any, path: bytes, syncs_directory: int) -> int:
        name = Path(os.fsdecode(path)).name
        if code := self._refuse("delete", name):
            return code
        # Before it happens, because the folder is synced within the call.
        self._tell(Event("delete", name))
        return int(_Delete(self._system.contents.xDelete)(self._system, path, syncs_directory))

    def _on_open_directory(self, path: bytes, out: Any) -> int:
        code = _OpenDirectory(self._system_directory)(path, out)
        self._tell(Event("sync directory", ""))
        return int(code)


def _address(function: Any) -> int:
    address = cast(function, c_void_p).value
    assert address
    return address
