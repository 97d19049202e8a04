"""
The one URL parser: what it returns is what is judged, stored and connected to.

Two parsers that disagree about one URL are how requests reach hosts nobody checked. So nothing else in callbackq
takes a URL apart, and whatever other parsers are known to read in different ways is refused here. One host has one
spelling in a `Target`, because limits and kept connections are counted by it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from attrs import field, frozen

from callbackq.core.addresses import parse_address

__all__ = ["MAX_URL_LENGTH", "Target", "UrlFault", "parse_host", "parse_url"]

MAX_URL_LENGTH: Final = 8192
_REMEMBERED_URLS: Final = 512
_MAX_HOST_LENGTH: Final = 253
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}

_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_URL = re.compile(
    r"(?P<scheme>[A-Za-z]+)://(?P<authority>[^/?#]*)(?P<path>/[^?#]*)?(?P<query>\?[^#]*)?(?:#.*)?",
)
_AUTHORITY = re.compile(r"(?P<host>\[[^\[\]]*\]|[^:\[\]]*)(?::(?P<port>.*))?")
# One spelling per port: no sign, no leading zeros, no digits of other scripts.
_PORT = re.compile(r"[1-9][0-9]{0,4}")
# RFC 1123, section 2.1, and the underscore, which real hosts have.
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
# What the URL standard calls "ends in a number": resolvers read 127.1, 0x7f.1 and 2130706433 as addresses.
_NUMERIC_LABEL = re.compile(r"[0-9]+|0x[0-9a-f]*")


class UrlFault(ValueError):
    """What is wrong with a URL, in words that do not quote it."""


@frozen(kw_only=True)
class Target:
    """
    A parsed callback URL.

    Attributes:
        scheme: ``"http"`` or ``"https"``.
        host: a name or a literal address in its one canonical spelling: lower case, no brackets, no trailing dot;
            IPv6 compressed, and an IPv4-mapped address as the IPv4 address it is.
        port: explicit or the scheme's default.
        path_and_query: what goes into the request line, byte for byte as in the URL; starts with ``/``. May hold
            secrets and is not shown by repr.
    """

    scheme: str
    host: str
    port: int
    path_and_query: str = field(repr=False)

    @property
    def is_literal_address(self) -> bool:
        """Whether the host is an address, so that there is no name to look up."""
        # No name has a colon or a numeric last label: parse_host() refuses those.
        return ":" in self.host or self.host.rpartition(".")[2].isdigit()

    @property
    def authority(self) -> str:
        """``host:port``, an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        """``scheme://host:port``: the part of a URL that may be logged, and the key of per-host limits."""
        return f"{self.scheme}://{self.authority}"


def parse_url(url: str) -> Target:
    """
    Take a callback URL apart, in time linear in its length.

    Path and query are kept as they are, also where their percent-encoding is broken: they go to the receiver
    untouched, and no reading of them changes where that is. The fragment is dropped.

    Raises:
        UrlFault: it is not an absolute http or https URL that every parser reads the same way.
    """
    if not isinstance(url, str):
        raise UrlFault("must be a string")
    if len(url) > MAX_URL_LENGTH:
        raise UrlFault(f"must not be longer than {MAX_URL_LENGTH} characters")
    return _parse(url)


# Few URLs get many callbacks, and each of those is parsed when it is made, stored, read and sent: a quarter of the time
# that storing one takes.
@lru_cache(maxsize=_REMEMBERED_URLS)
def _parse(url: str) -> Target:
    # Before any taking apart: parsers drop, encode or stop at these, each in its own way. Host names are not
    # converted to punycode for the caller, because IDNA 2003, IDNA 2008 and the browsers' UTS 46 send one name to
    # different hosts (the German sharp s, for one).
    if not url.isascii():
        raise UrlFault("must be ASCII: percent-encode path and query, and write the host name in punycode (xn--…)")
    if _UNSAFE.search(url):
        raise UrlFault("must not contain blanks, control characters or backslashes")
    parts = _URL.fullmatch(url)
    if parts is None or (scheme := parts["scheme"].lower()) not in _DEFAULT_PORTS:
        raise UrlFault("must be an absolute URL that starts with http:// or https://")
    host, port = _split_authority(parts["authority"])
    return Target(
        scheme=scheme,
        host=host,
        port=_DEFAULT_PORTS[scheme] if port is None else port,
        path_and_query=(parts["path"] or "/") + (parts["query"] or ""),
    )


def _split_authority(authority: str) -> tuple[str, int | None]:
    if "@" in authority:
        raise UrlFault("must not contain a user name or password: send an Authorization header instead")
    parts = _AUTHORITY.fullmatch(authority)
    if parts is None:
        raise UrlFault("must have nothing but a host and a port before the path, an IPv6 address in brackets")
    host = parts["host"]
    canonical = _parse_ipv6(host[1:-1]) if host.startswith("[") else parse_host(host)
    return canonical, _parse_port(parts["port"])


def _parse_port(port: str | None) -> int | None:
    if port is None:
        return None
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise UrlFault("must have a plain number from 1 to 65535 as port, or neither colon nor port")
    return int(port)


def _parse_ipv6(text: str) -> str:
    address = parse_address(text) if ":" in text else None
    if address is None:
        raise UrlFault("must have an IPv6 address without a zone, and nothing else, in the brackets")
    return str(address)


def parse_host(host: str) -> str:
    """
    Bring a host name or a literal IPv4 address into its canonical spelling.

    Raises:
        UrlFault: it is neither, or one of the spellings of an address that only some resolvers understand.
    """
    name = host.removesuffix(".")
    if not name:
        raise UrlFault("must name a host (an IPv6 address goes in brackets)")
    if len(name) > _MAX_HOST_LENGTH:
        raise UrlFault(f"must not have a host name longer than {_MAX_HOST_LENGTH} characters")
    if not _NAME.fullmatch(name):
        raise UrlFault(
            "must have a host name of labels of 1 to 63 ASCII letters, digits, underscores and inner hyphens "
            "(other scripts in punycode, no percent-encoding)"
        )
    name = name.lower()
    if _NUMERIC_LABEL.fullmatch(name.rpartition(".")[2]) and parse_address(name) is None:
        raise UrlFault("must write an IPv4 address as four decimal numbers from 0 to 255 without leading zeros")
    if "xn--" in name and not all(_is_punycode(label) for label in name.split(".") if label.startswith("xn--")):
        raise UrlFault("must have a host name in valid punycode where a label starts with xn--")
    return name


def _is_punycode(label: str) -> bool:
    # It decodes, and is the only spelling of what it decodes to. Not judged: which characters IDNA permits. That
    # table changes with every Unicode version, and the name is only ever looked up as it stands.
    encoded = label.removeprefix("xn--").encode("ascii")
    try:
        return encoded.decode("punycode").encode("punycode") == encoded
    except UnicodeError:
        return False
