"""
The operator's forward proxy: what is sent to it on its own account, and where it is.

It is trusted as the operator's configuration is. So its addresses are not judged, are looked up by the system, and may
be remembered for a moment: otherwise every attempt to any host would wait in one line for the same name.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Final

from callbackq.clock import Clock
from callbackq.core.url import Target, UrlFault, parse_url
from callbackq.core.validation import Fault
from callbackq.targets import system_resolver

__all__ = ["Proxy", "check_proxy"]

_REMEMBERED_SECONDS: Final = 10.0
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class Proxy:
    """
    A forward proxy. One object may be used from any number of threads.

    Args:
        url: ``http://host:port``.
        credentials: user name and password for it, or ``None``.
        user_agent: what it is told about who asks for a tunnel.

    Attributes:
        name: ``host:port``, for the log.
        host: what is looked up.
        port: where it listens.
        headers: fields that are for the proxy alone. Secret.
    """

    def __init__(self, url: str, credentials: tuple[str, str] | None, user_agent: str) -> None:
        where = parse_url(url)
        self.name = where.authority
        self.host = where.host
        self.port = where.port
        self.headers: dict[str, str] = {}
        if credentials is not None:
            # RFC 7617. It leaves the encoding open; UTF-8 is what it recommends.
            encoded = base64.b64encode(":".join(credentials).encode()).decode("ascii")
            self.headers["Proxy-Authorization"] = f"Basic {encoded}"
        self._user_agent = user_agent
        self._literal = [where.host] if where.is_literal_address else None
        # Replaced as a whole, so that threads need no lock.
        self._remembered: tuple[list[str], float] = [], 0.0

    def __repr__(self) -> str:
        return f"<Proxy {self.name}>"

    def connect_request(self, target: Target) -> bytes:
        """Return the bytes that ask for a tunnel to *target*."""
        fields = {"Host": target.authority, "User-Agent": self._user_agent} | self.headers
        lines = [f"CONNECT {target.authority} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
        return "\r\n".join([*lines, "", ""]).encode("ascii")

    def known_addresses(self, now: float) -> list[str]:
        """Return its addresses without a look-up; none when it takes one."""
        if self._literal is not None:
            return self._literal
        addresses, until = self._remembered
        return addresses if now < until else []

    def look_up(self, clock: Clock) -> list[str]:
        """
        Return its addresses; blocks for as long as the system does.

        Raises:
            OSError: the name can't be looked up.
        """
        # Many attempts may have come here at a time, and the first of them has been answered meanwhile.
        if known := self.known_addresses(clock.monotonic()):
            return known
        addresses = list(dict.fromkeys(system_resolver(self.host, self.port)))
        self._remembered = addresses, clock.monotonic() + _REMEMBERED_SECONDS
        return addresses

    def forget(self) -> None:
        """Look it up anew next time: nobody listens where it was."""
        self._remembered = [], 0.0


def check_proxy(url: object, credentials: object) -> Iterator[Fault]:
    """Judge what an operator gave: no fault quotes it, since it may hold a password."""
    if url is not None:
        for reason in _faults_of_url(url):
            yield "proxy", reason
    if credentials is None:
        return
    if url is None:
        yield "proxy_credentials", "must not be given without a proxy"
    if not _are_credentials(credentials):
        yield "proxy_credentials", "must be a tuple of user name (without a colon) and password, no control characters"


def _faults_of_url(url: object) -> Iterator[str]:
    if isinstance(url, str) and "@" in url:
        yield "must not contain a user name or password: give them as proxy_credentials=(user, password)"
        return
    try:
        where = parse_url(url)  # type: ignore[arg-type]  # it says so itself where the value is no text
    except UrlFault as fault:
        yield f"{fault}; for example http://proxy.internal:3128"
        return
    if where.scheme != "http":
        yield "must start with http://: no TLS to the proxy itself (https targets are encrypted through it, end to end)"
    if where.path_and_query != "/":
        yield "must be nothing but http://host:port"


def _are_credentials(given: object) -> bool:
    if not isinstance(given, tuple) or len(given) != 2 or not all(isinstance(part, str) for part in given):
        return False
    user, password = given
    try:
        f"{user}{password}".encode()
    except UnicodeEncodeError:
        return False
    return ":" not in user and not _CONTROL.search(user) and not _CONTROL.search(password)
