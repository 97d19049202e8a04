"""
Where nothing may go: refused URLs, addresses and names, end to end.

Judged by the interpreter's own report of every connection and look-up of this process, and by a canary: a listener on
loopback that nobody must connect to.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from callbackq import HTTPTransport, InvalidRequestError, TargetPolicy
from callbackq.core.delivery import Answer
from callbackq.core.models import AttemptFailure
from support.deliveries import Outcomes, make_delivery
from support.egress import connections_of_this_process
from support.hosts import OWN_STATUS, HostileHosts, HostileReceivers
from support.receivers import Receiver

pytestmark = pytest.mark.system

CORE = Path(__file__).parents[1] / "core"
URLS: dict[str, Any] = tomllib.loads((CORE / "urls.toml").read_text(encoding="utf-8"))
TARGETS: dict[str, Any] = tomllib.loads((CORE / "targets.toml").read_text(encoding="utf-8"))
SPECIAL = [address for addresses in TARGETS["special"].values() for address in addresses]
PUBLIC = ["8.8.8.8", "2606:4700:4700::1111"]


@pytest.fixture
def canary(receivers: HostileReceivers) -> Iterator[Receiver]:
    yield receivers.canary
    assert receivers.canary.connections == 0


class Names:
    """A resolver that answers what the host's name stands for, and counts."""

    def __init__(self) -> None:
        self.answers: dict[str, list[str]] = {}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        return self.answers.get(host, ["127.0.0.1"])


@contextmanager
def watched(policy: TargetPolicy) -> Iterator[HTTPTransport]:
    """A transport of which it is made sure that it connects to nothing and asks the system for no name."""
    with connections_of_this_process() as seen, closing(HTTPTransport(target_policy=policy)) as transport:
        yield transport
    assert seen == []


def failures_of(transport: HTTPTransport, urls: Iterable[str]) -> dict[str, AttemptFailure | None]:
    """Send to all of them; a URL that the model refuses can't even be tried, and is left out."""
    deliveries = {}
    for url in urls:
        try:
            deliveries[url] = make_delivery(url), Outcomes()
        except InvalidRequestError:
            continue
    for delivery, outcomes in deliveries.values():
        transport.submit(delivery, outcomes)
    return {url: outcomes.answers(1)[0].failure for url, (_, outcomes) in deliveries.items()}


def literal(address: str, port: int) -> str:
    return f"http://{f'[{address}]' if ':' in address else address}:{port}/"


def test_connections_are_seen_when_there_are_any() -> None:
    policy = TargetPolicy(allow=["127.0.0.1"])

    with (
        closing(Receiver()) as receiver,
        connections_of_this_process() as seen,
        closing(HTTPTransport(target_policy=policy)) as transport,
    ):
        transport.send(make_delivery(receiver.url()))

    assert seen == [("127.0.0.1", receiver.port)]


def test_no_malformed_url_is_ever_connected_to_whatever_is_allowed(canary: Receiver) -> None:
    names = Names()
    everything = TargetPolicy(
        allow=["0.0.0.0/0", "127.0.0.0/8", "::/0", ".test", ".a", "localhost"], ports=range(1, 65536), resolver=names
    )
    refused = [url for kind in URLS["refused"].values() for url in kind["urls"]]
    at_the_canary = [
        url.replace(host, f"{host}:{canary.port}") for url in refused for host in ("a.test", "127.1", "[::1]")
    ]

    with watched(everything) as transport:
        tried = failures_of(transport, {*refused, *at_the_canary})

    assert len(refused) >= 200
    assert tried == {}
    assert names.asked == []


def test_no_special_address_is_connected_to_as_a_literal(canary: Receiver) -> None:
    with watched(TargetPolicy()) as transport:
        failures = failures_of(transport, [literal(address, canary.port) for address in SPECIAL])

    assert len(SPECIAL) >= 100
    assert {url for url, failure in failures.items() if failure is not AttemptFailure.TARGET_NOT_ALLOWED} == set()


def test_no_special_address_is_connected_to_as_an_answer_alone_or_among_public_ones(canary: Receiver) -> None:
    names = Names()
    for number, address in enumerate(SPECIAL):
        names.answers[f"alone-{number}.test"] = [address]
        names.answers[f"first-{number}.test"] = [address, *PUBLIC]
        names.answers[f"last-{number}.test"] = [*PUBLIC, address]

    with watched(TargetPolicy(resolver=names)) as transport:
        failures = failures_of(transport, [f"http://{name}:{canary.port}/" for name in names.answers])

    assert {url for url, failure in failures.items() if failure is not AttemptFailure.TARGET_NOT_ALLOWED} == set()
    assert sorted(names.asked) == sorted(names.answers), "not one look-up for each attempt"


def test_no_local_name_is_looked_up_and_no_odd_port_connected_to(canary: Receiver) -> None:
    names = Names()
    local = [f"http://{name}:{canary.port}/" for rule in TARGETS["names"].values() for name in rule]
    ports = [f"http://a.test:{port}/" for port in TARGETS["ports"]["refused"]]

    with watched(TargetPolicy(resolver=names)) as transport:
        failures = failures_of(transport, [*local, *ports])

    assert set(failures.values()) == {AttemptFailure.TARGET_NOT_ALLOWED}
    assert names.asked == []


def test_name_that_is_bound_anew_gets_one_look_up_for_each_attempt_and_never_reaches_loopback(canary: Receiver) -> None:
    """127.0.0.2 stands for a public address here: allowed by the policy, with a receiver behind it."""
    answers = iter([["127.0.0.2"], ["127.0.0.1"], ["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return next(answers)

    policy = TargetPolicy(allow=["127.0.0.2"], resolver=resolve)
    with connections_of_this_process() as seen, closing(HTTPTransport(target_policy=policy)) as transport:
        outcomes = [transport.send(make_delivery(f"http://rebound.test:{canary.port}/")) for _ in range(4)]

    # Nobody listens behind 127.0.0.2 at the canary's port; what counts is that the first attempt went there.
    failures = [outcome.failure for outcome in outcomes if isinstance(outcome, Answer)]
    assert failures == [AttemptFailure.CONNECT] + [AttemptFailure.TARGET_NOT_ALLOWED] * 3
    assert seen == [("127.0.0.2", canary.port)]
    assert asked == ["rebound.test"] * 4


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_proxies_of_the_environment_are_not_used(
    hosts: HostileHosts, canary: Receiver, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, canary.url())
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "")
    policy = TargetPolicy(allow=["127.0.0.1"], resolver=hosts.resolve)

    with (
        connections_of_this_process() as seen,
        closing(HTTPTransport(target_policy=policy, ssl_context=hosts.client_tls())) as transport,
    ):
        outcome = transport.send(make_delivery(hosts.own_url("any", scheme)))

    assert isinstance(outcome, Answer)
    assert outcome.status_code == OWN_STATUS
    assert seen == [("127.0.0.1", hosts.ports[scheme])]


def test_keys_of_tls_connections_are_written_where_the_environment_says_as_the_documentation_warns(
    hosts: HostileHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    policy = TargetPolicy(allow=["127.0.0.1"], resolver=hosts.resolve)

    for context, heeds in ((hosts.client_tls(), False), (None, True)):
        with closing(HTTPTransport(target_policy=policy, ssl_context=context)) as transport:
            transport.send(make_delivery(hosts.own_url("any", "https")))
        assert (tmp_path / "keys").exists() is heeds

    assert "HANDSHAKE_TRAFFIC_SECRET" in (tmp_path / "keys").read_text(encoding="ascii")
