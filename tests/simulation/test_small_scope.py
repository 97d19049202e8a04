"""Every order of events in a small world keeps the promises, and the search notices when one doesn't."""

from __future__ import annotations

from pathlib import Path

import pytest

from callbackq.judging import Judge
from callbackq.testing.simulation.small_scope import explore
from simulation.planted import PLANTED

PAGE = Path(__file__).parents[2] / "docs/explanation/how-we-test.md"


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("crashes", "freezes"),
    [(0, 0), *(pytest.param(*most, marks=pytest.mark.thorough) for most in ((1, 0), (2, 0), (0, 1)))],
)
def test_no_order_of_events_breaks_a_promise(crashes: int, freezes: int) -> None:
    scope = explore(crashes=crashes, freezes=freezes)

    assert scope.violations == []
    assert scope.endings > 0
    if crashes == 2:
        assert f"{scope.states:,} different states and {scope.steps:,} steps" in PAGE.read_text()


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "rule", "crashes", "callbacks"),
    [
        ("a retry lets the next one go", "early start", 0, 3),
        ("last in, first out", "order", 0, 3),
        ("one attempt too few", "counts", 0, 2),
        ("recorded before it is sent", "contradiction", 0, 2),
        ("the next one may go as soon as the head is locked", "lock overlap", 1, 2),
        ("the retry delay is forgotten", "too soon", 0, 2),
        ("a lock that times out is never taken over", "not drained", 1, 2),
        ("an abandoned lock counts as an attempt", "counts", 1, 2),
        ("tokens repeat", "token order", 1, 2),
    ],
)
def test_a_planted_fault_is_found(name: str, rule: str, crashes: int, callbacks: int) -> None:
    with PLANTED[name]():
        scope = explore(crashes=crashes, callbacks=callbacks)

    assert rule in {violation.rule for violation, _ in scope.violations}


@pytest.mark.thorough
def test_that_tokens_are_not_compared_is_found_when_somebody_freezes() -> None:
    with PLANTED["the token isn't compared"]():
        scope = explore(crashes=0, freezes=1, callbacks=2)

    assert scope.violations != []


@pytest.mark.thorough
def test_a_bug_that_it_found_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # An attempt that outlives its lock was counted as the retry after another dispatcher's attempt.
    monkeypatch.setattr(Judge, "wants_retry", lambda judge, attempt: False)

    scope = explore(crashes=0, freezes=1, callbacks=2)

    assert {violation.rule for violation, _ in scope.violations} == {"counts"}
