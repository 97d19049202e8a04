"""
The outbox pattern: an order and its callback in one transaction, both there or neither. Runs as it is:

    python examples/own_transaction.py
"""

from __future__ import annotations

import sqlite3
import tempfile
from datetime import timedelta
from pathlib import Path

from callbackq import CallbackData, CallbackRequest, Dispatcher, RetryPhase, SQLiteDataAccess
from callbackq.testing import ScriptedTransport


class Shop:
    """An application with tables of its own in the file in which its callbacks are."""

    def __init__(self, path: Path) -> None:
        self.store = SQLiteDataAccess(path)
        self.store.open()  # before the first transaction
        self.connection = sqlite3.connect(path, isolation_level=None)
        self.connection.execute("CREATE TABLE orders (number INTEGER PRIMARY KEY, item TEXT NOT NULL)")

    def place_order(self, number: int, item: str, *, card_is_good: bool = True) -> None:
        placed = CallbackRequest(
            url="https://warehouse.example/orders",
            post_data=CallbackData(headers={"Content-Type": "text/plain"}, data=f"{number}: {item}".encode()),
            retry_phases=[RetryPhase(retries=12, delay=timedelta(minutes=5))],
            queue_id=f"order-{number}",
        )
        self.connection.execute("BEGIN IMMEDIATE")
        with self.connection:  # commits, or rolls back when an exception leaves it
            self.connection.execute("INSERT INTO orders VALUES (?, ?)", [number, item])
            self.store.store_callback_request(placed, id=f"order-{number}-placed", connection=self.connection)
            if not card_is_good:
                raise ValueError("the card was refused")
        self.store.hint()  # a dispatcher of this process need not wait for its next look

    def close(self) -> None:
        self.connection.close()
        self.store.close()


def main() -> None:
    transport = ScriptedTransport()  # sends nothing; leave it away to send real HTTP
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop(Path(folder) / "shop.db")
        shop.place_order(1042, "teapot")
        try:
            shop.place_order(1043, "kettle", card_is_good=False)
        except ValueError as error:
            print(f"shop: order 1043 failed, {error}")
        shop.place_order(1044, "cup")

        Dispatcher(shop.store, transport=transport).run_until_idle(timeout=timedelta(seconds=10))

        orders = [number for (number,) in shop.connection.execute("SELECT number FROM orders")]
        shop.close()
    print("shop: orders", orders)
    print("warehouse:", sorted(sent.callback_id for sent in transport.deliveries))


if __name__ == "__main__":
    main()
