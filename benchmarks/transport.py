"""
How fast requests leave: `HTTPTransport` against a plain urllib3 loop, on the same receiver in the same run.

    python benchmarks/transport.py [requests per round]

The receiver is a process of its own. Rounds alternate, so that a busy machine slows both; medians of five are printed.
The codec's parts are measured too: they are why requests are written by urllib3 and answers read by
`callbackq.core.exchange`.
"""

from __future__ import annotations

import io
import statistics
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import urllib3
from urllib3.connection import HTTPConnection

from callbackq.clock import SystemClock
from callbackq.core.delivery import Answer, Delivery, Outcome
from callbackq.core.exchange import Exchange
from callbackq.core.models import CallbackData, CallbackRequest
from callbackq.targets import TargetPolicy
from callbackq.transport import HTTPTransport
from callbackq.transport.request import RequestWriter

IN_FLIGHT = 64
ROUNDS = 5
BODY = b"x" * 1024
HEADERS = {"Content-Type": "application/json", "X-Api-Key": "0123456789abcdef"}
ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: bench\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Type: text/plain\r\n"
    b"Content-Length: 2\r\nConnection: keep-alive\r\n\r\nok"
)


def raw_loop(url: str, count: int) -> None:
    """What an application without callbackq writes."""
    with urllib3.PoolManager() as pool:
        for _ in range(count):
            assert pool.request("POST", url, body=BODY, headers=HEADERS).status == 200


def make_delivery(url: str, number: int = 1) -> Delivery:
    request = CallbackRequest(url=url, post_data=CallbackData(headers=HEADERS, data=BODY), queue_id="benchmark")
    ends_at = SystemClock().monotonic() + 3600
    return Delivery(callback_id=f"cb-{number}", request=request, sequence=number, attempt=1, token=1, ends_at=ends_at)


def transport_round(url: str, count: int) -> None:
    """Keep so many in flight, as a dispatcher does: outcomes come back to this thread, which submits the next."""
    delivery = make_delivery(url)
    free = threading.Semaphore(IN_FLIGHT)
    faults: list[Outcome] = []

    def done(outcome: Outcome) -> None:
        if not isinstance(outcome, Answer) or outcome.status_code != 200:
            faults.append(outcome)
        free.release()

    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.1"]))
    try:
        for _ in range(count):
            free.acquire()
            transport.submit(delivery, done)
        for _ in range(IN_FLIGHT):
            free.acquire()
    finally:
        transport.close()
    assert not faults, faults[0]


def timed(work: Callable[[str, int], None], url: str, count: int) -> tuple[float, float]:
    """Return requests per second, and CPU seconds per 1,000 of this process."""
    started, used = time.perf_counter(), time.process_time()
    work(url, count)
    return count / (time.perf_counter() - started), (time.process_time() - used) / count * 1000


def compare(url: str, count: int) -> None:
    rounds: dict[str, list[tuple[float, float]]] = {
        "urllib3, one thread": [],
        f"HTTPTransport, {IN_FLIGHT} in flight": [],
    }
    for _ in range(ROUNDS):
        for name, work in zip(rounds, (raw_loop, transport_round), strict=True):
            rounds[name].append(timed(work, url, count))
    rates = {name: statistics.median(rate for rate, _ in figures) for name, figures in rounds.items()}
    print(f"{'how':<32} {'/s':>8} {'x raw':>7} {'CPU s/1,000':>12}")
    for name, figures in rounds.items():
        ratio = rates[name] / rates["urllib3, one thread"]
        print(f"{name:<32} {rates[name]:>8,.0f} {ratio:>7.2f} {statistics.median(cpu for _, cpu in figures):>12.2f}")


class Canned:
    """A socket that has the answer ready."""

    def sendall(self, data: bytes) -> None:
        pass

    def settimeout(self, timeout: object) -> None:
        pass

    def close(self) -> None:
        pass

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(ANSWER)


def codec() -> None:
    writer = RequestWriter(user_agent="bench", order_headers="plain", queue_key=b"", signer=None, close=False)
    delivery = make_delivery("http://127.0.0.1:8000/hook")
    target = delivery.request.target
    now = datetime.now(UTC)

    def read_by_exchange() -> None:
        exchange = Exchange(response_limit=16384)
        exchange.request_written()
        exchange.receive(ANSWER)
        assert exchange.reply.body == b"ok"

    def urllib3_request() -> HTTPConnection:
        connection = HTTPConnection("127.0.0.1", 8000)
        connection.sock = Canned()
        connection.request("POST", "/hook", body=BODY, headers=HEADERS, preload_content=False, decode_content=False)
        return connection

    def urllib3_both() -> None:
        response = urllib3_request().getresponse()
        assert (dict(response.headers), response.read(16385, decode_content=False))[1] == b"ok"

    def microseconds(work: Callable[[], object]) -> float:
        return min(timeit.repeat(work, number=2000, repeat=5)) / 2000 * 1e6

    writing = microseconds(lambda: writer.write(delivery, target, now))
    print(f"write a request with urllib3, our fields included: {writing:.0f} us")
    print(f"read the answer with core.exchange: {microseconds(read_by_exchange):.0f} us")
    print(f"read the answer with urllib3: {microseconds(urllib3_both) - microseconds(urllib3_request):.0f} us")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 6000
    command = [sys.executable, str(Path(__file__).with_name("receiver.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        url = f"http://127.0.0.1:{receiver.stdout.readline().strip()}/hook"
        compare(url, count)
        assert receiver.stdin is not None
        receiver.stdin.close()
    codec()


if __name__ == "__main__":
    main()
