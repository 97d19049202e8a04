"""What a dispatcher does next, and how long it may rest."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from callbackq.core.planning import Plan, backoff, margin_of, plan
from support import generated

READY = {"free_slots": 3, "seconds_to_look": 0.0, "poll_interval": 5.0, "paused_for": 0.0, "draining": False}


@pytest.mark.parametrize(
    ("change", "acquire", "wait"),
    [
        ({}, 3, 0.0),
        ({"seconds_to_look": -7.0}, 3, 0.0),
        ({"seconds_to_look": 0.5}, 0, 0.5),
        ({"seconds_to_look": 2.0}, 0, 2.0),
        ({"seconds_to_look": 9.0}, 0, 5.0),
        ({"seconds_to_look": float("inf")}, 0, 5.0),
        ({"free_slots": 1}, 1, 0.0),
        ({"free_slots": 0}, 0, 5.0),
        ({"free_slots": 0, "seconds_to_look": 2.0}, 0, 5.0),
        ({"free_slots": -1}, 0, 5.0),
        ({"draining": True}, 0, 5.0),
        ({"draining": True, "seconds_to_look": 2.0}, 0, 5.0),
        ({"paused_for": 0.5}, 0, 0.5),
        ({"paused_for": 2.0}, 0, 2.0),
        ({"paused_for": 9.0}, 0, 5.0),
        ({"paused_for": 2.0, "seconds_to_look": 1.0}, 0, 2.0),
        ({"paused_for": 2.0, "draining": True}, 0, 2.0),
        ({"paused_for": -1.0}, 3, 0.0),
    ],
)
def test_the_next_step_follows_from_the_situation(change: dict[str, Any], acquire: int, wait: float) -> None:
    assert plan(**(READY | change)) == Plan(acquire=acquire, wait=wait)


@generated.FEW
@given(
    st.integers(0, 1000),
    st.floats(-1e6, 1e9),
    st.floats(0.01, 60),
    st.floats(-1, 1e6),
    st.booleans(),
)
def test_a_plan_never_asks_for_more_than_is_free_nor_rests_longer_than_the_poll_interval(
    free_slots: int, seconds_to_look: float, poll_interval: float, paused_for: float, draining: bool
) -> None:
    step = plan(
        free_slots=free_slots,
        seconds_to_look=seconds_to_look,
        poll_interval=poll_interval,
        paused_for=paused_for,
        draining=draining,
    )

    assert 0 <= step.acquire <= free_slots
    assert 0 <= step.wait <= poll_interval
    # Either there is something to do, or there is time to rest: anything else would spin.
    assert (step.acquire > 0) is (step.wait == 0)
    if draining or paused_for > 0:
        assert step.acquire == 0


@pytest.mark.parametrize(
    ("failures", "rest"), [(1, 0.5), (2, 1.0), (3, 2.0), (5, 8.0), (6, 10.0), (7, 10.0), (33, 10.0), (10**9, 10.0)]
)
def test_the_rest_doubles_with_every_failure_up_to_the_longest(failures: int, rest: float) -> None:
    assert backoff(failures, first=0.5, longest=10.0, random=0.0) == rest


def test_chance_takes_off_up_to_half_of_the_rest() -> None:
    rests = [backoff(3, first=0.5, longest=10.0, random=random) for random in (0.0, 0.5, 1.0)]

    assert rests == [2.0, 1.5, 1.0]


@generated.FEW
@given(st.integers(1, 10**6), st.floats(0.001, 10), st.floats(10, 1000), st.floats(0, 1, exclude_max=True))
def test_a_rest_is_never_longer_than_the_longest_nor_shorter_than_half_of_what_it_would_be(
    failures: int, first: float, longest: float, random: float
) -> None:
    rest = backoff(failures, first=first, longest=longest, random=random)
    full = backoff(failures, first=first, longest=longest, random=0.0)

    assert full / 2 <= rest <= full <= longest


@pytest.mark.parametrize(("lock_timeout", "margin"), [(1, 2), (17, 2), (20, 2), (21, 2.1), (60, 6), (3600, 360)])
def test_the_margin_is_two_seconds_or_a_tenth_of_the_locks_life(lock_timeout: float, margin: float) -> None:
    assert margin_of(timedelta(seconds=lock_timeout)) == timedelta(seconds=margin)
