"""Attempts at hostile receivers, each followed by an ordinary one to the same host over the same transport."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import NamedTuple

from callbackq.core.delivery import Answer, Delivery, Outcome
from callbackq.targets import TargetPolicy
from callbackq.transport import HTTPTransport
from support.deliveries import make_delivery
from support.hostile import Behaviour, Result
from support.hosts import OWN_STATUS, HostileHosts

__all__ = ["Trial", "own_id_in", "result_of", "transport_to", "try_out"]

_PATIENCE_SECONDS = 60.0


class Trial(NamedTuple):
    """
    One behaviour met.

    Attributes:
        outcome: of the attempt at it.
        seconds: from the submission of the attempt to its outcome, by our own clock.
        own_id: the callback that was sent to the same host next.
        own: what became of that.
    """

    name: str
    scheme: str
    outcome: Outcome
    seconds: float
    own_id: str
    own: Outcome

    @property
    def got_its_own_answer(self) -> bool:
        """Whether the next callback got an answer, and that to itself."""
        return isinstance(self.own, Answer) and own_id_in(self.own.status_code, self.own.response.data) == self.own_id


def result_of(outcome: Outcome) -> Result | Outcome:
    """What is to be recorded of an attempt; or what should not have been there."""
    if isinstance(outcome, Answer):
        return Result(outcome.status_code, outcome.failure, outcome.truncated)
    return outcome


def own_id_in(status_code: int, body: bytes | None) -> str | None:
    """The id of the callback that an answer belongs to; ``None`` when it is not of that kind."""
    return body.decode("latin-1") if body is not None and status_code == OWN_STATUS else None


@contextmanager
def transport_to(hosts: HostileHosts, *, seconds: float) -> Iterator[HTTPTransport]:
    """A transport that may call the hostile hosts, with so many seconds for an attempt."""
    transport = HTTPTransport(
        target_policy=TargetPolicy(allow=["127.0.0.1"], resolver=hosts.resolve),
        ssl_context=hosts.client_tls(),
        deadline=timedelta(seconds=seconds),
    )
    try:
        yield transport
    finally:
        transport.close()


def try_out(
    transport: HTTPTransport,
    hosts: HostileHosts,
    table: Mapping[str, Behaviour],
    cases: Iterable[tuple[str, str]],
    tell: Callable[[Trial], object],
    *,
    in_flight: int = 1000,
) -> None:
    """Meet all *cases* (name, scheme), so many at a time, and *tell* of each, from the transport's thread."""
    free = threading.Semaphore(in_flight)

    def meet(name: str, scheme: str) -> None:
        hostile = make_delivery(hosts.url(name, scheme), data=table[name].body)
        transport.submit(hostile, partial(go_on, name, scheme, time.monotonic()))

    def go_on(name: str, scheme: str, began: float, outcome: Outcome) -> None:
        seconds = time.monotonic() - began
        next_one = make_delivery(hosts.own_url(name, scheme))
        transport.submit(next_one, partial(end, name, scheme, outcome, seconds, next_one))

    def end(name: str, scheme: str, outcome: Outcome, seconds: float, next_one: Delivery, own: Outcome) -> None:
        tell(Trial(name, scheme, outcome, seconds, next_one.callback_id, own))
        free.release()

    for name, scheme in cases:
        assert free.acquire(timeout=_PATIENCE_SECONDS), "an attempt never ended"
        meet(name, scheme)
    for _ in range(in_flight):
        assert free.acquire(timeout=_PATIENCE_SECONDS), "an attempt never ended"
