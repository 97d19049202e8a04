"""
What happens to open databases when the process is forked.

Their connections are closed beforehand. SQLite counts its locks in the process's memory, and a child that inherits
the count takes no locks of its own (measured: what it commits is lost when the parent closes). Parent and child open
new connections with their next call. The fork waits until no operation is running, so that the child inherits neither
half a transaction nor a mutex whose holder doesn't exist there.
"""

from __future__ import annotations

import logging
import os
import threading
from typing import Final, Protocol
from weakref import WeakSet

from callbackq.errors import TransientDataAccessError

__all__ = ["Forkable", "fork_safe_mutex", "watch_forks"]

_LOG = logging.getLogger("callbackq.stores")


class Forkable(Protocol):
    """Something that must not be in use across a fork."""

    def rest(self) -> None:
        """Come to rest, until `resume`. Raises TransientDataAccessError when that takes too long."""
        ...

    def resume(self) -> None:
        """Go on, in the parent."""
        ...

    def start_anew(self, *, rested: bool) -> None:
        """Forget, in the child, what is the parent's."""
        ...


# Of whole modules, held by nobody for longer than a look at a file.
_mutexes: Final[list[threading.Lock]] = []
_watched: Final[WeakSet[Forkable]] = WeakSet()
_resting: Final[list[Forkable]] = []
# Held over each fork: two threads that fork at once would take each other's resting objects for their own.
_MUTEX: Final = threading.Lock()


def watch_forks(one: Forkable) -> None:
    """Bring an object to rest around every fork, for as long as it exists."""
    with _MUTEX:
        _watched.add(one)


def fork_safe_mutex() -> threading.Lock:
    """Make a mutex for a module, which no child will find held by a thread that it doesn't have."""
    mutex = threading.Lock()
    _mutexes.append(mutex)
    return mutex


def _before() -> None:
    _MUTEX.acquire()
    for one in _watched:
        try:
            one.rest()
            _resting.append(one)
        except TransientDataAccessError as error:
            _LOG.warning("a store will not be usable in the process that is forked now: %s", error)
    # Last, because what the stores were waiting for may need one.
    for mutex in _mutexes:
        mutex.acquire()


def _after_in_parent() -> None:
    for mutex in _mutexes:
        mutex.release()
    for one in _resting:
        one.resume()
    _resting.clear()
    _MUTEX.release()


def _after_in_child() -> None:
    # All are free already when the fork was made by something that didn't tell Python beforehand.
    was_foretold = _MUTEX.locked()
    for mutex in _mutexes if was_foretold else ():
        mutex.release()
    for one in _watched:
        one.start_anew(rested=one in _resting)
    _resting.clear()
    if was_foretold:
        _MUTEX.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_after_in_parent, after_in_child=_after_in_child)
