"""
Literal addresses: how they are read, and the table of those that are not the public internet.

`ipaddress` serves for reading and comparing only. Its own verdicts (``is_global``, ``is_private``) change with the
patch release, and call this host global when its address is wrapped in NAT64, 6to4 or SIIT.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from attrs import frozen

__all__ = ["NAT64", "SPECIAL_NETWORKS", "Address", "Network", "SpecialBlock", "parse_address", "special_block"]

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

# A host is judged at every attempt, and there are few hosts and many attempts: that took 3 µs of each.
_REMEMBERED: Final = 1024


@frozen
class SpecialBlock:
    """
    Addresses that are not the public internet.

    Attributes:
        network: the block.
        what: what lives there, in words that follow "leads to".
        is_guarded: a wide allow entry doesn't open it, nor does an allowed host name: only an entry that lies
            inside it. Cloud credentials are one GET away from such an address, or it carries an IPv4 address inside
            an IPv6 one and so a way around every other rule.
    """

    network: Network
    what: str
    is_guarded: bool


def _block(network: str, what: str, *, guarded: bool = False) -> SpecialBlock:
    return SpecialBlock(ip_network(network), what, guarded)


# The first row that holds an address counts, so a part comes before the whole. From IANA's special-purpose address
# registries, RFC 6890 and its updates, and the documentation of the cloud providers.
_SPECIAL_IPV4: Final = (
    _block("100.100.100.200/32", "a cloud metadata service", guarded=True),
    _block("168.63.129.16/32", "a cloud metadata service", guarded=True),
    _block("192.0.0.192/32", "a cloud metadata service", guarded=True),
    _block("169.254.0.0/16", "a link-local address or a cloud metadata service", guarded=True),
    _block("0.0.0.0/8", "this host"),
    _block("10.0.0.0/8", "a private network"),
    _block("100.64.0.0/10", "a provider's shared network"),
    _block("127.0.0.0/8", "this host"),
    _block("172.16.0.0/12", "a private network"),
    _block("192.0.0.0/24", "a special-purpose address"),
    _block("192.0.2.0/24", "a documentation address"),
    _block("192.88.99.0/24", "a 6to4 relay"),
    _block("192.168.0.0/16", "a private network"),
    _block("198.18.0.0/15", "a benchmarking network"),
    _block("198.51.100.0/24", "a documentation address"),
    _block("203.0.113.0/24", "a documentation address"),
    _block("224.0.0.0/4", "a multicast group"),
    _block("240.0.0.0/4", "a reserved address"),
)
_SPECIAL_IPV6: Final = (
    _block("fd00:ec2::/32", "a cloud metadata service", guarded=True),
    _block("fd20:ce::254/128", "a cloud metadata service", guarded=True),
    _block("fd00:42::42/128", "a cloud metadata service", guarded=True),
    _block("fe80::/10", "a link-local address", guarded=True),
    _block("64:ff9b::/96", "an IPv4 address behind NAT64", guarded=True),
    _block("64:ff9b:1::/48", "an IPv4 address behind NAT64", guarded=True),
    _block("::ffff:0:0:0/96", "an IPv4 address behind a translator", guarded=True),
    _block("2002::/16", "an IPv4 address behind 6to4", guarded=True),
    _block("2001::/32", "an IPv4 address behind Teredo", guarded=True),
    _block("::/127", "this host"),
    _block("fc00::/7", "a private network"),
    _block("ff00::/8", "a multicast group"),
    _block("2001::/23", "a special-purpose address"),
    _block("2001:db8::/32", "a documentation address"),
    _block("3fff::/20", "a documentation address"),
)
SPECIAL_NETWORKS: Final = tuple(block.network for block in (*_SPECIAL_IPV4, *_SPECIAL_IPV6))
"""All blocks of the table. What lies outside 2000::/3 is no more public than they are."""
_PUBLIC_IPV6: Final = IPv6Network("2000::/3")
# What IANA has not given to the public internet needs no row to be refused.
_NOT_PUBLIC_IPV6: Final = _block("::/0", "an address outside the public IPv6 internet, 2000::/3")
NAT64: Final = IPv6Network("64:ff9b::/96")
"""RFC 6052: the IPv4 address that is really called stands in the last four bytes."""


@lru_cache(maxsize=_REMEMBERED)
def parse_address(text: str) -> Address | None:
    """
    Read a literal address without brackets: IPv4 as four plain decimal numbers, IPv6 in any spelling.

    Returns:
        The address, an IPv4-mapped one (``::ffff:192.0.2.1``) as the IPv4 address that is really called; ``None``
        when it is no address or carries a zone.
    """
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv4Address):
        return address
    return None if address.scope_id is not None else address.ipv4_mapped or address


@lru_cache(maxsize=_REMEMBERED)
def special_block(address: Address) -> SpecialBlock | None:
    """Find the block that keeps an address from being public; ``None`` for a public one."""
    for block in _SPECIAL_IPV4 if isinstance(address, IPv4Address) else _SPECIAL_IPV6:
        if address in block.network:
            return block
    return _NOT_PUBLIC_IPV6 if isinstance(address, IPv6Address) and address not in _PUBLIC_IPV6 else None
