"""
Two dispatcher processes on one SQLite file; one is killed with callbacks in flight, the other takes over.

Both run on this machine, as all that share a SQLite file must; *machine* is only what a dispatcher is called.

    python examples/two_machines.py
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
from collections import defaultdict
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from callbackq import CallbackRequest, Dispatcher, HTTPTransport, RetryPhase, SQLiteDataAccess, TargetPolicy

QUEUES, LENGTH = 8, 10
PHASES = [RetryPhase(retries=12, delay=timedelta(minutes=5))]
accepted: defaultdict[str, list[int]] = defaultdict(list)


class Receiver(BaseHTTPRequestHandler):
    """Takes 20 ms for each callback and remembers their numbers."""

    def do_POST(self) -> None:
        accepted[self.headers["callbackq-queue"]].append(int(self.headers["callbackq-sequence"]))
        time.sleep(0.02)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """There are many."""


def dispatch(path: Path, machine_name: str) -> None:
    """What each process runs, until it is killed."""
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]), deadline=timedelta(seconds=2))
    Dispatcher(SQLiteDataAccess(path), machine_name=machine_name, transport=transport, concurrency=4).run()


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "callbacks.db"
        with SQLiteDataAccess(path) as store:
            requests = [
                CallbackRequest(url=url, queue_id=f"car-{n % QUEUES}", retry_phases=PHASES)
                for n in range(QUEUES * LENGTH)
            ]
            store.store_callback_requests(requests)
            context = multiprocessing.get_context("spawn")
            alpha, beta = (context.Process(target=dispatch, args=(path, name)) for name in ("alpha", "beta"))
            alpha.start()
            beta.start()
            while (arrived := sum(map(len, accepted.values()))) < QUEUES * LENGTH // 3:
                time.sleep(0.01)
            alpha.kill()
            alpha.join()
            print(f"killed alpha; {arrived} callbacks had been accepted")
            while store.next_due() is not None:
                time.sleep(0.02)
            beta.kill()
            beta.join()
            locks = [lock for status in store.list_callbacks() for lock in status.locks]
    taken_over = sum(lock.ended is not None and not lock.completed for lock in locks)
    duplicates = sum(len(numbers) - len(set(numbers)) for numbers in accepted.values())
    in_order = all(sorted(numbers) == numbers for numbers in accepted.values())
    complete = all(set(numbers) == set(range(1, LENGTH + 1)) for numbers in accepted.values())
    print(f"beta took over {taken_over} callbacks; {duplicates} of them had arrived already")
    print(f"all {QUEUES} queues complete: {complete}, in order: {in_order}")
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    main()
