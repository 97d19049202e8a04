"""
Sockets: a connection to one checked address, and which of them are kept for the next request.

Belongs to the network thread alone, so there are no locks here. Nothing here waits: what would block says so.
"""

from __future__ import annotations

import selectors
import socket
import ssl
from collections.abc import Iterable
from contextlib import suppress
from typing import Final, NamedTuple

__all__ = ["Connection", "KeptConnections", "Route"]

_RECEIVE_BYTES: Final = 64 * 1024
_KEPT_IN_ANY_CASE: Final = 256
_MAX_KEPT_PER_ROUTE: Final = 128


class Route(NamedTuple):
    """
    What a connection is good for.

    The host is part of it although the address is what is connected to: two names on one address may be two
    receivers, and a TLS connection was verified for one of them only. So nor do two hosts share a connection to a
    proxy: an answer that it mixed up would be taken for another receiver's.

    Attributes:
        address: what is connected to: the host's, or a proxy's.
        proxy_port: the proxy's; ``None`` without a proxy.
    """

    scheme: str
    host: str
    port: int
    address: str
    proxy_port: int | None = None


class Connection:
    """
    An open socket, registered with the selector until it is closed, also while it is idle.

    Attributes:
        route: where it leads to.
        user: the attempt it serves; ``None`` while it is idle.
        opened_at: clock reading at which it began to connect.
        idle_since: clock reading at the end of its last exchange.
        is_open: it has not been closed by this side.
    """

    def __init__(self, route: Route, selector: selectors.BaseSelector, user: object, now: float) -> None:
        """
        Begin to connect. The connection becomes writable when that has succeeded, or failed.

        Raises:
            OSError: it failed at once, or this machine has no socket left.
        """
        self.route = route
        self.user: object | None = user
        self.opened_at = now
        self.idle_since = now
        self.is_open = True
        self._selector = selector
        self._events = selectors.EVENT_WRITE
        self._socket = socket.socket(socket.AF_INET6 if ":" in route.address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            # A request leaves in one piece. Holding back its last segment until the others are acknowledged, as the
            # system does by default, only delays it.
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                self._socket.connect((route.address, route.port if route.proxy_port is None else route.proxy_port))
            except BlockingIOError:
                pass
            # The socket object changes when TLS begins, its descriptor doesn't.
            self._descriptor = self._socket.fileno()
            selector.register(self._descriptor, self._events, self)
        except BaseException:
            self._socket.close()
            raise

    def check_connected(self) -> None:
        """
        Make sure, once it is writable, that it leads to the address that was checked.

        Raises:
            OSError: it doesn't.
        """
        error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, "could not connect")
        if self._socket.getpeername()[0] != self.route.address:
            raise ConnectionError("connected to another address than the one that was checked")

    @property
    def is_encrypted(self) -> bool:
        """Whether TLS has been put on top."""
        return isinstance(self._socket, ssl.SSLSocket)

    def start_tls(self, context: ssl.SSLContext) -> None:
        """Put TLS on top. The certificate must be the host's, whatever the address."""
        self._socket = context.wrap_socket(
            self._socket,
            do_handshake_on_connect=False,
            server_hostname=self.route.host,
            # An end of the stream that the other side didn't sign may be somebody else's doing.
            suppress_ragged_eofs=False,
        )

    def shake_hands(self) -> bool:
        """
        Go on with the TLS handshake.

        Returns:
            Whether it is complete. If not, call again when the connection is ready.

        Raises:
            OSError: it failed, or the certificate is not the host's.
        """
        if not isinstance(self._socket, ssl.SSLSocket):
            raise AssertionError
        try:
            self._socket.do_handshake()
        except ssl.SSLWantReadError:
            self.watch(selectors.EVENT_READ)
            return False
        except ssl.SSLWantWriteError:
            self.watch(selectors.EVENT_WRITE)
            return False
        return True

    def send(self, data: memoryview) -> int:
        """
        Send as much as can be sent now; 0 for nothing.

        Raises:
            OSError: the connection is broken.
        """
        try:
            return self._socket.send(data)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            return 0

    def receive(self) -> bytes | None:
        """
        Return what has come; ``None`` for nothing yet, no bytes for the end of the stream.

        Raises:
            OSError: the connection is broken.
        """
        try:
            # More than a TLS record holds, so that nothing stays behind in TLS, where the selector can't see it.
            return self._socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None

    def is_quiet(self) -> bool:
        """Whether it looks alive while idle: neither closed by the other side nor speaking out of turn."""
        try:
            # The plain method, also of a TLS socket: any byte at all is one nobody asked for.
            socket.socket.recv(self._socket, 1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def watch(self, events: int) -> None:
        """Choose what its user is woken for: ``selectors.EVENT_READ``, ``EVENT_WRITE`` or both."""
        if events != self._events:
            self._events = events
            self._selector.modify(self._descriptor, events, self)

    def close(self) -> None:
        """Give the socket back. Idempotent."""
        if self.is_open:
            self.is_open = False
            self.user = None
            # Either fails when the host has closed our descriptors, as daemons do at their start.
            with suppress(KeyError):
                self._selector.unregister(self._descriptor)
            with suppress(OSError):
                self._socket.close()

    def abandon(self) -> None:
        """Forget, in a forked child, what is the parent's: from here on nothing touches the socket or the selector."""
        self.is_open = False


class KeptConnections:
    """
    The idle connections.

    Args:
        idle_timeout: seconds for which one is kept. Receivers close theirs after some time, five seconds being a
            common choice; a request sent at that very moment is lost in a way that can't be told from a fault.
        max_age: seconds after which one is not used again, so that a receiver that moves is followed.
    """

    def __init__(self, *, idle_timeout: float, max_age: float) -> None:
        self._idle_timeout = idle_timeout
        self._max_age = max_age
        # Longest idle first, since all are kept for the same time.
        self._connections: dict[Connection, None] = {}
        self._by_route: dict[Route, list[Connection]] = {}
        self._limit = _KEPT_IN_ANY_CASE

    def allow(self, number: int) -> None:
        """
        Keep as many from now on.

        For as many as were in use at a time: when a thousand receivers answer together, each will be needed again.
        """
        self._limit = max(self._limit, number)

    def take(self, routes: Iterable[Route], now: float) -> Connection | None:
        """Take out a connection that may carry a request: of the first route that has one, the least idle."""
        for route in routes:
            while route in self._by_route:
                connection = self._by_route[route][-1]
                self._remove(connection)
                if now < self._expiry(connection) and connection.is_quiet():
                    return connection
                connection.close()
        return None

    def keep(self, connection: Connection, now: float) -> None:
        """
        Keep a connection whose answer was read to its end; or close it, if there are enough.

        Raises:
            OSError: the selector doesn't take it. It is closed.
        """
        connection.user = None
        connection.idle_since = now
        if now >= self._expiry(connection) or len(self._by_route.get(connection.route, ())) >= _MAX_KEPT_PER_ROUTE:
            connection.close()
            return
        if len(self._connections) >= self._limit:
            self.drop(self._first())
        try:
            connection.watch(selectors.EVENT_READ)
        except BaseException:
            connection.close()
            raise
        self._connections[connection] = None
        self._by_route.setdefault(connection.route, []).append(connection)

    def drop(self, connection: Connection) -> None:
        """Close an idle connection."""
        self._remove(connection)
        connection.close()

    def drop_one(self) -> bool:
        """Close the one that has been idle for longest. Returns False when there is none."""
        if not self._connections:
            return False
        self.drop(self._first())
        return True

    def drop_expired(self, now: float) -> None:
        """Close those that have been idle for too long."""
        while self._connections and now >= self._first().idle_since + self._idle_timeout:
            self.drop(self._first())

    def next_expiry(self) -> float | None:
        """Return the clock reading at which `drop_expired` has something to do; ``None`` for never."""
        return self._first().idle_since + self._idle_timeout if self._connections else None

    def drop_all(self) -> None:
        """Close them all."""
        while self._connections:
            self.drop(self._first())

    def _first(self) -> Connection:
        return next(iter(self._connections))

    def _expiry(self, connection: Connection) -> float:
        return min(connection.idle_since + self._idle_timeout, connection.opened_at + self._max_age)

    def _remove(self, connection: Connection) -> None:
        del self._connections[connection]
        same_route = self._by_route[connection.route]
        same_route.remove(connection)
        if not same_route:
            del self._by_route[connection.route]
