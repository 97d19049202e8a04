from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trustme

from callbackq.targets import TargetPolicy
from callbackq.transport import HTTPTransport
from callbackq.transport.tls import CHEAP_CIPHERS
from support.receivers import Receiver, Script, answer_ok

LOOPBACK = TargetPolicy(allow=["127.0.0.0/8", "::1"])


@pytest.fixture
def receive() -> Iterator[Callable[..., Receiver]]:
    """Start a receiver; it is closed at the end of the test."""
    receivers: list[Receiver] = []

    def start(script: Script = answer_ok, **settings: Any) -> Receiver:
        receivers.append(Receiver(script, **settings))
        return receivers[-1]

    yield start
    for receiver in receivers:
        receiver.close()


@pytest.fixture
def make_transport(client_tls: ssl.SSLContext) -> Iterator[Callable[..., HTTPTransport]]:
    """Build a transport that may call loopback; it is closed at the end of the test."""
    transports: list[HTTPTransport] = []

    def build(**settings: Any) -> HTTPTransport:
        defaults: dict[str, Any] = {"target_policy": LOOPBACK, "ssl_context": client_tls}
        transports.append(HTTPTransport(**defaults | settings))
        return transports[-1]

    yield build
    for transport in transports:
        transport.close()


@pytest.fixture
def transport(make_transport: Callable[..., HTTPTransport]) -> HTTPTransport:
    return make_transport()


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Trusts the tests' authority and nobody else."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers(CHEAP_CIPHERS)
    authority.configure_trust(context)
    return context


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> Callable[..., ssl.SSLContext]:
    """Make a server's context with a certificate for these names."""

    def make(*names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names).configure_cert(context)
        return context

    return make
