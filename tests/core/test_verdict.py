"""What an answer means."""

from __future__ import annotations

from http import HTTPStatus

import pytest

from callbackq.core.verdict import ResponsePolicy, Verdict
from callbackq.errors import InvalidRequestError


def test_by_default_2xx_is_delivered_410_is_refused_and_all_else_follows_the_phases() -> None:
    verdicts = {status: ResponsePolicy().judge(status) for status in (0, *range(100, 1000))}

    assert {status for status, verdict in verdicts.items() if verdict is Verdict.DELIVERED} == {*range(200, 300)}
    assert {status for status, verdict in verdicts.items() if verdict is Verdict.REFUSED} == {410}
    assert set(verdicts.values()) == set(Verdict)


@pytest.mark.parametrize(
    "final", [{404, 410}, frozenset({404, 410}), [404, 410], (404, HTTPStatus.GONE, 404), range(404, 411, 6)]
)
def test_final_statuses_are_the_operators_choice(final: object) -> None:
    policy = ResponsePolicy(final_statuses=final)  # type: ignore[arg-type]

    assert policy.final_statuses == frozenset({404, 410})
    assert policy.judge(404) is Verdict.REFUSED
    assert policy.judge(500) is Verdict.RETRY


def test_no_status_need_be_final() -> None:
    assert ResponsePolicy(final_statuses=()).judge(410) is Verdict.RETRY


def test_the_edges_of_final_statuses_are_300_and_599() -> None:
    policy = ResponsePolicy(final_statuses={300, 599})

    assert (policy.judge(300), policy.judge(599)) == (Verdict.REFUSED, Verdict.REFUSED)


@pytest.mark.parametrize(
    "final",
    [
        {299},
        {600},
        {200},
        {0},
        {-1},
        {True},
        {410.0},
        {"410"},
        {None},
        "410",
        "",
        b"\x01",
        410,
        None,
        [[410]],
        [410, 200],
    ],
)
def test_a_policy_that_could_end_what_was_delivered_is_refused(final: object) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ResponsePolicy(final_statuses=final)  # type: ignore[arg-type]

    assert [path for path, _ in caught.value.errors] == ["final_statuses"]


def test_every_faulty_setting_is_named() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        ResponsePolicy(final_statuses={1}, honour_retry_after=1)  # type: ignore[arg-type]

    assert [path for path, _ in caught.value.errors] == ["final_statuses", "honour_retry_after"]


def test_policies_are_values() -> None:
    assert ResponsePolicy(final_statuses=[410]) == ResponsePolicy()  # type: ignore[arg-type]
    assert hash(ResponsePolicy()) == hash(ResponsePolicy(final_statuses={410}))
    assert ResponsePolicy().honour_retry_after
