"""When the next attempt is due."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from callbackq.core.models import RetryPhase
from callbackq.core.retry import attempts_allowed, delay_before_retry, parse_retry_after, postpone
from support import generated

NOW = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(hours=24)


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


def phases_of(*plan: tuple[int, float]) -> tuple[RetryPhase, ...]:
    return tuple(RetryPhase(retries=retries, delay=seconds(delay)) for retries, delay in plan)


def schedule(phases: tuple[RetryPhase, ...]) -> list[float]:
    delays = []
    while (delay := delay_before_retry(phases, len(delays) + 1)) is not None:
        delays.append(delay.total_seconds())
    return delays


# Phases


@pytest.mark.parametrize(
    ("plan", "delays"),
    [
        ((), []),
        (((0, 10),), []),
        (((1, 300),), [300]),
        (((3, 0),), [0, 0, 0]),
        (((2, 10), (1, 60)), [10, 10, 60]),
        (((1, 60), (2, 10)), [60, 10, 10]),
        (((0, 1), (1, 2), (0, 3), (1, 4), (0, 5)), [2, 4]),
        (((2, 0.000001),), [0.000001, 0.000001]),
        (((5, 10), (12, 300)), [10] * 5 + [300] * 12),
    ],
)
def test_the_delay_before_a_retry_is_that_of_the_phase_it_falls_in(plan: Any, delays: list[float]) -> None:
    phases = phases_of(*plan)

    assert schedule(phases) == delays
    assert attempts_allowed(phases) == 1 + len(delays)


def test_five_times_ten_seconds_and_twelve_times_five_minutes_are_eighteen_attempts() -> None:
    phases = phases_of((5, 10), (12, 300))

    assert attempts_allowed(phases) == 18
    assert sum(schedule(phases)) == 3650
    assert [delay_before_retry(phases, retry) for retry in (1, 5, 6, 17, 18)] == [
        *(seconds(10), seconds(10), seconds(300), seconds(300)),
        None,
    ]


plans = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1000)), max_size=5)


@generated.FEW
@given(plans)
def test_the_schedule_is_always_the_one_that_tenacity_would_follow(plan: list[tuple[int, int]]) -> None:
    chain = [tenacity.wait_fixed(delay) for retries, delay in plan for _ in range(retries)]
    stop = tenacity.stop_after_attempt(len(chain) + 1)
    expected = []
    if chain:
        wait = tenacity.wait_chain(*chain)
        state: Any = SimpleNamespace(attempt_number=1)
        while not stop(state):
            expected.append(wait(state))
            state.attempt_number += 1

    assert schedule(phases_of(*plan)) == expected


def test_a_plan_with_the_most_retries_there_may_be_is_answered_at_once() -> None:
    phases = tuple(RetryPhase(retries=10_000, delay=timedelta(microseconds=n)) for n in range(100))

    assert attempts_allowed(phases) == 1_000_001
    assert delay_before_retry(phases, 1_000_000) == timedelta(microseconds=99)
    assert delay_before_retry(phases, 1_000_001) is None


# Retry-After


@pytest.mark.parametrize(
    ("value", "wait"),
    [
        ("0", seconds(0)),
        ("1", seconds(1)),
        ("120", seconds(120)),
        (" 120\t", seconds(120)),
        ("0000000120", seconds(120)),
        ("86400", DAY),
        ("86401", DAY),
        ("9" * 18, DAY),
        ("9" * 19, DAY),
        ("9" * 64, DAY),
        ("Thu, 01 Jan 2026 00:02:00 GMT", seconds(120)),
        ("Thursday, 01-Jan-26 00:02:00 GMT", seconds(120)),
        ("Thu Jan  1 00:02:00 2026", seconds(120)),
        ("Thu, 01 Jan 2026 00:02:00 -0000", seconds(120)),
        ("Thu, 01 Jan 2026 01:02:00 +0100", seconds(120)),
        ("Thu, 01 Jan 2026 00:00:00 GMT", seconds(0)),
        ("Wed, 31 Dec 2025 23:59:59 GMT", seconds(0)),
        ("Thu, 01 Jan 1970 00:00:00 GMT", seconds(0)),
        ("Fri, 02 Jan 2026 00:00:01 GMT", DAY),
        ("Fri, 31 Dec 9999 23:59:59 GMT", DAY),
        ("Fri, 31 Dec 9999 23:59:59 -2359", DAY),
        ("Mon, 01 Jan 0001 00:00:00 +2359", seconds(0)),
    ],
)
def test_retry_after_is_read_in_seconds_or_as_a_date(value: str, wait: timedelta) -> None:
    assert parse_retry_after(value, NOW) == wait


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "-1", "+1", "1.5", "1,5", "1e3", "0x10", "NaN", "nan", "inf", "Infinity", "-inf", "null", "soon"),
        *("120, 60", "120 60", "120;60", "120s", "１２０", "١٢٠", "²", "1\x002", "1_000", "9" * 65, "9" * 100_000),
        *("Thu, 32 Jan 2026 00:00:00 GMT", "Thu, 01 Jan 2026 25:00:00 GMT", "Thu, 01 Jan 2026 00:00:61 GMT"),
        *("Thu, 01 Foo 2026 00:00:00 GMT", "2026-01-01T00:02:00Z", "Thu, 01 Jan 2026 00:02:00 +9999"),
        *("Thu, 01 Jan 2026 00:02:00 +99999999999999", "Thu, 01 Jan 99999 00:00:00 GMT", "Thu, 01 Jan"),
        *("Thu, 01 Jan 2026 00:02:00 GMT" + " " * 50 + "x", "Thu, 0١ Jan 2026 00:02:00 GMT", ",", ":", "GMT"),
    ],
)
def test_what_is_no_retry_after_is_nothing(value: str) -> None:
    assert parse_retry_after(value, NOW) is None


@generated.FEW
@given(
    st.text(max_size=70)
    | st.lists(
        st.sampled_from(["Thu", ",", " ", "01", "Jan", "2026", "00:00:00", ":", "GMT", "+", "-", "9999", "0", "99"]),
        max_size=10,
    ).map("".join),
    st.datetimes(timezones=st.just(UTC)),
)
def test_retry_after_never_raises_and_never_asks_for_less_than_nothing_or_more_than_a_day(
    value: str, now: datetime
) -> None:
    wait = parse_retry_after(value, now)

    assert wait is None or seconds(0) <= wait <= DAY


# Postponing


@pytest.mark.parametrize(
    ("delay", "retry_after", "wait"),
    [
        (10, None, 10),
        (10, 0, 10),
        (10, 5, 10),
        (10, 10, 10),
        (10, 11, 11),
        (10, 3600, 3600),
        (10, 3601, 3600),
        (10, 86400, 3600),
        (0, 60, 60),
        (1800, 3601, 3600),
        (1801, 86400, 3602),
        (36_000, 72_001, 72_000),
        (43_200, 86_400, 86_400),
        (50_000, 86_400, 86_400),
        (90_000, 86_400, 90_000),
        (365 * 86_400, 86_400, 365 * 86_400),
    ],
)
def test_retry_after_moves_an_attempt_later_up_to_its_cap_and_never_earlier(
    delay: float, retry_after: float | None, wait: float
) -> None:
    asked = None if retry_after is None else seconds(retry_after)

    assert postpone(seconds(delay), retry_after=asked) == seconds(wait)


def test_jitter_adds_its_share_and_no_more() -> None:
    assert postpone(seconds(100)) == seconds(100)
    assert postpone(seconds(100), jitter=0.5) == seconds(100)
    assert postpone(seconds(100), jitter=0.5, random=0.5) == seconds(125)
    assert postpone(seconds(100), jitter=0.5, random=1.0) == seconds(150)
    assert postpone(seconds(100), random=1.0) == seconds(100)
    assert postpone(seconds(0), jitter=1.0, random=1.0) == seconds(0)
    assert postpone(seconds(100), retry_after=seconds(200), jitter=0.1, random=1.0) == seconds(220)


@generated.FEW
@given(
    st.timedeltas(seconds(0), timedelta(days=365)),
    st.none() | st.timedeltas(seconds(0), timedelta(days=10_000)),
    st.floats(0, 1),
    st.floats(0, 1, exclude_max=True),
)
def test_an_attempt_is_never_earlier_than_its_phase_nor_later_than_was_granted(
    delay: timedelta, retry_after: timedelta | None, jitter: float, random: float
) -> None:
    wait = postpone(delay, retry_after=retry_after, jitter=jitter, random=random)

    granted = max(delay, min(max(2 * delay, seconds(3600)), DAY)) if retry_after is not None else delay
    assert delay <= wait <= 2 * granted
    if jitter == 0:
        assert wait <= granted
