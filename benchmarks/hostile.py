"""
Hostile receivers at length: what is recorded, when attempts end, what they leave behind in memory.

    python benchmarks/hostile.py --attempts 1000 --deadline 2 --healthy 5

The receivers (``tests/support/hostile.py``) are a process of their own, so that their memory and their threads are not
ours. Every behaviour is met over every scheme, again and again, each followed by an ordinary callback to the same host
on the same transport. Then, for so many seconds each, a healthy host's callbacks are timed through a dispatcher that
has fifty queues to a host that hangs, or floods.

Prints one JSON document; exits 0 only if everything was as it must be. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from callbackq import CallbackRequest, Dispatcher, HTTPTransport, InMemoryDataAccess, RetryPhase, TargetPolicy
from callbackq.events import EventKind, ObservedEvent

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.deliveries import make_delivery
from support.hostile import behaviours, cases
from support.hosts import HostileHosts, HostileReceivers
from support.trials import Trial, result_of, transport_to, try_out

TABLE = behaviours("")
PATIENT_SECONDS = 15.0
"""For behaviours that end their attempts themselves."""
ALLOWED_GROWTH_MIB = 5.0
ALLOWED_LATENCY = 1.0
HOSTILE_QUEUES = 50
CALLBACKS_PER_QUEUE = 100
PAUSE = 0.02
"""Between two callbacks to the healthy host."""


def serve() -> None:
    """Be the receivers until standard input ends."""
    with HostileReceivers() as receivers:
        print(json.dumps({"ports": receivers.hosts.ports, "authority": receivers.hosts.authority}), flush=True)
        sys.stdin.read()
        print(json.dumps(receivers.canary.connections), flush=True)


@contextmanager
def receivers_elsewhere(canary_connections: list[int]) -> Iterator[HostileHosts]:
    """Have the receivers in another process; in the end, tell how often the canary was connected to."""
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield HostileHosts(**json.loads(process.stdout.readline()))
        process.stdin.close()
        canary_connections.append(json.loads(process.stdout.readline()))


def resident_mib() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def our_threads() -> dict[str, set[threading.Thread]]:
    return {
        kind: {thread for thread in threading.enumerate() if thread.name.startswith(f"callbackq-{kind}")}
        for kind in ("network", "dns")
    }


class Report:
    """What was seen of each behaviour."""

    def __init__(self, deadline: float, slack: float) -> None:
        self._deadline = deadline
        self._slack = slack
        self.attempts = 0
        self.seen: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.worst: defaultdict[str, float] = defaultdict(float)
        self.wrong: list[str] = []

    def note(self, trial: Trial) -> None:
        name = f"{trial.name} over {trial.scheme}"
        behaviour, result = TABLE[trial.name], result_of(trial.outcome)
        self.attempts += 1
        self.seen[name][describe(result)] += 1
        self.worst[name] = max(self.worst[name], trial.seconds)
        if result not in behaviour.results_over(trial.scheme):
            self.wrong.append(f"{name}: {describe(result)}")
        if behaviour.lasts and not 0 <= trial.seconds - self._deadline <= self._slack:
            self.wrong.append(f"{name}: ended {trial.seconds - self._deadline:+.3f} s from its deadline")
        if not trial.got_its_own_answer:
            self.wrong.append(f"{name}: the next callback got {describe(result_of(trial.own))}")

    def summary(self) -> dict[str, Any]:
        lasting = [seconds for name, seconds in self.worst.items() if TABLE[name.split()[0]].lasts]
        ending = [seconds for name, seconds in self.worst.items() if not TABLE[name.split()[0]].lasts]
        return {
            "behaviours": len(TABLE),
            "attempts": self.attempts,
            "worst_seconds_beyond_deadline": round(max(lasting) - self._deadline, 3),
            "worst_seconds_of_those_that_end": round(max(ending), 3),
            "wrong": self.wrong,
            "table": {
                name: {"recorded": dict(results), "worst_seconds": round(self.worst[name], 3)}
                for name, results in sorted(self.seen.items())
            },
        }


def describe(result: object) -> str:
    if not isinstance(result, tuple):
        return str(result)
    status_code, failure, truncated = result
    return (failure.value if failure else str(status_code)) + (" truncated" if truncated else "")


def meet_ordinarily(transport: HTTPTransport, hosts: HostileHosts, met: list[tuple[str, str]], in_flight: int) -> None:
    """Send the same hosts ordinary callbacks, as large and as many at a time: what those need is no growth."""
    free = threading.Semaphore(in_flight)
    for name, scheme in met * 2:
        free.acquire()
        delivery = make_delivery(hosts.own_url(name, scheme), data=TABLE[name].body)
        transport.submit(delivery, lambda outcome: free.release())
    for _ in range(in_flight):
        free.acquire()


def meet_all(hosts: HostileHosts, *, attempts: int, deadline: float, slack: float, in_flight: int) -> dict[str, Any]:
    """Meet every behaviour in turn until there were so many attempts."""
    report = Report(deadline, slack)
    with transport_to(hosts, seconds=deadline) as hasty, transport_to(hosts, seconds=PATIENT_SECONDS) as patient:
        for transport, lasts in ((hasty, True), (patient, False)):
            meet_ordinarily(transport, hosts, cases(TABLE, lasts=lasts), in_flight)
        hosts.asked.clear()
        before, memory = our_threads(), [resident_mib()]
        rounds = itertools.cycle([(hasty, cases(TABLE, lasts=True)), (patient, cases(TABLE, lasts=False))])
        while report.attempts < attempts or len(memory) < 3:  # a round of each
            transport, met = next(rounds)
            try_out(transport, hosts, TABLE, met, report.note, in_flight=in_flight)
            memory.append(resident_mib())
        look_ups, after = len(hosts.asked), our_threads()
    return report.summary() | {
        "look_ups_per_attempt": look_ups / (2 * report.attempts),
        "network_threads_that_died": len(before["network"] - after["network"]),
        "threads": {kind: [len(before[kind]), len(after[kind])] for kind in before},
        "rss_mib": [round(mib, 1) for mib in memory],
        "rss_growth_mib": round(memory[-1] - memory[0], 2),
    }


class Stopwatch:
    """An observer that takes the time from storing a callback to its delivery."""

    def __init__(self) -> None:
        self.stored: dict[str, float] = {}
        self.delivered: dict[str, float] = {}

    def observe(self, event: ObservedEvent) -> None:
        if event.kind is EventKind.SUCCEEDED and event.callback_id is not None:
            self.delivered[event.callback_id] = time.monotonic()

    def latencies(self) -> list[float]:
        now = time.monotonic()
        return sorted(self.delivered.get(id, now) - began for id, began in self.stored.items())


NEIGHBOURS = {
    "nobody": "",
    "a host that reads and says nothing": "hang",
    "a host that never accepts": "never-accepts",
    "a host that drips": "drip-header",
    "a host that floods with headers": "many-small-headers",
    "a host that floods with chunks": "endless-tiny-chunks",
    "a host that never ends its body": "endless-body",
    "a host whose look-ups hang": "look-up",
    "fifty hosts whose look-ups hang": "look-ups",
}


def time_healthy_host(hosts: HostileHosts, *, seconds: float) -> dict[str, Any]:
    """Per neighbour: how long a healthy host's callbacks take beside fifty queues to it, which never stop retrying."""
    return {name: beside(hosts, neighbour, seconds=seconds) for name, neighbour in NEIGHBOURS.items()}


def beside(hosts: HostileHosts, neighbour: str, *, seconds: float) -> dict[str, float]:
    over = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        if host.startswith("look-up"):
            over.wait()
        return hosts.resolve(host, port)

    store, stopwatch = InMemoryDataAccess(), Stopwatch()
    policy = TargetPolicy(allow=["127.0.0.1"], resolver=resolve)
    with closing(HTTPTransport(target_policy=policy, ssl_context=hosts.client_tls())) as transport:
        for number in range(HOSTILE_QUEUES if neighbour else 0):
            url = hosts.url(f"look-up-{number}" if neighbour == "look-ups" else neighbour, "http")
            again = RetryPhase(retries=10_000, delay=timedelta(0))
            request = CallbackRequest(url=url, queue_id=str(number), retry_phases=[again])
            # Some floods count as deliveries.
            store.store_callback_requests([request] * CALLBACKS_PER_QUEUE)
        with Dispatcher(store, transport=transport, observer=stopwatch) as dispatcher:
            over.wait(0.5)
            ends_at = time.monotonic() + seconds
            while time.monotonic() < ends_at:
                request = CallbackRequest(url=hosts.own_url("healthy", "http"))
                began = time.monotonic()
                stopwatch.stored[store.store_callback_request(request).id] = began
                over.wait(PAUSE)
            over.wait(ALLOWED_LATENCY)
            latencies = stopwatch.latencies()
            dispatcher.stop(timeout=0)
        over.set()
    return {
        "callbacks": len(latencies),
        "median_seconds": round(latencies[len(latencies) // 2], 4),
        "worst_seconds": round(latencies[-1], 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attempts", type=int, default=1000, help="at hostile receivers, at least one of each kind")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds, for attempts that would last for ever")
    parser.add_argument("--slack", type=float, default=0.25, help="seconds after its deadline an attempt may end")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--healthy", type=float, default=0.0, help="seconds to time a healthy host, for each neighbour")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve()
        return 0

    canary_connections: list[int] = []
    with receivers_elsewhere(canary_connections) as hosts:
        summary = meet_all(
            hosts,
            attempts=arguments.attempts,
            deadline=arguments.deadline,
            slack=arguments.slack,
            in_flight=arguments.in_flight,
        )
        healthy = time_healthy_host(hosts, seconds=arguments.healthy) if arguments.healthy else {}
    summary = {"canary_connections": canary_connections[0], "healthy_host_beside": healthy, **summary}
    print(json.dumps(summary, indent=2))
    is_well = (
        not summary["wrong"]
        and summary["canary_connections"] == 0
        and summary["look_ups_per_attempt"] == 1
        and summary["network_threads_that_died"] == 0
        and summary["rss_growth_mib"] < ALLOWED_GROWTH_MIB
        and all(figures["worst_seconds"] < ALLOWED_LATENCY for figures in healthy.values())
    )
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
