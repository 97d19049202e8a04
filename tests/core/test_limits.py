"""`RequestLimits`: an operator's limits, below the ceilings that protect the library."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from attrs import fields

from callbackq import CallbackData, CallbackRequest, InvalidRequestError, RequestLimits, RetryPhase
from callbackq.core import validation as v

MICROSECOND = timedelta(microseconds=1)

# For each limit: its bounds, a value for it, a request that just fits, one that doesn't, and where.
CASES: dict[str, tuple[tuple[Any, Any], Any, dict[str, Any], dict[str, Any], str]] = {
    "max_body_bytes": (
        (0, 16 * 1024 * 1024),
        3,
        {"post_data": CallbackData(data=b"abc")},
        {"post_data": CallbackData(data=b"abcd")},
        "post_data.data",
    ),
    "max_headers": (
        (0, 100),
        1,
        {"post_data": CallbackData(headers={"A": "b"})},
        {"post_data": CallbackData(headers={"A": "b", "C": "d"})},
        "post_data.headers",
    ),
    "max_headers_bytes": (
        (0, 64 * 1024),
        6,
        {"post_data": CallbackData(headers={"A": "b", "C": "def"})},
        {"post_data": CallbackData(headers={"A": "b", "C": "defg"})},
        "post_data.headers",
    ),
    "max_attempts": (
        (1, 1_000_001),
        4,
        {"retry_phases": [RetryPhase(retries=1, delay=MICROSECOND), RetryPhase(retries=2, delay=MICROSECOND)]},
        {"retry_phases": [RetryPhase(retries=2, delay=MICROSECOND), RetryPhase(retries=2, delay=MICROSECOND)]},
        "retry_phases",
    ),
    "max_total_delay": (
        (timedelta(0), timedelta(days=3650)),
        timedelta(hours=1),
        {"retry_phases": [RetryPhase(retries=6, delay=timedelta(minutes=10))]},
        {"retry_phases": [RetryPhase(retries=6, delay=timedelta(minutes=10) + MICROSECOND)]},
        "retry_phases",
    ),
}


def request(**values: Any) -> CallbackRequest:
    return CallbackRequest(url="https://receiver.example/hook", **values)


def test_every_limit_has_a_case_here() -> None:
    assert list(CASES) == [field.name for field in fields(RequestLimits)]


@pytest.mark.parametrize("name", CASES)
def test_a_limit_lets_in_what_fits_and_nothing_beyond(name: str) -> None:
    _, value, fits, exceeds, path = CASES[name]
    limits = RequestLimits(**{name: value})

    limits(request(**fits))
    with pytest.raises(InvalidRequestError) as refused:
        limits(request(**exceeds))

    ((where, reason),) = refused.value.errors
    assert where == path
    assert reason.startswith("must not ")
    assert reason.endswith(f"({name})"), "it names the setting that an operator would change"


@pytest.mark.parametrize("name", CASES)
def test_a_limit_may_be_set_up_to_the_ceiling_and_not_beyond(name: str) -> None:
    (least, most), *_ = CASES[name]
    step = MICROSECOND if isinstance(most, timedelta) else 1

    assert getattr(RequestLimits(**{name: least}), name) == least
    assert getattr(RequestLimits(**{name: most}), name) == most
    for wrong in (least - step, most + step, None, "1", 1.0, True):
        with pytest.raises(InvalidRequestError) as refused:
            RequestLimits(**{name: wrong})
        assert [path for path, _ in refused.value.errors] == [name]


def test_all_faulty_limits_are_named_at_once() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        RequestLimits(**dict.fromkeys(CASES, -1))  # type: ignore[arg-type]

    assert [path for path, _ in refused.value.errors] == list(CASES)


def test_every_excess_is_listed_and_no_value_quoted() -> None:
    limits = RequestLimits(
        max_body_bytes=0, max_headers=0, max_headers_bytes=0, max_attempts=1, max_total_delay=timedelta(0)
    )
    secret = "canary"

    with pytest.raises(InvalidRequestError) as refused:
        limits(
            request(
                post_data=CallbackData(headers={secret: secret}, data=secret.encode()),
                retry_phases=[RetryPhase(retries=1, delay=timedelta(hours=7))],
                queue_id=secret,
            )
        )

    assert [path for path, _ in refused.value.errors] == [
        "post_data.headers",
        "post_data.headers",
        "post_data.data",
        "retry_phases",
        "retry_phases",
    ]
    assert secret not in str(refused.value)


def test_by_default_a_body_may_have_a_mebibyte_and_everything_else_what_the_models_allow() -> None:
    limits = RequestLimits()
    phases = [RetryPhase(retries=10_000, delay=timedelta(0))] * (v.MAX_PHASES - 1)

    limits(request(post_data=CallbackData(data=bytes(2**20))))
    limits(request(retry_phases=[*phases, RetryPhase(retries=10, delay=v.MAX_DELAY)]))
    limits(request(post_data=CallbackData(headers={f"X{n}": "a" * 8190 for n in range(8)})))
    limits(request(post_data=CallbackData(headers={f"{n}": "" for n in range(100)})))
    with pytest.raises(InvalidRequestError):
        limits(request(post_data=CallbackData(data=bytes(2**20 + 1))))


def test_no_request_that_a_model_allows_is_too_much_to_judge() -> None:
    highest = RequestLimits(max_body_bytes=v.MAX_BODY_BYTES)

    highest(request(retry_phases=[RetryPhase(retries=10_000, delay=timedelta(0))] * v.MAX_PHASES))
    highest(request(post_data=CallbackData(data=bytes(v.MAX_BODY_BYTES))))
