"""What shards can do together when each of them can: keep owed e-mails, list, purge."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from functools import partial

from attrs import evolve

from callbackq.core.models import CallbackState, CallbackStatus
from callbackq.dataaccess import (
    Notification,
    SupportsListing,
    SupportsNotifications,
    SupportsPurge,
    check_arguments,
)
from callbackq.stores.sharded.group import Faults, ShardGroup
from callbackq.stores.sharded.shard import Shard

__all__ = ["Listing", "Notifications", "Purge"]


class Notifications(SupportsNotifications):
    """
    Owed e-mails, oldest first within each shard; another shard is asked first each time.

    A queue's failures lie in its shard. Those of callbacks without a queue lie in all, and are an e-mail for each.
    """

    _shards: ShardGroup

    def acquire_notifications(self, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
        check_arguments(lock_timeout=lock_timeout, limit=limit)
        leased: list[Notification] = []
        faults = Faults()
        for shard in self._shards.in_turn():
            if len(leased) == limit:
                break
            with faults.kept():
                leased += self._lease(shard, lock_timeout, limit - len(leased))
        faults.raise_if_nobody_answered()
        return leased

    def _lease(self, shard: Shard, lock_timeout: timedelta, limit: int) -> list[Notification]:
        store = shard.store
        assert isinstance(store, SupportsNotifications)  # noqa: S101 - all are, or this class would not be in use
        call = partial(store.acquire_notifications, lock_timeout=lock_timeout, limit=limit)
        # Its token says which shard leased it, so that it finds its way back through any object on the same shards.
        count = len(self._shards.all)
        return [
            evolve(one, token=one.token * count + shard.number, first_token=one.first_token * count + shard.number)
            for one in shard.ask(call, name="acquire_notifications")
        ]

    def record_notification(
        self, notification: Notification, *, retry_in: timedelta | None, quiet_for: timedelta = timedelta(0)
    ) -> None:
        token, number = divmod(notification.token, len(self._shards.all))
        store = self._shards.all[number].store
        assert isinstance(store, SupportsNotifications)  # noqa: S101 - as above
        store.record_notification(evolve(notification, token=token), retry_in=retry_in, quiet_for=quiet_for)


class Listing(SupportsListing):
    """One shard after the other; a queue's callbacks from its own shard alone."""

    _shards: ShardGroup

    def list_callbacks(
        self, *, state: CallbackState | None = None, queue_id: str | None = None, page_size: int = 100
    ) -> Iterator[CallbackStatus]:
        # Here, not with the first page: whoever calls wrongly should be told where.
        check_arguments(state=state, queue_id=queue_id, page_size=page_size)
        shards = [self._shards.home("", queue_id)] if queue_id else self._shards.all
        return self._chain([shard.store for shard in shards], state, queue_id, page_size)

    def _chain(
        self, stores: list[object], state: CallbackState | None, queue_id: str | None, page_size: int
    ) -> Iterator[CallbackStatus]:
        faults = Faults()
        for store in stores:
            assert isinstance(store, SupportsListing)  # noqa: S101 - all are, or this class would not be in use
            with faults.kept():
                yield from store.list_callbacks(state=state, queue_id=queue_id, page_size=page_size)
        # Last, so that all that can be shown has been; but a listing with a gap must not look whole.
        faults.raise_any()


class Purge(SupportsPurge):
    """The limit is spread over the shards."""

    _shards: ShardGroup

    def purge(self, *, finished_for: timedelta, limit: int = 1000) -> int:
        check_arguments(finished_for=finished_for, limit=limit)
        faults = Faults()
        left, going_on = limit, list(self._shards.all)
        while left and going_on:
            share = -(-left // len(going_on))
            for shard in going_on[:]:
                asked, purged = min(share, left), 0
                if asked:
                    with faults.kept():
                        purged = self._purge(shard, finished_for, asked)
                left -= purged
                if purged < asked:
                    going_on.remove(shard)
        if left == limit:
            # While others have something to purge, callers must be able to go on.
            faults.raise_any()
        return limit - left

    def _purge(self, shard: Shard, finished_for: timedelta, limit: int) -> int:
        store = shard.store
        assert isinstance(store, SupportsPurge)  # noqa: S101 - as above
        return store.purge(finished_for=finished_for, limit=limit)
