"""
Two dispatcher processes share a PostgreSQL database, as two machines would. One is killed, the other takes over.

    DATABASE_URL=postgresql://user:password@host/database python examples/two_machines_postgres.py
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from callbackq import CallbackRequest, Dispatcher, HTTPTransport, TargetPolicy
from callbackq.stores.postgres import PostgreSQLDataAccess

QUEUES = [f"car-{n}-{time.time_ns()}" for n in range(8)]  # new ones for each run
LENGTH = 10
accepted: defaultdict[str, list[int]] = defaultdict(list)


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        accepted[self.headers["callbackq-queue"]].append(int(self.headers["callbackq-sequence"]))
        time.sleep(0.02)
        self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")


def dispatch(machine_name: str) -> None:
    """What each machine runs."""
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]), deadline=timedelta(seconds=1))
    store = PostgreSQLDataAccess(os.environ["DATABASE_URL"], schema="callbackq_example")
    Dispatcher(store, machine_name=machine_name, transport=transport, lock_timeout=timedelta(seconds=3)).run()


def wait_until(condition: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < give_up, "it takes too long"
        time.sleep(0.01)


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    with PostgreSQLDataAccess(os.environ["DATABASE_URL"], schema="callbackq_example") as store:
        store.store_callback_requests([CallbackRequest(url=url, queue_id=one) for _ in range(LENGTH) for one in QUEUES])
        alpha, beta = (multiprocessing.Process(target=dispatch, args=(name,)) for name in ("alpha", "beta"))
        alpha.start()
        beta.start()
        wait_until(lambda: sum(map(len, accepted.values())) >= 30)
        alpha.kill()  # its locks time out after three seconds; then beta takes over
        wait_until(lambda: store.next_due() is None)
        beta.kill()
    complete = all(set(accepted[one]) == set(range(1, LENGTH + 1)) for one in QUEUES)
    print(f"all {len(QUEUES)} queues complete: {complete}, in order: {all(sorted(n) == n for n in accepted.values())}")


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    main()
