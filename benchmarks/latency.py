"""
How long an idle dispatcher takes from a store's call to the first byte at the receiver.

    python benchmarks/latency.py [--store postgres] [--callbacks 100] [--rounds 5]

One callback at a time, after a pause of random length, so that polls come at any moment: stored in the dispatcher's own
process and in another one, in turns. Then what share of a core a dispatcher takes while it is idle.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import timedelta
from socket import create_server
from statistics import median, quantiles
from typing import TYPE_CHECKING

from figures import Figure, figure_of, show

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
SETTLING_SECONDS = 1.0
SHARE = "% of a core"

# On SQLite nobody wakes a dispatcher when another process has stored something: it finds that when it polls next. Who
# cares for delays there polls oftener than usual.
USUAL = timedelta(milliseconds=250)
OFTEN = timedelta(milliseconds=25)


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


def dispatcher_for(store: Store, poll: timedelta = USUAL) -> Dispatcher:
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
    return Dispatcher(store, transport=transport, observer=Silence(), poll_interval=poll)


def dispatch(make_store: MakeStore, poll: timedelta, line: Connection) -> None:
    """Dispatch until told to stop. When asked, be idle for so many seconds, and tell what share of a core that took."""
    logging.disable()
    with make_store() as store, dispatcher_for(store, poll):
        while seconds := line.recv():
            cpu = time.process_time()
            time.sleep(seconds)
            line.send((time.process_time() - cpu) / seconds)


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


def idle_share(dispatcher: Connection, seconds: float) -> float:
    dispatcher.send(seconds)
    return told(dispatcher) * 100


def figures(options: argparse.Namespace) -> list[Figure]:
    here: list[list[float]] = []
    elsewhere: list[list[float]] = []
    polls_often = options.store == "sqlite"
    with ExitStack() as stack:
        ground = stack.enter_context(stores.ground(options))
        arrivals = stack.enter_context(process(receive))
        port = int(told(arrivals))
        opened: list[Store] = [ground.maker(name)() for name in ("same", "other", "unused")]
        for store in opened:
            stack.enter_context(store)
        same, other, unused = opened
        for store in other, unused:
            store.next_due()
        often = stack.enter_context(process(dispatch, ground.maker("other"), OFTEN if polls_often else USUAL))
        usual = stack.enter_context(process(dispatch, ground.maker("unused"), USUAL))
        for dispatcher in often, usual:
            idle_share(dispatcher, SETTLING_SECONDS)
        for _ in range(options.rounds):
            with dispatcher_for(same):
                here.append(latencies(same, port, arrivals, options.callbacks))
            elsewhere.append(latencies(other, port, arrivals, options.callbacks))
        idle = [idle_share(usual, options.idle) for _ in range(options.rounds)]
        idle_often = [idle_share(often, options.idle) for _ in range(options.rounds)] if polls_often else []
    name = stores.NAMES[options.store]
    found = delays(here, f"stored to first byte, same process, {name}", most_p50=3.0, most_p99=10.0)
    if polls_often:
        every = f"{name} polled every {OFTEN / timedelta(milliseconds=1):g} ms"
        most = 2 * OFTEN / timedelta(milliseconds=1)
        found += delays(elsewhere, f"stored to first byte, another process, {every}", most_p99=most)
        found.append(figure_of(idle_often, f"idle dispatcher, {every}", SHARE, better="less"))
    else:
        found += delays(elsewhere, f"stored to first byte, another process, {name}", most_p50=5.0)
    return [*found, figure_of(idle, f"idle dispatcher, {name}", SHARE, target=0.2, better="less")]


def delays(
    rounds: list[list[float]], name: str, most_p50: float | None = None, most_p99: float | None = None
) -> list[Figure]:
    p50 = [median(took) for took in rounds]
    p99 = [quantiles(took, n=100, method="inclusive")[98] for took in rounds]
    return [
        figure_of(p50, f"{name}: p50", "ms", target=most_p50, better="less"),
        figure_of(p99, f"{name}: p99", "ms", target=most_p99, better="less"),
    ]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", type=int, default=100, help="for each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--idle", type=float, default=3.0, metavar="SECONDS", help="for each round")
    stores.add_options(parser)
    return parser


if __name__ == "__main__":
    logging.disable()
    show(figures(parser().parse_args()))
