"""
The other side: a receiver that verifies signatures, drops duplicates, and refuses stale copies.

    python examples/receiver_verify.py

`Inbox` is the part to copy. What was accepted, and what follows from it, is written in one transaction.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Mapping
from datetime import UTC, datetime

from callbackq import Signer
from callbackq.errors import SignatureError
from callbackq.signing import verify

SCHEMA = """
CREATE TABLE IF NOT EXISTS accepted (id TEXT PRIMARY KEY, body BLOB);
CREATE TABLE IF NOT EXISTS queues (queue TEXT PRIMARY KEY, highest INTEGER);
"""


class Inbox:
    """Decides what a request is worth."""

    def __init__(self, database: sqlite3.Connection, secret: bytes) -> None:
        self._database = database
        self._secret = secret
        database.executescript(SCHEMA)

    def receive(self, headers: Mapping[str, str], body: bytes) -> tuple[int, str]:
        """Answer with a status, and say why. Header names in lower case."""
        try:
            verified = verify(headers, body, self._secret, now=datetime.now(UTC))
        except SignatureError:
            return 401, "not signed with our secret"
        queue, sequence = headers.get("callbackq-queue", ""), int(headers.get("callbackq-sequence", "0"))
        with self._database:
            if self._database.execute("SELECT 1 FROM accepted WHERE id = ?", [verified.id]).fetchone():
                return 200, "duplicate, dropped"
            highest = self._database.execute("SELECT highest FROM queues WHERE queue = ?", [queue]).fetchone()
            if queue and highest and sequence <= highest[0]:
                return 200, "stale copy, dropped"
            # Here goes the effect, in the same transaction.
            self._database.execute("INSERT INTO accepted VALUES (?, ?)", [verified.id, body])
            self._database.execute("INSERT OR REPLACE INTO queues VALUES (?, ?)", [queue, sequence])
        return 200, "accepted"


def a_request(signer: Signer, id: str, sequence: int, body: bytes) -> tuple[dict[str, str], bytes]:
    """What callbackq sends."""
    timestamp = int(datetime.now(UTC).timestamp())
    headers = {
        "webhook-id": id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": signer.sign(id, timestamp, body),
        "callbackq-queue": "order-1042",
        "callbackq-sequence": str(sequence),
    }
    return headers, body


def main() -> None:
    secret = secrets.token_bytes(32)
    signer = Signer(secret)
    inbox = Inbox(database := sqlite3.connect(":memory:"), secret)
    first, second = a_request(signer, "a", 1, b"created"), a_request(signer, "b", 2, b"paid")
    frozen = a_request(signer, "z", 1, b"woke up and sent an old number")
    forged = a_request(Signer(secrets.token_bytes(32)), "c", 3, b"shipped")
    for headers, body in (first, second, second, frozen, forged, a_request(signer, "c", 3, b"shipped")):
        status, why = inbox.receive(headers, body)
        print(f"{headers['webhook-id']}, number {headers['callbackq-sequence']}: {status} {why}")
    database.close()


if __name__ == "__main__":
    main()
