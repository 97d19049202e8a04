"""Mail servers on the loopback, well-behaved and otherwise."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

__all__ = ["Mailbox", "PostOffice", "Script", "Stream"]


class Mailbox:
    """An aiosmtpd handler: keeps what arrives and answers RCPT, DATA and MAIL from a script, then with success."""

    def __init__(self, *, password: str = "") -> None:
        self.password = password
        self.envelopes: list[Envelope] = []
        self.commands: list[str] = []
        self.script: dict[str, list[str]] = {}

    @property
    def messages(self) -> list[EmailMessage]:
        contents = [envelope.content for envelope in self.envelopes]
        return [message_from_bytes(content, policy=policy.default) for content in contents]  # type: ignore[arg-type]

    def _answer(self, command: str) -> str:
        self.commands.append(command)
        answers = self.script.get(command, [])
        return answers.pop(0) if answers else "250 OK"

    async def handle_MAIL(self, server: SMTP, session: Session, envelope: Envelope, address: str, _: Any) -> str:
        if (answer := self._answer("MAIL")).startswith("250"):
            envelope.mail_from = address
        return answer

    async def handle_RCPT(self, server: SMTP, session: Session, envelope: Envelope, address: str, _: Any) -> str:
        if (answer := self._answer("RCPT")).startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        if (answer := self._answer("DATA")).startswith("250"):
            self.envelopes.append(envelope)
        return answer

    def authenticate(self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        self.commands.append(f"AUTH {data.login.decode()}")
        return AuthResult(success=data.password == self.password.encode(), handled=False)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, asyncio.Event], Awaitable[None]]


class PostOffice:
    """Mail servers on one event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="post office", daemon=True)
        self._thread.start()
        self._servers: list[asyncio.Server] = []
        self._closing = self._run(self._an_event())
        self.connections: Counter[int] = Counter()
        """How often each server that misbehaves was connected to, by port."""

    async def _an_event(self) -> asyncio.Event:
        return asyncio.Event()

    def _run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def open(self, mailbox: Mailbox, *, tls: ssl.SSLContext | None = None, **options: Any) -> int:
        """Start aiosmtpd; returns its port."""
        loop = self._loop
        return self._listen(
            loop.create_server(
                lambda: SMTP(mailbox, hostname="mail.test", loop=loop, **options), "127.0.0.1", 0, ssl=tls
            )
        )

    def misbehave(self, script: Script, *, tls: ssl.SSLContext | None = None) -> int:
        """Start a server that does to each connection what the script says; returns its port."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections[writer.get_extra_info("sockname")[1]] += 1
            try:
                await script(reader, writer, self._closing)
            except (OSError, asyncio.CancelledError):
                pass  # the client or this office has closed
            finally:
                writer.transport.abort()

        return self._listen(asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls))

    def _listen(self, opening: Any) -> int:
        server = self._run(opening)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    def close(self) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _close(self) -> None:
        self._closing.set()
        for server in self._servers:
            server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
