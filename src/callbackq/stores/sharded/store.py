"""`ShardedDataAccess`: the methods of a store over several stores."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from functools import cache, partial
from typing import Final, Self, TypeVar

from callbackq.clock import Clock, SystemClock
from callbackq.core.lifecycle import Action, Transition
from callbackq.core.models import NEVER, CallbackAttempt, CallbackRequest, CallbackStatus
from callbackq.core.validation import Fault, check_callback_id, refuse
from callbackq.dataaccess import (
    Acquired,
    AttemptRecord,
    DataAccess,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
    SupportsShards,
    check_arguments,
    ids_for,
)
from callbackq.errors import (
    CallbackNotFoundError,
    ConflictError,
    DataAccessError,
    LockLostError,
    SchemaVersionError,
    TransientDataAccessError,
)
from callbackq.settings import check_collaborator
from callbackq.stores.sharded import abilities
from callbackq.stores.sharded.group import Faults, ShardGroup
from callbackq.stores.sharded.routing import draw_id
from callbackq.stores.sharded.shard import Shard

__all__ = ["ShardedDataAccess"]

# How long callbacks that lie in the wrong shard are put off, until somebody has put the list of stores right.
_STRANGERS_WAIT: Final = timedelta(minutes=1)

_T = TypeVar("_T")
_Item = TypeVar("_Item")
_Sharded = TypeVar("_Sharded", bound="ShardedDataAccess")


class ShardedDataAccess(DataAccess, SupportsShards):
    """
    Spread queues over several stores of any kind.

    A queue lies whole in one of them, its *shard*, chosen by its id alone, and a callback without a queue by its own
    id. So order and locks are the shard's business, and every promise about a queue is kept as its store keeps it.
    All processes must list the same stores in the same order.

    * A shard that fails takes nothing else with it. `acquire_locks`, `next_due`, `now`, `open` and
      ``acquire_notifications`` give what the others have, and leave it alone for a growing while: 30 seconds at most,
      or a minute if it takes long to fail. They raise when no shard answers. Every other call asks the shards that
      it needs, and raises what they raise. The log tells when a shard fails and when it works again.
    * Storing under an id of your own needs all shards, unless the call is a repetition: none of them must have that id
      already, with another queue. While one can't be asked, `TransientDataAccessError` says so. Ids that are drawn here
      need the queue's shard only. Two callers who at the same moment store *different queues* under one id may both
      succeed; nothing else gets past `ConflictError`.
    * Several callbacks are stored, recorded and released shard by shard, not all or none. When the call raises, what
      belongs to other shards has been written all the same. Repeating it with the same ids is harmless.
    * Each shard's own clock judges its due times and locks. `now` is the clock of the first shard that answers, and
      `next_due` is told in its terms.
    * Those longest due come first to within a share: while something is due for longer elsewhere, a shard gives at most
      ``limit / (2 * number of shards)`` callbacks in one call. Callbacks are listed, and owed e-mails leased, in order
      within each shard.
    * It is a `SupportsNotifications`, a `SupportsListing`, a `SupportsPurge` when all its shards are. Backups are taken
      of each store.
    * Locked callbacks that lie in a shard where they don't belong are put off for a minute and never handed out, with
      a line in the log: the list of stores is not the one that they were stored with.

    Args:
        stores: the shards. Adding one at the end moves some queues to it, any other change moves many.
        clock: what the time for which a shard is left alone is measured with; the machine's clock by default.

    Raises:
        InvalidRequestError: *stores* is no sequence of different stores, or *clock* no `Clock`.
    """

    def __new__(cls, stores: Sequence[DataAccess], *, clock: Clock | None = None) -> Self:
        # Whoever asks with isinstance is told the truth: the object is of a class that can do what all shards can.
        listed: Sequence[object] = stores if isinstance(stores, Sequence) else ()
        shared = [
            ability
            for protocol, ability in _ABILITIES.items()
            if listed and all(isinstance(store, protocol) for store in listed)
        ]
        made: Self = super().__new__(_with_abilities(cls, tuple(shared)))
        return made

    def __init__(self, stores: Sequence[DataAccess], *, clock: Clock | None = None) -> None:
        clock = SystemClock() if clock is None else clock
        refuse([*_check_stores(stores), *check_collaborator("clock", clock, "now", "monotonic", "boot_id")])
        self.durability = min(store.durability for store in stores)
        self._clock = clock
        self._shards = ShardGroup(stores, clock)

    def __repr__(self) -> str:
        return f"<ShardedDataAccess of {[shard.store for shard in self._shards.all]!r}>"

    def open(self) -> None:
        """
        Open all shards.

        One that can't be opened now is logged and left for later, unless none can.
        """
        faults = Faults()
        for shard in self._shards.all:
            # What a newer release wrote doesn't pass by itself: whoever starts should know at once.
            with faults.kept(but=SchemaVersionError):
                shard.ask(shard.store.open, name="open", ended_by="next_due")
        faults.raise_if_nobody_answered()

    def close(self) -> None:
        faults = Faults()
        for shard in self._shards.all:
            with faults.kept():
                shard.store.close()
        faults.raise_any()

    def now(self) -> datetime:
        faults = Faults()
        for shard in self._shards.awake():
            with faults.kept():
                return shard.ask(shard.store.now, name="now")
        faults.raise_any()
        raise AssertionError("a shard answers or raises")

    # Storing and looking.

    def store_callback_request(self, request: CallbackRequest, *, id: str | None = None) -> CallbackStatus:
        check_arguments(request=request, id=id)
        return self._store([request], [id])[0]

    def store_callback_requests(
        self, requests: Sequence[CallbackRequest], *, ids: Sequence[str | None] | None = None
    ) -> list[CallbackStatus]:
        return self._store(requests, ids_for(requests, ids))

    def get_callback_status(self, id: str) -> CallbackStatus:
        return self._ask_for(id, lambda store: store.get_callback_status(id))

    def request_transition(self, id: str, action: Action) -> CallbackStatus:
        check_arguments(action=action)
        return self._ask_for(id, lambda store: store.request_transition(id, action))

    # Locks.

    def acquire_locks(self, machine_name: str, *, lock_timeout: timedelta, limit: int) -> list[Acquired]:
        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)
        acquired: list[Acquired] = []
        looks, faults = Faults(), Faults()
        overdue: dict[Shard, timedelta] = {}
        for shard in self._shards.awake():
            with looks.kept():
                overdue[shard] = shard.overdue()
        looks.raise_if_nobody_answered()
        # Shares, each for the shard where something has been due longest. The larger they are the fewer writes it
        # takes, the smaller the more exact is the order across shards.
        share = -(-limit // (2 * len(self._shards.all)))
        while overdue and len(acquired) < limit:
            shard = max(overdue, key=lambda one: overdue[one])
            del overdue[shard]
            asked = min(share, limit - len(acquired))
            lock = partial(shard.store.acquire_locks, machine_name, lock_timeout=lock_timeout, limit=asked)
            locked: list[Acquired] = []
            with faults.kept():
                locked = shard.ask(lock, name="acquire_locks")
            acquired += self._without_strangers(shard, locked)
            if len(locked) == asked:
                with looks.kept():
                    overdue[shard] = shard.overdue()
        faults.raise_if_nobody_answered()
        return acquired

    def shard_of(self, acquired: Acquired) -> int:
        """Say in which shard, counted from 0, an acquired callback lies."""
        return self._shards.of(acquired).number

    def release_lock(self, acquired: Acquired, *, delay: timedelta = timedelta(0)) -> Transition:
        check_arguments(delay=delay)
        return self._shards.of(acquired).store.release_lock(acquired, delay=delay)

    def release_locks(self, locks: Sequence[tuple[Acquired, timedelta]]) -> list[Transition | LockLostError]:
        return self._by_shard(
            locks,
            lambda lock: self._shards.of(lock[0]),
            lambda shard, some: shard.ask_for_results(lambda: shard.store.release_locks(some)),
        )

    def record_attempt(self, acquired: Acquired, attempt: CallbackAttempt | None, transition: Transition) -> Transition:
        return self._shards.of(acquired).store.record_attempt(acquired, attempt, transition)

    def record_attempts(self, records: Sequence[AttemptRecord]) -> list[Transition | LockLostError]:
        return self._by_shard(
            records,
            lambda record: self._shards.of(record.acquired),
            lambda shard, some: shard.ask_for_results(lambda: shard.store.record_attempts(some)),
        )

    def next_due(self) -> datetime | None:
        faults = Faults()
        present: datetime | None = None
        soonest: timedelta | None = None
        for shard in self._shards.awake():
            with faults.kept():
                due, now = shard.look()
                present = now if present is None else present
                if due is not None:
                    soonest = due - now if soonest is None else min(soonest, due - now)
        faults.raise_if_nobody_answered()
        return None if present is None or soonest is None else _later(present, soonest)

    def subscribe(self, wake: Callable[[], None]) -> Callable[[], None]:
        ends: list[Callable[[], None]] = []
        faults = Faults()
        for shard in self._shards.all:
            # Without hints from one of them, what is due there is found by polling.
            with faults.kept():
                ends.append(shard.ask(partial(shard.store.subscribe, wake), name="subscribe", ended_by="next_due"))

        def unsubscribe() -> None:
            faults = Faults()
            for end in ends:
                with faults.kept():
                    end()
            faults.raise_any()

        return unsubscribe

    # Everyday steps.

    def _store(self, requests: Sequence[CallbackRequest], ids: Sequence[str | None]) -> list[CallbackStatus]:
        # All ids are known, and all shards have been asked for them, before the first write.
        own: dict[str, CallbackRequest] = {}
        for id, request in zip(ids, requests, strict=True):
            if id is not None and own.setdefault(id, request) != request:
                raise ConflictError(id)
        there = {id: status for id, request in own.items() if (status := self._find(id, request)) is not None}
        named = [(id or self._draw_id(request), request) for id, request in zip(ids, requests, strict=True)]
        missing = [one for one in named if one[0] not in there]
        stored = iter(self._by_shard(missing, lambda one: self._shards.home(one[0], one[1].queue_id), _store))
        return [there[id] if id in there else next(stored) for id, _ in named]

    def _draw_id(self, request: CallbackRequest) -> str:
        shard = self._shards.home("", request.queue_id).number if request.queue_id else None
        return draw_id(shard, len(self._shards.all), self._clock.now())

    def _find(self, id: str, request: CallbackRequest) -> CallbackStatus | None:
        """Find what is stored under an id, by whatever call."""
        here = self._shards.home(id, request.queue_id)
        # Here first: a call that is repeated needs no other shard.
        for shard in (here, *(one for one in self._shards.all if one is not here)):
            try:
                status = shard.store.get_callback_status(id)
            except CallbackNotFoundError:
                continue
            except DataAccessError as error:
                if shard is here:
                    raise
                raise TransientDataAccessError(
                    f"{shard.name} can't be asked whether it has this id already; nothing was stored. "
                    "Try again, or store without an id"
                ) from error
            if status.request != request:
                raise ConflictError(id)
            return status
        return None

    def _ask_for(self, id: str, call: Callable[[DataAccess], _T]) -> _T:
        """Make a call to the shard that holds a callback. The others say that it isn't there, and do nothing."""
        faults = Faults()
        for shard in self._shards.from_home(id) if not any(check_callback_id(id)) else ():
            try:
                return call(shard.store)
            except CallbackNotFoundError:
                continue
            except DataAccessError as error:
                # Another one may have it. If none has, this one may.
                faults.add(error)
        faults.raise_any()
        raise CallbackNotFoundError(id)

    def _by_shard(
        self,
        items: Sequence[_Item],
        shard_of: Callable[[_Item], Shard],
        write: Callable[[Shard, list[_Item]], Sequence[_T]],
    ) -> list[_T]:
        """Write items, those of each shard at a time, and put the results into the order of the items."""
        places: dict[Shard, list[int]] = {}
        for place, item in enumerate(items):
            places.setdefault(shard_of(item), []).append(place)
        results: dict[int, _T] = {}
        faults = Faults()
        for shard, own in places.items():
            with faults.kept():
                results.update(zip(own, write(shard, [items[place] for place in own]), strict=True))
        faults.raise_any_after_writing()
        return [results[place] for place in range(len(items))]

    def _without_strangers(self, shard: Shard, locked: list[Acquired]) -> list[Acquired]:
        """Give back what belongs to another shard: its queue may go on there already, and would lose its order."""
        strangers = [one for one in locked if self._shards.of(one) is not shard]
        if not strangers:
            return locked
        shard.tell_of_strangers(len(strangers))
        with Faults().kept():
            # Otherwise their locks time out.
            shard.store.release_locks([(one, _STRANGERS_WAIT) for one in strangers])
        return [one for one in locked if self._shards.of(one) is shard]


def _store(shard: Shard, named: list[tuple[str, CallbackRequest]]) -> list[CallbackStatus]:
    return shard.store.store_callback_requests([request for _, request in named], ids=[id for id, _ in named])


def _later(now: datetime, delay: timedelta) -> datetime:
    try:
        return now + delay
    except OverflowError:
        # Due at the end of the calendar, by a clock that is behind.
        return NEVER


# Who can do what all shards can.

_ABILITIES: Final = {
    SupportsNotifications: abilities.Notifications,
    SupportsListing: abilities.Listing,
    SupportsPurge: abilities.Purge,
}


@cache
def _with_abilities(cls: type[_Sharded], shared: tuple[type, ...]) -> type[_Sharded]:
    """Make the class of a store that can do this, too."""
    return types.new_class(cls.__name__, (cls, *shared)) if shared else cls


def _check_stores(stores: object) -> Iterator[Fault]:
    if not isinstance(stores, Sequence) or isinstance(stores, str) or not stores:
        yield "stores", "must be a list of stores, at least one"
        return
    for index, store in enumerate(stores):
        yield from check_collaborator(f"stores[{index}]", store, "open", "acquire_locks", "record_attempts")
        if any(store is other for other in stores[:index]):
            yield f"stores[{index}]", "must be another store than those before it"
