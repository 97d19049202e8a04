"""
How long an idle dispatcher takes from a store's call to the first byte at the receiver.

    python benchmarks/latency.py [--store postgres] [--callbacks 300]

One callback at a time, after a pause of random length, so that polls come at any moment: stored in the dispatcher's own
process, then in another one. Prints milliseconds, and what share of a core the dispatcher takes while it is idle.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from socket import create_server
from statistics import median, quantiles
from typing import TYPE_CHECKING

import stores
from callbackq import CallbackData, CallbackRequest, Dispatcher, HTTPTransport, TargetPolicy
from callbackq.events import ObservedEvent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from stores import MakeStore, Store

SPAWN = multiprocessing.get_context("spawn")
BODY = b"x" * 1024
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
LONGEST_SECONDS = 10.0
LONGEST_PAUSE_SECONDS = 0.1
IDLE_SECONDS = 5.0


class Silence:
    def observe(self, event: ObservedEvent) -> None:
        pass


def receive(line: Connection) -> None:
    """Tell when each request's first byte came, by the clock that all processes share. Ends with its parent."""
    with create_server(("127.0.0.1", 0)) as listener:
        line.send(listener.getsockname()[1])
        while True:
            connection, _ = listener.accept()
            with connection, suppress(ConnectionError):
                while received := connection.recv(1):
                    line.send(time.monotonic())
                    while not received.endswith(BODY):
                        received += connection.recv(65536)
                    connection.sendall(ANSWER)


def dispatcher_for(store: Store) -> Dispatcher:
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
    return Dispatcher(store, transport=transport, observer=Silence())


def dispatch(make_store: MakeStore, line: Connection) -> None:
    """Dispatch until told to stop, after some idle time whose CPU is told."""
    logging.disable()
    with make_store() as store, dispatcher_for(store):
        time.sleep(1)
        cpu = time.process_time()
        time.sleep(IDLE_SECONDS)
        line.send((time.process_time() - cpu) / IDLE_SECONDS)
        line.recv()


@contextmanager
def process(target: Callable[..., None], *arguments: object) -> Iterator[Connection]:
    ours, theirs = SPAWN.Pipe()
    worker = SPAWN.Process(target=target, args=(*arguments, theirs), daemon=True)
    worker.start()
    theirs.close()  # so that we notice its end
    with closing(ours):
        yield ours
    worker.kill()
    worker.join()


def told(line: Connection) -> float:
    assert line.poll(LONGEST_SECONDS)
    answer: float = line.recv()
    return answer


def latencies(store: Store, port: int, arrivals: Connection, number: int) -> list[float]:
    took = []
    for _ in range(number + 1):
        time.sleep(random.uniform(LONGEST_PAUSE_SECONDS / 2, LONGEST_PAUSE_SECONDS))
        began = time.monotonic()
        store.store_callback_request(
            CallbackRequest(url=f"http://127.0.0.1:{port}/", post_data=CallbackData(data=BODY))
        )
        took.append((told(arrivals) - began) * 1000)
    return took[1:]  # the first had to connect


def show(name: str, took: list[float]) -> None:
    print(f"{name:24} {median(took):8.2f} {quantiles(took, n=100)[98]:8.2f} {max(took):8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", type=int, default=300)
    stores.add_options(parser)
    options = parser.parse_args()
    logging.disable()
    print(f"{'ms, ' + options.store:24} {'p50':>8} {'p99':>8} {'highest':>8}")
    with ExitStack() as stack:
        ground = stack.enter_context(stores.ground(options))
        arrivals = stack.enter_context(process(receive))
        port = int(told(arrivals))
        store = stack.enter_context(ground.maker("same")())
        with dispatcher_for(store):
            show("from the same process", latencies(store, port, arrivals, options.callbacks))
        make_store = ground.maker("other")
        store = stack.enter_context(make_store())
        store.next_due()
        dispatcher = stack.enter_context(process(dispatch, make_store))
        idle = told(dispatcher)
        show("from another process", latencies(store, port, arrivals, options.callbacks))
    print(f"\nidle: {idle:.2%} of a core")


if __name__ == "__main__":
    main()
