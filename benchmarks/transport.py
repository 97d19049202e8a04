"""
How fast requests leave: `HTTPTransport` against a plain urllib3 loop, on the same receiver in the same run.

    python benchmarks/transport.py [--requests 6000] [--rounds 5]

The receiver is a process of its own. Rounds alternate, so that a busy machine slows both.
The codec's parts are measured too: they are why requests are written by urllib3 and answers read by
`callbackq.core.exchange`.
"""

from __future__ import annotations

import argparse
import io
import threading
import time
import timeit
from collections.abc import Callable
from datetime import UTC, datetime

import urllib3
from figures import Figure, figure_of, show
from receiver import receiver
from urllib3.connection import HTTPConnection

from callbackq.clock import SystemClock
from callbackq.core.delivery import Answer, Delivery, Outcome
from callbackq.core.exchange import Exchange
from callbackq.core.models import CallbackData, CallbackRequest
from callbackq.targets import TargetPolicy
from callbackq.transport import HTTPTransport
from callbackq.transport.request import RequestWriter

RAW = "PoolManager.request in one thread"
IN_FLIGHT = 64
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


def figures(options: argparse.Namespace) -> list[Figure]:
    ratios, rates, cpu = [], [], []
    with receiver() as url:
        for _ in range(options.rounds):
            raw_rate, raw_cpu = timed(raw_loop, url, options.requests)
            rate, own_cpu = timed(transport_round, url, options.requests)
            ratios.append(rate / raw_rate)
            rates.append(rate)
            cpu.append(own_cpu / raw_cpu)
    name = f"HTTPTransport, {IN_FLIGHT} in flight, nothing stored"
    return [
        figure_of(ratios, name, "x raw", baseline=RAW),
        figure_of(rates, f"{name}: rate", "requests/s"),
        figure_of(cpu, f"{name}: CPU", "x raw CPU", better="less", baseline=RAW),
    ]


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


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=6000, help="for each round")
    parser.add_argument("--rounds", type=int, default=5)
    return parser


def main() -> None:
    show(figures(parser().parse_args()))
    codec()


if __name__ == "__main__":
    main()
