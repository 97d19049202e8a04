"""The heap of deadlines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from callbackq.transport.deadlines import Deadlines

OWNERS = st.sampled_from("abcdef")
TIMES = st.integers(0, 50).map(float)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("set"), OWNERS, TIMES),
        st.tuples(st.just("clear"), OWNERS, TIMES),
        st.tuples(st.just("pop"), OWNERS, TIMES),
    ),
    max_size=60,
)


@given(STEPS)
def test_each_owner_has_one_deadline_the_latest_it_was_given(steps: list[tuple[str, str, float]]) -> None:
    deadlines: Deadlines[str] = Deadlines()
    expected: dict[str, float] = {}

    for step, owner, at in steps:
        if step == "set":
            deadlines.set(owner, at)
            expected[owner] = at
        elif step == "clear":
            deadlines.clear(owner)
            expected.pop(owner, None)
        else:
            passed = deadlines.pop_passed(at)
            assert sorted(passed) == sorted(name for name, due in expected.items() if due <= at)
            assert [expected[name] for name in passed] == sorted(expected[name] for name in passed)
            for name in passed:
                del expected[name]
        assert deadlines.next() == min(expected.values(), default=None)


def test_what_has_ended_is_forgotten_long_before_its_deadline() -> None:
    deadlines: Deadlines[object] = Deadlines()

    for _ in range(10_000):
        owner = object()
        deadlines.set(owner, 15.0)
        deadlines.clear(owner)

    assert len(deadlines) < 100
