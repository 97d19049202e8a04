"""What a transport says is made fit for the record, whoever wrote the transport."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from callbackq.core import validation as v
from callbackq.core.delivery import Answer


def answer_with(detail: str) -> Answer:
    return Answer(status_code=200, time=datetime(2026, 1, 1, tzinfo=UTC), duration=timedelta(0), detail=detail)


@given(st.text() | st.text(min_size=121))
def test_any_detail_of_an_answer_can_be_recorded(detail: str) -> None:
    assert not list(v.check_detail(answer_with(detail).detail))


def test_detail_that_can_be_recorded_stays_as_it_is() -> None:
    detail = "CERTIFICATE_VERIFY_FAILED: self-signed certificate"

    assert answer_with(detail).detail == detail


def test_detail_that_cant_is_cut_and_marked() -> None:
    assert answer_with("caf\u00e9\n\x1b[2J").detail == "caf???[2J"
    assert answer_with("x" * 121).detail == "x" * 120
