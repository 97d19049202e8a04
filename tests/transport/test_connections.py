"""Connections and their keeping, without the network thread."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable, Iterator
from unittest.mock import Mock

import pytest

from callbackq.transport.connections import Connection, KeptConnections, Route

Connect = Callable[..., tuple[Connection, socket.socket]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Open a connection to a listener of this process; return it and the other end."""
    selector = selectors.DefaultSelector()
    ends: list[Connection | socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        port = listener.getsockname()[1]

        def connect(host: str = "a.example", now: float = 0.0) -> tuple[Connection, socket.socket]:
            connection = Connection(Route("http", host, port, "127.0.0.1"), selector, None, now)
            other_end, _ = listener.accept()
            assert selector.select(10)
            connection.check_connected()
            connection.watch(selectors.EVENT_READ)
            ends.extend((connection, other_end))
            return connection, other_end

        yield connect
        for end in ends:
            end.close()
    selector.close()


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()


@pytest.mark.parametrize(
    ("happens", "is_quiet"),
    [
        (lambda other_end: None, True),
        (lambda other_end: other_end.sendall(b"x"), False),
        (lambda other_end: other_end.close(), False),
        (reset, False),
    ],
    ids=["nothing", "speaks", "closes", "resets"],
)
def test_idle_connection_is_good_while_the_other_side_is_silent(
    connect: Connect, happens: Callable[[socket.socket], None], is_quiet: bool
) -> None:
    kept = KeptConnections(idle_timeout=4.0, max_age=60.0)
    connection, other_end = connect()
    kept.keep(connection, 1.0)

    happens(other_end)

    assert kept.take([connection.route], 2.0) is (connection if is_quiet else None)
    assert connection.is_open is is_quiet


@pytest.mark.parametrize(
    ("opened_at", "kept_at", "taken_at", "is_good"),
    [(0.0, 10.0, 13.9, True), (0.0, 10.0, 14.0, False), (0.0, 59.0, 59.9, True), (0.0, 59.0, 60.0, False)],
)
def test_kept_connection_is_good_until_it_is_idle_or_old_for_too_long(
    connect: Connect, opened_at: float, kept_at: float, taken_at: float, is_good: bool
) -> None:
    kept = KeptConnections(idle_timeout=4.0, max_age=60.0)
    connection, _ = connect(now=opened_at)
    kept.keep(connection, kept_at)

    assert (kept.take([connection.route], taken_at) is connection) is is_good


def test_connection_of_another_route_is_not_taken(connect: Connect) -> None:
    kept = KeptConnections(idle_timeout=4.0, max_age=60.0)
    connection, _ = connect("a.example")
    kept.keep(connection, 0.0)

    route = connection.route
    others = [route._replace(host="b.example"), route._replace(scheme="https"), route._replace(address="127.0.0.2")]

    assert kept.take(others, 0.0) is None
    assert kept.take([*others, route], 0.0) is connection


def test_connections_expire_in_the_order_in_which_they_became_idle(connect: Connect) -> None:
    kept = KeptConnections(idle_timeout=4.0, max_age=60.0)
    first, second = connect()[0], connect()[0]
    kept.keep(first, 1.0)
    kept.keep(second, 2.0)

    expiries = [kept.next_expiry()]
    kept.drop_expired(5.0)
    expiries.append(kept.next_expiry())
    kept.drop_expired(6.0)
    expiries.append(kept.next_expiry())

    assert expiries == [5.0, 6.0, None]
    assert not first.is_open
    assert not second.is_open


def test_the_longest_idle_makes_room_when_enough_are_kept_in_all(connect: Connect) -> None:
    kept = KeptConnections(idle_timeout=4.0, max_age=60.0)
    connections = [connect(f"host{number % 3}.example")[0] for number in range(258)]

    for connection in connections:
        kept.keep(connection, 1.0)

    assert [connection.is_open for connection in connections] == [False] * 2 + [True] * 256


def test_as_many_are_kept_as_were_in_use_at_a_time(connect: Connect) -> None:
    kept = KeptConnections(idle_timeout=4.0, max_age=60.0)
    connections = [connect(f"host{number % 3}.example")[0] for number in range(302)]
    for in_use in 300, 1:
        kept.allow(in_use)

    for connection in connections:
        kept.keep(connection, 1.0)

    assert [connection.is_open for connection in connections] == [False] * 2 + [True] * 300


def test_connection_that_the_selector_refuses_to_watch_is_closed(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = KeptConnections(idle_timeout=4.0, max_age=60.0)
    connection, _ = connect()
    monkeypatch.setattr(connection, "watch", Mock(side_effect=OSError("no")))

    with pytest.raises(OSError, match="no"):
        kept.keep(connection, 1.0)

    assert not connection.is_open
    assert kept.take([connection.route], 1.0) is None


def test_closing_twice_does_nothing(connect: Connect) -> None:
    connection, _ = connect()

    connection.close()
    connection.close()

    assert not connection.is_open
