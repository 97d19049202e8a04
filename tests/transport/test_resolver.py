"""Who gets a thread to look names up."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from callbackq.transport.resolver import MAX_PER_HOST, MAX_THREADS, LookUp, ResolverPool


@pytest.fixture
def pool() -> Iterator[ResolverPool]:
    pool = ResolverPool()
    yield pool
    pool.close()


class Held:
    """A look-up that hangs until it is let go."""

    def __init__(self, host: str) -> None:
        self.began = threading.Event()
        self.let_go = threading.Event()
        self.found = threading.Event()
        self.look_up = LookUp(host, self._resolve, self.found.set)

    def _resolve(self) -> list[str]:
        self.began.set()
        self.let_go.wait(20)
        return [self.look_up.host]


def begin(pool: ResolverPool, *hosts: str) -> list[Held]:
    held = [Held(host) for host in hosts]
    for one in held:
        pool.submit(one.look_up)
    return held


def test_look_ups_handed_over_at_once_get_a_thread_each_also_when_one_is_idle(pool: ResolverPool) -> None:
    for _ in range(20):
        [first] = begin(pool, "a")
        first.let_go.set()
        assert first.found.wait(10)

        both = begin(pool, "b", "c")

        assert all(one.began.wait(10) for one in both)
        for one in both:
            one.let_go.set()


def test_third_look_up_of_a_host_begins_when_one_of_its_others_ends(pool: ResolverPool) -> None:
    first, second, third = begin(pool, "a", "a", "a")
    assert first.began.wait(10)
    assert second.began.wait(10)
    assert not third.began.is_set()

    first.let_go.set()

    assert third.began.wait(10)
    for one in (second, third):
        one.let_go.set()
        assert one.found.wait(10)
        assert one.look_up.result() == ["a"]


def test_look_up_that_was_given_up_never_begins(pool: ResolverPool) -> None:
    first, second, third, fourth = begin(pool, "a", "a", "a", "a")
    assert first.began.wait(10)
    assert second.began.wait(10)

    assert not pool.give_up(third.look_up)
    first.let_go.set()

    assert fourth.began.wait(10)
    assert not third.began.is_set()
    for one in (second, fourth):
        one.let_go.set()


def test_giving_up_tells_whether_other_hosts_held_all_threads(pool: ResolverPool) -> None:
    held = begin(pool, *["hang"] * MAX_PER_HOST, *(f"hang{number}" for number in range(MAX_THREADS - MAX_PER_HOST)))
    assert all(one.began.wait(10) for one in held)
    own, other = begin(pool, "hang", "innocent")

    assert pool.give_up(other.look_up)
    assert not pool.give_up(own.look_up)
    assert not pool.give_up(held[0].look_up)
    for one in held:
        one.let_go.set()


def test_hosts_with_several_look_ups_leave_half_of_the_threads_to_others(pool: ResolverPool) -> None:
    held = begin(pool, *(f"hang{number // 2}" for number in range(MAX_THREADS)))
    assert all(one.began.wait(10) for one in held[::2])

    others = begin(pool, *(f"other{number}" for number in range(MAX_THREADS // 4)))

    assert all(one.began.wait(10) for one in others)
    for one in (*held, *others):
        one.let_go.set()


def test_forty_seven_hanging_names_stop_nobody_and_forty_eight_do_as_the_documentation_says(pool: ResolverPool) -> None:
    held = begin(pool, *(f"hang{number // 2}" for number in range(32)))
    assert all(one.began.wait(10) for one in held)
    held += begin(pool, *(f"hang{number}" for number in range(16, 47)))
    assert all(one.began.wait(10) for one in held)
    assert len({one.look_up.host for one in held}) == 47

    [innocent] = begin(pool, "innocent")

    assert innocent.began.wait(10)
    innocent.let_go.set()
    assert innocent.found.wait(10)
    [last] = begin(pool, "hang47")
    assert last.began.wait(10)
    [stopped] = begin(pool, "innocent")
    assert pool.give_up(stopped.look_up)
    assert not stopped.began.is_set()
    for one in (*held, last):
        one.let_go.set()


def test_thread_with_nothing_to_do_ends_and_the_next_look_up_gets_another() -> None:
    threads: list[threading.Thread] = []
    pool = ResolverPool(rest=0.0)

    for _ in range(2):
        found = threading.Event()
        pool.submit(LookUp("a", lambda: threads.append(threading.current_thread()) or [], found.set))  # type: ignore[func-returns-value]
        assert found.wait(10)
        threads[-1].join(10)

    first, second = threads
    assert first is not second
    assert not first.is_alive()
    assert not second.is_alive()
