"""What this process connects to and looks up, as the interpreter itself reports it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["connections_of_this_process"]

# An audit hook can't be taken away again, so there is one, which does nothing while nobody is watching.
_watchers: list[list[object]] = []
_is_installed = False


def _note(event: str, arguments: tuple[object, ...]) -> None:
    if _watchers and event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        for watcher in _watchers:
            watcher.append(arguments[1] if event != "socket.getaddrinfo" else arguments[0])


@contextmanager
def connections_of_this_process() -> Iterator[list[object]]:
    """Every address that any thread connects to, or name that it asks the system for, while this is open."""
    global _is_installed
    if not _is_installed:
        sys.addaudithook(_note)
        _is_installed = True
    seen: list[object] = []
    _watchers.append(seen)
    try:
        yield seen
    finally:
        _watchers.remove(seen)
