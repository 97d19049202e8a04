"""A receiver on loopback that misbehaves by script and keeps a log of everything that reached it."""

from __future__ import annotations

import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from callbackq.testing.history import Arrival

__all__ = ["Receiver"]

_SLOW_SECONDS: Final = 0.15
_HANG_SECONDS: Final = 2.0


class Receiver:
    """
    Answers POST requests on ``http://127.0.0.1:port``. The last part of the path says how it behaves.

    ``/ok`` accepts. ``/slow`` accepts after a moment. ``/flaky`` answers 500, then 503, then accepts. ``/timeout`` does
    not answer the first request in time, then accepts. ``/down`` always answers 500. ``/gone`` answers 410.
    """

    def __init__(self) -> None:
        # Guards the log and the counts: each request has a thread of its own.
        self._mutex = threading.Lock()
        self._arrivals: list[Arrival] = []
        self._seen: Counter[str] = Counter()
        self._stopping = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="demo-receiver", daemon=True
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def arrivals(self) -> list[Arrival]:
        """Everything that has been answered so far."""
        with self._mutex:
            return list(self._arrivals)

    def accepted(self) -> int:
        """How many callbacks have been accepted at least once."""
        with self._mutex:
            return len({arrival.callback_id for arrival in self._arrivals if arrival.accepted is not None})

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def answer(self, headers: dict[str, str], behaviour: str) -> int | None:
        """Decide on a status, ``None`` for no answer at all, and log the request."""
        started = time.monotonic()
        with self._mutex:
            self._seen[headers["webhook-id"]] += 1
            request_number = self._seen[headers["webhook-id"]]
        status = self._behave(behaviour, request_number)
        accepted = time.monotonic() if status == 200 else None
        with self._mutex:
            self._arrivals.append(Arrival.from_headers(headers, started=started, accepted=accepted))
        return status

    def _behave(self, behaviour: str, request_number: int) -> int | None:
        match behaviour, request_number:
            case "slow", _:
                self._stopping.wait(_SLOW_SECONDS)
                return 200
            case "flaky", 1:
                return 500
            case "flaky", 2:
                return 503
            case "timeout", 1:
                self._stopping.wait(_HANG_SECONDS)
                return None
            case "down", _:
                return 500
            case "gone", _:
                return 410
        return 200

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                self.rfile.read(int(headers.get("content-length", "0")))
                status = receiver.answer(headers, self.path.rpartition("/")[2])
                if status is None:
                    self.close_connection = True
                    return
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """The table at the end says it all."""

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: object, client_address: object) -> None:
        """A killed dispatcher's connections break off; that is what the demo is about."""
