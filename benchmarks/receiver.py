"""
A receiver that costs as little as Python allows, so that a benchmark measures the sender.

    python benchmarks/receiver.py

Listens on a free port of 127.0.0.1, prints the port, and answers 200 to everything, with keep-alive, until its
standard input ends.
"""

from __future__ import annotations

import asyncio
import re
import sys

_ANSWER = b"HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)


class Receiver(asyncio.Protocol):
    """One connection. Reads requests with a Content-Length, or without a body."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (head_end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._buffer, 0, head_end)
            request_end = head_end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < request_end:
                return
            self._buffer = self._buffer[request_end:]
            self._transport.write(_ANSWER)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Receiver, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
