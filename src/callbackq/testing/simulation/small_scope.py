"""
Every order of events in a small world: two dispatchers, one queue, three callbacks, and some crashes and freezes.

Chance finds what is likely. This finds what is possible: after each call of the store, each arrival at the receiver and
each answer, all that could happen next is tried, a crash before and after each call among it. What can be seen of the
promises at once is judged at each step, the rest at each end. States that were seen already are not looked at again.

A dispatcher stops in the middle of its step wherever it calls the store. No thread is needed for that: its life is run
again from its start, with the replies that it was given so far, up to the next call.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import datetime, timedelta
from math import inf
from typing import Any, Final

from attrs import evolve, field, frozen, mutable

from callbackq.core.delivery import Delivery
from callbackq.core.models import CallbackRequest, CallbackState, RetryPhase
from callbackq.errors import LockLostError
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.testing.history import Arrival, History, Violation
from callbackq.testing.simulation.replayed import HINT, LOCK_TIMEOUT, Clock, Life, Reply, go_on

__all__ = ["SmallScope", "explore"]

_RETRY_DELAY: Final = timedelta(seconds=5)
# A refusal, the calls of the store in between, and the time that passes: far more than any way takes. Who gets there
# may go on for ever, with ever higher tokens.
_DEEPEST: Final = 150


@frozen(kw_only=True)
class SmallScope:
    """
    What came of trying everything.

    Attributes:
        states: different states that were reached.
        steps: steps from one state to the next that were tried.
        endings: different states in which all callbacks had ended.
        violations: every broken promise, with the steps that led there.
    """

    states: int
    steps: int
    endings: int
    violations: list[tuple[Violation, tuple[str, ...]]] = field(factory=list)


@frozen
class _Flight:
    """A request on its way to the receiver."""

    machine: int
    number: int
    delivery: Delivery = field(eq=False)


@mutable
class _State:
    """The whole world at one moment."""

    store: InMemoryDataAccess
    clock: Clock
    lives: list[Life]
    flights: tuple[_Flight, ...] = ()
    arrivals: tuple[Arrival, ...] = ()
    crashes: int = 0
    freezes: int = 0
    # Whose locks were held by somebody who crashed or froze: callback and token.
    hit: frozenset[tuple[str, int]] = frozenset()


class _Explorer:
    def __init__(self, crashes: int, freezes: int, machines: int, callbacks: int) -> None:
        self._most_crashes = crashes
        self._most_freezes = freezes
        self._machines = machines
        self._ids = [f"c{number}" for number in range(callbacks)]
        # How each state was reached first, and from which it can be reached.
        self._reached: dict[bytes, tuple[bytes, str] | None] = {}
        self._before: defaultdict[bytes, list[bytes]] = defaultdict(list)
        self._steps = 0
        self._endings: list[bytes] = []
        self._violations: list[tuple[Violation, tuple[str, ...]]] = []
        self._memo: dict[int, object] = {}

    def explore(self) -> SmallScope:
        clock = Clock()
        store = InMemoryDataAccess(clock=clock)
        for id in self._ids:
            request = CallbackRequest(
                url="http://receiver.test/", queue_id="q", retry_phases=[RetryPhase(retries=1, delay=_RETRY_DELAY)]
            )
            store.store_callback_request(request, id=id)
            self._memo[id_of(request)] = request
        self._memo[id_of(store._mutex)] = store._mutex
        state = _State(store, clock, [])
        for machine in range(self._machines):
            self._start(state, machine)
        # Not recursive: ways are longer than Python's stack.
        begin = self._key(state)
        todo = [(state, begin, 0)]
        self._reached[begin] = None
        while todo:
            state, before, depth = todo.pop()
            for words, following in self._following(state):
                self._steps += 1
                key = self._key(following)
                self._before[key].append(before)
                # Also of a state that was seen already: it may have been reached in a better way before.
                for violation in self._judge_step(state, following):
                    self._violations.append((violation, (*self._way(before), words)))
                if key in self._reached:
                    continue
                self._reached[key] = before, words
                if self._is_over(following):
                    self._endings.append(key)
                    self._judge(following, self._way(key))
                elif depth < _DEEPEST:
                    todo.append((following, key, depth + 1))
        self._judge_dead_ends()
        return SmallScope(
            states=len(self._reached), steps=self._steps, endings=len(self._endings), violations=self._violations
        )

    def _way(self, key: bytes) -> tuple[str, ...]:
        """Give the steps by which a state was reached first."""
        steps = []
        while (step := self._reached[key]) is not None:
            key, words = step
            steps.append(words)
        return tuple(reversed(steps))

    def _judge_dead_ends(self) -> None:
        """From each state, all must still be able to end: also where the world goes round in circles."""
        alive, todo = set(self._endings), list(self._endings)
        while todo:
            for before in self._before[todo.pop()]:
                if before not in alive:
                    alive.add(before)
                    todo.append(before)
        dead = next((key for key in self._reached if key not in alive), None)
        if dead is not None:
            detail = f"no way from here to an end, nor from {len(self._reached) - len(alive) - 1} other states"
            self._violations.append((Violation(rule="not drained", callback_id="", detail=detail), self._way(dead)))

    def _copy(self, state: _State) -> _State:
        clock = Clock(state.clock.now_us)
        memo: dict[int, Any] = {**self._memo, id_of(state.clock): clock}
        return evolve(
            state, store=deepcopy(state.store, memo), clock=clock, lives=[evolve(life) for life in state.lives]
        )

    def _key(self, state: _State) -> bytes:
        callbacks = tuple(
            (
                one.state.value,
                max((one.due - state.clock.now()) // timedelta(microseconds=1), -1) if one.state.is_open else 0,
                one.sequence,
                one.attempts_made,
                one.abandoned,
                one.accepted_late,
                tuple((lock.token, lock.completed, lock.ended is None) for lock in one.locks),
                tuple((result.token, result.written is None) for result in one.results),
            )
            for one in state.store._callbacks.values()
        )
        last = {one.callback_id: state.clock.now_us - round(one.started * 1e6) for one in state.arrivals}
        is_open = {one.id for one in state.store._callbacks.values() if one.state.is_open}
        facts = (
            callbacks,
            tuple(life.key(state.clock.now_us) for life in state.lives),
            tuple((flight.machine, flight.delivery.token) for flight in state.flights),
            tuple((one.callback_id, one.token, one.accepted is None) for one in state.arrivals),
            tuple(ago for id, ago in last.items() if id in is_open),
            state.crashes,
            state.freezes,
            sorted(state.hit),
        )
        return hashlib.blake2b(repr(facts).encode(), digest_size=16).digest()

    def _start(self, state: _State, machine: int) -> None:
        life = Life(f"m{machine}", (Reply(state.clock.now_us, "start", state.clock.now_us),))
        if machine == len(state.lives):
            state.lives.append(life)
        else:
            state.lives[machine] = life
        self._run(state, machine)

    def _run(self, state: _State, machine: int) -> None:
        life = state.lives[machine]
        before = life.sent
        sent = go_on(life, state.store)
        flights = (_Flight(machine, before + number, delivery) for number, delivery in enumerate(sent))
        state.flights += tuple(flights)

    # What can happen next.

    def _following(self, state: _State) -> Iterator[tuple[str, _State]]:
        found = False
        for machine, life in enumerate(state.lives):
            if life.is_ready(state.clock.now_us):
                found = True
                yield self._with(state, machine, self._call if life.call else self._step)
        for flight in state.flights:
            found = True
            following = self._copy(state)
            self._arrive(following, flight)
            yield f"{flight.delivery.callback_id} arrives", following
        if state.crashes < self._most_crashes:
            yield from self._crashes(state)
        yield from self._freezes(state)
        if not found:
            following = self._copy(state)
            wakes = min((life.wakes_us for life in state.lives if not life.is_frozen), default=inf)
            if wakes == inf:
                return
            following.clock.now_us = int(wakes)
            yield "time passes", following

    def _with(self, state: _State, machine: int, happen: Callable[[_State, int], str]) -> tuple[str, _State]:
        following = self._copy(state)
        return f"machine {machine} {happen(following, machine)}", following

    def _crashes(self, state: _State) -> Iterator[tuple[str, _State]]:
        for machine, life in enumerate(state.lives):
            yield self._with(state, machine, self._crash)
            if life.call is not None:
                yield self._with(state, machine, self._crash_after_call)

    def _freezes(self, state: _State) -> Iterator[tuple[str, _State]]:
        for machine, life in enumerate(state.lives):
            if life.is_frozen:
                yield self._with(state, machine, self._thaw)
            elif state.freezes < self._most_freezes and self._can_freeze(state, machine):
                yield self._with(state, machine, self._freeze)

    @staticmethod
    def _can_freeze(state: _State, machine: int) -> bool:
        # In the middle of something. What it has sent must have arrived: a copy that is under way for as long as a lock
        # lives can't be stopped by anybody.
        is_busy = state.lives[machine].call is not None or bool(state.lives[machine].answers)
        return is_busy and all(flight.machine != machine for flight in state.flights)

    def _freeze(self, state: _State, machine: int) -> str:
        state.freezes += 1
        state.lives[machine].is_frozen = True
        self._hit(state, machine)
        return "freezes"

    @staticmethod
    def _thaw(state: _State, machine: int) -> str:
        state.lives[machine].is_frozen = False
        return "goes on"

    @staticmethod
    def _hit(state: _State, machine: int) -> None:
        name = state.lives[machine].machine_name
        state.hit |= {
            (one.id, one.locks[-1].token)
            for one in state.store._callbacks.values()
            if one.state is CallbackState.LOCKED and one.locks[-1].machine_name == name
        }

    def _crash(self, state: _State, machine: int) -> str:
        state.crashes += 1
        self._hit(state, machine)
        state.flights = tuple(flight for flight in state.flights if flight.machine != machine)
        self._start(state, machine)
        return "crashes"

    def _crash_after_call(self, state: _State, machine: int) -> str:
        words = self._answer_call(state, machine)
        return f"{words}, and {self._crash(state, machine)}"

    def _call(self, state: _State, machine: int) -> str:
        words = self._answer_call(state, machine)
        self._run(state, machine)
        return words

    def _answer_call(self, state: _State, machine: int) -> str:
        life = state.lives[machine]
        assert life.call is not None
        name, args, kwargs = life.call
        wakes: list[None] = []
        unsubscribe = state.store.subscribe(lambda: wakes.append(None))
        value = getattr(state.store, name)(*args, **kwargs)
        unsubscribe()
        if wakes:
            # Both hear of it: at their next rest, which this ends.
            for one in state.lives:
                if HINT not in one.answers:
                    one.answers += (HINT,)
        words = f"{name} {_in_words(value, state)}"
        life.replies += (Reply(state.clock.now_us, name, value),)
        return words

    def _step(self, state: _State, machine: int) -> str:
        life = state.lives[machine]
        answers, life.answers = life.answers, ()
        words = f"wakes {answers}"
        life.replies += (Reply(state.clock.now_us, "rest", answers),)
        self._run(state, machine)
        return words

    def _arrive(self, state: _State, flight: _Flight) -> None:
        delivery = flight.delivery
        state.flights = tuple(one for one in state.flights if one != flight)
        # The second callback is refused once.
        is_refused = delivery.callback_id == self._ids[1] and delivery.attempt == 1
        at = state.clock.now_us / 1e6
        state.arrivals += (
            Arrival(
                callback_id=delivery.callback_id,
                queue_id="q",
                sequence=delivery.sequence,
                token=delivery.token,
                started=at,
                accepted=None if is_refused else at,
            ),
        )
        state.lives[flight.machine].answers += ((flight.number, 503 if is_refused else 200),)

    # Judging.

    def _judge_step(self, before: _State, after: _State) -> Iterator[Violation]:
        """Judge what the state that was reached doesn't keep: what lay between, and how long it took."""
        callbacks = list(after.store._callbacks.values())
        locked = [one for one in callbacks if one.state is CallbackState.LOCKED]
        for one in locked:
            if one is not next(other for other in callbacks if other.state.is_open):
                yield Violation(rule="early lock", callback_id=one.id, detail="locked behind one that is open")
            if one is not locked[0]:
                yield Violation(rule="lock overlap", callback_id=one.id, detail="locked beside another")
        for one in callbacks:
            for lock in one.locks:
                if lock.ended is not None and not lock.completed and lock.ended < lock.acquired + LOCK_TIMEOUT:
                    yield Violation(rule="takeover", callback_id=one.id, detail=f"token {lock.token} ended early")
        for arrival in after.arrivals[len(before.arrivals) :]:
            yield from self._judge_arrival(before, arrival)

    @staticmethod
    def _judge_arrival(before: _State, arrival: Arrival) -> Iterator[Violation]:
        one = before.store._callbacks[arrival.callback_id]
        if one.state is not CallbackState.LOCKED or one.locks[-1].token != arrival.token:
            yield Violation(rule="unrecorded", callback_id=one.id, detail="sent without a live lock")
        last = next((past for past in reversed(before.arrivals) if past.callback_id == one.id), None)
        recorded = {lock.token for lock in one.locks if lock.completed}
        if last is not None and last.accepted is None and last.token in recorded:
            waited = timedelta(seconds=arrival.started - last.started)
            if waited < _RETRY_DELAY:
                yield Violation(rule="too soon", callback_id=one.id, detail=f"retried after {waited}")

    def _is_over(self, state: _State) -> bool:
        return not any(one.state.is_open for one in state.store._callbacks.values())

    def _judge(self, state: _State, way: tuple[str, ...]) -> None:
        statuses = list(state.store.list_callbacks())
        # Who froze and came back in time has recorded what came of it, and explains nothing.
        abandoned = {(one.id, lock.token) for one in statuses for lock in one.locks if not lock.completed}
        judgement = History(state.arrivals, statuses, acknowledged=self._ids, excused=state.hit & abandoned).judge()
        self._violations += [(violation, way) for violation in judgement.violations]
        for callback in state.store._callbacks.values():
            # One retry is all the second one needs, and no crash uses it up. What was accepted late isn't counted.
            counted = callback.attempts_made
            most = 2 if callback.id == self._ids[1] else 1
            if callback.state is not CallbackState.SUCCEEDED or not most - callback.accepted_late <= counted <= most:
                detail = f"{callback.state.value} after {callback.attempts_made} attempts"
                self._violations.append((Violation(rule="counts", callback_id=callback.id, detail=detail), way))


def id_of(thing: object) -> int:
    """Python's `id`, a word that means something else here."""
    return id(thing)


def _in_words(value: Any, state: _State) -> str:
    if isinstance(value, datetime):
        return str((value - state.clock.now()) // timedelta(microseconds=1))
    if not isinstance(value, list):
        return str(value)
    words = []
    for one in value:
        if isinstance(one, LockLostError):
            words.append("lost")
        elif hasattr(one, "lock"):
            words.append(f"{one.id} token {one.lock.token} abandoned {one.abandoned} made {one.attempts_made}")
        else:
            words.append(f"{one.state.value} {one.delay}")
    return ", ".join(words)


def explore(*, crashes: int = 2, freezes: int = 0, machines: int = 2, callbacks: int = 3) -> SmallScope:
    """
    Try every order of events.

    Args:
        crashes: how many there may be in one run, at most.
        freezes: how often a dispatcher may stand still in the middle of something, for any time, and go on.
        machines: how many dispatchers.
        callbacks: how many, at least 2, all in one queue; the second is refused once.
    """
    return _Explorer(crashes, freezes, machines, callbacks).explore()
