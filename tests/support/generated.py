"""Hypothesis strategies for models: everything a model may hold."""

from __future__ import annotations

from datetime import UTC, timedelta
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from callbackq.core import validation as v
from callbackq.core.models import (
    AttemptFailure,
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
    RetryPhase,
)

FEW = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""For tests of the core, which are many and meant to be fast: few examples, and no clock on a shared machine."""

# Labels and answers come in all of Unicode but lone surrogates; labels without what the checks call control characters.
labels = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029"), max_size=v.MAX_TEXT_LENGTH
)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
bodies = st.none() | st.binary(max_size=100)
instants = st.datetimes(timezones=st.just(UTC))
durations = st.timedeltas(timedelta(0), v.MAX_DURATION)
numbers = st.integers(0, v.MAX_INTEGER)

answers = st.builds(CallbackData, headers=st.dictionaries(texts, texts, max_size=4), data=bodies)

request_headers = st.dictionaries(
    st.from_regex(r"X-[!#$%&'*+.^_`|~0-9A-Za-z-]{1,20}", fullmatch=True),
    st.from_regex(r"([\x21-\x7e]([\x20-\x7e\t]{0,20}[\x21-\x7e])?)?", fullmatch=True),
    max_size=4,
).filter(lambda headers: len({name.lower() for name in headers}) == len(headers))

retry_phases = st.builds(
    RetryPhase,
    retries=st.integers(0, 10),
    delay=st.timedeltas(timedelta(0), timedelta(days=30)),
)

requests: st.SearchStrategy[CallbackRequest] = st.builds(
    CallbackRequest,
    url=st.sampled_from(["http://a.example", "https://a.example:8443/p?q=<&>", "http://[2001:db8::1]/#x"]),
    method=st.sampled_from(v.METHODS),
    post_data=st.builds(CallbackData, headers=request_headers, data=bodies),
    retry_phases=st.lists(retry_phases, max_size=5),
    application_id=labels,
    queue_id=labels,
    notification_email_address=st.sampled_from(["", "a@example.com", "first.last+tag@mail.example"]),
    on_exhausted=st.sampled_from(v.ON_EXHAUSTED),
)

attempts = st.builds(
    CallbackAttempt,
    status_code=st.just(0) | st.integers(100, 999),
    response=answers,
    time=instants,
    duration=durations,
    failure=st.none() | st.sampled_from(AttemptFailure),
    machine_name=labels,
    late=st.booleans(),
    truncated=st.booleans(),
    detail=st.from_regex(r"[\x20-\x7e]{0,120}", fullmatch=True),
)

locks = st.builds(
    CallbackLock,
    acquired=instants,
    timeout=instants,
    completed=st.booleans(),
    machine_name=labels,
    token=numbers,
    ended=st.none() | instants,
)

statuses: st.SearchStrategy[CallbackStatus] = st.builds(
    CallbackStatus,
    id=labels,
    request=requests,
    attempts=st.lists(attempts, max_size=3),
    locks=st.lists(locks, max_size=3),
    state=st.sampled_from(CallbackState),
    queue_id=labels,
    sequence=numbers,
    next_attempt_at=st.none() | instants,
    failed_reason=st.none() | st.sampled_from(FailedReason),
    blocked_by=st.none() | labels,
)

models: st.SearchStrategy[Any] = st.one_of(requests, statuses, attempts, locks, answers, retry_phases)
