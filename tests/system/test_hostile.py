"""
Every hostile behaviour met: over plain connections and TLS, through the transport and through a dispatcher.

What must be recorded of each stands in `support.hostile`; ``benchmarks/hostile.py`` does the same at length, with the
true times, and measures memory.
"""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trustme

from callbackq import (
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    Dispatcher,
    HTTPTransport,
    InMemoryDataAccess,
    RetryPhase,
    SQLiteDataAccess,
    TargetPolicy,
)
from callbackq.core.models import AttemptFailure, CallbackData
from callbackq.events import EventKind
from support.deliveries import Outcomes, make_delivery
from support.dispatching import Witness
from support.egress import connections_of_this_process
from support.hostile import DOMAIN, RETRY_AFTER, Result, behaviours, cases
from support.hosts import HostileHosts, HostileReceivers
from support.receivers import Conversation, Receiver
from support.trials import Trial, own_id_in, result_of, transport_to, try_out

pytestmark = pytest.mark.system

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TABLE = behaviours("")
LASTING, ENDING = cases(TABLE, lasts=True), cases(TABLE, lasts=False)

SHORT = 1.0
"""Seconds for an attempt at a receiver that never ends it."""
LONG = 15.0
"""For one that does, so that what ends it can't be the deadline on a busy machine."""
LATEST = SHORT + 1.5
"""Measured on an idle machine: 0.03 s after the deadline. See the benchmark."""


class Run(NamedTuple):
    """All behaviours, met once."""

    trials: list[Trial]
    look_ups: Counter[str]
    connections: set[object]
    threads_before: set[threading.Thread]
    threads_after: set[threading.Thread]


@pytest.fixture(scope="module")
def run(receivers: HostileReceivers) -> Run:
    hosts = receivers.hosts
    hosts.asked.clear()
    trials: list[Trial] = []
    with (
        connections_of_this_process() as seen,
        transport_to(hosts, seconds=SHORT) as hasty,
        transport_to(hosts, seconds=LONG) as patient,
    ):
        for transport in (hasty, patient):
            transport.send(make_delivery(hosts.own_url("ordinary", "http")))
        before = our_threads()
        try_out(hasty, hosts, TABLE, LASTING, trials.append)
        try_out(patient, hosts, TABLE, ENDING, trials.append)
        return Run(trials, Counter(hosts.asked), set(seen), before, our_threads())


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("callbackq-")}


def network_threads(threads: set[threading.Thread]) -> set[threading.Thread]:
    return {thread for thread in threads if thread.name == "callbackq-network"}


def named(trial: Trial) -> str:
    return f"{trial.name} over {trial.scheme}"


def test_the_table_is_as_large_as_it_is_meant_to_be() -> None:
    assert len(TABLE) >= 240
    assert len(LASTING + ENDING) >= 450


def test_what_is_recorded_of_every_behaviour_is_what_happened(run: Run) -> None:
    wrong = {
        named(trial): (result, allowed)
        for trial in run.trials
        if (result := result_of(trial.outcome)) not in (allowed := TABLE[trial.name].results_over(trial.scheme))
    }

    assert wrong == {}
    assert len(run.trials) == len(LASTING + ENDING)


def test_attempt_at_a_receiver_that_never_ends_it_ends_with_its_deadline(run: Run) -> None:
    wrong = {
        named(trial): trial.seconds
        for trial in run.trials
        if TABLE[trial.name].lasts and not SHORT <= trial.seconds < LATEST
    }

    assert wrong == {}


def test_next_callback_to_the_same_host_gets_its_own_answer_whatever_came_before(run: Run) -> None:
    wrong = {named(trial): trial.own for trial in run.trials if not trial.got_its_own_answer}

    assert wrong == {}


def test_every_attempt_looks_its_host_up_exactly_once(run: Run) -> None:
    attempts = Counter(f"{name}.{DOMAIN}" for name, _ in LASTING + ENDING for _ in ("hostile", "own"))
    attempts[f"ordinary.{DOMAIN}"] = 2

    assert run.look_ups == attempts


def test_nothing_a_receiver_says_leads_anywhere_else(receivers: HostileReceivers, run: Run) -> None:
    assert run.connections == {("127.0.0.1", port) for port in receivers.hosts.ports.values()}
    assert receivers.canary.connections == 0


def test_network_threads_survive_everything_and_get_no_company(run: Run) -> None:
    assert len(run.threads_before) == 4, "a network thread and one for look-ups, twice"
    assert network_threads(run.threads_after) == network_threads(run.threads_before)
    assert all(thread.name.startswith("callbackq-dns-") for thread in run.threads_after - run.threads_before)


@pytest.mark.parametrize("lasts", [True, False], ids=["until the deadline", "at once"])
def test_dispatcher_records_of_every_behaviour_what_happened_and_goes_on(
    receivers: HostileReceivers, hosts: HostileHosts, tmp_path: Path, lasts: bool
) -> None:
    met = LASTING if lasts else ENDING
    with closing(SQLiteDataAccess(tmp_path / "callbacks.db")) as store:
        store.open()
        hostile = store.store_callback_requests(
            [
                CallbackRequest(
                    url=hosts.url(name, scheme),
                    queue_id=f"{name} {scheme}",
                    post_data=CallbackData(data=TABLE[name].body),
                )
                for name, scheme in met
            ]
        )
        own = store.store_callback_requests(
            [CallbackRequest(url=hosts.own_url(name, scheme), queue_id=f"{name} {scheme}") for name, scheme in met]
        )
        with transport_to(hosts, seconds=SHORT if lasts else LONG) as transport:
            assert Dispatcher(store, transport=transport, concurrency=1000).run_until_idle(timeout=40)

        for (name, scheme), first, next_one in zip(met, hostile, own, strict=True):
            result = recorded(store.get_callback_status(first.id))
            assert result in TABLE[name].results_over(scheme), name
            attempt = store.get_callback_status(next_one.id).attempts[0]
            assert own_id_in(attempt.status_code, attempt.response.data) == next_one.id, name
    assert receivers.canary.connections == 0


def recorded(status: CallbackStatus) -> Result:
    [attempt] = status.attempts
    delivered = 200 <= attempt.status_code <= 299
    assert status.state is (CallbackState.SUCCEEDED if delivered else CallbackState.FAILED)
    return Result(attempt.status_code, attempt.failure, attempt.truncated)


def test_retry_after_moves_the_next_attempt_within_bounds_whatever_it_says(hosts: HostileHosts) -> None:
    delay = timedelta(hours=1)
    store = InMemoryDataAccess()
    stored = {
        name: store.store_callback_request(
            CallbackRequest(
                url=hosts.url(f"retry-after-{name}", "http"), retry_phases=[RetryPhase(retries=1, delay=delay)]
            )
        )
        for name in RETRY_AFTER
    }
    with transport_to(hosts, seconds=LONG) as transport:
        before = store.now()
        assert Dispatcher(store, transport=transport).run_until_idle(timeout=40)

    for name, status in stored.items():
        next_attempt_at = store.get_callback_status(status.id).next_attempt_at
        assert next_attempt_at is not None
        assert before + delay <= next_attempt_at <= store.now() + 2 * delay, name


@pytest.mark.parametrize("last_word", ["end", "reset"])
def test_answer_cut_off_at_any_byte_counts_if_and_only_if_its_head_was_complete(last_word: str) -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nA: b\r\n\r\n"
    head_length = data.index(b"\r\n\r\n") + 4

    def script(conversation: Conversation) -> None:
        request = conversation.read_request()
        assert request
        conversation.send(data[: int(request.line.split("/")[1].split()[0])])
        if last_word == "reset":
            # So that it doesn't overtake what was said before.
            conversation.wait(0.1)
            conversation.reset()

    outcomes = [Outcomes() for _ in data]
    with closing(HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.1"]))) as transport:
        receiver = Receiver(script)
        for cut, outcome in enumerate(outcomes):
            transport.submit(make_delivery(receiver.url(f"/{cut}")), outcome)
        results = [result_of(outcome.wait_for(1)[0]) for outcome in outcomes]
        receiver.close()

    lost, broken_off = Result(0, AttemptFailure.CONNECTION_LOST), Result(200, truncated=True)
    assert results == [lost] * head_length + [broken_off] * (len(data) - head_length)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="only openssl's own server can be made to ask for it")
@pytest.mark.parametrize("option", [0, ssl.OP_NO_RENEGOTIATION], ids=["context of the host's", "as by default"])
def test_receiver_that_asks_for_a_new_handshake_before_it_answers_holds_up_nothing(tmp_path: Path, option: int) -> None:
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(tmp_path / "server.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    context.options |= option
    outcomes = Outcomes()
    policy = TargetPolicy(allow=["127.0.0.1"])

    with (
        openssl_server(tmp_path / "server.pem") as (server, port),
        closing(HTTPTransport(target_policy=policy, ssl_context=context)) as transport,
    ):
        transport.submit(make_delivery(f"https://127.0.0.1:{port}/", data=b"the end\n"), outcomes)
        read_until(server, "the end")
        say(server, "R\n")
        read_until(server, "SSL_do_handshake")
        say(server, "HTTP/1.1 200 OK\nContent-Length: 4\n\nok\n\n")
        [answer] = outcomes.answers(1)

    assert result_of(answer) == (Result(0, AttemptFailure.TLS) if option else Result(200))
    assert answer.duration < timedelta(seconds=LONG)


@contextmanager
def openssl_server(certificate: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command: list[str | Path] = [
        "openssl",
        "s_server",
        "-accept",
        "127.0.0.1:0",
        "-tls1_2",
        "-crlf",
        "-cert",
        certificate,
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield server, int(read_until(server, "ACCEPT").rpartition(":")[2])
        finally:
            server.kill()


def read_until(server: subprocess.Popen[str], word: str) -> str:
    assert server.stdout is not None
    return next(line for line in server.stdout if word in line)


def say(server: subprocess.Popen[str], text: str) -> None:
    assert server.stdin is not None
    with suppress(BrokenPipeError):
        server.stdin.write(text)
        server.stdin.flush()


@pytest.mark.parametrize("fault", ["hang", "never-accepts", "look-up"])
def test_fifty_queues_to_a_host_that_hangs_leave_a_healthy_one_alone(hosts: HostileHosts, fault: str) -> None:
    over = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        if host.startswith("look-up"):
            over.wait(LONG)
        return hosts.resolve(host, port)

    policy = TargetPolicy(allow=["127.0.0.1"], resolver=resolve)
    store, witness = InMemoryDataAccess(), Witness()
    bad, good = hosts.url(fault, "http"), hosts.own_url("healthy", "http")
    store.store_callback_requests([CallbackRequest(url=bad, queue_id=f"bad {number}") for number in range(50)])
    healthy = store.store_callback_requests([CallbackRequest(url=good, queue_id="good") for _ in range(20)])

    with closing(HTTPTransport(target_policy=policy, deadline=timedelta(seconds=LONG))) as transport:
        dispatcher = Dispatcher(
            store, transport=transport, observer=witness, concurrency=52, poll_interval=timedelta(seconds=0.05)
        )
        dispatcher.start()
        witness.wait_for(EventKind.SUCCEEDED, len(healthy))
        events = list(witness.events)
        dispatcher.stop(timeout=0)
        over.set()

    delivered = [event.callback_id for event in events if event.kind is EventKind.SUCCEEDED]
    assert delivered == [status.id for status in healthy]
    # Not one of the others had to end first, to make room.
    assert EventKind.FAILED not in {event.kind for event in events}


def benchmark(name: str, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *arguments]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert finished.stdout, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout)
    assert finished.returncode == 0, found
    return found


def test_hundreds_of_hostile_attempts_leave_next_to_nothing_in_memory() -> None:
    found = benchmark("hostile", "--attempts", "450", "--deadline", "0.5", "--slack", "1.5", "--in-flight", "80")

    assert found["attempts"] >= 450
    assert found["rss_growth_mib"] < 5
    assert found["wrong"] == []


def test_fuzzing_finds_nothing() -> None:
    found = benchmark(
        "fuzz", "--urls", "2000", "--answers", "4000", "--retry-after", "1000", "--documents", "1000", "--seed", "7"
    )

    assert (found["cases"], found["crashes"]) == (8000, 0)
