"""What befalls a dispatcher excuses the requests it had under way then, and no others."""

from __future__ import annotations

from random import Random

import pytest

from callbackq.testing.simulation.excuses import Excuses
from callbackq.testing.simulation.world import Actor, World

LONG_US = 10_000_000


@pytest.fixture
def holders() -> tuple[Actor, Actor]:
    world = World(Random(1))
    return Actor(world, "one", []), Actor(world, "other", [])


@pytest.mark.parametrize("fate", ["killed", "frozen"])
@pytest.mark.parametrize("comes", ["before", "meanwhile", "afterwards"])
def test_only_what_befalls_a_holder_while_it_holds_is_an_excuse(
    holders: tuple[Actor, Actor], fate: str, comes: str
) -> None:
    holder, _ = holders
    excuses = Excuses(lock_timeout_us=LONG_US)

    def befall() -> None:
        if fate == "killed":
            holder.die(1.0)
        else:
            holder.hinder(LONG_US)

    if comes == "before" and fate == "frozen":
        befall()
    excuses.given(1, holder)
    if comes == "meanwhile":
        befall()
    excuses.ended(1, timed_out=True)
    if comes == "afterwards":
        befall()

    assert excuses.allow_another(1) is (comes == "meanwhile")


def test_a_request_that_goes_on_under_a_new_token_ends_with_that(holders: tuple[Actor, Actor]) -> None:
    holder, _ = holders
    excuses = Excuses(lock_timeout_us=LONG_US)
    excuses.given(1, holder)
    excuses.given(2, holder)
    excuses.renewed(1, 2)
    excuses.ended(2, timed_out=True)
    holder.die(1.0)

    assert not excuses.allow_another(1)
    assert not excuses.allow_another(2)


def test_a_lost_answer_excuses_another_request_but_not_a_lock_that_is_left(holders: tuple[Actor, Actor]) -> None:
    excuses = Excuses(lock_timeout_us=LONG_US)
    for token, holder in enumerate(holders):
        excuses.given(token, holder)
    excuses.lost_answer(0)
    excuses.never_told([1])

    assert [excuses.allow_another(token) for token in (0, 1)] == [True, False]
    assert [excuses.allow_leaving(token) for token in (0, 1)] == [False, True]
