"""Poolers in transaction mode: one of our own that takes everything away between transactions, and the real one."""

from __future__ import annotations

import secrets
import struct

from support.postgres_wire import CANCEL, Message, Peer, Proxy, error

__all__ = ["SwappingPooler"]

_KNOWN_PARAMETERS = {
    "user", "database", "application_name", "client_encoding", "datestyle", "timezone", "standard_conforming_strings"
}  # fmt: skip
_ENDS_CYCLE = {b"Q", b"S", b"F"}
"""Query, Sync and FunctionCall: each is answered by one ReadyForQuery."""


class SwappingPooler(Proxy):
    """
    A pooler in transaction mode, like pgbouncer, but at its worst: no two transactions of a client in a row have the
    same backend.

    So what a session holds (LISTEN, SET, advisory locks of the session, prepared statements, temporary tables) is gone
    in the next transaction, and may turn up in somebody else's: nothing resets a backend between two transactions.
    As with pgbouncer, parameters at the start of a connection that it doesn't know are refused, ``options`` among them,
    notifications to a backend without a client are lost, and a client that leaves in a transaction takes the backend
    along. Unlike pgbouncer it never lets clients wait for a backend, and keeps no client's ``application_name`` and the
    like when they are SET.

    It logs in once for each backend and thus needs a server that asks for no password.
    """

    def __init__(self, target: str) -> None:
        self._idle: list[_Backend] = []
        self._clients: dict[bytes, _Client] = {}
        super().__init__(target)

    async def serve(self, client: Peer) -> None:
        startup = await client.read_startup()
        if startup is None:
            return
        if startup.code == CANCEL:
            await self._cancel(startup.body[4:])
            return
        if unknown := _parameters(startup).keys() - _KNOWN_PARAMETERS:
            client.write(error("FATAL", "08P01", f"unsupported startup parameter: {sorted(unknown)[0]}"))
            await client.drain()
            await client.close()
            return
        await _Client(self, client, startup).run()

    async def take(self, startup: Message, other_than: _Backend | None) -> _Backend:
        """Give the backend that has been idle longest, but not *other_than*; a new one if there is none."""
        for backend in self._idle:
            if backend.startup == startup and backend is not other_than:
                self._idle.remove(backend)
                return backend
        backend = _Backend(self, await self.connect(), startup)
        try:
            await backend.log_in()
        except BaseException:
            backend.peer.abort()
            raise
        self.spawn(backend.run())
        return backend

    def give_back(self, backend: _Backend) -> None:
        self._idle.append(backend)

    def forget(self, backend: _Backend) -> None:
        if backend in self._idle:
            self._idle.remove(backend)

    def register(self, client: _Client) -> bytes:
        """Give a client what it may cancel its statements with."""
        key = struct.pack("!II", secrets.randbits(31), secrets.randbits(32))
        self._clients[key] = client
        return key

    def unregister(self, key: bytes) -> None:
        del self._clients[key]

    async def _cancel(self, key: bytes) -> None:
        client = self._clients.get(key)
        if client and client.backend:
            server = await self.connect()
            server.write(Message(b"", struct.pack("!I", CANCEL) + client.backend.key))
            await server.close()


class _Client:
    def __init__(self, pooler: SwappingPooler, peer: Peer, startup: Message) -> None:
        self.peer = peer
        self.backend: _Backend | None = None
        self._last: _Backend | None = None
        self._pooler = pooler
        self._startup = startup

    async def run(self) -> None:
        try:
            first = await self._pooler.take(self._startup, None)
        except _RefusedError as refused:
            self.peer.write(refused.message)
            await self.peer.drain()
            await self.peer.close()
            return
        self._pooler.give_back(first)
        key = self._pooler.register(self)
        self.peer.write(*first.greeting, Message(b"K", key), Message(b"Z", b"I"))
        try:
            await self._forward()
        finally:
            self._pooler.unregister(key)
            if self.backend:  # in the middle of a transaction, which ends with its connection
                self.backend.client = None
                await self.backend.peer.close()

    async def _forward(self) -> None:
        async for messages in self.peer.read():
            for message in messages:
                if message.kind == b"X":
                    return
                backend = await self._attached()
                backend.pass_on(message)
            if self.backend:
                await self.backend.peer.drain()

    async def _attached(self) -> _Backend:
        if self.backend is None:
            self.backend = await self._pooler.take(self._startup, self._last)
            self.backend.client = self
        return self.backend

    def let_go(self) -> None:
        self._last, self.backend = self.backend, None


class _RefusedError(Exception):
    def __init__(self, message: Message) -> None:
        super().__init__()
        self.message = message


class _Backend:
    def __init__(self, pooler: SwappingPooler, peer: Peer, startup: Message) -> None:
        self.peer = peer
        self.startup = startup
        self.client: _Client | None = None
        self.greeting: list[Message] = []
        self.key = b""
        self._pooler = pooler
        self._messages = peer.read()
        self._owed = 0  # how many ReadyForQuery are to come
        self._open = False  # whether messages were sent since the last one that leads to a ReadyForQuery

    async def log_in(self) -> None:
        self.peer.write(self.startup)
        async for messages in self._messages:
            for message in messages:
                if message.kind == b"E":
                    raise _RefusedError(message)
                if message.kind == b"R":
                    assert message.body == b"\0\0\0\0", "the pooler needs a server that asks for no password"
                if message.kind == b"Z":
                    return
                if message.kind == b"K":
                    self.key = message.body
                else:
                    self.greeting.append(message)
        raise ConnectionResetError

    def pass_on(self, message: Message) -> None:
        self.peer.write(message)
        self._open = message.kind not in _ENDS_CYCLE
        self._owed += not self._open

    async def run(self) -> None:
        try:
            async for messages in self._messages:
                for message in messages:
                    self._answer(message)
                if self.client:
                    await self.client.peer.drain()
        finally:
            self._pooler.forget(self)
            if self.client:
                await self.client.peer.close()
            await self.peer.close()

    def _answer(self, message: Message) -> None:
        if self.client is None:
            return
        self.client.peer.write(message)
        if message.kind == b"Z":
            self._owed -= 1
            if message.body == b"I" and not self._owed and not self._open:
                self.client.let_go()
                self.client = None
                self._pooler.give_back(self)


def _parameters(startup: Message) -> dict[str, str]:
    words = startup.body[4:-2].decode().split("\0")
    return {name.lower(): value for name, value in zip(words[::2], words[1::2], strict=True)}
