"""
procrastinate on PostgreSQL: see `peer`.

As its documentation has it: asynchronous tasks, several at a time in each worker, finished jobs kept, which is how it
records outcomes. What varies is how many at a time. Jobs have no lock: with one for each queue it keeps order, too, and
is slower. uvloop and aiohttp as for pgqueuer.
"""

from __future__ import annotations

import asyncio
import logging

import aiohttp
import peer
import uvloop
from procrastinate import App, PsycopgConnector


async def fill(where: str, number: int) -> None:
    app = App(connector=PsycopgConnector(conninfo=where))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        send = app.configure_task("send")
        for start in range(0, number, peer.BATCH):
            jobs = [{"body": peer.BODY.decode()}] * min(peer.BATCH, number - start)
            await send.batch_defer_async(*jobs)


async def work(where: str, url: str, concurrency: int) -> None:
    app = App(connector=PsycopgConnector(conninfo=where))
    async with app.open_async(), aiohttp.ClientSession() as session:

        @app.task(name="send")
        async def send(body: str) -> None:
            async with session.post(url, data=body.encode(), headers=peer.HEADERS) as response:
                await response.read()
                response.raise_for_status()

        await asyncio.to_thread(peer.wait_for_start)
        await app.run_worker_async(concurrency=concurrency, install_signal_handlers=False)


if __name__ == "__main__":
    logging.disable()
    peer.main(
        lambda where, number: uvloop.run(fill(where, number)),
        lambda where, url, concurrency: uvloop.run(work(where, url, concurrency)),
    )
