"""
Hints from other machines that a callback may be due: PostgreSQL's LISTEN and NOTIFY.

Only a hint: everything is found without it, too, at the next poll. So nothing depends on the session that listens. It
is made anew when it breaks, and behind a pooler that gives each transaction another session it just hears nothing.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, Final

import psycopg
from psycopg import sql

__all__ = ["Listener"]

_LOG: Final = logging.getLogger("callbackq.stores")
_LOOK_SECONDS: Final = 1.0
_FIRST_REST_SECONDS: Final = 1.0
_LONGEST_REST_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 5.0


class Listener:
    """
    A thread that listens from its construction until `stop`.

    Args:
        connect: opens a session; called again whenever that breaks.
        channel: what to listen to.
        wake: called at each hint, and after each time when hints may have been missed.
    """

    def __init__(
        self, connect: Callable[[], psycopg.Connection[Any]], *, channel: str, wake: Callable[[], None]
    ) -> None:
        self._connect = connect
        self._listen = sql.SQL("LISTEN {}").format(sql.Identifier(channel))
        self._wake = wake
        self._stop_asked = threading.Event()
        self._connection: psycopg.Connection[Any] | None = None
        self._thread = threading.Thread(target=self._run, name="callbackq-postgres-listener", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        self._stop_asked.set()
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        rest = _FIRST_REST_SECONDS
        while not self._stop_asked.is_set():
            try:
                with self._connect() as connection:
                    connection.execute(self._listen)
                    rest = _FIRST_REST_SECONDS
                    self._hear(connection)
            except Exception as error:  # whatever it is: polling goes on, and the thread must live to hear again
                # Once for each outage: the dispatcher says itself when the server can't be reached.
                level = logging.INFO if rest == _FIRST_REST_SECONDS else logging.DEBUG
                _LOG.log(level, "hints from PostgreSQL are interrupted (%s)", type(error).__name__)
                self._stop_asked.wait(rest)
                rest = min(2 * rest, _LONGEST_REST_SECONDS)

    def _hear(self, connection: psycopg.Connection[Any]) -> None:
        self._wake()
        while not self._stop_asked.is_set():
            for _ in connection.notifies(timeout=_LOOK_SECONDS, stop_after=1):
                self._wake()
            if connection.closed:
                return
