"""A proxy between the store and its server that has accidents when the test says so."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from contextlib import suppress
from enum import Enum

from support.postgres_wire import CANCEL, Message, Peer, Proxy, error
from support.processes import LIMIT

__all__ = ["ANY", "COMMIT", "CuttingProxy", "Fault"]

ANY = ""
COMMIT = r"^\s*(COMMIT|END)\b"
"""What ends a transaction. A statement outside one commits itself: name that one then."""

_NOT_THERE = "callbackq_fault"  # the name of no portal and no prepared statement
_TEXT = "the test wants it so"
_ENDS_CYCLE = {b"Q", b"S", b"F"}


class _Kind(Enum):
    CUT_BEFORE = "cut before"
    CUT_AFTER = "cut after"
    FAIL = "fail"


class Fault:
    """
    An accident that is to happen.

    Attributes:
        statements: those it happened to, as they were sent.
    """

    def __init__(self, kind: _Kind, pattern: str, nth: int, times: int, sqlstate: str = "") -> None:
        self.kind = kind
        self.sqlstate = sqlstate
        self.statements: list[str] = []
        self._pattern = re.compile(pattern, re.IGNORECASE)
        self._to_pass = nth - 1
        self._times = times
        self._left = threading.Semaphore(0)

    def wait(self) -> None:
        """Wait until it has happened, as often as it should, and the server has done what follows from it."""
        assert all(self._left.acquire(timeout=LIMIT) for _ in range(self._times)), "the fault never happened"

    def strikes(self, statement: str) -> bool:
        """Tell whether this is a statement to happen to; the proxy asks once for each."""
        if len(self.statements) == self._times or not self._pattern.search(statement):
            return False
        if self._to_pass:
            self._to_pass -= 1
            return False
        self.statements.append(statement)
        return True

    def happened(self) -> None:
        self._left.release()


class CuttingProxy(Proxy):
    """
    A proxy that loses connections, and that fails statements, when the test says so.

    A fault is planned with a regular expression for the statement it happens to, and with which of the matching ones,
    of all connections, that is: the first unless *nth* says otherwise. Whether it was sent as text, prepared, or in a
    pipeline makes no difference.

    Attributes:
        statements: all that clients had executed, in order, those that faults happened to included.
        connections: how many were begun.
    """

    def __init__(self, target: str) -> None:
        self.statements: list[str] = []
        self.connections = 0
        self._faults_planned: list[Fault] = []
        self._links: set[_Link] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._refusal: str | None = None
        self._parked: socket.socket | None = None
        super().__init__(target)

    def close(self) -> None:
        super().close()
        if self._parked:
            self._parked.close()

    def cut_before(self, pattern: str = COMMIT, *, nth: int = 1) -> Fault:
        """Lose the connection in place of executing the statement: when it is COMMIT, nothing is committed."""
        return self._plan(Fault(_Kind.CUT_BEFORE, pattern, nth, 1))

    def cut_after(self, pattern: str = COMMIT, *, nth: int = 1) -> Fault:
        """Lose the connection once the server has answered, but not the client: when it is COMMIT, all is committed."""
        return self._plan(Fault(_Kind.CUT_AFTER, pattern, nth, 1))

    def fail(self, sqlstate: str, pattern: str = ANY, *, nth: int = 1, times: int = 1) -> Fault:
        """
        Answer the statement, *times* in a row, with this error in place of executing it.

        What follows from the error really happens on the server: the transaction is aborted and takes no more
        statements, and a COMMIT that fails has rolled it back. Errors that end a session (57P01 and its like, class 08)
        end the connection.
        """
        return self._plan(Fault(_Kind.FAIL, pattern, nth, times, sqlstate))

    def forget(self) -> None:
        """Let nothing happen any more that was planned."""

        async def forget() -> None:
            self._faults_planned.clear()

        self.ask(forget)

    def stall(self) -> None:
        """Let nothing pass any more, in either direction; connections are taken and never answered."""
        self.ask(self._stall)

    def resume(self) -> None:
        """Let pass what came meanwhile, and what comes."""
        self.ask(self._resume)

    def refuse(self) -> None:
        """Refuse new connections, as a machine does where no server runs."""
        self.ask(self._refuse)

    def refuse_with(self, sqlstate: str) -> None:
        """Refuse new connections with an error, as a server does that starts (57P03) or is full (53300)."""
        self._refusal = sqlstate

    def accept(self) -> None:
        """Take new connections again."""
        self._refusal = None
        self.ask(self._accept_again)

    def cut_all(self) -> None:
        """Lose all connections there are."""
        self.ask(self._cut_all)

    async def serve(self, client: Peer) -> None:
        await self.until_flowing()
        startup = await client.read_startup()
        if startup is None:
            return
        self.connections += startup.code != CANCEL
        server = await self.connect()
        try:
            server.write(startup)
            if startup.code == CANCEL:
                await server.close()
            elif self._refusal:
                client.write(error("FATAL", self._refusal, _TEXT))
                await client.close()
            else:
                await self._link(_Link(self, client, server))
        finally:
            server.abort()

    async def until_flowing(self) -> None:
        await self._flowing.wait()

    def fault_for(self, statement: str) -> Fault | None:
        """Note a statement that is to be executed, and give the accident that happens to it."""
        self.statements.append(statement)
        return next((fault for fault in self._faults_planned if fault.strikes(statement)), None)

    def _plan(self, fault: Fault) -> Fault:
        async def plan() -> None:
            self._faults_planned.append(fault)

        self.ask(plan)
        return fault

    async def _link(self, link: _Link) -> None:
        self._links.add(link)
        try:
            await link.run()
        finally:
            self._links.discard(link)

    async def _stall(self) -> None:
        self._flowing.clear()

    async def _resume(self) -> None:
        self._flowing.set()

    async def _refuse(self) -> None:
        # A socket that has the port, but doesn't listen, keeps others from taking it.
        self._server.close()
        self._parked = socket.socket()
        self._parked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._parked.bind(("127.0.0.1", self._port))

    async def _accept_again(self) -> None:
        if self._parked:
            self._parked.close()
            self._parked = None
            await self.listen()

    async def _cut_all(self) -> None:
        for link in self._links:
            link.client.abort()
            link.server.abort()


class _Link:
    """
    A client's connection together with the one to the server.

    What a client sends is counted in cycles: each ends with a message that the server answers with ReadyForQuery, so we
    know of an answer to which cycle it belongs. Cycle 0 is the login.
    """

    def __init__(self, proxy: CuttingProxy, client: Peer, server: Peer) -> None:
        self.client = client
        self.server = server
        self._proxy = proxy
        self._statements: dict[str, str] = {}
        self._portals: dict[str, str] = {}
        self._sending = 1
        self._answering = 0
        self._cut_after: dict[int, Fault] = {}
        self._failing: dict[int, Fault] = {}
        self._hidden: set[int] = set()  # cycles whose end the client doesn't see
        self._skipping = False  # as the server does after an error, up to the end of the cycle
        self._roll_back_then = False
        self._lost = False

    async def run(self) -> None:
        answers = self._proxy.spawn(self._answers())
        fault = None
        try:
            fault = await self._requests()
        finally:
            with suppress(OSError):
                self.server.write_end()
            await asyncio.wait([answers])
        if fault:
            fault.happened()

    async def _requests(self) -> Fault | None:
        """Pass on what the client sends, to its end or the accident that ends the connection."""
        async for messages in self.client.read():
            await self._proxy.until_flowing()
            for message in messages:
                fault = self._fault_for(message)
                if fault is None:
                    self._send(message)
                elif fault.kind is _Kind.CUT_AFTER:
                    self._cut_after[self._sending] = fault
                    self._send(message)
                elif fault.kind is _Kind.FAIL and not _ends_session(fault.sqlstate):
                    self._fail(message, fault)
                else:
                    await self._lose(fault)
                    return fault
            await self.server.drain()
        return None

    def _fault_for(self, message: Message) -> Fault | None:
        statement = self._executed_by(message)
        return None if statement is None or self._skipping else self._proxy.fault_for(statement)

    def _executed_by(self, message: Message) -> str | None:
        """Give the statement that a message has executed, if it has; remember what it prepares."""
        if message.kind == b"P":
            self._statements[message.string()] = message.string(1)
        elif message.kind == b"B":
            self._portals[message.string()] = self._statements.get(message.string(1), "")
        elif message.kind == b"E":
            return self._portals.get(message.string(), "")
        elif message.kind == b"Q":
            return message.string()
        return None

    def _send(self, message: Message) -> None:
        self.server.write(message)
        if message.kind in _ENDS_CYCLE:
            self._sending += 1
            self._skipping = False
            if self._roll_back_then:
                self._roll_back_then = False
                self._send(_query("ROLLBACK"))

    def _fail(self, message: Message, fault: Fault) -> None:
        """
        Let the server find an error of its own in place of the statement, so that what follows is its doing.

        Its answer then gets the error that was wished for. When a COMMIT fails, there is no transaction any more, where
        after any other error there is one that takes no statements; so we end it.
        """
        if re.match(COMMIT, fault.statements[-1], re.IGNORECASE):
            self._roll_back_then = True
            self._hidden.add(self._sending)
        self._failing[self._sending + self._roll_back_then] = fault
        if message.kind == b"Q":
            self._send(_query(f"EXECUTE {_NOT_THERE}"))
        else:
            self._skipping = True
            self._send(Message(b"E", f"{_NOT_THERE}\0".encode() + bytes(4)))

    async def _lose(self, fault: Fault) -> None:
        self._lost = True
        if fault.kind is _Kind.CUT_BEFORE:
            self.client.abort()
        else:
            self.client.write(error("FATAL", fault.sqlstate, _TEXT))
            await self.client.close()

    async def _answers(self) -> None:
        try:
            async for messages in self.server.read():
                await self._proxy.until_flowing()
                for message in messages:
                    self._answer(message)
                if not self._lost:
                    await self.client.drain()
        finally:
            if not self._lost:
                await self.client.close()

    def _answer(self, message: Message) -> None:
        cycle = self._answering
        self._answering += message.kind == b"Z"
        if fault := self._cut_after.get(cycle):
            if message.kind == b"Z" and not self._lost:
                self._lost = True
                self.client.abort()
                self.server.abort()
                fault.happened()
        elif not self._lost:
            self._show(message, cycle)

    def _show(self, message: Message, cycle: int) -> None:
        is_end = message.kind == b"Z"
        if cycle in self._hidden and is_end:
            return
        if cycle - 1 in self._hidden and not is_end:  # our own ROLLBACK, of which the client sees that it is over
            return
        fault = self._failing.get(cycle) or self._failing.get(cycle + 1)
        if fault and message.kind == b"E" and _NOT_THERE.encode() in message.body:
            message = error("ERROR", fault.sqlstate, _TEXT)
        self.client.write(message)
        if is_end and (ended := self._failing.pop(cycle, None)):
            ended.happened()


def _query(statement: str) -> Message:
    return Message(b"Q", f"{statement}\0".encode())


def _ends_session(sqlstate: str) -> bool:
    return sqlstate.startswith("08") or sqlstate in {"57P01", "57P02", "57P03", "57P05"}
