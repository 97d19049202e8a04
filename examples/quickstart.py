"""
Store, deliver, see a retry keep its queue in order. Runs as it is and ends by itself:

    python examples/quickstart.py
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections import Counter
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from callbackq import (
    CallbackData,
    CallbackRequest,
    Dispatcher,
    HTTPTransport,
    RetryPhase,
    SQLiteDataAccess,
    TargetPolicy,
)

seen: Counter[str] = Counter()


class Receiver(BaseHTTPRequestHandler):
    """Somebody else's server. It refuses the first request for "paid"."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        seen[body] += 1
        status = 503 if body == "paid" and seen[body] == 1 else 200
        queue, number, attempt = (self.headers[f"callbackq-{name}"] for name in ("queue", "sequence", "attempt"))
        print(f"receiver: {queue}, number {number}, attempt {attempt}: {body} -> {status}")
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """The line above says it all."""


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()

    with tempfile.TemporaryDirectory() as folder, SQLiteDataAccess(Path(folder) / "callbacks.db") as store:
        for body in ("created", "paid", "shipped"):
            request = CallbackRequest(
                url=f"http://127.0.0.1:{server.server_port}/hook",
                post_data=CallbackData(headers={"Content-Type": "text/plain"}, data=body.encode()),
                retry_phases=[RetryPhase(retries=3, delay=timedelta(milliseconds=200))],
                queue_id="order-1042",
            )
            status = store.store_callback_request(request)
            print(f"stored:   {status.queue_id}, number {status.sequence}: {body}")

        # Loopback is closed by default, like everything that isn't the public internet.
        transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
        with Dispatcher(store, transport=transport):
            while store.next_due() is not None:  # something is still to be delivered
                time.sleep(0.02)
        transport.close()

        for status in store.list_callbacks():
            codes = ", ".join(str(attempt.status_code) for attempt in status.attempts)
            print(f"record:   {status.queue_id}, number {status.sequence}: {status.state.value} after {codes}")
    server.shutdown()
    server.server_close()


if __name__ == "__main__":
    main()
