"""What may be called by default, what an operator can change about it, and that no answer of a DNS server can."""

from __future__ import annotations

import pickle
import socket
import tomllib
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from callbackq.core.addresses import parse_address, special_block
from callbackq.core.url import parse_url
from callbackq.errors import InvalidRequestError, TargetNotAllowedError
from callbackq.targets import TargetPolicy, system_resolver

TABLE: dict[str, Any] = tomllib.loads(Path(__file__).with_name("targets.toml").read_text(encoding="utf-8"))
SPECIAL = [(block, address) for block, addresses in TABLE["special"].items() for address in addresses]
LOCAL_NAMES = [(rule, name) for rule, names in TABLE["names"].items() for name in names]
PUBLIC_IPV4, PUBLIC_IPV6 = "8.8.8.8", "2001:4860:4860::8888"


class Resolver:
    """A resolver that answers from a script and counts."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append((host, port))
        return self.answers.pop(0)


def url_of(host: str, scheme: str = "http", port: int = 80) -> str:
    return f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"


def verdict(policy: TargetPolicy, host: str, *answers: str) -> str:
    """``"open"``, or the rule against calling *host* when the look-up gives *answers*."""
    policy = attrs.evolve(policy, resolver=Resolver(list(answers)))
    try:
        policy.resolve(url_of(host))
    except TargetNotAllowedError as error:
        return error.rule
    return "open"


def verdict_on_port(policy: TargetPolicy, port: int) -> str:
    try:
        policy.check_url(url_of("a.test", port=port))
    except TargetNotAllowedError as error:
        return error.rule
    return "open"


# The built-in rules


def test_refuses_every_special_address_as_literal_and_as_answer() -> None:
    policy = TargetPolicy()

    wrong = [(block, address) for block, address in SPECIAL if verdict(policy, address) != block]
    wrong += [(block, address) for block, address in SPECIAL if verdict(policy, "a.test", address) != block]

    assert wrong == []


def test_lets_public_addresses_pass_as_literal_and_as_answer() -> None:
    policy = TargetPolicy()

    wrong = [address for address in TABLE["public"]["addresses"] if verdict(policy, address) != "open"]
    wrong += [address for address in TABLE["public"]["addresses"] if verdict(policy, "a.test", address) != "open"]

    assert wrong == []


def test_the_tables_are_as_large_as_they_are_meant_to_be() -> None:
    assert len(SPECIAL) + len(TABLE["public"]["addresses"]) >= 150
    assert len(LOCAL_NAMES) + len(TABLE["open-names"]["names"]) >= 50


def test_refuses_local_and_metadata_names_by_name_without_a_look_up() -> None:
    resolver = Resolver()
    policy = TargetPolicy(resolver=resolver)

    wrong = []
    for rule, name in LOCAL_NAMES:
        with pytest.raises(TargetNotAllowedError) as caught:
            policy.resolve(url_of(name))
        wrong += [(rule, name)] if (caught.value.rule, caught.value.address) != (rule, None) else []

    assert wrong == []
    assert resolver.asked == []


def test_lets_other_names_pass() -> None:
    policy = TargetPolicy()

    assert [name for name in TABLE["open-names"]["names"] if verdict(policy, name, PUBLIC_IPV4) != "open"] == []


def test_refuses_ports_of_other_protocols() -> None:
    policy = TargetPolicy()

    assert [port for port in TABLE["ports"]["refused"] if verdict_on_port(policy, port) != "port"] == []
    assert [port for port in TABLE["ports"]["open"] if verdict_on_port(policy, port) != "open"] == []


@pytest.mark.parametrize(
    "host", ["127.1", "0x7f000001", "2130706433", "0177.0.0.1", "127.0.0.1%00", "a@127.0.0.1", "[::1%25lo]"]
)
def test_odd_spellings_are_no_urls_whatever_is_allowed(host: str) -> None:
    policy = TargetPolicy(allow=["127.0.0.0/8"], resolver=Resolver(["127.0.0.1"]))

    with pytest.raises(InvalidRequestError) as caught:
        policy.resolve(f"http://{host}/")

    assert not isinstance(caught.value, TargetNotAllowedError)
    assert [path for path, _ in caught.value.errors] == ["url"]


@given(st.ip_addresses(v=6))
@settings(max_examples=60, deadline=None)
def test_no_ipv6_address_outside_the_public_block_ever_passes(address: Any) -> None:
    if address in ip_network("2000::/3") or address.ipv4_mapped:
        return

    assert special_block(address) is not None


@given(st.ip_addresses(v=4))
@settings(max_examples=50, deadline=None)
def test_an_ipv4_address_always_fares_alike_in_every_spelling(address: Any) -> None:
    policy = TargetPolicy()
    plain, mapped = str(address), f"::ffff:{address}"

    assert verdict(policy, plain) == verdict(policy, mapped) == verdict(policy, "a.test", mapped)
    assert verdict(policy, f"64:ff9b::{address}") != "open"


# The look-up


def test_looks_a_name_up_once_and_returns_canonical_addresses_in_order() -> None:
    resolver = Resolver(["2001:4860:4860:0:0:0:0:8888", "8.8.8.8", "::ffff:8.8.8.8", "2001:4860:4860::8888"])

    addresses = TargetPolicy(resolver=resolver).resolve("https://Hooks.Test./x?y")

    assert addresses == [PUBLIC_IPV6, PUBLIC_IPV4]
    assert resolver.asked == [("hooks.test", 443)]


@pytest.mark.parametrize(("url", "expected"), [("http://8.8.8.8/", "8.8.8.8"), ("http://[::FFFF:8.8.8.8]/", "8.8.8.8")])
def test_a_literal_address_needs_no_look_up(url: str, expected: str) -> None:
    resolver = Resolver()

    assert TargetPolicy(resolver=resolver).resolve(url) == [expected]
    assert resolver.asked == []


@pytest.mark.parametrize(
    "bad",
    ["10.0.0.1", "::1", "169.254.169.254", "fe80::1%eth0", "fe80::1", "not an address", "", "127.1", "8.8.8.8:80"],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_answer_refuses_the_name(bad: str, place: int) -> None:
    answers = [PUBLIC_IPV4, PUBLIC_IPV6]
    answers.insert(place, bad)
    resolver = Resolver(answers)

    with pytest.raises(TargetNotAllowedError) as caught:
        TargetPolicy(resolver=resolver).resolve("http://a.test/")

    assert caught.value.host == "a.test"
    assert len(resolver.asked) == 1


def test_a_name_that_changes_its_addresses_is_judged_anew_each_time() -> None:
    resolver = Resolver([PUBLIC_IPV4], ["127.0.0.1"], [PUBLIC_IPV4])
    policy = TargetPolicy(resolver=resolver)

    assert policy.resolve("http://a.test/") == [PUBLIC_IPV4]
    with pytest.raises(TargetNotAllowedError):
        policy.resolve("http://a.test/")
    assert policy.resolve("http://a.test/") == [PUBLIC_IPV4]
    assert len(resolver.asked) == 3


def test_a_name_without_addresses_is_a_failed_look_up() -> None:
    policy = TargetPolicy(resolver=Resolver([]))

    with pytest.raises(socket.gaierror):
        policy.resolve("http://a.test/")
    assert policy.check_addresses(parse_url("http://a.test/"), []) == []


def test_what_the_resolver_raises_comes_out() -> None:
    def fail(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_AGAIN, "try again")

    with pytest.raises(socket.gaierror, match="try again"):
        TargetPolicy(resolver=fail).resolve("http://a.test/")


def test_a_resolver_that_cannot_be_called_is_refused_with_all_other_faults() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TargetPolicy(allow=["10.0.0.0/33"], resolver=5)  # type: ignore[arg-type]

    assert [field for field, _ in caught.value.errors] == ["allow[0]", "resolver"]


def test_asks_the_operating_system_where_no_resolver_is_given() -> None:
    assert TargetPolicy().resolver is TargetPolicy(resolver=None).resolver is system_resolver
    assert "127.0.0.1" in TargetPolicy(allow=["127.0.0.0/8"]).resolve("http://localhost:8000/")


def test_a_transport_can_look_names_up_by_itself() -> None:
    policy = TargetPolicy()
    target = policy.check_url("https://a.test:8443/x")

    assert target == parse_url("https://a.test:8443/x")
    assert policy.check_addresses(target, [PUBLIC_IPV4]) == [PUBLIC_IPV4]
    with pytest.raises(TargetNotAllowedError):
        policy.check_addresses(target, [PUBLIC_IPV4, "10.0.0.1"])


# What an operator changes


@pytest.mark.parametrize(
    ("allow", "host", "answers", "expected"),
    [
        # A block opens its addresses, however they are reached, and no others.
        (["10.1.0.0/16"], "10.1.2.3", [], "open"),
        (["10.1.0.0/16"], "10.2.2.3", [], "10.0.0.0/8"),
        (["10.1.0.0/16"], "hooks.test", ["10.1.2.3", "8.8.8.8"], "open"),
        (["10.1.0.0/16"], "hooks.test", ["10.1.2.3", "10.2.2.3"], "10.0.0.0/8"),
        (["10.1.0.0/16"], "hooks.internal", ["10.1.2.3"], "open"),
        (["10.1.0.0/16"], "billing", ["::ffff:10.1.2.3"], "open"),
        (["10.1.0.0/16"], "hooks.internal", ["10.1.2.3", "8.8.8.8"], ".internal"),
        (["10.1.0.0/16"], "hooks.internal", ["10.2.2.3"], "10.0.0.0/8"),
        (["10.1.0.0/16"], "metadata.google.internal", ["10.1.2.3"], "metadata.google.internal"),
        (["10.1.2.3"], "10.1.2.3", [], "open"),
        (["::ffff:10.1.2.3"], "10.1.2.3", [], "open"),
        (["fd12::/16"], "fd12::1", [], "open"),
        (["FD12:0::0/16"], "fd13::1", [], "fc00::/7"),
        # This host, for tests.
        (["127.0.0.0/8"], "127.0.0.1", [], "open"),
        (["127.0.0.0/8"], "localhost", ["::1", "127.0.0.1"], "open"),
        (["127.0.0.1"], "localhost", ["::1", "127.0.0.1"], "open"),
        (["127.0.0.0/8"], "::1", [], "open"),
        (["127.0.0.2"], "localhost", ["::1"], "::/127"),
        (["::1"], "localhost", ["127.0.0.1"], "127.0.0.0/8"),
        (["127.0.0.0/8"], "localhost", ["10.0.0.1"], "10.0.0.0/8"),
        (["localhost"], "localhost", ["::1", "127.0.0.1"], "open"),
        (["localhost"], "127.0.0.1", [], "127.0.0.0/8"),
        # A name opens itself and its private addresses.
        (["hooks.internal"], "hooks.internal", ["10.0.0.1"], "open"),
        (["Hooks.Internal."], "HOOKS.internal", ["10.0.0.1", "8.8.8.8", "fd00::1"], "open"),
        (["hooks.internal"], "a.hooks.internal", ["10.0.0.1"], ".internal"),
        (["hooks.internal"], "other.internal", ["10.0.0.1"], ".internal"),
        (["hooks.internal"], "hooks.internal", ["169.254.169.254"], "169.254.0.0/16"),
        (["hooks.internal"], "hooks.internal", ["64:ff9b::10.0.0.1"], "64:ff9b::/96"),
        (["hooks.internal"], "10.0.0.1", [], "10.0.0.0/8"),
        (["hooks.test"], "hooks.test", ["fe80::1"], "fe80::/10"),
        (["hooks.test"], "hooks.test", ["10.0.0.1"], "open"),
        ([".corp.test"], "a.b.corp.test", ["10.0.0.1"], "open"),
        ([".corp.test"], "corp.test", ["10.0.0.1"], "open"),
        ([".corp.test"], "notcorp.test", ["10.0.0.1"], "10.0.0.0/8"),
        ([".internal"], "hooks.internal", ["10.0.0.1"], "open"),
        (["billing"], "billing", ["10.0.0.1"], "open"),
        # Link-local addresses, metadata services and wrapped IPv4 stay closed unless they are meant.
        (["0.0.0.0/0"], "10.0.0.1", [], "open"),
        (["0.0.0.0/0"], "169.254.169.254", [], "169.254.0.0/16"),
        (["0.0.0.0/0"], "a.test", ["169.254.169.254"], "169.254.0.0/16"),
        (["0.0.0.0/0"], "100.100.100.200", [], "100.100.100.200/32"),
        (["100.64.0.0/10"], "100.100.100.200", [], "100.100.100.200/32"),
        (["100.64.0.0/10"], "100.100.100.201", [], "open"),
        (["100.100.100.200"], "100.100.100.200", [], "open"),
        (["fd00::/8"], "fd00:ec2::254", [], "fd00:ec2::/32"),
        (["fd00::/8", "fd00:ec2::254"], "fd00:ec2::254", [], "open"),
        (["169.0.0.0/8"], "169.254.169.254", [], "169.254.0.0/16"),
        (["169.254.0.0/16"], "169.254.169.254", [], "open"),
        (["169.254.169.254"], "169.254.169.254", [], "open"),
        (["169.254.169.254/32"], "169.254.169.253", [], "169.254.0.0/16"),
        (["fe80::/10"], "fe80::1", [], "open"),
        ([".internal"], "metadata.google.internal", ["169.254.169.254"], "metadata.google.internal"),
        (["metadata.google.internal"], "metadata.google.internal", ["169.254.169.254"], "169.254.0.0/16"),
        (["metadata.google.internal", "169.254.169.254"], "metadata.google.internal", ["169.254.169.254"], "open"),
        (["metadata.google.internal"], "metadata.google.internal", ["10.0.0.1"], "open"),
        (["::/0"], "fd00::1", [], "open"),
        (["::/0"], "5f00::1", [], "open"),
        (["::/0"], "64:ff9b::8.8.8.8", [], "64:ff9b::/96"),
        (["::/0"], "2002:a9fe:a9fe::", [], "2002::/16"),
        (["::/0"], "::ffff:10.0.0.1", [], "10.0.0.0/8"),
        # NAT64 is judged by the address inside.
        (["64:ff9b::/96"], "64:ff9b::8.8.8.8", [], "open"),
        (["64:ff9b::/96"], "a.test", ["64:ff9b::8.8.8.8"], "open"),
        (["64:ff9b::/96"], "a.test", ["64:ff9b::10.0.0.1"], "10.0.0.0/8"),
        (["64:ff9b::/96", "10.0.0.0/8"], "a.test", ["64:ff9b::10.0.0.1"], "open"),
        (["64:ff9b::/96", "0.0.0.0/0"], "a.test", ["64:ff9b::169.254.169.254"], "169.254.0.0/16"),
        # What is public anyway stays so.
        (["8.8.8.0/24"], "1.1.1.1", [], "open"),
        (["10.0.0.0/255.0.0.0"], "10.1.1.1", [], "open"),
    ],
)
def test_the_allow_list_opens_what_it_names(allow: list[str], host: str, answers: list[str], expected: str) -> None:
    assert verdict(TargetPolicy(allow=allow), host, *answers) == expected


@pytest.mark.parametrize(
    ("deny", "allow", "host", "answers", "expected"),
    [
        (["8.8.8.0/24"], [], "8.8.8.8", [], "8.8.8.0/24"),
        (["8.8.8.8"], [], "::ffff:8.8.8.8", [], "8.8.8.8/32"),
        (["8.8.8.8"], [], "a.test", ["1.1.1.1", "8.8.8.8"], "8.8.8.8/32"),
        (["8.8.8.8"], [], "8.8.4.4", [], "open"),
        (["2001:4860::/32"], [], "a.test", ["2001:4860::1"], "2001:4860::/32"),
        (["self.test"], [], "SELF.test.", ["8.8.8.8"], "self.test"),
        (["self.test"], [], "a.self.test", ["8.8.8.8"], "open"),
        ([".self.test"], [], "a.self.test", ["8.8.8.8"], ".self.test"),
        ([".self.test"], [], "self.test", ["8.8.8.8"], ".self.test"),
        ([".self.test"], [], "myself.test", ["8.8.8.8"], "open"),
        (["a.test"], ["a.test"], "a.test", ["8.8.8.8"], "a.test"),
        ([".test"], ["a.test"], "a.test", ["8.8.8.8"], ".test"),
        (["10.0.0.1"], ["10.0.0.0/8"], "10.0.0.1", [], "10.0.0.1/32"),
        (["10.0.0.0/8"], ["10.0.0.1"], "10.0.0.1", [], "10.0.0.0/8"),
        (["10.0.0.1"], ["a.test"], "a.test", ["10.0.0.1"], "10.0.0.1/32"),
        (["169.254.169.254"], ["169.254.0.0/16"], "169.254.169.254", [], "169.254.169.254/32"),
        (["127.0.0.1"], ["0.0.0.0/0", "::/0"], "localhost", ["::1"], "::1/128"),
        (["10.0.0.1"], ["64:ff9b::/96", "10.0.0.0/8"], "a.test", ["64:ff9b::10.0.0.1"], "10.0.0.1/32"),
    ],
)
def test_the_deny_list_wins(deny: list[str], allow: list[str], host: str, answers: list[str], expected: str) -> None:
    assert verdict(TargetPolicy(allow=allow, deny=deny), host, *answers) == expected


@pytest.mark.parametrize(
    ("ports", "open_ports", "refused"),
    [
        ([80], [80], [443, 8080]),
        ([22, range(8000, 8010)], [22, 8000, 8009], [80, 443, 7999, 8010]),
        (range(8000, 8002), [8000, 8001], [7999, 8002, 80]),
        ({5060}, [5060], [5061]),
        (iter([8443]), [8443], [443]),
        (range(65535, 0, -1), [1, 25, 6000, 65535], []),
    ],
)
def test_ports_are_the_only_ones_open_when_they_are_given(
    ports: Any, open_ports: list[int], refused: list[int]
) -> None:
    policy = TargetPolicy(ports=ports)

    assert [verdict_on_port(policy, port) for port in open_ports] == ["open"] * len(open_ports)
    assert [verdict_on_port(policy, port) for port in refused] == ["port"] * len(refused)


def test_https_only_refuses_plain_http() -> None:
    policy = TargetPolicy(https_only=True, allow=["127.0.0.0/8", "a.test"], resolver=Resolver([PUBLIC_IPV4]))

    for url in ("http://a.test/", "http://127.0.0.1:8000/"):
        with pytest.raises(TargetNotAllowedError) as caught:
            policy.check_url(url)
        assert caught.value.rule == "https_only"
    assert policy.resolve("https://a.test/") == [PUBLIC_IPV4]


# Settings and errors


@pytest.mark.parametrize("entry", [*TABLE["bad-entries"]["entries"], "a" * 64, None, 10, b"a.test", ("10.0.0.0", 8)])
def test_an_entry_that_cannot_be_understood_is_refused_by_its_index(entry: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TargetPolicy(allow=["10.0.0.0/8", entry], deny=[entry, "a.test"])

    assert [path for path, _ in caught.value.errors] == ["allow[1]", "deny[0]"]


@pytest.mark.parametrize(
    ("settings", "paths"),
    [
        ({"ports": [80, 0, 443, 65536, -1]}, ["ports[1]", "ports[3]", "ports[4]"]),
        ({"ports": [True, "80", 80.0, None]}, ["ports[0]", "ports[1]", "ports[2]", "ports[3]"]),
        (
            {"ports": [range(10), range(1, 65537), range(5, 5), range(1, 65536)]},
            ["ports[0]", "ports[1]", "ports[2]"],
        ),
        ({"ports": []}, ["ports"]),
        ({"ports": 80}, ["ports"]),
        ({"ports": "80"}, ["ports"]),
        ({"allow": "10.0.0.0/8"}, ["allow"]),
        ({"deny": 10}, ["deny"]),
        ({"allow": None, "deny": "a.test", "ports": [0], "https_only": 1}, ["allow", "deny", "ports[0]", "https_only"]),
    ],
)
def test_every_unusable_setting_is_named(settings: dict[str, Any], paths: list[str]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        TargetPolicy(**settings)

    assert [path for path, _ in caught.value.errors] == paths


def test_an_error_carries_its_evidence_and_quotes_none_of_it() -> None:
    with pytest.raises(TargetNotAllowedError) as caught:
        TargetPolicy(resolver=Resolver([PUBLIC_IPV4, "10.20.30.40"])).resolve("http://secret-name.test/?SECRET")

    error = caught.value
    assert (error.host, error.address, error.rule) == ("secret-name.test", "10.20.30.40", "10.0.0.0/8")
    assert [path for path, _ in error.errors] == ["url"]
    assert not any(text in str(error) for text in ("secret-name", "SECRET", "10.20.30.40"))
    assert (error.__cause__, error.__context__) == (None, None)


def test_a_malformed_url_is_no_matter_of_policy() -> None:
    for url in ("ftp://a.test/", "http://u:SECRET@a.test/", None):
        with pytest.raises(InvalidRequestError) as caught:
            TargetPolicy().resolve(url)  # type: ignore[arg-type]
        assert not isinstance(caught.value, TargetNotAllowedError)
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("name", ["localhost", "vault.internal", "billing", "a.billing.local"])
def test_allowed_blocks_dont_open_local_names_where_nobody_looks_them_up(name: str) -> None:
    target = parse_url(url_of(name))
    everything = ["0.0.0.0/0", "127.0.0.0/8", "::/0"]

    TargetPolicy(allow=everything).check_target(target)
    TargetPolicy(allow=[name]).check_target(target, is_looked_up=False)
    with pytest.raises(TargetNotAllowedError):
        TargetPolicy(allow=everything).check_target(target, is_looked_up=False)


def test_other_rules_hold_as_well_where_nobody_looks_names_up() -> None:
    policy = TargetPolicy(deny=[".denied.test"], https_only=True)

    wrong = []
    for url in ("https://a.denied.test/", "http://a.test/", "https://a.test:25/", "https://10.0.0.1/"):
        try:
            policy.check_target(parse_url(url), is_looked_up=False)
            wrong.append(url)
        except TargetNotAllowedError:
            continue
    assert wrong == []
    policy.check_target(parse_url("https://a.test/"), is_looked_up=False)


def test_a_policy_names_what_it_opens_and_what_lives_there() -> None:
    policy = TargetPolicy(
        allow=["127.0.0.0/8", "169.254.169.254", "fd00::/8", "0.0.0.0/0", "8.8.8.8", ".Corp.example", "Metadata"],
        ports=[443, 8443, 25, range(1, 1025), range(8000, 9000), 6667],
    )

    assert policy.openings() == [
        "127.0.0.0/8 (this host)",
        "169.254.169.254/32 (a link-local address or a cloud metadata service)",
        "fd00::/8 (a private network)",
        "0.0.0.0/0",
        "8.8.8.8/32",
        ".corp.example",
        "metadata (a cloud metadata service)",
        "port 25",
        "ports 1 to 1024",
        "port 6667",
    ]


@pytest.mark.parametrize("policy", [{}, {"deny": ["8.8.8.8"], "ports": [443, range(8000, 9000)], "https_only": True}])
def test_a_policy_that_opens_nothing_has_nothing_to_name(policy: dict[str, Any]) -> None:
    assert TargetPolicy(**policy).openings() == []


def test_a_policy_is_a_value() -> None:
    policy = TargetPolicy(allow=["10.0.0.0/8"], deny=iter([".a.test"]), ports=[80, range(8000, 9000)])

    assert policy == TargetPolicy(allow=("10.0.0.0/8",), deny=(".a.test",), ports=(80, range(8000, 9000)))
    assert policy != TargetPolicy(allow=["10.0.0.0/9"])
    assert hash(policy) == hash(pickle.loads(pickle.dumps(policy)))
    assert verdict(attrs.evolve(policy, allow=()), "10.0.0.1") == "10.0.0.0/8"
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        policy.https_only = True  # type: ignore[misc]


@given(
    st.one_of(
        st.just(()),
        st.sampled_from([("10.1.0.0/16",), ("0.0.0.0/0", "::/0"), ("a.test",), (".internal",), ("127.0.0.0/8",)]),
    ),
    st.sampled_from(["a.test", "hooks.internal", "localhost", "billing"]),
    st.lists(
        st.one_of(st.ip_addresses().map(str), st.sampled_from([address for _, address in SPECIAL])),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=100, deadline=None)
def test_what_is_returned_always_passes_by_itself_and_is_never_guarded(
    allow: tuple[str, ...], host: str, answers: list[str]
) -> None:
    policy = TargetPolicy(allow=allow, resolver=Resolver(answers))
    try:
        addresses = policy.resolve(url_of(host))
    except TargetNotAllowedError:
        return

    for text in addresses:
        block = special_block(ip_address(text))
        assert block is None or not block.is_guarded
        assert verdict(policy, host, text) == "open"
    assert {parse_address(answer) for answer in answers} == {ip_address(text) for text in addresses}
