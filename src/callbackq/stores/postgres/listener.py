"""
Hints that a callback may be due: to subscribers in this process, and from others by PostgreSQL's LISTEN and NOTIFY.

Only hints: everything is found without them, too, at the next poll. So nothing depends on the session that listens. It
is made anew when it breaks, and behind a pooler that gives each transaction another session it just hears nothing.
"""

from __future__ import annotations

import logging
import os
import selectors
import socket
import threading
from collections.abc import Callable
from typing import Any, Final

import psycopg
from psycopg import sql

from callbackq.stores.postgres.connections import leads_to_one_session

__all__ = ["Hints", "Listener"]

_LOG: Final = logging.getLogger("callbackq.stores")
_FIRST_REST_SECONDS: Final = 1.0
_LONGEST_REST_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 5.0
_PROBE_SECONDS: Final = 30.0


class Hints:
    """
    Subscribers, and a listener as long as there are any.

    Args:
        connect: opens a session to listen with.
        channel: what to listen to; ``None`` for a server that can't notify.
    """

    def __init__(self, connect: Callable[[], psycopg.Connection[Any]], *, channel: str | None) -> None:
        self._connect = connect
        self._channel = channel
        self._forget()

    def _forget(self) -> None:
        self._subscribers: dict[object, Callable[[], None]] = {}
        self._listener: Listener | None = None
        # Two subscriptions at the same time would start two listeners.
        self._subscribing = threading.Lock()
        self._pid = os.getpid()

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Have *wake* called at each hint, in any thread, until the function is called that is returned."""
        if self._pid != os.getpid():
            self._forget()  # the thread is the parent's, and so is who subscribed there
        subscription = object()
        with self._subscribing:
            self._subscribers[subscription] = wake
            if self._listener is None and self._channel is not None:
                self._listener = Listener(self._connect, channel=self._channel, wake=self.tell)

        return lambda: self._unsubscribe(subscription)

    def tell(self) -> None:
        """Call all subscribers."""
        for wake in tuple(self._subscribers.values()):
            wake()

    def stop_listening(self) -> None:
        """End the thread, if there is one."""
        if self._pid == os.getpid():
            with self._subscribing:
                listener, self._listener = self._listener, None
            if listener is not None:
                listener.stop()

    def _unsubscribe(self, subscription: object) -> None:
        with self._subscribing:
            self._subscribers.pop(subscription, None)
            # One that subscribes at the same time must not be left without it.
            listener = None if self._subscribers else self._listener
            if listener is not None:
                self._listener = None
        if listener is not None:
            listener.stop()


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
        # Wakes the thread from its wait for the server.
        self._told_to_stop, self._tell_to_stop = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="callbackq-postgres-listener", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Idempotent."""
        if not self._stop_asked.is_set():
            self._stop_asked.set()
            self._tell_to_stop.close()
        if self._thread is not threading.current_thread():
            self._thread.join(_STOP_SECONDS)

    def _run(self) -> None:
        rest = _FIRST_REST_SECONDS
        with self._told_to_stop:
            while not self._stop_asked.is_set():
                try:
                    with self._connect() as connection:
                        if leads_to_one_session(connection):
                            connection.execute(self._listen)
                            rest = _FIRST_REST_SECONDS
                            self._hear(connection)
                            continue
                    # A pooler. What listens there would be the session of whoever comes next.
                    self._stop_asked.wait(_LONGEST_REST_SECONDS)
                except Exception as error:  # whatever it is: polling goes on, and the thread must live to hear again
                    # Once for each outage: the dispatcher says itself when the server can't be reached.
                    level = logging.INFO if rest == _FIRST_REST_SECONDS else logging.DEBUG
                    _LOG.log(level, "hints from PostgreSQL are interrupted (%s)", type(error).__name__)
                    self._stop_asked.wait(rest)
                    rest = min(2 * rest, _LONGEST_REST_SECONDS)

    def _hear(self, connection: psycopg.Connection[Any]) -> None:
        self._wake()
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_READ)
            selector.register(self._told_to_stop, selectors.EVENT_READ)
            while not self._stop_asked.is_set():
                # `stop` ends it, and the system when the server has vanished (keepalives). But what stands between may
                # keep the line open: so the server is asked now and then, and must answer.
                if not selector.select(_PROBE_SECONDS):
                    connection.execute("SELECT 1")
                if any(True for _ in connection.notifies(timeout=0)):
                    self._wake()
