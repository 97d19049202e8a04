"""
pgqueuer on PostgreSQL: see `peer`.

As its documentation and its own benchmark have it: asyncpg on uvloop, one connection for each worker, asynchronous
entrypoints, the settings of autovacuum that it recommends, the durability it has by default (every outcome in its log).
What varies is the size of batches. aiohttp sends, the quickest of the asynchronous clients.
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import asyncpg
import peer
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from psycopg.conninfo import conninfo_to_dict


async def connect(where: str) -> AsyncpgDriver:
    parts = conninfo_to_dict(where)
    return AsyncpgDriver(
        await asyncpg.connect(host=parts["host"], port=parts["port"], user=parts["user"], database=parts["dbname"])
    )


async def fill(where: str, number: int) -> None:
    queries = Queries(await connect(where))
    await queries.install()
    await queries.optimize_autovacuum()
    for start in range(0, number, peer.BATCH):
        some = min(peer.BATCH, number - start)
        await queries.enqueue(["send"] * some, [peer.BODY] * some, [0] * some)


async def work(where: str, url: str, batch: int) -> None:
    queuer = PgQueuer(await connect(where))
    async with aiohttp.ClientSession() as session:

        @queuer.entrypoint("send")
        async def send(job: Job) -> None:
            async with session.post(url, data=job.payload, headers=peer.HEADERS) as response:
                await response.read()
                response.raise_for_status()

        await asyncio.to_thread(peer.wait_for_start)
        await queuer.run(batch_size=batch, max_concurrent_tasks=2 * batch)


if __name__ == "__main__":
    logging.disable()
    peer.main(
        lambda where, number: uvloop.run(fill(where, number)),
        lambda where, url, batch: uvloop.run(work(where, url, batch)),
    )
