"""
The bytes of a request: urllib3's connection writes the head, into a list instead of a socket.

Only what the callback says goes out, plus the fields that name the callback and its place in the queue, so that a
receiver can drop duplicates and stale copies.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from datetime import datetime
from functools import lru_cache
from typing import Final, Literal
from urllib.parse import quote

from attrs import field, frozen
from urllib3.connection import HTTPConnection

from callbackq.core.delivery import Delivery
from callbackq.core.models import CallbackRequest
from callbackq.core.url import Target
from callbackq.errors import InvalidRequestError
from callbackq.signing import Signer
from callbackq.transport.proxy import Proxy

__all__ = ["OrderHeaders", "RequestWriter", "Signing"]

OrderHeaders = Literal["plain", "hashed", "none"]
"""What receivers are told about queue and order. See `callbackq.HTTPTransport`."""

Signing = Signer | Callable[[CallbackRequest], Signer | None] | None
"""What signs: one for all requests, one for each, or nothing. See `callbackq.HTTPTransport`."""

_REMEMBERED_HEADS: Final = 256
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
# Visible ASCII except the percent sign itself and what is awkward inside a field value; ``unquote`` restores the rest.
_PLAIN_IN_QUEUE: Final = "!#$&'()*+,/:;=?@[]~"


@frozen(kw_only=True)
class RequestWriter:
    """
    Writes requests.

    Attributes:
        user_agent: sent unless the callback brings its own.
        order_headers: whether to send the four ``callbackq-`` fields, and the queue in which form.
        queue_key: the key with which the queue is hashed.
        signer: makes the signatures.
        close: ask the receiver to close the connection after its answer.
        proxy: gets plain http requests, in their absolute form (RFC 9112, section 3.2.2). What goes through a tunnel is
            written as if it weren't there.
    """

    user_agent: str
    order_headers: OrderHeaders
    queue_key: bytes = field(repr=False)
    signer: Signing = field(repr=False)
    close: bool
    proxy: Proxy | None = None

    def write(self, delivery: Delivery, target: Target, now: datetime) -> bytes:
        """
        Return head and body of one attempt's request, ready to be sent.

        Raises:
            Exception: whatever the host's code raises that chooses the signer or provides its secrets.
        """
        request = delivery.request
        body = None if request.method == "GET" else request.post_data.data or b""
        headers = {"Host": _host_field(target), "Accept-Encoding": "identity"}
        if self.close:
            headers["Connection"] = "close"
        if not any(name.lower() == "user-agent" for name in request.post_data.headers):
            headers["User-Agent"] = self.user_agent
        headers |= request.post_data.headers
        request_target = target.path_and_query
        if self.proxy is not None and target.scheme == "http":
            request_target = f"http://{headers['Host']}{request_target}"
            headers |= self.proxy.headers
        own = {} if body is None else {"Content-Length": str(len(body))}
        own |= self._identity(delivery, body or b"", now)
        own |= self._order(delivery)
        head = _common_lines(target.host, target.port, request.method, request_target, tuple(headers.items()))
        return b"%b%b\r\n%b" % (head, _lines(own), body or b"")

    def _identity(self, delivery: Delivery, body: bytes, now: datetime) -> dict[str, str]:
        """What Standard Webhooks asks for. The time is the attempt's, so that receivers may refuse old copies."""
        timestamp = int(now.timestamp())
        fields = {"webhook-id": delivery.callback_id, "webhook-timestamp": str(timestamp)}
        signer = self._signer_of(delivery.request)
        if signer is not None:
            fields["webhook-signature"] = signer.sign(delivery.callback_id, timestamp, body)
        return fields

    def _signer_of(self, request: CallbackRequest) -> Signer | None:
        if isinstance(self.signer, Signer | None):
            return self.signer
        signer = self.signer(request)
        if not isinstance(signer, Signer | None):
            raise InvalidRequestError([("signer", "must return a Signer, or None to send no signature")])
        return signer

    def _order(self, delivery: Delivery) -> dict[str, str]:
        if self.order_headers == "none":
            return {}
        fields = {}
        if queue_id := delivery.request.queue_id:
            fields["callbackq-queue"] = self._queue_field(queue_id)
        fields["callbackq-sequence"] = str(delivery.sequence)
        fields["callbackq-attempt"] = str(delivery.attempt)
        fields["callbackq-token"] = str(delivery.token)
        return fields

    def _queue_field(self, queue_id: str) -> str:
        if self.order_headers == "hashed":
            return hmac.new(self.queue_key, queue_id.encode(), hashlib.sha256).hexdigest()
        return quote(queue_id, safe=_PLAIN_IN_QUEUE)


def _host_field(target: Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return host if target.port == _DEFAULT_PORTS[target.scheme] else f"{host}:{target.port}"


# All callbacks of a customer have these lines in common. To write them anew for each took 16 µs of 20.
@lru_cache(maxsize=_REMEMBERED_HEADS)
def _common_lines(host: str, port: int, method: str, path: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    """Write what says nothing about the callback. urllib3 checks method, path, names and values once more."""
    connection = HTTPConnection(host, port)
    written = _Written()
    connection.sock = written
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers:
        connection.putheader(name, value)
    connection.endheaders()
    return b"".join(written.parts).removesuffix(b"\r\n")


def _lines(fields: dict[str, str]) -> bytes:
    """Write the lines that are a callback's own. All of them are ours, but for what the host's signer says."""
    lines = "".join([f"{name}: {value}\r\n" for name, value in fields.items()])
    if not len(fields) == lines.count("\r") == lines.count("\n") or not lines.isascii():
        raise ValueError("a signature must be one line of ASCII")
    return lines.encode()


class _Written:
    """Stands where urllib3 expects a socket, and keeps what would have been sent."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    def sendall(self, data: bytes) -> None:
        self.parts.append(data)

    def settimeout(self, timeout: object) -> None:
        """Nothing here takes time."""

    def close(self) -> None:
        """Nothing to give back."""
