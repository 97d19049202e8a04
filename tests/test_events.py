"""What a dispatcher tells, and what a log line of it looks like."""

from __future__ import annotations

import logging
from datetime import timedelta

import pytest

from callbackq.core.models import AttemptFailure, FailedReason
from callbackq.events import EventKind, LoggingObserver, ObservedEvent


def test_an_event_becomes_one_line_with_all_it_knows(caplog: pytest.LogCaptureFixture) -> None:
    event = ObservedEvent(
        kind=EventKind.RETRY_SCHEDULED,
        machine_name="one",
        callback_id="c-1",
        queue_id="HONDA",
        application_id="shop",
        origin="https://receiver.example:443",
        sequence=3,
        token=12,
        attempt=2,
        status_code=503,
        duration=timedelta(milliseconds=40),
        next_attempt_in=timedelta(seconds=10),
    )

    with caplog.at_level(logging.DEBUG, logger="callbackq"):
        LoggingObserver().observe(event)

    (record,) = caplog.records
    assert record.getMessage() == (
        "retry scheduled: callback='c-1' queue='HONDA' sequence=3 application='shop' "
        "origin='https://receiver.example:443' attempt=2 status=503 duration=0.040s next_in=10.000s machine='one'"
    )
    assert record.levelno == logging.INFO
    assert record.callbackq_event is event  # type: ignore[attr-defined]


def test_a_failure_says_why(caplog: pytest.LogCaptureFixture) -> None:
    LoggingObserver().observe(
        ObservedEvent(
            kind=EventKind.FAILED,
            machine_name="one",
            callback_id="c",
            attempt=1,
            failure=AttemptFailure.TIMEOUT,
            failed_reason=FailedReason.EXHAUSTED,
            detail="waiting for the head",
        )
    )

    message = caplog.records[0].getMessage()
    assert message.endswith("failure=timeout reason=exhausted detail='waiting for the head' machine='one'")


def test_an_abandoned_lock_is_told_with_its_holder_and_how_many_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    LoggingObserver().observe(
        ObservedEvent(
            kind=EventKind.ABANDONED,
            machine_name="heir",
            callback_id="c",
            sequence=3,
            abandoned=2,
            abandoned_by="dead\n",
        )
    )

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (r"abandoned: callback='c' queue='' sequence=3 in_a_row=2 by='dead\n' machine='heir'")


def test_ids_cannot_forge_log_lines_or_move_a_terminals_cursor(caplog: pytest.LogCaptureFixture) -> None:
    LoggingObserver().observe(
        ObservedEvent(
            kind=EventKind.FAILED,
            machine_name="m\n",
            callback_id="a\x1b[2J",
            origin="\n",
            detail="\r",
            queue_id="‮evil\nsucceeded:",
        )
    )

    message = caplog.records[0].getMessage()
    assert message.isascii()
    assert message.isprintable()


@pytest.mark.parametrize("kind", EventKind)
def test_every_kind_of_event_has_a_level(kind: EventKind, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("callbackq.test")

    with caplog.at_level(logging.DEBUG, logger=logger.name):
        LoggingObserver(logger).observe(ObservedEvent(kind=kind, machine_name="one", detail="OSError"))

    assert caplog.records[0].getMessage() == f"{kind.value}: detail='OSError' machine='one'"


def test_nothing_is_formatted_for_a_level_that_is_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, logger="callbackq"):
        LoggingObserver().observe(ObservedEvent(kind=EventKind.LOCKED, machine_name="one", callback_id="c"))

    assert not caplog.records
