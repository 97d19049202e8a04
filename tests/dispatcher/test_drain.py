"""A stop, step by step: it gives up only what the store doesn't take in the end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from callbackq.draining import Drain, StopReport
from callbackq.errors import TransientDataAccessError
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing import FakeClock
from support.dispatching import HeldTransport, Witness, a_request, an_engine

STOP_SECONDS = 1.0
GRACE_SECONDS = 2.0


class Refusing(InMemoryDataAccess):
    """Takes no ends of locks before a moment."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock=clock)
        self._time = clock
        self.works_at = 0.0

    def record_attempts(self, records: Any) -> Any:
        self._refuse()
        return super().record_attempts(records)

    def release_locks(self, locks: Any) -> Any:
        self._refuse()
        return super().release_locks(locks)

    def _refuse(self) -> None:
        if self._time.monotonic() < self.works_at:
            raise TransientDataAccessError("not now")


@pytest.mark.parametrize(
    ("works_after", "report"),
    [
        (0.5, StopReport(finished=0, released=3, interrupted=3, unrecorded=0)),
        (GRACE_SECONDS, StopReport(finished=0, released=3, interrupted=3, unrecorded=0)),
        (60.0, StopReport(finished=0, released=0, interrupted=0, unrecorded=6)),
    ],
)
def test_what_a_store_refused_is_tried_once_more_at_the_end(works_after: float, report: StopReport) -> None:
    clock = FakeClock()
    store, transport = Refusing(clock), HeldTransport(clock)
    engine = an_engine(store, transport, clock, Witness(), host_concurrency=3)
    store.store_callback_requests([a_request()] * 6)
    engine.step()
    transport.wait_for(3)
    stops_at = clock.monotonic() + STOP_SECONDS
    store.works_at = stops_at + works_after
    drain = Drain(engine, clock=clock, grace=clock.monotonic)

    while (wait := drain.step(stops_at)) is not None:
        clock.advance(wait)

    assert drain.report() == report
    assert clock.monotonic() <= stops_at + GRACE_SECONDS + 0.1
    assert len(store.acquire_locks("other", lock_timeout=timedelta(minutes=1), limit=9)) == 6 - report.unrecorded
