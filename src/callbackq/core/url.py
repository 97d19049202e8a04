"""
The one URL parser: what it returns is what is judged, stored and connected to.

Two parsers that disagree about one URL are how requests reach hosts nobody checked, so nothing else in
callbackq takes a URL apart.
"""

from __future__ import annotations

import re

from attrs import frozen

__all__ = ["MAX_URL_LENGTH", "Target", "UrlFault", "parse_url"]

MAX_URL_LENGTH = 8192
_DEFAULT_PORTS = {"http": 80, "https": 443}
_URL = re.compile(
    r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?",
    re.DOTALL,
)
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")


class UrlFault(ValueError):
    """What is wrong with a URL, in words that do not quote it."""


@frozen(kw_only=True)
class Target:
    """
    A parsed callback URL.

    Attributes:
        scheme: ``"http"`` or ``"https"``.
        host: lower case, without brackets; a name or a literal address.
        port: explicit or the scheme's default.
        path_and_query: what goes into the request line; starts with ``/``.
    """

    scheme: str
    host: str
    port: int
    path_and_query: str

    @property
    def origin(self) -> str:
        """``scheme://host:port``: the part of a URL that may be logged, and the key of per-host limits."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_url(url: str) -> Target:
    """
    Take a callback URL apart.

    Raises:
        UrlFault: it is not an absolute http or https URL that every parser reads the same way.
    """
    if len(url) > MAX_URL_LENGTH:
        raise UrlFault(f"must not be longer than {MAX_URL_LENGTH} characters")
    if any(c <= " " or c == "\x7f" or c == "\\" for c in url):
        raise UrlFault("must not contain blanks, control characters or backslashes")
    if not url.isascii():
        raise UrlFault("must be ASCII: percent-encode the path and write the host name in punycode")
    parts = _URL.fullmatch(url)
    if parts is None or parts["scheme"].lower() not in _DEFAULT_PORTS:
        raise UrlFault("must be an absolute URL that starts with http:// or https://")
    if "@" in parts["authority"]:
        raise UrlFault("must not contain a user name or password: send an Authorization header instead")
    authority = _AUTHORITY.fullmatch(parts["authority"])
    if authority is None:
        raise UrlFault("must name a host, and a port from 1 to 65535 where there is one")
    scheme = parts["scheme"].lower()
    port = int(authority["port"]) if authority["port"] else _DEFAULT_PORTS[scheme]
    if not 1 <= port <= 65535:
        raise UrlFault("must have a port from 1 to 65535")
    return Target(
        scheme=scheme,
        host=authority["host"].strip("[]").lower(),
        port=port,
        path_and_query=(parts["path"] or "/") + (parts["query"] or ""),
    )
