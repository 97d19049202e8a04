"""
A forward proxy on loopback: tunnels (CONNECT), and plain requests in absolute form.

To it every name leads to this machine; it is the one who looks names up. Misbehaviour is scripted, as a receiver's is.
"""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from support.receivers import Conversation, SeenRequest

__all__ = ["ESTABLISHED", "forward"]

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_PATIENCE_SECONDS = 20.0


def forward(conversation: Conversation) -> None:
    """A script for a receiver: be an honest proxy."""
    while request := conversation.read_request():
        method, where, _ = request.line.split(" ")
        if method == "CONNECT":
            conversation.send(ESTABLISHED)
            conversation.relay_to(int(where.rpartition(":")[2]))
            return
        conversation.send(_fetch(request))


def _fetch(request: SeenRequest) -> bytes:
    """Ask the receiver, in the form it expects, without what is for the proxy; return its answer."""
    method, where, version = request.line.split(" ")
    url = urlsplit(where)
    lines = [
        f"{method} {url.path}{'?' if url.query else ''}{url.query} {version}",
        *(line for line in request.raw_head.split("\r\n")[1:] if not line.lower().startswith("proxy-")),
    ]
    with socket.create_connection(("127.0.0.1", url.port or 80), _PATIENCE_SECONDS) as receiver:
        receiver.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + request.body)
        receiver.shutdown(socket.SHUT_WR)  # so that its script ends, and with it the answer
        return b"".join(iter(lambda: receiver.recv(65536), b""))
