"""
Judges a run from outside: by what the receivers saw and what the store says in the end.

Nothing a dispatcher says of itself counts. Feed it every request that reached a receiver (`Arrival`), the final
status of every callback, and the ids whose storing was acknowledged; it names each broken promise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime
from itertools import accumulate, pairwise
from typing import Final

from attrs import field, frozen

from callbackq.core.models import AttemptFailure, CallbackState, CallbackStatus, FailedReason

__all__ = ["Arrival", "History", "Judgement", "Violation"]

# A difference of two floats that stand for whole microseconds may miss the true one by less than that.
_ROUNDING_SECONDS: Final = 1e-6


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
    "contradiction": "a callback that counts as delivered was accepted by a receiver",
    "unrecorded": "every request was sent under a lock that is in the record",
    "token order": "requests for one callback carry rising tokens",
    "too many": "no more requests than the phases allow, besides those whose locks were abandoned",
    "too few": "a callback has failed as exhausted only after all attempts that its phases allow",
    "too soon": "a retry starts no earlier than its phase's delay after the request before",
    "order": "first acceptances in a queue come in the order of its numbers",
    "early start": "no request starts before the callbacks in front are accepted or have failed",
    "stale": "no request for a callback starts after one for a later callback of its queue",
    "lock overlap": "no two locks of a queue are live at a time",
    "duplicates": "second acceptances stay within the bound",
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
        duplicates_bound: how many were allowed.
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
            kills. 0 for a run without any.
        redelivered: ids of callbacks that somebody had redelivered: their retries began anew, so they aren't counted.
        stale_requests: callback id and token of requests whose dispatcher stood still between its last look at the
            clock and the first byte, until its lock had timed out. No design rules that out; their order isn't judged.
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
    ) -> None:
        self._arrivals = sorted(arrivals, key=lambda arrival: arrival.started)
        self._redelivered = frozenset(redelivered)
        self._stale_requests = frozenset(stale_requests)
        self._statuses = {status.id: status for status in statuses}
        self._acknowledged = list(acknowledged)
        self._bound = duplicates_bound
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
        self._judge_locks()
        duplicates = sum(max(_acceptances(arrivals) - 1, 0) for arrivals in self._by_callback.values())
        if duplicates > self._bound:
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
            elif status.state is CallbackState.SUCCEEDED and not _acceptances(self._by_callback.get(id, [])):
                self._break("contradiction", id, "delivered, says the store; no receiver accepted it")

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
        kept = [attempt for attempt in status.attempts if not attempt.late]
        interrupted = sum(attempt.failure is AttemptFailure.INTERRUPTED for attempt in kept)
        completed = {lock.token for lock in status.locks if lock.completed}
        delays = [phase.delay.total_seconds() for phase in status.request.retry_phases for _ in range(phase.retries)]
        allowed = 1 + len(delays)
        counted = sum(arrival.token in completed for arrival in arrivals)
        if counted > allowed + interrupted:
            self._break("too many", status.id, f"{counted} requests where the phases allow {allowed}")
        # Of the record, since not every attempt reaches a receiver.
        attempts = len(kept) - interrupted
        if status.failed_reason is FailedReason.EXHAUSTED and attempts < allowed:
            self._break("too few", status.id, f"{attempts} attempts where the phases allow {allowed}")
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


def _id_of(arrivals: list[Arrival], sequence: int) -> str:
    return next(arrival.callback_id for arrival in arrivals if arrival.sequence == sequence)
