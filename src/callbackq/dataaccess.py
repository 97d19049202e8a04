"""
The protocol between callbackq and its stores, and the values that cross it.

A store persists what the core decided; it holds no policy. To write one, subclass `DataAccess`, implement the
abstract methods from their docstrings alone, and let `callbackq.testing.DataAccessConformance` judge it. Whatever
else a store can do, it offers through the small ``Supports…`` protocols below.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from enum import IntEnum
from os import PathLike
from types import TracebackType
from typing import Final, Literal, Protocol, Self, TypeVar, runtime_checkable

from attrs import field, frozen

from callbackq.arguments import check_arguments, ids_for
from callbackq.core.lifecycle import Action, Transition
from callbackq.core.models import CallbackAttempt, CallbackLock, CallbackRequest, CallbackState, CallbackStatus
from callbackq.errors import LockLostError

__all__ = [
    "MOST_LISTED",
    "Acquired",
    "Action",
    "AttemptRecord",
    "DataAccess",
    "Durability",
    "Notification",
    "SupportsBackup",
    "SupportsEnlist",
    "SupportsHandover",
    "SupportsListing",
    "SupportsNotifications",
    "SupportsPurge",
    "SupportsShards",
    "Transition",
    "check_arguments",
    "handover_of",
    "ids_for",
]

_Connection = TypeVar("_Connection", contravariant=True)


class Durability(IntEnum):
    """What a stored callback survives. Each word includes those before it."""

    MEMORY = 0
    """Nothing: it is gone with the process."""
    PROCESS = 1
    """The death of any process."""
    POWER = 2
    """The loss of power, once the call has returned."""
    REPLICATED = 3
    """The loss of the machine."""


@frozen(kw_only=True, eq=False)
class Acquired:
    """
    A callback that was just locked for one attempt.

    Attributes:
        id: the callback.
        request: what to send; ``None`` when the stored request can't be read any more.
        queue_id: its queue; empty when it has one of its own.
        sequence: its number there.
        lock: the new, live lock.
        attempts_made: counted attempts since the callback was stored or redelivered.
        abandoned: locks that timed out in a row, without a result in between, before this one.
        on_exhausted: what happens to the queue when it fails for good; known also when the stored request can't be
            read.
    """

    id: str
    request: CallbackRequest | None
    queue_id: str
    sequence: int
    lock: CallbackLock
    attempts_made: int
    abandoned: int
    on_exhausted: Literal["continue", "hold"] = "continue"


@frozen(kw_only=True, eq=False)
class AttemptRecord:
    """
    The end of a lock, to be written.

    Attributes:
        acquired: what `DataAccess.acquire_locks` returned.
        attempt: what happened; ``None`` when the callback ends without one (abandoned, undecodable).
        transition: what follows.
    """

    acquired: Acquired
    attempt: CallbackAttempt | None
    transition: Transition


class DataAccess(Protocol):
    """
    Where callbacks live. One object may be used from many threads.

    Words used below: a callback is *open* while WAITING or LOCKED. The *head* of a queue is the callback that
    closes it for those behind: the open callback with the lowest number, or a FAILED one that *holds* the queue
    (``Transition.hold``). A callback without a queue id is the only one in a queue of its own. *Now* is the
    store's own clock, the only judge of due times and locks: callers pass durations.

    Every method refuses an argument of another type or out of bounds with `InvalidRequestError`, before anything is
    written (call `check_arguments`). An *id* that is asked for is not one of them: what can't be an id is not found.

    All methods may raise `DataAccessError`, and nothing else that isn't named: a driver's exception is its
    ``__cause__``. `TransientDataAccessError` means that nothing was written. After a fault the same object
    works again once the backend does. The texts of these errors are logged, so they must quote no values of a
    callback and no password of a connection; of the driver's exception the log names the type only.

    Attributes:
        durability: what a stored callback survives.
    """

    durability: Durability

    @abstractmethod
    def open(self) -> None:
        """
        Make ready for use.

        Idempotent. Other methods open the store themselves when it isn't open, also in a process that was
        forked while it was.

        Raises:
            SchemaVersionError: the stored data comes from a newer release; it was not changed.
        """
        ...

    @abstractmethod
    def close(self) -> None:
        """Give back all resources. Idempotent. Locks stay as they are and end by their timeout."""
        ...

    @abstractmethod
    def now(self) -> datetime:
        """Read the store's clock: aware, UTC. It never steps while the machine (or the server) runs."""
        ...

    @abstractmethod
    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        """
        Store a callback.

        * It is WAITING, due now, and has the next number of its queue. If storing *a* had returned before
          storing *b* began, *a*'s number is lower; numbers start at 1 and are never used twice. A callback
          without a queue has number 1.
        * When the call returns, the callback survives what `durability` says. When it raises, either nothing
          was stored or the whole callback was: repeating the call with the same *id* is harmless.
        * *id* already stored with an equal request: nothing is written, the stored callback's status is returned.

        Args:
            request: what to deliver.
            id: 1 to 255 visible ASCII characters other than the dot; ``None`` for a new random one.

        Raises:
            ConflictError: *id* is stored with another request.
            InvalidRequestError: *id* is malformed.
            NotAcceptedError: rules of the host, which it gave the store, refuse the request; nothing was stored. They
                must not be asked about a repeated call: it would look as if the callback weren't there.
        """
        ...

    @abstractmethod
    def get_callback_status(self, id: str) -> CallbackStatus:
        """
        Read everything about a callback, as of one moment.

        * ``attempts`` and ``locks`` are in the order of their tokens.
        * ``failed_reason`` is set while the callback is FAILED, and only then.
        * ``blocked_by`` names the head of its queue for an open callback that isn't the head.
        * ``next_attempt_at`` is the due time of a WAITING callback.

        Raises:
            CallbackNotFoundError: nothing is stored under *id*.
        """
        ...

    @abstractmethod
    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        """
        Lock due heads of queues for one attempt each.

        * Only heads that are WAITING and due, or LOCKED with a lock whose timeout has passed; those longest due
          first; at most *limit*. For a callback that waited behind others, a store may count from when it became
          the head.
        * Each becomes LOCKED under a new lock: acquired now, timing out *lock_timeout* from now, with a token
          higher than any this callback ever had. However many callers race, each head goes to one of them.
        * A lock that had timed out is closed (``ended`` set, ``completed`` false), counts as abandoned, and
          uses up no attempt. What was asked or learnt under it applies: when
          ``settle(Transition(state=WAITING), …)`` is final, the callback ends so and is not handed out.
        * All of this is durable when the call returns.

        Args:
            machine_name: a label for the record. It proves nothing: locks are told apart by their token.
            lock_timeout: how long the locks live; longer than nothing.
            limit: how many at most; at least 1.
        """
        ...

    @abstractmethod
    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        """
        Give a lock back unused.

        In one step the lock ends (completed), the callback is WAITING and due *delay* from now; no attempt is
        recorded, and its count of abandoned locks in a row stays. What was asked or learnt in the meantime
        applies: the state is that of ``settle(Transition(state=WAITING), …)``.

        Returns:
            The transition as it was settled and written.

        Raises:
            LockLostError: a later lock exists, or the callback is no longer LOCKED; nothing was changed. So also when
                a call is repeated that was carried out: unlike `record_attempt`, this one has no result to lose.
        """
        ...

    @abstractmethod
    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        """
        Save one attempt and what follows from it, in one step.

        While the lock is still the newest of its callback and the callback is LOCKED, also when the lock has
        timed out, *transition* is first combined with what happened meanwhile::

            transition = settle(transition, accepted_late=…, cancel_requested=…)

        and then, all or nothing, durable when the call returns:

        * the attempt (if any) is appended and the lock ended as completed,
        * the callback has the transition's state, reason and hold; WAITING is due ``delay`` from now,
        * the count of attempts made rises by one if ``counted``; that of abandoned locks starts anew,
        * an e-mail is owed if ``notify`` (see `SupportsNotifications`),
        * when the state is final and doesn't hold the queue, the queue's next callback is its head.

        Repeating a call that was carried out (the lock with this token has been ended by a record) changes
        nothing and returns as the first did: after a `DataAccessError` nobody knows whether it had been.

        Otherwise the attempt is appended with ``late=True``, once for each token, and if *transition* says
        SUCCEEDED, the callback remembers it as accepted late; nothing else changes.

        Returns:
            The transition as it was settled and written. (Of a repeated call, only its state must be right.)

        Raises:
            LockLostError: the lock had been lost; the attempt was kept as late, unless the callback was purged: a stale
                result must not reach another callback under the same id.
        """
        ...

    @abstractmethod
    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        """
        Carry out an operator's wish: cancel, redeliver, skip.

        The store finds the callback's state, asks `callbackq.core.lifecycle.apply_action` for the effect, and
        writes that, in one step. *holds_queue* is true for a FAILED callback that holds its queue or has no queue.

        Returns:
            The status afterwards.

        Raises:
            CallbackNotFoundError: nothing is stored under *id*.
            IllegalTransitionError: the state does not allow it; nothing was changed.
        """
        ...

    @abstractmethod
    def next_due(self) -> datetime | None:
        """
        Say when `acquire_locks` will next find something.

        That is the earliest of all heads' due times and live locks' timeouts, which may lie in the past;
        ``None`` when there is none: no callback is open, or all wait behind heads that hold their queues.
        """
        ...

    # Derived: right for every store, overridden where a store can do better.

    def store_callback_requests(
        self, requests: Sequence[CallbackRequest], *, ids: Sequence[str | None] | None = None
    ) -> list[CallbackStatus]:
        """
        Store several callbacks, in this order.

        Not atomic unless a store says so: when it raises, the first few may have been stored. Repeating the call with
        the same *ids* is harmless.

        Args:
            requests: what to deliver.
            ids: one for each request, in the same order; ``None`` for new random ones.

        Raises:
            ConflictError: one of the *ids* is stored with another request.
            InvalidRequestError: one of the *ids* is malformed, or there are more or fewer of them than requests;
                nothing was stored.
        """
        return [
            self.store_callback_request(request, id=id)
            for id, request in zip(ids_for(requests, ids), requests, strict=True)
        ]

    def record_attempts(self, records: Sequence[AttemptRecord]) -> list[Transition | LockLostError]:
        """
        Record several attempts.

        A store may write them in one transaction.

        Returns:
            For each record what `record_attempt` returns, or the error that says that its lock had been lost.
        """

        def record(one: AttemptRecord) -> Transition | LockLostError:
            try:
                return self.record_attempt(one.acquired, one.attempt, one.transition)
            except LockLostError as lost:
                return lost

        return [record(one) for one in records]

    def release_locks(self, locks: Sequence[tuple[Acquired, timedelta]]) -> list[Transition | LockLostError]:
        """
        Give several locks back, each with its delay.

        A store may write them in one transaction.

        Returns:
            For each what `release_lock` returns, or the error that says that it had been lost.
        """

        def release(acquired: Acquired, delay: timedelta) -> Transition | LockLostError:
            try:
                return self.release_lock(acquired, delay=delay)
            except LockLostError as lost:
                return lost

        return [release(acquired, delay) for acquired, delay in locks]

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        """
        Ask for a hint whenever a callback may have become due.

        *wake* is called from any thread, must not block or raise, and may be called too often or not at all:
        hints only shorten the wait, polling finds everything.

        Returns:
            A function that ends the subscription.
        """
        return lambda: None

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


MOST_LISTED: Final = 20
"""How many callbacks an e-mail about many failures lists."""


@frozen(kw_only=True, eq=False)
class Notification:
    """
    An e-mail that is owed for final failures, leased for one try.

    Attributes:
        email_address: whom to tell. Not shown by repr.
        queue_id: the queue of the callbacks that failed; empty for all those without one.
        callback_ids: the callbacks of its first failures, oldest first, at most `MOST_LISTED`. One that failed twice is
            there twice.
        count: how many failures it tells of, those that aren't listed included.
        tries: tries of this e-mail that were made before this one.
        token: identifies the lease.
        first_token: identifies the e-mail: the token of its first lease.
    """

    email_address: str = field(repr=False)
    queue_id: str
    callback_ids: tuple[str, ...]
    count: int
    tries: int
    token: int
    first_token: int


@runtime_checkable
class SupportsNotifications(Protocol):
    """
    The store keeps the e-mails that final failures owe.

    A debt is written in the transaction that makes the callback FAILED with ``Transition.notify``, and lives on
    its own from then on: redelivery doesn't take it back.

    Debts with the same e-mail address and queue id form a *mailing*, those without a queue id among them, too. It is
    what is leased, and has a due time: of its first debt, now; a later debt doesn't move it. A mailing that owes
    nothing is remembered until its due time, so that a debt that comes before finds it; after that it is forgotten.

    The cost of both methods doesn't grow with the number of mailings or of debts, except that paid debts must be
    deleted at some time: many of them in small steps, or deliveries would have to wait.
    """

    @abstractmethod
    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        """
        Lease mailings that are due and owe something, those longest due first; at most *limit*.

        * Each is leased under a new token and due again *lock_timeout* from now. However many callers race, each goes
          to one of them.
        * The first lease of an e-mail decides of which debts it tells: all there are. It tells of the same, and has
          the same *first_token*, until `record_notification` ends it, however often it is tried or its lease times
          out. Debts that come later are left to the next e-mail.
        * A call that raises may have leased some all the same: they come when that lease times out.
        """
        ...

    @abstractmethod
    def record_notification(
        self, notification: Notification, *, retry_in: timedelta | None, quiet_for: timedelta = timedelta(0)
    ) -> None:
        """
        End the lease.

        * ``retry_in=None``: the e-mail was sent or is given up. The debts that it tells of are gone, no others; the
          mailing is due *quiet_for* from now, and its next e-mail begins without tries.
        * Otherwise the mailing is due *retry_in* from now, with one more try.

        A notification whose lease was lost is left alone, silently: its e-mail was sent twice at worst. So is one
        whose lease has been ended.
        """
        ...


@runtime_checkable
class SupportsListing(Protocol):
    """The store can show what it holds."""

    @abstractmethod
    def list_callbacks(
        self, *, state: CallbackState | None = None, queue_id: str | None = None, page_size: int = 100
    ) -> Iterator[CallbackStatus]:
        """
        Walk over callbacks in the order in which they were stored: within a queue, that of the numbers they got then.

        Nothing is held open between pages; callbacks stored or purged meanwhile may or may not appear.
        """
        ...


@runtime_checkable
class SupportsPurge(Protocol):
    """The store can forget finished callbacks."""

    @abstractmethod
    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        """
        Delete callbacks that have been finished for that long, with their attempts and locks.

        Never an open callback, nor one that holds its queue, nor one whose e-mail is still owed. No number and no
        token becomes free for another use.

        Args:
            finished_for: how long ago they must have finished; not negative.
            limit: how many at most, at least 1, so that delivery isn't held up. Call again while it returns *limit*.

        Returns:
            How many were deleted.
        """
        ...


@runtime_checkable
class SupportsBackup(Protocol):
    """The store can copy itself while it is in use."""

    @abstractmethod
    def backup(self, path: str | PathLike[str]) -> None:
        """
        Write a copy that opens at some commit point between the call and its return.

        The copy appears under *path* only when it is complete and was checked.

        Raises:
            InvalidRequestError: there is something under *path* already; it was left as it is.
        """
        ...


@runtime_checkable
class SupportsEnlist(Protocol[_Connection]):
    """
    The store can take part in a transaction of the application's, in the same database.

    Then a callback is stored if, and only if, the application's own changes are. The type of the driver's connection
    is the protocol's parameter: ``SupportsEnlist[sqlite3.Connection]``.
    """

    @abstractmethod
    def store_callback_request(
        self, request: CallbackRequest, *, id: str | None = None, connection: _Connection | None = None
    ) -> CallbackStatus:
        """
        Store a callback as `DataAccess.store_callback_request` does, within the transaction of *connection*.

        * The callback is there when the application commits, as durable as that commit is, and nowhere to be seen
          before; when the application rolls back, also to a savepoint, it never was. The store doesn't end the
          transaction, and changes no setting of the connection.
        * Its number is drawn under a lock that lasts until the transaction ends: numbers rise in the order of commits.
          So other writers wait meanwhile, in this queue at least: store late in the transaction, and commit soon.
        * When it raises, nothing of the callback was written, and the transaction can go on, unless the error is a
          `DataAccessError`: then roll it back.
        * The status that is returned holds once the application has committed.

        Args:
            request: what to deliver.
            id: as without a transaction.
            connection: the driver's own connection, with a transaction under way; ``None``: a transaction of the
                store's own, committed when the call returns.

        Raises:
            ConflictError: *id* is stored with another request.
            InvalidRequestError: *id* is malformed; *connection* is of another type, leads to another database, or has
                no transaction under way.
            DataAccessError: the store wasn't opened before.
            TransientDataAccessError: the transaction can't write. Repeat all of it.
        """
        ...

    @abstractmethod
    def store_callback_requests(
        self,
        requests: Sequence[CallbackRequest],
        *,
        ids: Sequence[str | None] | None = None,
        connection: _Connection | None = None,
    ) -> list[CallbackStatus]:
        """Store several callbacks within the transaction of *connection*, in this order, all or none."""
        ...

    @abstractmethod
    def hint(self) -> None:
        """
        Tell subscribers that something may be due, once the application has committed.

        No store can hear that commit. Without the hint a dispatcher finds the callbacks at its next poll.
        """
        ...


@runtime_checkable
class SupportsHandover(Protocol):
    """
    The store can record results and lock what is due then in one transaction: one durable commit in place of two.

    The next callback of a queue may begin when the result of the one before is durable. So where commits are slow, or
    queues are few, commits are most of what there is to wait for.

    Dispatchers use it in place of the two methods that it stands for, unless a subclass overrides one of those.
    """

    @abstractmethod
    def record_and_acquire(
        self, records: Sequence[AttemptRecord], machine_name: str, *, lock_timeout: timedelta, limit: int
    ) -> tuple[list[Transition | LockLostError], list[Acquired]]:
        """
        Do what `DataAccess.record_attempts` does, and then what `DataAccess.acquire_locks` does, in one transaction.

        Where that can't be (for results of one kind, say), in two. When the second fails then, there are no locks.

        Returns:
            What each of the two returns. What the results have made due is among the locks, limit permitting.

        Raises:
            InvalidRequestError: as `DataAccess.acquire_locks`.
            TransientDataAccessError, DataAccessError: as `DataAccess.record_attempts`.
        """
        ...


def handover_of(data_access: DataAccess) -> SupportsHandover | None:
    """
    Return the store as one that hands over, if it is one.

    A class derived from such a store may override `DataAccess.acquire_locks` or `DataAccess.record_attempts`, to count
    or to choose; then it is to be asked by these, as any other store is.
    """
    if not isinstance(data_access, SupportsHandover):
        return None
    place = {name: nth for nth, base in reversed(list(enumerate(type(data_access).__mro__))) for name in vars(base)}
    is_newest = place["record_and_acquire"] <= min(place["acquire_locks"], place["record_attempts"])
    return data_access if is_newest else None


@runtime_checkable
class SupportsShards(Protocol):
    """
    The store keeps callbacks in several places that fail and recover each by itself.

    Who records or releases many can do so for each of them apart, so that one that fails doesn't hold up the others.
    """

    @abstractmethod
    def shard_of(self, acquired: Acquired) -> int:
        """Say in which of them an acquired callback lies, as a number that never changes."""
        ...
