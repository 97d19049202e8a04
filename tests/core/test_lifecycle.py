"""The fate of a callback: the table, and the functions that must agree with it."""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from typing import Any

import attrs
import pytest
from hypothesis import given

from callbackq.core.lifecycle import (
    TABLE,
    Action,
    Effect,
    Event,
    Transition,
    abandon,
    after_attempt,
    apply_action,
    give_up,
    settle,
)
from callbackq.core.models import AttemptFailure, CallbackRequest, CallbackState, FailedReason, RetryPhase
from callbackq.core.retry import attempts_allowed
from callbackq.core.verdict import Verdict
from callbackq.errors import IllegalTransitionError
from support import generated

WAITING, LOCKED, SUCCEEDED, FAILED, CANCELLED = CallbackState

TEN_SECONDS, FIVE_MINUTES = timedelta(seconds=10), timedelta(minutes=5)

REQUEST = CallbackRequest(
    url="http://example.com",
    retry_phases=[RetryPhase(retries=2, delay=TEN_SECONDS), RetryPhase(retries=1, delay=FIVE_MINUTES)],
)
HOLDING = attrs.evolve(REQUEST, on_exhausted="hold")
NOTIFYING = attrs.evolve(REQUEST, notification_email_address="a@example.com")

# The diagram of the contract, arrow by arrow, and what its text adds.
DIAGRAM = {
    (WAITING, "lock acquired", LOCKED),
    (LOCKED, "delivered", SUCCEEDED),
    (LOCKED, "gave up", FAILED),
    (LOCKED, "retry scheduled", WAITING),
    (LOCKED, "lock released", WAITING),
    (LOCKED, "lock timed out", WAITING),
    (LOCKED, "cancel", CANCELLED),
    (WAITING, "cancel", CANCELLED),
    (FAILED, "redeliver", WAITING),
    # A callback under way is cancelled "after the attempt ends": until then the wish is kept.
    (LOCKED, "cancel noted", LOCKED),
    # A held queue stays closed "until somebody redelivers, skips or cancels".
    (FAILED, "skip", FAILED),
    (FAILED, "cancel", CANCELLED),
}


def arrows_to(state: CallbackState, *, since: CallbackState) -> set[Event]:
    return {event for (before, event), after in TABLE.items() if (before, after) == (since, state)}


# The table


def test_the_table_holds_exactly_the_arrows_of_the_contract() -> None:
    assert {(before, event.value, after) for (before, event), after in TABLE.items()} == DIAGRAM


@pytest.mark.parametrize(("state", "event"), [*product(CallbackState, Event)])
def test_every_pair_of_state_and_event_has_one_outcome_or_none(state: CallbackState, event: Event) -> None:
    expected = [after for before, word, after in DIAGRAM if (before, word) == (state, event.value)]

    assert [TABLE[state, event]] == expected if expected else (state, event) not in TABLE


def test_what_is_delivered_or_cancelled_stays_so() -> None:
    assert {before for before, _ in TABLE} == {WAITING, LOCKED, FAILED}


def test_every_event_has_an_arrow_and_every_state_can_be_reached() -> None:
    assert {event for _, event in TABLE} == set(Event)

    reached = {WAITING}
    while more := {after for (before, _), after in TABLE.items() if before in reached} - reached:
        reached |= more
    assert reached == set(CallbackState)


def test_nobody_can_change_the_table() -> None:
    with pytest.raises(TypeError):
        TABLE[SUCCEEDED, Event.GAVE_UP] = FAILED  # type: ignore[index]


# After an attempt


@pytest.mark.parametrize(
    ("attempts_made", "verdict", "transition"),
    [
        (0, Verdict.DELIVERED, Transition(state=SUCCEEDED, counted=True)),
        (3, Verdict.DELIVERED, Transition(state=SUCCEEDED, counted=True)),
        (99, Verdict.DELIVERED, Transition(state=SUCCEEDED, counted=True)),
        (0, Verdict.RETRY, Transition(state=WAITING, counted=True, delay=TEN_SECONDS)),
        (1, Verdict.RETRY, Transition(state=WAITING, counted=True, delay=TEN_SECONDS)),
        (2, Verdict.RETRY, Transition(state=WAITING, counted=True, delay=FIVE_MINUTES)),
        (3, Verdict.RETRY, Transition(state=FAILED, counted=True, failed_reason=FailedReason.EXHAUSTED)),
        (99, Verdict.RETRY, Transition(state=FAILED, counted=True, failed_reason=FailedReason.EXHAUSTED)),
        (0, Verdict.REFUSED, Transition(state=FAILED, counted=True, failed_reason=FailedReason.REFUSED)),
        (3, Verdict.REFUSED, Transition(state=FAILED, counted=True, failed_reason=FailedReason.REFUSED)),
    ],
)
def test_what_follows_an_answer(attempts_made: int, verdict: Verdict, transition: Transition) -> None:
    assert after_attempt(REQUEST, attempts_made=attempts_made, verdict=verdict) == transition


@pytest.mark.parametrize(("attempts_made", "failure"), [*product(range(5), AttemptFailure)])
def test_what_follows_no_answer(attempts_made: int, failure: AttemptFailure) -> None:
    transition = after_attempt(REQUEST, attempts_made=attempts_made, verdict=Verdict.RETRY, failure=failure)

    if failure is AttemptFailure.INTERRUPTED:
        assert transition == Transition(state=WAITING)
    else:
        assert transition == after_attempt(REQUEST, attempts_made=attempts_made, verdict=Verdict.RETRY)


def test_a_request_without_phases_has_one_attempt() -> None:
    once = CallbackRequest(url="http://example.com")

    assert after_attempt(once, attempts_made=0, verdict=Verdict.RETRY).state is FAILED


@pytest.mark.parametrize(
    ("on_exhausted", "address", "reason"), [*product(("continue", "hold"), ("", "a@b"), FailedReason)]
)
def test_giving_up_holds_the_queue_and_owes_an_email_where_the_request_says_so(
    on_exhausted: Any, address: str, reason: FailedReason
) -> None:
    request = attrs.evolve(REQUEST, on_exhausted=on_exhausted, notification_email_address=address)

    transition = give_up(request, reason)

    assert transition == Transition(
        state=FAILED, hold=on_exhausted == "hold", notify=address != "", failed_reason=reason
    )
    assert give_up(request, reason, counted=True) == attrs.evolve(transition, counted=True)


def test_retry_after_and_jitter_move_the_next_attempt_later() -> None:
    def delay(**more: Any) -> timedelta:
        return after_attempt(REQUEST, attempts_made=0, verdict=Verdict.RETRY, **more).delay

    assert delay(retry_after=timedelta(seconds=77)) == timedelta(seconds=77)
    assert delay(retry_after=timedelta(seconds=3)) == TEN_SECONDS
    assert delay(jitter=0.5, random=1.0) == timedelta(seconds=15)


def test_an_interrupted_attempt_is_due_again_at_once_whatever_was_asked() -> None:
    transition = after_attempt(
        HOLDING,
        attempts_made=99,
        verdict=Verdict.RETRY,
        failure=AttemptFailure.INTERRUPTED,
        retry_after=FIVE_MINUTES,
        jitter=1.0,
        random=1.0,
    )

    assert transition == Transition(state=WAITING)


@generated.FEW
@given(generated.requests)
def test_a_receiver_that_never_accepts_always_gets_exactly_the_attempts_allowed(request: CallbackRequest) -> None:
    delays = []
    transition = Transition(state=WAITING)
    while transition.state is WAITING:
        transition = after_attempt(request, attempts_made=len(delays), verdict=Verdict.RETRY)
        delays.append(transition.delay)

    assert len(delays) == attempts_allowed(request.retry_phases)
    assert delays[:-1] == [phase.delay for phase in request.retry_phases for _ in range(phase.retries)]
    assert transition.state is FAILED
    assert transition.hold is (request.on_exhausted == "hold")
    assert transition.notify is bool(request.notification_email_address)


# Abandoned locks


@pytest.mark.parametrize(("abandoned", "gives_up"), [(0, False), (4, False), (5, True), (6, True)])
def test_a_callback_is_given_up_after_so_many_abandoned_locks_in_a_row(abandoned: int, gives_up: bool) -> None:
    transition = abandon(NOTIFYING, abandoned=abandoned, max_abandoned=5)

    expected = Transition(state=FAILED, notify=True, failed_reason=FailedReason.ABANDONED)
    assert transition == (expected if gives_up else None)


# Settling with what happened meanwhile

DECISIONS = {
    "delivered": Transition(state=SUCCEEDED, counted=True),
    "retry": Transition(state=WAITING, counted=True, delay=TEN_SECONDS),
    "released": Transition(state=WAITING),
    "released for a while": Transition(state=WAITING, delay=TEN_SECONDS),
    "gave up": give_up(NOTIFYING, FailedReason.EXHAUSTED, counted=True),
    "gave up, holding": give_up(HOLDING, FailedReason.REFUSED, counted=True),
    "abandoned": give_up(HOLDING, FailedReason.ABANDONED),
}


@pytest.mark.parametrize(
    ("decision", "accepted_late", "cancel_requested"), [*product(DECISIONS, (False, True), (False, True))]
)
def test_what_happened_while_the_lock_was_held_decides_unless_it_was_delivered(
    decision: str, accepted_late: bool, cancel_requested: bool
) -> None:
    decided = DECISIONS[decision]

    settled = settle(decided, accepted_late=accepted_late, cancel_requested=cancel_requested)

    if decided.state is SUCCEEDED or not (accepted_late or cancel_requested):
        assert settled == decided
    elif accepted_late:
        assert settled == Transition(state=SUCCEEDED, counted=decided.counted)
    else:
        assert settled == Transition(state=CANCELLED, counted=decided.counted)


def test_every_transition_out_of_a_lock_is_an_arrow_of_the_table() -> None:
    decided = [
        after_attempt(request, attempts_made=made, verdict=verdict, failure=failure)
        for request, made, verdict, failure in product(
            (REQUEST, HOLDING, NOTIFYING), range(5), Verdict, (None, *AttemptFailure)
        )
    ]
    decided += DECISIONS.values()

    for transition, accepted_late, cancel_requested in product(decided, (False, True), (False, True)):
        settled = settle(transition, accepted_late=accepted_late, cancel_requested=cancel_requested)
        assert arrows_to(settled.state, since=LOCKED)
        assert settled.delay == timedelta(0) or settled.state is WAITING
        assert (settled.failed_reason is not None) is (settled.state is FAILED)
        assert not (settled.hold or settled.notify) or settled.state is FAILED


# What an operator asks

# (action, state, lock_is_live, holds_queue) → effect; None: whatever it is.
ACTIONS: dict[tuple[Action, CallbackState, bool | None, bool | None], Effect] = {
    (Action.CANCEL, WAITING, None, None): Effect.CANCEL,
    (Action.CANCEL, LOCKED, True, None): Effect.NOTE_CANCEL,
    (Action.CANCEL, LOCKED, False, None): Effect.CANCEL,
    (Action.CANCEL, FAILED, None, True): Effect.CANCEL,
    (Action.REDELIVER, FAILED, None, True): Effect.REDELIVER_IN_PLACE,
    (Action.REDELIVER, FAILED, None, False): Effect.REDELIVER_AT_TAIL,
    (Action.SKIP, FAILED, None, True): Effect.OPEN_QUEUE,
}

# Which event an effect is, and the state it leaves behind.
EFFECTS = {
    Effect.CANCEL: (Event.CANCELLED_BY_REQUEST, CANCELLED),
    Effect.NOTE_CANCEL: (Event.CANCEL_NOTED, LOCKED),
    Effect.REDELIVER_IN_PLACE: (Event.REDELIVERY_REQUESTED, WAITING),
    Effect.REDELIVER_AT_TAIL: (Event.REDELIVERY_REQUESTED, WAITING),
    Effect.OPEN_QUEUE: (Event.QUEUE_OPENED, FAILED),
}


@pytest.mark.parametrize(
    ("action", "state", "lock_is_live", "holds_queue"), [*product(Action, CallbackState, (False, True), (False, True))]
)
def test_an_action_has_its_effect_in_the_states_that_allow_it_and_is_refused_in_all_others(
    action: Action, state: CallbackState, lock_is_live: bool, holds_queue: bool
) -> None:
    expected = [
        effect
        for (wish, where, live, holds), effect in ACTIONS.items()
        if (wish, where) == (action, state) and live in (None, lock_is_live) and holds in (None, holds_queue)
    ]

    def effect() -> Effect:
        return apply_action(action, id="an id", state=state, lock_is_live=lock_is_live, holds_queue=holds_queue)

    if expected:
        assert [effect()] == expected
        event, after = EFFECTS[effect()]
        assert TABLE[state, event] is after
    else:
        with pytest.raises(IllegalTransitionError) as caught:
            effect()
        assert (caught.value.id, caught.value.state, caught.value.action) == ("an id", state.value, action.value)


def test_every_arrow_an_operator_may_take_is_the_effect_of_an_action() -> None:
    taken = {(state, EFFECTS[effect][0]) for (_, state, _, _), effect in ACTIONS.items()}

    events = {event for event, _ in EFFECTS.values()}
    assert taken == {(state, event) for state, event in TABLE if event in events}
