"""
A web application that stores a callback in its request and delivers it from a thread of its own process.

    python examples/wsgi_app.py            serves one request to itself, waits for the delivery, and ends
    python examples/wsgi_app.py serve      serves on http://127.0.0.1:8080 until Ctrl-C or SIGTERM

Nothing here is special to this server: with gunicorn, call `dispatcher.start` in ``post_worker_init`` and
`dispatcher.stop` in ``worker_exit``.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import urlopen
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from callbackq import CallbackRequest, Dispatcher, HTTPTransport, RetryPhase, SQLiteDataAccess, TargetPolicy

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

PHASES = [  # without any there is one attempt
    RetryPhase(retries=5, delay=timedelta(seconds=10)),
    RetryPhase(retries=12, delay=timedelta(minutes=5)),
]


class Shop:
    """The application: ``/order/…`` tells the warehouse; ``/warehouse`` plays the warehouse."""

    def __init__(self, store: SQLiteDataAccess, warehouse_url: str) -> None:
        self._store = store
        self._warehouse_url = warehouse_url

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/warehouse":
            print(f"warehouse: callback {environ['HTTP_WEBHOOK_ID']}")
        elif path.startswith("/order/"):
            order = path.removeprefix("/order/")
            request = CallbackRequest(url=self._warehouse_url, queue_id=order, retry_phases=PHASES)
            # Under an id of its own, a request that is repeated stores one callback.
            status = self._store.store_callback_request(request, id=f"order-{order}-placed")
            print(f"shop: stored {status.id}, {status.state.value}")
        start_response("200 OK", [("Content-Length", "0")])
        return []


def main(serve: bool) -> None:
    transport = HTTPTransport(target_policy=TargetPolicy(allow=["127.0.0.0/8"]))
    with (
        tempfile.TemporaryDirectory() as folder,
        SQLiteDataAccess(Path(folder) / "callbacks.db") as store,
        WSGIServer(("127.0.0.1", 8080 if serve else 0), WSGIRequestHandler) as server,
        Dispatcher(store, transport=transport),
    ):
        url = f"http://127.0.0.1:{server.server_port}"
        server.set_app(Shop(store, f"{url}/warehouse"))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        if serve:
            asked_to_end = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: asked_to_end.set())
            asked_to_end.wait()
        else:
            urlopen(f"{url}/order/1042").close()
            while store.next_due() is not None:
                time.sleep(0.02)
            print(f"shop: {store.get_callback_status('order-1042-placed').state.value}")
        server.shutdown()
    transport.close()


if __name__ == "__main__":
    main(serve=sys.argv[1:] == ["serve"])
