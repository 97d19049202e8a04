"""
May this host, port, address be called? The built-in rules, and the operator's lists on top of them.

Nothing is looked up here: names come in, and so do the addresses that somebody else found for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Network, ip_network
from typing import Any, Final, NoReturn, TypeGuard, cast

from attrs import field, frozen

from callbackq.core.addresses import NAT64, Address, Network, SpecialBlock, parse_address, special_block
from callbackq.core.url import Target, UrlFault, parse_host, parse_url
from callbackq.core.validation import Fault, check_bool
from callbackq.errors import InvalidRequestError, TargetNotAllowedError

__all__ = ["TargetRules"]

# These domains, what is below them, and names of a single label mean something in the local network only.
_LOCAL_DOMAINS: Final = frozenset({"localhost", "localdomain", "local", "internal", "home.arpa"})
_METADATA_NAMES: Final = frozenset(
    {"metadata", "metadata.goog", "metadata.google.internal", "metadata.azure.internal", "metadata.tencentyun.com"}
    | {"instance-data", "instance-data.ec2.internal"}
)
# The fetch standard's bad ports from 1024 on: a request can be read as a command of the protocols spoken there.
_BAD_PORTS: Final = frozenset(
    {1719, 1720, 1723, 2049, 3659, 4045, 4190, 5060, 5061, 6000, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080}
)
_MAX_PORT: Final = 65535
_LOOPBACK_IPV4: Final = IPv4Address("127.0.0.1")
_LOOPBACK_IPV6: Final = IPv6Network("::1/128")
_MAPPED_IPV4: Final = IPv6Network("::ffff:0:0/96")

_REMEDY: Final = "an operator can allow it: TargetPolicy(allow=...)"
_LOCAL_NAME: Final = f"names a host of the local network; {_REMEDY}"


@frozen
class _Entries:
    """An allow or deny list, sorted by kind of entry."""

    networks: tuple[Network, ...] = ()
    names: frozenset[str] = frozenset()
    domains: frozenset[str] = frozenset()

    def networks_with(self, address: Address) -> list[Network]:
        return [network for network in self.networks if address in network]

    def entry_for(self, name: str) -> str | None:
        """The entry that names a host, exactly or as one of a domain."""
        if name in self.names:
            return name
        return next((f".{domain}" for domain in _self_and_parents(name) if domain in self.domains), None)


def _is_list(value: object) -> TypeGuard[Iterable[Any]]:
    # One string is an iterable of strings, too: a forgotten pair of brackets.
    return isinstance(value, Iterable) and not isinstance(value, str)


# What these two can't convert passes, so that the check names it together with all other faults.


def _to_entries(value: Iterable[str]) -> tuple[str, ...]:
    return tuple(value) if _is_list(value) else cast("tuple[str, ...]", value)


def _to_ports(value: Iterable[int | range] | None) -> tuple[int | range, ...] | None:
    if isinstance(value, range):
        return (value,)
    return tuple(value) if _is_list(value) else cast("None", value)


@frozen(kw_only=True)
class TargetRules:
    """
    What `callbackq.TargetPolicy` decides without a look-up; its docstring has the rules.

    Raises:
        InvalidRequestError: when built, with every entry that can't be understood, by its index.
    """

    allow: tuple[str, ...] = field(default=(), converter=_to_entries)
    deny: tuple[str, ...] = field(default=(), converter=_to_entries)
    ports: tuple[int | range, ...] | None = field(default=None, converter=_to_ports)
    https_only: bool = False
    _allowed: _Entries = field(init=False, repr=False, eq=False)
    _denied: _Entries = field(init=False, repr=False, eq=False)

    def __attrs_post_init__(self) -> None:
        faults: list[Fault] = []
        object.__setattr__(self, "_allowed", _read_entries("allow", self.allow, faults))
        object.__setattr__(self, "_denied", _read_entries("deny", self.deny, faults))
        faults += [(f"ports{path}", reason) for path, reason in _check_ports(self.ports)]
        faults += [(f"https_only{path}", reason) for path, reason in check_bool(self.https_only)]
        if faults:
            raise InvalidRequestError(faults)

    def check_url(self, url: str) -> Target:
        """
        Judge all of a URL that can be judged without a look-up: syntax, scheme, port, name, literal address.

        Returns:
            The URL, taken apart.

        Raises:
            TargetNotAllowedError: the policy forbids it.
            InvalidRequestError: it is malformed.
        """
        try:
            target = parse_url(url)
        except UrlFault as fault:
            raise InvalidRequestError([("url", str(fault))]) from None
        self.check_target(target)
        return target

    def check_target(self, target: Target, *, is_looked_up: bool = True) -> None:
        """
        Judge scheme, port and name or literal address of a URL that was taken apart before.

        Args:
            target: the URL.
            is_looked_up: whether the addresses of a name will be judged, too. When they can't be, allowed blocks
                don't speak for local names: these must be allowed by name.

        Raises:
            TargetNotAllowedError: the policy forbids it.
        """
        if self.https_only and target.scheme != "https":
            _refuse(target, None, "https_only", "must start with https://: this policy allows no plain http")
        if not self._is_allowed_port(target.port):
            _refuse(target, None, "port", "must not use this port; an operator can allow it: TargetPolicy(ports=...)")
        if target.is_literal_address:
            self.check_addresses(target, [target.host])
        else:
            self._check_name(target, is_looked_up=is_looked_up)

    def check_addresses(self, target: Target, addresses: Iterable[str]) -> list[str]:
        """
        Judge what a look-up found for a target that `check_target` let pass. One bad answer refuses them all.

        A mixed answer is an attack or a broken zone, and choosing the good ones would tell which inner names exist.

        Returns:
            The addresses in canonical spelling and unchanged order, each once: these and no others may be
            connected to. Empty only when *addresses* is.

        Raises:
            TargetNotAllowedError: one of them must not be called, or is no address.
        """
        checked: dict[str, None] = {}
        for text in addresses:
            address = parse_address(text)
            if address is None:
                _refuse(target, None, "address", "leads to something that is no address")
            self._check_address(target, address)
            checked[str(address)] = None
        return list(checked)

    def openings(self) -> list[str]:
        """Name what is open beyond the default, an entry each; with what lives there, where that has a name."""
        opened = [_describe_entry(entry) for entry in self.allow]
        for entry in self.ports or ():
            ports = entry if isinstance(entry, range) else range(entry, entry + 1)
            if not all(map(_is_open_by_default, ports)):
                opened.append(f"port {ports[0]}" if len(ports) == 1 else f"ports {ports[0]} to {ports[-1]}")
        return opened

    def _is_allowed_port(self, port: int) -> bool:
        if self.ports is None:
            return _is_open_by_default(port)
        return any(port in entry if isinstance(entry, range) else port == entry for entry in self.ports)

    def _check_name(self, target: Target, *, is_looked_up: bool) -> None:
        name = target.host
        if (entry := self._denied.entry_for(name)) is not None:
            _refuse(target, None, entry, "names a host on the deny list")
        if self._is_allowed_name(name):
            return
        if name in _METADATA_NAMES:
            _refuse(target, None, name, f"names a cloud metadata service; {_REMEDY}")
        # With blocks on the allow list the name may still pass, if all its addresses are in them: that gives no
        # more than these addresses as literals do.
        may_be_opened_by_its_addresses = is_looked_up and self._allowed.networks
        if (rule := _local_rule(target)) is not None and not may_be_opened_by_its_addresses:
            _refuse(target, None, rule, _LOCAL_NAME)

    def _check_address(self, target: Target, address: Address) -> None:
        if denying := self._denied.networks_with(address):
            _refuse(target, address, str(denying[0]), "leads to an address on the deny list")
        block = special_block(address)
        if not self._is_opened(target.host, address, block):
            if block is not None:
                _refuse(target, address, str(block.network), f"leads to {block.what}; {_REMEDY}")
            if (rule := _local_rule(target)) is not None:
                _refuse(target, address, rule, _LOCAL_NAME)
        if address in NAT64:
            self._check_address(target, IPv4Address(int(address) & 0xFFFFFFFF))

    def _is_opened(self, host: str, address: Address, block: SpecialBlock | None) -> bool:
        """Whether the allow list speaks for the address, by itself or through the host's name."""
        networks = self._allowed.networks_with(address)
        if block is not None and block.is_guarded:
            # Both hold the address, so the one with the longer prefix lies inside the other.
            return any(network.prefixlen >= block.network.prefixlen for network in networks)
        return bool(networks) or self._is_allowed_name(host)

    def _is_allowed_name(self, name: str) -> bool:
        # Who allows ".internal" means hosts of his; who means the credentials has to say so.
        return name in self._allowed.names if name in _METADATA_NAMES else self._allowed.entry_for(name) is not None


def _is_open_by_default(port: int) -> bool:
    return port in (80, 443) or (port >= 1024 and port not in _BAD_PORTS)


def _describe_entry(entry: str) -> str:
    read = _read_entry(entry)
    if isinstance(read, str):
        return f"{read} (a cloud metadata service)" if read in _METADATA_NAMES else read
    block = special_block(read.network_address)
    # Both hold the address, so the one with the longer prefix lies inside the other.
    return f"{read} ({block.what})" if block is not None and read.prefixlen >= block.network.prefixlen else str(read)


def _refuse(target: Target, address: Address | None, rule: str, reason: str) -> NoReturn:
    raise TargetNotAllowedError(target.host, None if address is None else str(address), rule, reason)


def _local_rule(target: Target) -> str | None:
    """The rule by which a name is a local one."""
    if target.is_literal_address:
        return None
    domain = next((domain for domain in _self_and_parents(target.host) if domain in _LOCAL_DOMAINS), None)
    if domain is not None:
        return f".{domain}"
    return None if "." in target.host else "single label"


def _self_and_parents(name: str) -> Iterator[str]:
    while name:
        yield name
        name = name.partition(".")[2]


def _read_entries(path: str, entries: object, faults: list[Fault]) -> _Entries:
    if not isinstance(entries, tuple):
        faults.append((path, "must be a sequence of strings"))
        return _Entries()
    read: list[Network | str] = []
    for index, entry in enumerate(entries):
        try:
            read.append(_read_entry(entry))
        except UrlFault as fault:
            faults.append((f"{path}[{index}]", str(fault)))
    networks = [entry for entry in read if not isinstance(entry, str)]
    # localhost has both addresses on most machines: who speaks of the one means the other, too.
    if any(_LOOPBACK_IPV4 in network for network in networks):
        networks.append(_LOOPBACK_IPV6)
    names = [entry for entry in read if isinstance(entry, str)]
    return _Entries(
        networks=tuple(networks),
        names=frozenset(name for name in names if not name.startswith(".")),
        domains=frozenset(name[1:] for name in names if name.startswith(".")),
    )


def _read_entry(entry: object) -> Network | str:
    if not isinstance(entry, str):
        raise UrlFault("must be a string")
    if "/" in entry:
        return _read_network(entry)
    if (address := parse_address(entry)) is not None:
        return ip_network(address)
    try:
        name = parse_host(entry.removeprefix("."))
    except UrlFault:
        name = ""
    # What is an address only now had a dot around it.
    if not name or parse_address(name) is not None:
        raise UrlFault("must be a CIDR block, an address, a host name, or .domain for a domain and all below it")
    return f".{name}" if entry.startswith(".") else name


def _read_network(entry: str) -> Network:
    try:
        network = None if "%" in entry else ip_network(entry)
    except ValueError:
        network = None
    if network is None:
        raise UrlFault("must be a CIDR block without a zone or bits set behind its prefix, such as 10.1.0.0/16")
    if isinstance(network, IPv6Network) and network.subnet_of(_MAPPED_IPV4):
        raise UrlFault("must write IPv4 addresses as such, not as IPv6 ones")
    return network


def _check_ports(ports: object) -> Iterator[Fault]:
    if ports is None:
        return
    if not isinstance(ports, tuple) or not ports:
        yield "", "must be a sequence of ports and ranges of ports, or None for the default"
        return
    for index, entry in enumerate(ports):
        edges = (entry[0], entry[-1]) if isinstance(entry, range) and entry else (entry,)
        if not all(type(edge) is int and 1 <= edge <= _MAX_PORT for edge in edges):
            yield f"[{index}]", f"must be a whole number from 1 to {_MAX_PORT} or a range of such"
