"""
Judges a run from outside: by what the receivers saw and what the store says in the end.

Nothing a dispatcher says of itself counts. Feed it every request that reached a receiver (`Arrival`), the final
status of every callback, and the ids whose storing was acknowledged; it names each broken promise. The more it is told
of what operators did and whom a kill hit, the less it has to let pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate, pairwise
from typing import Final

from attrs import field, frozen

from callbackq.core.models import (
    NEVER,
    CallbackAttempt,
    CallbackLock,
    CallbackState,
    CallbackStatus,
    FailedReason,
)

__all__ = ["Arrival", "History", "Judgement", "Violation"]

# A difference of two floats that stand for whole microseconds may miss the true one by less than that.
_ROUNDING_SECONDS: Final = 1e-6
# The end of what is not over.
_NOT_YET: Final = datetime.max.replace(tzinfo=UTC)


@frozen(kw_only=True)
class Arrival:
    """
    One request as a receiver saw it.

    Attributes:
        callback_id: from ``webhook-id``.
        queue_id: from ``callbackq-queue``; empty for a callback with a queue of its own.
        sequence: from ``callbackq-sequence``.
        token: from ``callbackq-token``.
        started: when the request was complete, by the receivers' common clock, in seconds.
        accepted: when a 2xx answer was begun, by the same clock; ``None`` when it was not.
    """

    callback_id: str
    queue_id: str
    sequence: int
    token: int
    started: float
    accepted: float | None

    @classmethod
    def from_headers(cls, headers: Mapping[str, str], *, started: float, accepted: float | None) -> Arrival:
        """Read the headers callbackq sends; names in lower case."""
        return cls(
            callback_id=headers["webhook-id"],
            queue_id=headers.get("callbackq-queue", ""),
            sequence=int(headers["callbackq-sequence"]),
            token=int(headers["callbackq-token"]),
            started=started,
            accepted=accepted,
        )


@frozen(kw_only=True)
class Violation:
    """
    A promise that was broken.

    Attributes:
        rule: which, one of `RULES`.
        callback_id: by which callback.
        detail: what was seen.
    """

    rule: str
    callback_id: str
    detail: str


RULES: Final = {
    "lost": "every callback whose storing was acknowledged is in the store",
    "not drained": "every callback is finished in the end",
    "cancelled": "a callback is cancelled only if somebody asked for that",
    "contradiction": "state, record and receivers agree on what was accepted, unless an answer was lost or came late",
    "unfounded": "a callback has failed for a reason that its record bears out",
    "unrecorded": "every request was sent under a lock that is in the record",
    "token order": "requests for one callback carry rising tokens",
    "too many": "no more requests than the phases allow, besides those whose locks were abandoned",
    "too few": "a callback has failed as exhausted only after all attempts that its phases allow",
    "too soon": "a retry starts no earlier than its phase's delay after the request before",
    "order": "first acceptances in a queue come in the order of its numbers",
    "early start": "no request starts before those callbacks in front that are accepted at all have been accepted",
    "early lock": "no callback is locked before those in front of it in its queue are over, accepted or not",
    "stale": "no request for a callback starts after one for a later callback of its queue",
    "lock overlap": "no two locks of a queue are live at a time",
    "takeover": "no live lock is taken over, unless its dispatcher was killed or stood still",
    "duplicates": "second acceptances stay within the bound, or each has an excuse of its own",
}
"""What is judged, and the promise behind each word."""


@frozen(kw_only=True)
class Judgement:
    """
    What became of a run.

    Attributes:
        callbacks: how many were judged.
        arrivals: requests that reached a receiver.
        takeovers: locks that were abandoned and taken over.
        duplicates: acceptances beyond the first of each callback.
        duplicates_bound: how many were allowed, at most.
        violations: every broken promise.
    """

    callbacks: int
    arrivals: int
    takeovers: int
    duplicates: int
    duplicates_bound: int
    violations: Sequence[Violation] = field(factory=list)

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        return not self.violations

    def broken(self) -> dict[str, int]:
        """Broken rules and how often each was broken."""
        return dict(Counter(violation.rule for violation in self.violations))


class History:
    """
    A run to be judged.

    Args:
        arrivals: all requests that reached a receiver.
        statuses: the final status of every callback in the store.
        acknowledged: ids for which `DataAccess.store_callback_request` returned.
        duplicates_bound: callbacks that were in flight when a dispatcher was killed or frozen, summed over all
            kills. 0 for a run without any. Of no meaning when *excused* is given.
        redelivered: ids of callbacks that somebody had redelivered: their retries began anew, so they aren't counted.
            They may have been locked before they came to their place, and may be accepted once more.
        stale_requests: callback id and token of requests whose dispatcher stood still between its last look at the
            clock and the first byte, until its lock had timed out. No design rules that out; their order isn't judged.
        cancelled: ids of callbacks that somebody cancelled or skipped. What was skipped stays FAILED, and no longer
            closes its queue.
        excused: callback id and token of locks whose dispatcher was killed or stood still while it held them, or could
            not learn what was answered. Only such a lock may be taken over before its time is up, and only what was
            accepted under such locks may be accepted again. ``None``: nobody knows; no takeover is judged, and
            *duplicates_bound* bounds what is accepted again.
        final_statuses: those of the dispatchers' `ResponsePolicy`.
    """

    def __init__(
        self,
        arrivals: Iterable[Arrival],
        statuses: Iterable[CallbackStatus],
        *,
        acknowledged: Iterable[str],
        duplicates_bound: int = 0,
        redelivered: Collection[str] = (),
        stale_requests: Collection[tuple[str, int]] = (),
        cancelled: Collection[str] = (),
        excused: Collection[tuple[str, int]] | None = None,
        final_statuses: Collection[int] = (410,),
    ) -> None:
        self._arrivals = sorted(arrivals, key=lambda arrival: arrival.started)
        self._redelivered = frozenset(redelivered)
        self._stale_requests = frozenset(stale_requests)
        self._statuses = {status.id: status for status in statuses}
        self._acknowledged = list(acknowledged)
        self._cancelled = frozenset(cancelled)
        self._excused = None if excused is None else frozenset(excused)
        self._final_statuses = frozenset(final_statuses)
        self._bound = duplicates_bound if excused is None else len(excused)
        self._by_callback: dict[str, list[Arrival]] = defaultdict(list)
        for arrival in self._arrivals:
            self._by_callback[arrival.callback_id].append(arrival)
        self._violations: list[Violation] = []

    def judge(self) -> Judgement:
        """Apply every rule."""
        self._violations = []
        self._judge_statuses()
        for id, arrivals in self._by_callback.items():
            self._judge_callback(id, arrivals)
        queues: dict[str, list[Arrival]] = defaultdict(list)
        for arrival in self._arrivals:
            if arrival.queue_id and not self._is_stale(arrival):
                queues[arrival.queue_id].append(arrival)
        for queue_arrivals in queues.values():
            self._judge_queue(queue_arrivals)
        self._judge_turns()
        self._judge_locks()
        duplicates = sum(max(_acceptances(arrivals) - 1, 0) for arrivals in self._by_callback.values())
        if self._excused is not None:
            self._judge_takeovers(self._excused)
            self._judge_duplicates(self._excused)
        elif duplicates > self._bound:
            self._break("duplicates", "", f"{duplicates} second acceptances, {self._bound} allowed")
        return Judgement(
            callbacks=len(self._statuses),
            arrivals=len(self._arrivals),
            takeovers=sum(
                lock.ended is not None and not lock.completed
                for status in self._statuses.values()
                for lock in status.locks
            ),
            duplicates=duplicates,
            duplicates_bound=self._bound,
            violations=self._violations,
        )

    def _judge_statuses(self) -> None:
        for id in self._acknowledged:
            if id not in self._statuses:
                self._break("lost", id, "acknowledged, but not in the store")
        for id, status in self._statuses.items():
            if status.state.is_open:
                self._break("not drained", id, f"still {status.state.value}")
            elif status.state is CallbackState.CANCELLED and id not in self._cancelled:
                self._break("cancelled", id, "cancelled, says the store; nobody did that")
            elif status.state is CallbackState.FAILED:
                self._judge_reason(status)
            arrivals = self._by_callback.get(id, [])
            if status.state is CallbackState.SUCCEEDED:
                self._judge_success(status, arrivals)
            else:
                self._judge_denial(status, arrivals)

    def _judge_reason(self, status: CallbackStatus) -> None:
        last = next((attempt for attempt in reversed(status.attempts) if not attempt.late), None)
        if status.failed_reason is FailedReason.REFUSED:
            if last is None or last.status_code not in self._final_statuses:
                answer = "no answer at all" if last is None else f"{last.status_code} is not final"
                self._break("unfounded", status.id, f"refused, says the store; {answer}")
        elif status.failed_reason is FailedReason.ABANDONED and all(lock.completed for lock in status.locks):
            self._break("unfounded", status.id, "abandoned, says the store; its holders ended all of its locks")
        elif status.failed_reason is FailedReason.EXHAUSTED and status.id not in self._redelivered:
            # Of the record, since not every attempt reaches a receiver.
            attempts = sum(attempt.is_counted for attempt in status.attempts)
            allowed = 1 + len(_delays(status))
            if attempts < allowed:
                self._break("too few", status.id, f"{attempts} attempts where the phases allow {allowed}")

    def _judge_success(self, status: CallbackStatus, arrivals: list[Arrival]) -> None:
        if not _acceptances(arrivals):
            self._break("contradiction", status.id, "delivered, says the store; no receiver accepted it")
        elif not any(_is_acceptance(attempt) for attempt in status.attempts):
            self._break("contradiction", status.id, "delivered, says the store; no answer in its record says so")

    def _judge_denial(self, status: CallbackStatus, arrivals: list[Arrival]) -> None:
        """Judge that a callback does not count as delivered."""
        if any(attempt.is_counted and _is_acceptance(attempt) for attempt in status.attempts):
            self._break("contradiction", status.id, f"{status.state.value}, though it was accepted, by its record")
        # Late attempts belong to locks that were abandoned, all others each to a completed one. They don't
        # name it, but stand in the same order; only what was given back unsent has none.
        kept = [attempt for attempt in status.attempts if not attempt.late]
        completed = [lock.token for lock in status.locks if lock.completed]
        without = len(completed) - len(kept)
        for arrival in arrivals:
            if arrival.accepted is None or self._is_stale(arrival) or arrival.token not in completed:
                continue
            place = completed.index(arrival.token)
            candidates = kept[max(place - without, 0) : place + 1]
            # Without a status it may be the answer that got lost.
            if candidates and all(one.status_code and not _is_acceptance(one) for one in candidates):
                codes = ", ".join(str(one.status_code) for one in candidates)
                self._break("contradiction", status.id, f"accepted under token {arrival.token}, recorded as {codes}")

    def _judge_callback(self, id: str, arrivals: list[Arrival]) -> None:
        status = self._statuses.get(id)
        tokens = {lock.token for lock in status.locks} if status else set()
        last_token = 0
        for arrival in arrivals:
            if arrival.token not in tokens:
                self._break("unrecorded", id, f"a request with token {arrival.token}, of which no lock is recorded")
            if arrival.token <= last_token and not self._is_stale(arrival):
                self._break("token order", id, f"token {arrival.token} after {last_token}")
            last_token = max(last_token, arrival.token)
        if status is not None and id not in self._redelivered:
            self._judge_retries(status, arrivals)

    def _judge_retries(self, status: CallbackStatus, arrivals: list[Arrival]) -> None:
        arrivals = [arrival for arrival in arrivals if not self._is_stale(arrival)]
        # What a stop interrupted is not counted, and due again at once; the record doesn't say which request it was.
        interrupted = sum(not attempt.late and not attempt.is_counted for attempt in status.attempts)
        completed = {lock.token for lock in status.locks if lock.completed}
        delays = _delays(status)
        allowed = 1 + len(delays)
        counted = sum(arrival.token in completed for arrival in arrivals)
        if counted > allowed + interrupted:
            self._break("too many", status.id, f"{counted} requests where the phases allow {allowed}")
        if interrupted:
            return
        made = 0
        for before, after in pairwise(arrivals):
            if before.token not in completed:
                continue
            made += 1
            # An attempt that never reached a receiver counts; a lock given back unused doesn't, and is completed, too.
            # So this may be a later retry, and wait for as long as any of these.
            possible = delays[made - 1 : sum(token <= before.token for token in completed)]
            waited = after.started - before.started
            if possible and waited < min(possible) - _ROUNDING_SECONDS:
                self._break("too soon", status.id, f"retry {made} after {waited:.3f} s")

    def _judge_queue(self, arrivals: list[Arrival]) -> None:
        first_accepted: dict[int, float] = {}
        for arrival in arrivals:
            if arrival.accepted is not None:
                # What started first may be accepted last: by a receiver that is slow, after its sender was killed.
                earliest = first_accepted.get(arrival.sequence, arrival.accepted)
                first_accepted[arrival.sequence] = min(earliest, arrival.accepted)
        previous = 0
        for sequence, _ in sorted(first_accepted.items(), key=lambda entry: entry[1]):
            if sequence < previous:
                self._break("order", _id_of(arrivals, sequence), f"number {sequence} accepted after {previous}")
            previous = max(previous, sequence)

        # For each accepted number, the latest first acceptance up to it: nothing beyond may start before that.
        numbers = sorted(first_accepted)
        latest = list(accumulate((first_accepted[number] for number in numbers), max))
        highest = 0
        for arrival in arrivals:
            in_front = bisect_left(numbers, arrival.sequence)
            if in_front and arrival.started < latest[in_front - 1]:
                self._break("early start", arrival.callback_id, f"number {arrival.sequence} started too early")
            if arrival.sequence < highest:
                self._break("stale", arrival.callback_id, f"number {arrival.sequence} started after {highest}")
            highest = max(highest, arrival.sequence)

    def _judge_turns(self) -> None:
        queues: dict[str, list[CallbackStatus]] = defaultdict(list)
        for status in self._statuses.values():
            if status.queue_id and status.sequence:
                queues[status.queue_id].append(status)
        for in_queue in queues.values():
            # When all in front are over, and who is the last of them.
            opened, last = NEVER, ""
            for status in sorted(in_queue, key=lambda one: one.sequence):
                first = min((lock.acquired for lock in status.locks), default=_NOT_YET)
                if first < opened and status.id not in self._redelivered:
                    self._break("early lock", status.id, f"number {status.sequence} locked before {last} is over")
                if (over := self._over(status)) > opened:
                    opened, last = over, status.id

    def _over(self, status: CallbackStatus) -> datetime:
        """
        Say when a callback ceased to close its queue: then, or later.

        It is later if somebody cancelled it while it waited, or opened the queue that it held. The record doesn't say
        when, and not at all for what was never locked.
        """
        is_held = status.state is CallbackState.FAILED and status.request.on_exhausted == "hold"
        # What can't be read may have lost its wish, too.
        is_held = is_held and status.failed_reason is not FailedReason.UNDECODABLE
        if status.state.is_open or (is_held and status.id not in self._cancelled):
            return _NOT_YET
        return max((lock.ended for lock in status.locks if lock.ended is not None), default=NEVER)

    def _judge_takeovers(self, excused: Collection[tuple[str, int]]) -> None:
        # A store that sees the death of a dispatcher may bring the timeouts of its locks forward to that moment, as
        # SQLite's does. So how long they would have lived is also taken from those that their holders ended.
        leases: dict[str, timedelta] = {}
        for status in self._statuses.values():
            for lock in status.locks:
                if lock.completed:
                    lease = _lease(lock)
                    leases[lock.machine_name] = min(leases.get(lock.machine_name, lease), lease)
        for id, status in self._statuses.items():
            for lock in status.locks:
                if lock.completed or lock.ended is None or (id, lock.token) in excused:
                    continue
                lived = lock.ended - lock.acquired
                lease = max(_lease(lock), leases.get(lock.machine_name, lived))
                if lived < lease:
                    early = (lease - lived).total_seconds()
                    self._break("takeover", id, f"token {lock.token} was taken over {early:.3f} s early")

    def _judge_duplicates(self, excused: Collection[tuple[str, int]]) -> None:
        for id, arrivals in self._by_callback.items():
            if id in self._redelivered:
                continue
            settled = 0
            # A slow receiver may accept what somebody sent who was killed after what his successor sent.
            for arrival in sorted(arrivals, key=lambda one: one.token):
                if arrival.accepted is None:
                    continue
                if settled:
                    self._break("duplicates", id, f"accepted under token {settled}, and again under {arrival.token}")
                elif (id, arrival.token) not in excused:
                    settled = arrival.token

    def _judge_locks(self) -> None:
        spans: dict[str, list[tuple[datetime, datetime, str]]] = defaultdict(list)
        for id, status in self._statuses.items():
            for lock in status.locks:
                # A queue's name and a callback's id are told apart by the prefix.
                spans[f"q{status.queue_id}" if status.queue_id else f"c{id}"].append(
                    (lock.acquired, lock.ended or lock.timeout, id)
                )
        for queue_spans in spans.values():
            queue_spans.sort()
            for (_, ended, one), (acquired, _, other) in pairwise(queue_spans):
                if acquired < ended:
                    self._break("lock overlap", other, f"locked while a lock on {one} was live")

    def _is_stale(self, arrival: Arrival) -> bool:
        return (arrival.callback_id, arrival.token) in self._stale_requests

    def _break(self, rule: str, id: str, detail: str) -> None:
        self._violations.append(Violation(rule=rule, callback_id=id, detail=detail))


def _acceptances(arrivals: list[Arrival]) -> int:
    return sum(arrival.accepted is not None for arrival in arrivals)


def _is_acceptance(attempt: CallbackAttempt) -> bool:
    return 200 <= attempt.status_code <= 299


def _lease(lock: CallbackLock) -> timedelta:
    return lock.timeout - lock.acquired


def _id_of(arrivals: list[Arrival], sequence: int) -> str:
    return next(arrival.callback_id for arrival in arrivals if arrival.sequence == sequence)


def _delays(status: CallbackStatus) -> list[float]:
    """How many seconds each retry waits, worked out here anew: the judge must not take the judged one's word."""
    return [phase.delay.total_seconds() for phase in status.request.retry_phases for _ in range(phase.retries)]
