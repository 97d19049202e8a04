"""
What must be true, kept beside the store and judged at every step.

The ledger knows what was committed, what reached the receivers and what they answered. From these alone, and the
contract's words, it works out what each callback must be, and compares. It imports none of the code that decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from attrs import evolve

from callbackq.core.lifecycle import Action, Transition
from callbackq.core.models import CallbackRequest, CallbackState, CallbackStatus, FailedReason
from callbackq.dataaccess import Acquired, AttemptRecord
from callbackq.errors import IllegalTransitionError, LockLostError
from callbackq.testing.history import Arrival, Violation
from callbackq.testing.simulation.account import Account
from callbackq.testing.simulation.excuses import Excuses
from callbackq.testing.simulation.mails import Mails
from callbackq.testing.simulation.verdicts import Verdicts
from callbackq.testing.simulation.world import Actor

__all__ = ["RULES", "Ledger"]

RULES: Final = {
    "number": "a stored callback has the next number of its queue",
    "not the head": "only the head of a queue is locked",
    "not due": "nothing is locked before it is due",
    "live lock": "nothing is locked while a lock on it is live",
    "token": "tokens of a callback rise",
    "lease": "a lock lives as long as it was asked for",
    "counts": "attempts and abandoned locks are counted as the contract says",
    "passed over": "whoever asks for locks gets what is due",
    "fencing": "a stale token changes nothing and is told so",
    "verdict": "what is recorded follows from what the receiver answered",
    "settled": "what was asked or learnt under a lock applies when it ends",
    "stop": "a stop begins nothing, lets end what may, interrupts in time, and leaves no lock, unless it is hindered",
    "operator": "an operator's wish does what the table of states says",
    "purge": "only finished callbacks are forgotten",
    "sent without a lock": "a request starts under the live lock of its queue's head",
    "sent again": "nothing is sent again that was accepted, without a kill, freeze or lost answer",
    "parked": "what was not sent is due again within a bounded time",
    "e-mail lost": "each final failure that owes an e-mail is told",
    "e-mail repeated": "an e-mail is sent once, without a kill or fault",
    "e-mail too soon": "an address is left alone for the interval",
    "state": "the store's final dump agrees with what was committed",
    "stuck": "when nothing goes wrong any more, everything ends",
    "raised": "no step of a dispatcher raises",
}
"""What the ledger judges, beside the rules of `callbackq.testing.history`."""

# The stores on SQL databases count in whole microseconds.
_ROUNDING_US: Final = 2
_ENOUGH: Final = 20
_LONGEST_PARKING_US: Final = 60_000_000


class Ledger:
    """
    Watch a run.

    Args:
        now_us: the world's time.
        lock_timeout_us: of all dispatchers.
        max_abandoned: of all dispatchers.
        jitter: the greatest of all dispatchers.
        interval_us: how long an address is left alone after an e-mail.
        may_be_taken: whether a holder is known to be dead, so that its live locks may be taken over.
        give_up: called when so much is broken that nothing more can be learnt.

    Attributes:
        accounts: what each callback must be, by id.
        acknowledged: ids whose storing returned.
        arrivals: requests that reached a receiver.
        stale_requests: callback id and token of requests whose dispatcher stood still at the first byte.
        cancelled: ids of callbacks that an operator cancelled or skipped.
        time_has_jumped: the machine was rebooted with another wall time, and across reboots there is nothing else to go
            by.
        excuses: knows which requests the contract allows to be sent again.
        verdicts: judges what is recorded.
        mails: judges e-mails.
        violations: every broken promise.
    """

    def __init__(
        self,
        now_us: Callable[[], int],
        *,
        lock_timeout_us: int,
        max_abandoned: int,
        jitter: float,
        interval_us: int,
        may_be_taken: Callable[[Actor | None], bool],
        give_up: Callable[[], None],
    ) -> None:
        self._give_up = give_up
        self._now_us = now_us
        self._lock_timeout_us = lock_timeout_us
        self._may_be_taken = may_be_taken
        self.excuses = Excuses(lock_timeout_us=lock_timeout_us)
        self.accounts: dict[str, Account] = {}
        self._queues: dict[str, list[Account]] = defaultdict(list)
        self._last_number: dict[str, int] = defaultdict(int)
        self.acknowledged: set[str] = set()
        self.arrivals: list[Arrival] = []
        self.stale_requests: set[tuple[str, int]] = set()
        self.cancelled: set[str] = set()
        self._taken_from_the_dead: set[tuple[str, int]] = set()
        self._max_abandoned = max_abandoned
        self.time_has_jumped = False
        self.verdicts = Verdicts(self.break_rule, max_abandoned=max_abandoned, jitter=jitter)
        self.mails = Mails(self.break_rule, self.accounts, now_us, interval_us)
        self.violations: list[Violation] = []

    def break_rule(self, rule: str, id: str, detail: str) -> None:
        """Note a broken promise."""
        self.violations.append(Violation(rule=rule, callback_id=id, detail=detail))
        if len(self.violations) >= _ENOUGH:
            self._give_up()

    # What the application stored.

    def stored(self, requests: Sequence[tuple[str, CallbackRequest]], statuses: Sequence[CallbackStatus]) -> None:
        """Callbacks were committed, in this order."""
        for (id, request), status in zip(requests, statuses, strict=True):
            account = self.accounts.get(id)
            if account is None or account.was_purged:
                number = self._number(request.queue_id)
                account = self.accounts[id] = Account(id, request, number, self._now_us(), len(self.arrivals))
                self._queues[request.queue_id or f"\0{id}"].append(account)
                self.cancelled.discard(id)
                if status.sequence != number:
                    self.break_rule("number", id, f"number {status.sequence} where {number} is next")
            if status.id != id or status.sequence != account.sequence:
                self.break_rule("number", id, f"repeated, it has number {status.sequence}, not {account.sequence}")

    def _number(self, queue_id: str) -> int:
        if not queue_id:
            return 1
        self._last_number[queue_id] += 1
        return self._last_number[queue_id]

    # Locks.

    def acquired(self, holder: Actor, limit: int, found: Sequence[Acquired], end_states: Callable[[str], None]) -> None:
        """Locks were committed."""
        now = self._now_us()
        taken = {one.id for one in found}
        self._end_those_that_need_no_sending(now, taken, end_states)
        if len(found) > limit:
            self.break_rule("lease", found[0].id, f"{len(found)} locks where {limit} were asked for")
        for one in found:
            if holder.is_stopping:
                self.break_rule("stop", one.id, "locked by a dispatcher that is to stop")
            self._take(self.accounts[one.id], one, holder, now)
        if len(found) < limit and not self.time_has_jumped:
            for queue in self._queues.values():
                head = self._head(queue)
                if head is not None and head.id not in taken and self._is_due(head, now):
                    self.break_rule("passed over", head.id, "it is due and at the head, and was not locked")

    def _is_due(self, account: Account, now: int) -> bool:
        if account.state is CallbackState.WAITING:
            return account.due_us <= now - _ROUNDING_US
        return account.state is CallbackState.LOCKED and account.timeout_us <= now - _ROUNDING_US

    def _end_those_that_need_no_sending(self, now: int, taken: set[str], end_states: Callable[[str], None]) -> None:
        # A lock that timed out with a cancel or a late acceptance under it ends the callback in passing.
        for account in self.accounts.values():
            is_over = account.timeout_us <= now + _ROUNDING_US or self._may_be_taken(account.holder)
            ends = account.accepted_late or account.cancel_requested
            if account.state is CallbackState.LOCKED and is_over and ends and not account.was_purged:
                if account.id in taken:
                    self.break_rule("settled", account.id, "locked again, though cancelled or accepted under its lock")
                end_states(account.id)

    def passed(self, id: str, status: CallbackStatus) -> None:
        """A lock that timed out may have ended its callback, which has *status* now."""
        account = self.accounts[id]
        if status.state is CallbackState.LOCKED:
            return
        self._note_takeover(account)
        expected = CallbackState.SUCCEEDED if account.accepted_late else CallbackState.CANCELLED
        if status.state is not expected:
            self.break_rule("settled", id, f"{status.state.value} where it must be {expected.value}")
        account.abandoned += 1
        self._finish(account, status.state)

    def _take(self, account: Account, one: Acquired, holder: Actor, now: int) -> None:
        if not account.is_open or account.was_purged:
            self.break_rule("state", one.id, f"locked while {account.state.value}")
        head = self._head(self._queues[account.request.queue_id or f"\0{account.id}"])
        if head is not account:
            self.break_rule("not the head", one.id, f"locked before {head.id if head else 'nothing'}")
        # By a dispatcher that had stood still: its attempt goes on, however many locks that takes.
        account.was_renewed = account.state is CallbackState.LOCKED and account.holder is holder
        if account.state is CallbackState.LOCKED:
            if account.timeout_us > now + _ROUNDING_US and not self._may_be_taken(account.holder):
                self.break_rule("live lock", one.id, f"{(account.timeout_us - now) / 1e6:.3f} s before it times out")
            self._note_takeover(account)
            account.abandoned += 1
        elif account.due_us > now + _ROUNDING_US and not self.time_has_jumped:
            self.break_rule("not due", one.id, f"{(account.due_us - now) / 1e6:.3f} s too early")
        token = one.lock.token
        if account.tokens and token <= account.tokens[-1]:
            self.break_rule("token", one.id, f"{token} after {account.tokens[-1]}")
        lease_us = round((one.lock.timeout - one.lock.acquired).total_seconds() * 1e6)
        if abs(lease_us - self._lock_timeout_us) > _ROUNDING_US:
            self.break_rule("lease", one.id, f"{lease_us / 1e6} s")
        if (one.attempts_made, one.abandoned, one.sequence) != (
            account.attempts_made,
            account.abandoned,
            account.sequence,
        ):
            self.break_rule(
                "counts",
                one.id,
                f"{one.attempts_made} attempts, {one.abandoned} abandoned, number {one.sequence}; rightly "
                f"{account.attempts_made}, {account.abandoned}, {account.sequence}",
            )
        if account.state is CallbackState.LOCKED and not account.was_renewed:
            self.excuses.ended(account.token, timed_out=account.timeout_us <= now + _ROUNDING_US)
        self.excuses.given(token, holder)
        if account.was_renewed:
            self.excuses.renewed(account.token, token)
        account.state = CallbackState.LOCKED
        account.token = token
        account.tokens.append(token)
        account.timeout_us = now + self._lock_timeout_us
        account.holder = holder

    def _note_takeover(self, account: Account) -> None:
        if account.state is CallbackState.LOCKED and self._may_be_taken(account.holder):
            self._taken_from_the_dead.add((account.id, account.token))

    def excused(self) -> set[tuple[str, int]]:
        """Give callback id and token of all locks that may have ended early, or led to another request."""
        tokens = ((account.id, token) for account in self.accounts.values() for token in account.tokens)
        return self._taken_from_the_dead.union(one for one in tokens if self.excuses.allow_another(one[1]))

    def _head(self, queue: list[Account]) -> Account | None:
        blocking = (one for one in queue if (one.is_open or one.holds) and not one.was_purged)
        return min(blocking, key=lambda one: one.sequence, default=None)

    def recorded(self, holder: Actor, record: AttemptRecord, result: Transition | LockLostError) -> None:
        """The end of a lock was committed, or refused."""
        id, token = record.acquired.id, record.acquired.lock.token
        account = self.accounts[id]
        self.excuses.ended(token, timed_out=account.timeout_us <= self._now_us())
        wanted = record.transition
        if account.state is CallbackState.LOCKED and account.token == token and not account.was_purged:
            self.verdicts.judge(holder, account, record)
            if isinstance(result, LockLostError):
                self.break_rule("fencing", id, f"token {token} is the newest, and was refused")
                return
            self._apply(account, wanted, result, is_result=True)
            account.recorded[token] = result.state
            if record.attempt is not None:
                account.attempts += 1
            return
        if token in account.recorded and not account.was_purged:
            if isinstance(result, LockLostError) or result.state is not account.recorded[token]:
                self.break_rule("fencing", id, "a repeated record is not answered as the first")
            return
        if not isinstance(result, LockLostError):
            self.break_rule("fencing", id, f"token {token} was taken, though {account.token} is the newest")
            return
        if account.was_purged or token not in account.tokens:
            return
        if record.attempt is not None and token not in account.late:
            account.late.add(token)
            account.attempts += 1
        account.accepted_late = account.accepted_late or wanted.state is CallbackState.SUCCEEDED

    def released(self, acquired: Acquired, delay_us: int, result: Transition | LockLostError) -> None:
        """A lock was given back, or that was refused."""
        account = self.accounts[acquired.id]
        token = acquired.lock.token
        if account.state is CallbackState.LOCKED and account.token == token and not account.was_purged:
            if isinstance(result, LockLostError):
                self.break_rule("fencing", account.id, f"token {token} is the newest, and was refused")
                return
            if delay_us > _LONGEST_PARKING_US:
                self.break_rule("parked", account.id, f"given back for {delay_us / 1e6:.1f} s")
            self.excuses.ended(token, timed_out=account.timeout_us <= self._now_us())
            self._apply(account, Transition(state=CallbackState.WAITING), result, is_result=False, delay_us=delay_us)
        elif not isinstance(result, LockLostError):
            self.break_rule("fencing", account.id, f"stale token {token} gave back the lock {account.token}")

    def stopped(self, holder: Actor) -> None:
        """A dispatcher has stopped in order. A store that works must have taken all that it had to say in time."""
        for account in self.accounts.values():
            is_left = self.is_locked_by(account.id, account.token) and account.holder is holder
            if is_left and not holder.meets_failing_store and not self.excuses.allow_leaving(account.token):
                self.break_rule("stop", account.id, f"token {account.token} is left, though nothing was in the way")

    def _apply(
        self, account: Account, wanted: Transition, result: Transition, *, is_result: bool, delay_us: int | None = None
    ) -> None:
        state = wanted.state
        if state is not CallbackState.SUCCEEDED and account.accepted_late:
            state = CallbackState.SUCCEEDED
        elif state is not CallbackState.SUCCEEDED and account.cancel_requested:
            state = CallbackState.CANCELLED
        if result.state is not state:
            self.break_rule("settled", account.id, f"{result.state.value} where it must be {state.value}")
        account.attempts_made += wanted.counted
        if is_result:
            account.abandoned = 0
        if state is CallbackState.WAITING:
            account.state = state
            wait = round(wanted.delay.total_seconds() * 1e6) if delay_us is None else delay_us
            account.due_us = self._now_us() + wait
            return
        if state is CallbackState.FAILED:
            account.failed_reason = wanted.failed_reason
            account.holds = wanted.hold
            if wanted.notify:
                self.mails.owe(account)
        self._finish(account, state)

    def _finish(self, account: Account, state: CallbackState) -> None:
        account.state = state
        if state is not CallbackState.FAILED:
            account.failed_reason = None
        account.finished_us = self._now_us()

    # Operators.

    def acted(self, action: Action, id: str, result: CallbackStatus | IllegalTransitionError) -> None:
        """An operator's wish was committed, or refused."""
        account = self.accounts[id]
        holds = account.holds or not account.request.queue_id
        failed = account.state is CallbackState.FAILED
        if action is Action.CANCEL:
            is_legal = account.is_open or (failed and holds)
        else:
            is_legal = failed and (holds or action is Action.REDELIVER)
        if isinstance(result, IllegalTransitionError) or not is_legal:
            if is_legal or not isinstance(result, IllegalTransitionError):
                self.break_rule("operator", id, f"{action.value} while {account.state.value} was decided wrongly")
            return
        if action is not Action.REDELIVER:
            self.cancelled.add(id)
        if action is Action.CANCEL:
            lock_is_live = account.state is CallbackState.LOCKED and account.timeout_us > self._now_us()
            if lock_is_live and result.state is CallbackState.LOCKED:
                account.cancel_requested = True
            elif result.state is CallbackState.CANCELLED and (not lock_is_live or self._may_be_taken(account.holder)):
                account.holds = False
                self._note_takeover(account)
                self._finish(account, CallbackState.CANCELLED)
            else:
                self.break_rule("operator", id, f"{result.state.value} after cancel")
        elif action is Action.SKIP:
            account.holds = False
        else:
            if not holds:
                account.sequence = self._number(account.request.queue_id)
            self._redeliver(account, result)

    def _redeliver(self, account: Account, result: CallbackStatus) -> None:
        account.state, account.due_us = CallbackState.WAITING, self._now_us()
        account.attempts_made = account.abandoned = 0
        account.holds, account.failed_reason = False, None
        account.redeliveries += 1
        account.accepted_tokens.clear()
        if (result.state, result.sequence) != (CallbackState.WAITING, account.sequence):
            self.break_rule("operator", account.id, f"number {result.sequence} after redelivery")

    def purged(self, finished_for_us: int, gone: Iterable[str], count: int) -> None:
        """Callbacks were forgotten."""
        latest = self._now_us() - finished_for_us
        names = list(gone)
        for id in names:
            account = self.accounts[id]
            if account.is_open or account.holds or account.debts or account.finished_us > latest + _ROUNDING_US:
                self.break_rule("purge", id, f"forgotten while {account.state.value}")
            account.was_purged = True
        if len(names) != count:
            self.break_rule("purge", "", f"{count} were forgotten, says the store; {len(names)} are gone")

    # Receivers.

    def is_locked_by(self, id: str, token: int) -> bool:
        """Whether a token's lock on a callback is live."""
        account = self.accounts[id]
        is_held = account.state is CallbackState.LOCKED and account.token == token and not account.was_purged
        return is_held and account.timeout_us >= self._now_us()

    def arrived(self, arrival: Arrival) -> int:
        """A request reached its receiver. Returns its place among all arrivals."""
        self.arrivals.append(arrival)
        account = self.accounts[arrival.callback_id]
        # Whatever comes of it. Who is slow may accept the earlier one only later: see `accepted`.
        self._judge_again(account, arrival.token)
        if not self.is_locked_by(account.id, arrival.token):
            if (account.id, arrival.token) not in self.stale_requests:
                self.break_rule(
                    "sent without a lock",
                    account.id,
                    f"token {arrival.token} while {account.state.value}, token {account.token}",
                )
        elif account.abandoned >= self._max_abandoned and not account.was_renewed:
            self.break_rule("counts", account.id, f"sent after {account.abandoned} abandoned locks")
        elif arrival.sequence != account.sequence:
            self.break_rule("sent without a lock", account.id, f"with number {arrival.sequence}")
        return len(self.arrivals) - 1

    def accepted(self, place: int) -> None:
        """A receiver accepted the request with this place among all arrivals."""
        arrival = self.arrivals[place] = evolve(self.arrivals[place], accepted=self._now_us() / 1e6)
        account = self.accounts[arrival.callback_id]
        self._judge_again(account, arrival.token)
        account.accepted_tokens.append(arrival.token)

    def _judge_again(self, account: Account, token: int) -> None:
        for earlier in account.accepted_tokens:
            # What stood still before its first byte for longer than its lock is the straggler itself.
            if not self.excuses.allow_another(earlier) and (account.id, token) not in self.stale_requests:
                self.break_rule("sent again", account.id, f"accepted under token {earlier}, sent again under {token}")

    # The end.

    def judge_end(self, statuses: Iterable[CallbackStatus]) -> None:
        """Compare the final dump."""
        found = {status.id: status for status in statuses}
        for id, account in self.accounts.items():
            status = found.pop(id, None)
            if account.was_purged:
                if status is not None:
                    self.break_rule("state", id, "it was forgotten, and is there again")
                continue
            if status is None:
                self.break_rule("lost", id, "committed, but not in the store")
                continue
            self._judge_status(account, status)
            self.mails.judge_end(id)
        for id in found:
            self.break_rule("state", id, "in the store, though nobody stored it")

    def _judge_status(self, account: Account, status: CallbackStatus) -> None:
        seen = (status.state, status.sequence, status.failed_reason, len(status.attempts))
        right = (account.state, account.sequence, account.failed_reason, account.attempts)
        if seen != right:
            self.break_rule("state", account.id, f"{_words(seen)}; rightly {_words(right)}")
        if [lock.token for lock in status.locks] != account.tokens:
            self.break_rule("state", account.id, "its locks are not those that were given")
        if any(lock.ended is None for lock in status.locks) and not account.is_open:
            self.break_rule("state", account.id, "it is finished, and a lock has not ended")


def _words(facts: tuple[CallbackState, int, FailedReason | None, int]) -> str:
    state, sequence, reason, attempts = facts
    return f"{state.value} ({reason.value if reason else '-'}), number {sequence}, {attempts} attempts"
