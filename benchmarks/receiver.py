"""
A receiver that costs as little as can be had, so that a benchmark measures the sender: nginx where it is installed.

    python benchmarks/receiver.py

Listens on a free port of 127.0.0.1, prints the port, and answers 200 to everything, with keep-alive, until its
standard input ends. Without nginx it is one in Python, which takes about as long for a request as it takes urllib3 to
send it. `receiver()` starts it for a benchmark, `kind()` says which it is.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_SECONDS = 10.0

_ANSWER = b"HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)

# One worker. nginx answers when it has read the head, and reads the body afterwards: the connection stays. A body is
# in its buffer or thrown away, never in a file; the folders are named only because nginx makes them when it starts.
_NGINX = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log stderr error;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    server {{
        listen 127.0.0.1:{port};
        location / {{ return 200 "ok"; }}
    }}
}}
"""


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


async def answer_with_python(listener: socket.socket) -> None:
    server = await asyncio.get_running_loop().create_server(Receiver, sock=listener)
    async with server:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


def answer_with_nginx(program: str, listener: socket.socket) -> None:
    with tempfile.TemporaryDirectory(prefix="callbackq-nginx-") as folder:
        config = Path(folder) / "nginx.conf"
        config.write_text(_NGINX.format(folder=folder, port=listener.getsockname()[1]))
        # In NGINX it is told what sockets it inherits, so that nobody can take the port before.
        running = subprocess.Popen(
            [program, "-p", folder, "-c", str(config), "-e", os.devnull],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
            env={**os.environ, "NGINX": f"{listener.fileno()};"},
        )
        listener.close()  # so that, should nginx end, connections are refused
        with running:
            sys.stdin.read()
            running.terminate()
            running.wait(LONGEST_SECONDS)


def main() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        print(listener.getsockname()[1], flush=True)
        if program := shutil.which("nginx"):
            answer_with_nginx(program, listener)
        else:
            asyncio.run(answer_with_python(listener))


@contextmanager
def receiver() -> Iterator[str]:
    """Start one in a process of its own, and give its URL."""
    command = [sys.executable, str(Path(__file__))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/"
        finally:
            process.stdin.close()
            process.wait(LONGEST_SECONDS)


def kind() -> str:
    """Say which receiver it is."""
    program = shutil.which("nginx")
    if not program:
        return "asyncio, in a process of its own"
    told = subprocess.run([program, "-v"], capture_output=True, text=True, timeout=LONGEST_SECONDS, check=True)
    version = re.search(r"nginx/([\d.]+)", told.stderr)
    return f"nginx {version[1]}" if version else "nginx"


if __name__ == "__main__":
    main()
