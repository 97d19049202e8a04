"""Loopback receivers that do exactly what a test tells them, byte by byte."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

__all__ = ["OK", "Conversation", "Receiver", "Script", "SeenRequest", "answer_ok", "full_listener"]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
_PATIENCE_SECONDS = 20.0


class SeenRequest(NamedTuple):
    """A request as it arrived; field names in lower case."""

    line: str
    fields: Mapping[str, str]
    body: bytes
    raw_head: str
    connection: int


class Conversation:
    """One accepted connection, seen from the script that serves it."""

    def __init__(self, receiver: Receiver, connection: socket.socket, number: int) -> None:
        self._receiver = receiver
        self._connection = connection
        self._number = number
        self._buffer = b""

    def read_request(self) -> SeenRequest | None:
        """Read one request with a Content-Length or no body; ``None`` when the sender has closed."""
        return self.read_body() if self.read_head() else None

    def read_head(self) -> SeenRequest | None:
        """Read a request up to its body; ``None`` when the sender has closed. Then read the body, or never."""
        while b"\r\n\r\n" not in self._buffer:
            if not self._read():
                return None
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in lines)}
        self._begun = SeenRequest(line, fields, b"", head.decode("latin-1"), self._number)
        return self._begun

    def read_body(self) -> SeenRequest | None:
        """Read the rest of the request whose head was read; ``None`` when the sender has closed."""
        length = int(self._begun.fields.get("content-length", "0"))
        while len(self._buffer) < length:
            if not self._read(1024 * 1024):
                return None
        body, self._buffer = self._buffer[:length], self._buffer[length:]
        request = self._begun._replace(body=body)
        self._receiver.note(request)
        return request

    def read_something(self, at_most: int = 65536) -> bool:
        """Wait for some bytes, whatever they are; False when the sender has closed."""
        return self._read(at_most)

    def wait(self, seconds: float | None = None) -> bool:
        """Do nothing, not even read, until the time is over (False) or the receiver is closed (True)."""
        return self._receiver.stopped.wait(seconds)

    def send(self, data: bytes) -> None:
        self._connection.sendall(data)

    def send_outside_tls(self, data: bytes) -> None:
        """Put bytes between the records of a TLS connection."""
        socket.socket.sendall(self._connection, data)

    def drip(self, data: bytes, *, pause: float = 0.02) -> None:
        """Send one byte at a time, then nothing more, until the sender gives up."""
        for byte in data:
            self.send(bytes([byte]))
            if self._receiver.stopped.wait(pause):
                return
        self.hang()

    def send_for_ever(self, data: bytes) -> None:
        while not self._receiver.stopped.is_set():
            self.send(data)

    def hang(self) -> None:
        """Say nothing until the sender closes."""
        while self._read():
            pass

    def relay_to(self, port: int) -> None:
        """Be a tunnel to a port of this machine until one of the two ends."""
        with socket.create_connection(("127.0.0.1", port), _PATIENCE_SECONDS) as other:
            other.sendall(self._buffer)
            back = threading.Thread(target=_pump, args=(other, self._connection), name="receiver", daemon=True)
            back.start()
            _pump(self._connection, other)
            back.join(_PATIENCE_SECONDS)

    def end_tls(self) -> None:
        """Say, as TLS wants it, that this is the end of the stream."""
        if not isinstance(self._connection, ssl.SSLSocket):
            raise AssertionError
        self._connection.unwrap()

    def end(self) -> None:
        """End the connection as a process does that dies."""
        self._connection.close()

    def reset(self) -> None:
        """End the connection with a reset instead of an end of the stream. Read first, or connecting itself fails."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.end()

    def _read(self, at_most: int = 65536) -> bool:
        data = self._connection.recv(at_most)
        self._buffer += data
        return bool(data)


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


Script = Callable[[Conversation], object]


def answer_ok(conversation: Conversation) -> None:
    """Answer 200 to every request on the connection."""
    while conversation.read_request():
        conversation.send(OK)


class Receiver:
    """
    A listener whose every connection is served by a script, in a thread of its own.

    Args:
        script: what it does. The connection is closed when it returns.
        tls: a server's context, for https.
        family: where it listens: 127.0.0.1 or ::1.
    """

    def __init__(
        self,
        script: Script = answer_ok,
        *,
        tls: ssl.SSLContext | None = None,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> None:
        self.requests: list[SeenRequest] = []
        self.connections = 0
        self.stopped = threading.Event()
        self._requested = threading.Condition()
        self._script = script
        self._tls = tls
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(
            ("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family, backlog=1024
        )
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def url(self, path: str = "/hook", *, host: str = "127.0.0.1") -> str:
        return f"http{'s' if self._tls else ''}://{host}:{self.port}{path}"

    def note(self, request: SeenRequest) -> None:
        with self._requested:
            self.requests.append(request)
            self._requested.notify_all()

    def wait_for_requests(self, count: int) -> None:
        """Wait until so many requests have been read."""
        with self._requested:
            arrived = self._requested.wait_for(lambda: len(self.requests) >= count, _PATIENCE_SECONDS)
        assert arrived, f"{len(self.requests)} of {count} requests"

    def close(self) -> None:
        self.stopped.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(_PATIENCE_SECONDS)
            assert not thread.is_alive(), "a receiver's script hangs"
        self._listener.close()

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="receiver", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self.stopped.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed; or a test has taken all descriptors away for a moment
                self.stopped.wait(0.01)
                continue
            self.connections += 1
            number = self.connections
            self._open.add(connection)
            self._start(lambda connection=connection, number=number: self._serve(connection, number))  # type: ignore[misc]

    def _serve(self, connection: socket.socket, number: int) -> None:
        connection.settimeout(_PATIENCE_SECONDS)
        plain = connection
        # The sender hanging up is what most scripts end with.
        with contextlib.suppress(OSError):
            if self._tls is not None:
                connection = self._tls.wrap_socket(connection, server_side=True)
                self._open.add(connection)
            self._script(Conversation(self, connection, number))
        self._open -= {plain, connection}
        connection.close()
        plain.close()


@contextlib.contextmanager
def full_listener() -> Iterator[int]:
    """A port at which connections are neither accepted nor refused."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port: int = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        try:
            yield port
        finally:
            for filler in fillers:
                filler.close()
