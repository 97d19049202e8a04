"""
Look-ups on a few threads of their own.

The system's resolver can't be given a deadline, so whoever waits for it must be free to go. A thread that hangs in a
look-up nobody waits for any more stays lost until the look-up ends. So there are many threads, few for each host, and
half of them serve only hosts that have none yet. To stop all others it takes 48 hanging names: 16 with two threads
each, and 32 with one. In a pool of eight, four would do.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from typing import Final

__all__ = ["MAX_PER_HOST", "MAX_THREADS", "LookUp", "ResolverPool"]

MAX_THREADS: Final = 64
"""Many more than healthy look-ups need."""
MAX_PER_HOST: Final = 2
_REST_SECONDS: Final = 10.0


class LookUp:
    """
    One look-up of one attempt.

    Attributes:
        host: whose.
    """

    def __init__(self, host: str, resolve: Callable[[], list[str]], found: Callable[[], object]) -> None:
        self.host = host
        self._resolve = resolve
        self._found = found
        self._addresses: list[str] = []
        self._error: Exception | None = None

    def run(self) -> None:
        """Look up, then tell whoever waits."""
        try:
            self._addresses = self._resolve()
        except Exception as error:
            self._error = error
        except BaseException as error:
            # A resolver of the host's that calls sys.exit() must take along neither this thread nor the network's.
            self._error = RuntimeError(f"the resolver raised {type(error).__name__}")
        self._found()

    def result(self) -> list[str]:
        """
        Return the addresses that may be connected to.

        Raises:
            Exception: what the resolver or the policy raised.
        """
        if self._error is not None:
            raise self._error
        return self._addresses


class ResolverPool:
    """
    Threads that look names up. They are started as they are needed, and end with `close`.

    Args:
        rest: seconds after which a thread that has nothing to do ends.
    """

    def __init__(self, *, rest: float = _REST_SECONDS) -> None:
        self._rest = rest
        # Guards all below. Never held during a look-up.
        self._changed = threading.Condition()
        self._waiting: deque[LookUp] = deque()
        self._running: Counter[str] = Counter()
        self._threads = 0
        self._idle = 0
        self._is_closed = False

    def submit(self, look_up: LookUp) -> None:
        """
        Begin a look-up, when its turn comes.

        Raises:
            RuntimeError: the system gives no thread, and there is none yet.
        """
        with self._changed:
            self._waiting.append(look_up)
            if self._idle >= len(self._waiting) or self._threads == MAX_THREADS:
                self._changed.notify()
                return
            self._threads += 1
            number = self._threads
        try:
            threading.Thread(target=self._work, name=f"callbackq-dns-{number}", daemon=True).start()
        except RuntimeError:
            with self._changed:
                self._threads -= 1
                if self._threads == 0:
                    self._waiting.remove(look_up)
                    raise

    def give_up(self, look_up: LookUp) -> bool:
        """
        Wait no longer for a look-up.

        Returns:
            Whether it never began because look-ups of other hosts held all threads: then nothing is known about its
            own host.
        """
        with self._changed:
            if look_up not in self._waiting:
                return False
            self._waiting.remove(look_up)
            return self._running[look_up.host] < MAX_PER_HOST

    def close(self) -> None:
        """Let the threads end; those that hang, when they wake."""
        with self._changed:
            self._is_closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _work(self) -> None:
        while (look_up := self._next()) is not None:
            look_up.run()
            with self._changed:
                self._running[look_up.host] -= 1
                if not self._running[look_up.host]:
                    del self._running[look_up.host]

    def _next(self) -> LookUp | None:
        with self._changed:
            self._idle += 1
            self._changed.wait_for(lambda: self._is_closed or self._first_allowed() is not None, self._rest)
            self._idle -= 1
            look_up = self._first_allowed()
            if look_up is None:
                self._threads -= 1
                return None
            self._waiting.remove(look_up)
            self._running[look_up.host] += 1
            return look_up

    def _first_allowed(self) -> LookUp | None:
        limit = MAX_PER_HOST if self._running.total() < MAX_THREADS // 2 else 1
        return next((one for one in self._waiting if self._running[one.host] < limit), None)
