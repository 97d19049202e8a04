"""
Whether callbacks are delivered in the order in which their transactions were committed, on PostgreSQL.

Processes store callbacks into shared queues, up to twenty in each transaction of their own, stay in it for a random
time before they commit, and roll every tenth back. Meanwhile others acquire and record. In the end the server tells
when it committed each row: in each queue that must be the order of the numbers, that in which locks were given, and the
numbers must have no gap.

    python benchmarks/commit_order.py [--callbacks 100000] [--enqueuers 2] [--conninfo CONNINFO]

Without a conninfo it starts the tests' own server. One that is named needs track_commit_timestamp = on. Exits with 1
when a callback is out of order or missing.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psycopg

from callbackq.core.lifecycle import Transition
from callbackq.core.models import CallbackAttempt, CallbackRequest, CallbackState
from callbackq.dataaccess import AttemptRecord
from callbackq.errors import TransientDataAccessError
from callbackq.stores.postgres import PostgreSQLDataAccess

SCHEMA = "commit_order"
QUEUES = 16
LONGEST_DELAY_SECONDS = 0.002
SPAWN = get_context("spawn")

DELIVERED = Transition(state=CallbackState.SUCCEEDED, counted=True)
ATTEMPT = CallbackAttempt(status_code=200, time=datetime.now(UTC), duration=timedelta(0))

OUT_OF_ORDER = f"""
SELECT count(*) FROM (
    SELECT pg_xact_commit_timestamp(r.xmin) AS committed, h.acquired, c.sequence,
        lag(pg_xact_commit_timestamp(r.xmin)) OVER w AS committed_before,
        lag(h.acquired) OVER w AS acquired_before, row_number() OVER w AS place
    FROM {SCHEMA}.callbacks AS c
    JOIN {SCHEMA}.requests AS r ON r.callback = c.callback
    JOIN {SCHEMA}.history AS h ON h.callback = c.callback
    WINDOW w AS (PARTITION BY c.queue ORDER BY c.sequence)
) AS one
WHERE committed < committed_before OR acquired <= acquired_before OR sequence <> place
"""


def enqueue(conninfo: str, callbacks: int, seed: int) -> None:
    chance = random.Random(seed)
    stored = 0
    with PostgreSQLDataAccess(conninfo, schema=SCHEMA) as store, psycopg.connect(conninfo) as connection:
        while stored < callbacks:
            requests = [
                CallbackRequest(url="https://receiver.example/", queue_id=f"queue {chance.randrange(QUEUES)}")
                for _ in range(min(chance.randint(1, 20), callbacks - stored))
            ]
            try:
                # Two calls in one transaction lock queues in an order that another may cross: now and then, since the
                # server takes its time to notice.
                for part in (requests[::2], requests[1::2]) if chance.random() < 0.1 else (requests,):
                    store.store_callback_requests(part, connection=connection)
            except TransientDataAccessError:
                connection.rollback()
                continue
            time.sleep(chance.random() * LONGEST_DELAY_SECONDS)
            if chance.random() < 0.1:
                connection.rollback()
                continue
            connection.commit()
            stored += len(requests)


def complete(conninfo: str, is_over: Any) -> None:
    with PostgreSQLDataAccess(conninfo, schema=SCHEMA) as store:
        while True:
            was_over = is_over.is_set()
            acquired = store.acquire_locks("machine", lock_timeout=timedelta(minutes=5), limit=QUEUES)
            store.record_attempts(
                [AttemptRecord(acquired=one, attempt=ATTEMPT, transition=DELIVERED) for one in acquired]
            )
            if not acquired:
                if was_over and store.next_due() is None:
                    return
                time.sleep(0.01)


@contextmanager
def server(conninfo: str) -> Iterator[str]:
    if conninfo:
        yield conninfo
        return
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from support.postgres import PostgreSQLServers

    with PostgreSQLServers() as servers:
        yield servers.start(settings={"track_commit_timestamp": "on"}).conninfo()


def run(conninfo: str, callbacks: int, enqueuers: int) -> bool:
    with PostgreSQLDataAccess(conninfo, schema=SCHEMA) as store:
        store.open()
    is_over = SPAWN.Event()
    storing = [
        SPAWN.Process(target=enqueue, args=(conninfo, callbacks // enqueuers, seed)) for seed in range(enqueuers)
    ]
    completing = [SPAWN.Process(target=complete, args=(conninfo, is_over)) for _ in range(2)]
    began = time.monotonic()
    for process in [*storing, *completing]:
        process.start()
    for process in storing:
        process.join()
    is_over.set()
    for process in completing:
        process.join()
    with psycopg.connect(conninfo) as connection:
        [(done,)] = connection.execute(f"SELECT count(*) FROM {SCHEMA}.callbacks WHERE state = 2").fetchall()
        [(wrong,)] = connection.execute(OUT_OF_ORDER).fetchall()
        connection.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
    print(f"{done} callbacks in {time.monotonic() - began:.0f} s, {wrong} out of order")
    return wrong == 0 and done == callbacks // enqueuers * enqueuers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callbacks", type=int, default=100_000)
    parser.add_argument("--enqueuers", type=int, default=2)
    parser.add_argument("--conninfo", default="")
    arguments = parser.parse_args()
    with server(arguments.conninfo) as conninfo:
        return 0 if run(conninfo, arguments.callbacks, arguments.enqueuers) else 1


if __name__ == "__main__":
    sys.exit(main())
