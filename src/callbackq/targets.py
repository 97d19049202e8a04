"""
Where callbacks may go: the policy of an operator, and the one look-up of names it takes to apply it.

What the rules are is in `callbackq.core.targets`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Final

from attrs import field, frozen

from callbackq.core.targets import TargetRules
from callbackq.core.validation import Fault, refuse
from callbackq.errors import InvalidRequestError

__all__ = ["NO_ADDRESS", "Resolver", "TargetPolicy", "system_resolver"]

NO_ADDRESS: Final[int] = getattr(socket, "EAI_NODATA", socket.EAI_NONAME)
"""The number of the `socket.gaierror` for a name that exists and has no address."""

Resolver = Callable[[str, int], list[str]]
"""
Find the addresses of a host name, for a port.

Called from several threads at a time. Returns them as text, the best first, or raises `socket.gaierror`.
"""


def system_resolver(host: str, port: int) -> list[str]:
    """Ask the operating system, which has no timeout for this: call it where it may hang."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(sockaddr[0]) for *_, sockaddr in found]


def _system_resolver_if_none(resolver: Resolver | None) -> Resolver:
    return system_resolver if resolver is None else resolver


def _check_resolver(resolver: object) -> Iterator[Fault]:
    if not callable(resolver):
        yield "resolver", "must be a function of a host and a port, or None for the system's"


@frozen(kw_only=True)
class TargetPolicy(TargetRules):
    """
    Which targets may be called. The default lets callbacks out to the public internet and nowhere else.

    Refused are special addresses of IPv4 and all of IPv6 but the public part of 2000::/3, however they are written
    or wrapped; names that mean something in the local network only (``localhost``, ``.local``, ``.internal``,
    ``.home.arpa``, ``.localdomain``, single labels) and those of cloud metadata services; names one of whose
    addresses is refused; and ports other than 80, 443 and those from 1024 that the fetch standard doesn't call bad.

    *allow* opens and *deny* closes, in this order:

    1. Denied is denied, whatever else is allowed.
    2. An allowed block or address opens these addresses: as literals, for public names that resolve to them, and
       for local names all of whose addresses are allowed. What contains 127.0.0.1 speaks for ::1, too. So
       ``allow=["127.0.0.0/8"]`` is for tests against ``http://127.0.0.1:8000`` and ``http://localhost:8000``.
    3. An allowed name opens that name, and whatever private addresses it has: trust those who run its DNS.
    4. Link-local addresses, metadata services, NAT64, 6to4 and Teredo stay closed to both, unless an entry lies
       inside such a block: ``0.0.0.0/0`` or an allowed name doesn't open 169.254.169.254, ``169.254.169.254`` does,
       and so does ``169.254.0.0/16``. A metadata service's name has to be allowed exactly, and its address besides.
       With ``64:ff9b::/96`` (NAT64) allowed, the IPv4 address inside is judged in its turn.

    Immutable; one policy may serve many transports and threads.

    Args:
        allow: CIDR blocks, addresses, exact host names, or ``.domain`` for a domain and all below it.
        deny: the same. A server that can be reached from outside may want its own public addresses here.
        ports: the only ports that may be called, as numbers and ranges; ``None`` for the default above.
        https_only: refuse plain http.
        resolver: looks up names; ``None`` for the system's.

    Raises:
        InvalidRequestError: with every entry that can't be understood, by its index (``allow[1]``), and for a
            *resolver* that can't be called.
    """

    resolver: Resolver = field(default=None, converter=_system_resolver_if_none)

    def __attrs_post_init__(self) -> None:
        faults: list[Fault] = []
        try:
            super().__attrs_post_init__()
        except InvalidRequestError as error:
            faults = error.errors
        refuse([*faults, *_check_resolver(self.resolver)])

    def resolve(self, url: str) -> list[str]:
        """
        Judge a URL with all that belongs to it, looking its host up exactly once.

        Blocks for as long as the resolver does. A name may change its addresses at any time: connect to what is
        returned here, never to the name, and ask again for the next request.

        Returns:
            The addresses that may be connected to, in the resolver's order, each once; never empty.

        Raises:
            TargetNotAllowedError: the policy forbids it; one forbidden address among several is enough.
            InvalidRequestError: the URL is malformed.
            socket.gaierror: the name has no address, or can't be looked up.
        """
        target = self.check_url(url)
        if target.is_literal_address:
            return [target.host]
        addresses = self.check_addresses(target, self.resolver(target.host, target.port))
        if not addresses:
            raise socket.gaierror(NO_ADDRESS, "the name has no address")
        return addresses
