"""
Proxies that speak PostgreSQL's protocol, version 3, on a loopback port, each in a thread of its own.

That thread needs the interpreter's lock, so what is called through a proxy must not wait while holding it: libpq's own
calls do (``pgconn.get_result()``, ``connection.cancel()``), psycopg's (``execute()``, ``cancel_safe()``) don't.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from support.processes import LIMIT

__all__ = ["CANCEL", "Message", "Peer", "Proxy", "error"]

T = TypeVar("T")

CANCEL = 80877102
_SSL, _GSS = 80877103, 80877104


class Message(NamedTuple):
    """A message; its kind is empty for the first one of a client, which has none."""

    kind: bytes
    body: bytes

    def encoded(self) -> bytes:
        return self.kind + struct.pack("!I", len(self.body) + 4) + self.body

    @property
    def code(self) -> int:
        """The protocol version, or the special request, that a first message begins with."""
        return int(struct.unpack_from("!I", self.body)[0])

    def string(self, nth: int = 0) -> str:
        """Give the *nth* of the strings, each ended by a zero byte, that the body begins with."""
        return self.body.split(b"\0", nth + 1)[nth].decode(errors="replace")


def error(severity: str, sqlstate: str, text: str) -> Message:
    """Make an ErrorResponse."""
    fields = {"S": severity, "V": severity, "C": sqlstate, "M": text}
    return Message(b"E", b"".join(f"{key}{value}\0".encode() for key, value in fields.items()) + b"\0")


class Peer:
    """A client or a server, as a proxy sees it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def read_startup(self) -> Message | None:
        """Read a client's first message, after having refused encryption; ``None`` when it closes instead."""
        with suppress(asyncio.IncompleteReadError):
            while True:
                (length,) = struct.unpack("!I", await self._reader.readexactly(4))
                message = Message(b"", await self._reader.readexactly(length - 4))
                if message.code not in (_SSL, _GSS):
                    return message
                self._writer.write(b"N")
        return None

    async def read(self) -> AsyncIterator[list[Message]]:
        """Give what comes, whole messages and as many at a time as have come, to the end of the connection."""
        buffer = b""
        while data := await self._reader.read(1 << 16):
            buffer += data
            messages, begin = [], 0
            while len(buffer) - begin >= 5:
                end = begin + 1 + int(struct.unpack_from("!I", buffer, begin + 1)[0])
                if end > len(buffer):
                    break
                messages.append(Message(buffer[begin : begin + 1], buffer[begin + 5 : end]))
                begin = end
            buffer = buffer[begin:]
            if messages:
                yield messages

    def write(self, *messages: Message) -> None:
        self._writer.write(b"".join(message.encoded() for message in messages))

    async def drain(self) -> None:
        """Let what was written go, if it has become much."""
        await self._writer.drain()

    def write_end(self) -> None:
        """End our direction of the connection, as a process does that dies."""
        self._writer.write_eof()

    async def close(self) -> None:
        """Close, after what was written."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def abort(self) -> None:
        """Close at once, whatever was written."""
        self._writer.transport.abort()


class Proxy(ABC):
    """
    A loopback port that leads to a server.

    Args:
        target: conninfo of the server.

    Attributes:
        conninfo: what to connect with instead.
    """

    def __init__(self, target: str) -> None:
        parameters = conninfo_to_dict(target)
        self._host, self._server_port = str(parameters["host"]), int(parameters.get("port") or 5432)
        self._tasks: set[asyncio.Task[None]] = set()
        self._faults: list[BaseException] = []
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()
        assert self._listening.wait(LIMIT), "the proxy doesn't listen"
        self.conninfo = make_conninfo(target, host="127.0.0.1", port=self._port)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End all connections and free the port. A fault of the proxy itself is raised here."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closed.set)
            self._thread.join(LIMIT)
        if self._faults:
            raise AssertionError("the proxy failed") from self._faults[0]

    @abstractmethod
    async def serve(self, client: Peer) -> None:
        """Serve one client to its end. An end of any connection may be raised, and is then the client's end, too."""

    async def connect(self) -> Peer:
        """Connect to the server."""
        if self._host.startswith("/"):
            return Peer(*await asyncio.open_unix_connection(f"{self._host}/.s.PGSQL.{self._server_port}"))
        return Peer(*await asyncio.open_connection(self._host, self._server_port))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do something beside, to its end or the proxy's."""
        task = asyncio.create_task(self._surrounded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def ask(self, function: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Do something in the proxy's thread and wait for it."""
        return asyncio.run_coroutine_threadsafe(function(), self._loop).result(LIMIT)

    async def listen(self) -> None:
        """Take connections, on the port that we had before, if any."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", getattr(self, "_port", 0))
        self._port = int(self._server.sockets[0].getsockname()[1])

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._closed = asyncio.Event()
        await self.listen()
        self._listening.set()
        await self._closed.wait()
        self._server.close()
        while tasks := list(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=1)  # then again: one may close politely somebody who doesn't read
        await asyncio.sleep(0)  # what was closed last is closed in the loop's next round

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.spawn(self._serve(Peer(reader, writer)))

    async def _serve(self, client: Peer) -> None:
        try:
            await self.serve(client)
        finally:
            client.abort()

    async def _surrounded(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except OSError:
            pass  # one side is gone, so the other one goes
        except Exception as fault:
            self._faults.append(fault)
