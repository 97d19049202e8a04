"""All shards together: who is responsible for what, and what is made of the faults of some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from callbackq.clock import Clock
from callbackq.dataaccess import Acquired, DataAccess
from callbackq.errors import DataAccessError, TransientDataAccessError
from callbackq.stores.sharded.routing import shard_of
from callbackq.stores.sharded.shard import Shard

__all__ = ["Faults", "ShardGroup"]


class ShardGroup:
    """
    The shards, in the order of the list that they were made from.

    Args:
        stores: one for each.
        clock: what rests are measured with.
    """

    def __init__(self, stores: Sequence[DataAccess], clock: Clock) -> None:
        self.all = tuple(Shard(number, len(stores), store, clock) for number, store in enumerate(stores))
        self._next_first = 0

    def home(self, id: str, queue_id: str = "") -> Shard:
        """Where a callback belongs: it goes with its queue; without one, and for those who know its id only, by id."""
        return self.all[shard_of(queue_id or id, len(self.all))]

    def of(self, acquired: Acquired) -> Shard:
        """Where an acquired callback lies."""
        return self.home(acquired.id, acquired.queue_id)

    def from_home(self, id: str) -> Iterator[Shard]:
        """All shards, the likeliest to hold the callback first: whose id was drawn for it lies at home."""
        home = self.home(id)
        yield home
        yield from (shard for shard in self.all if shard is not home)

    def awake(self) -> Sequence[Shard]:
        """Those not left alone after a fault; all, when there are no others: then whoever calls rests."""
        return [shard for shard in self.all if not shard.is_resting] or self.all

    def in_turn(self) -> Sequence[Shard]:
        """Those awake, another one first each time."""
        awake = self.awake()
        first = self._next_first % len(awake)
        self._next_first = first + 1
        return [*awake[first:], *awake[:first]]


class Faults:
    """What some shards raised, while the others were asked all the same."""

    def __init__(self) -> None:
        self._errors: list[Exception] = []
        self._answers = 0

    @contextmanager
    def kept(self, *, but: type[Exception] | tuple[()] = ()) -> Iterator[None]:
        """Ask one of the shards in the block, and keep what it raises, *but* that."""
        try:
            yield
        except but:
            raise
        except Exception as error:
            # Whatever a store raises, a custom one's bugs included, must not cost what the others gave.
            self._errors.append(error)
        else:
            self._answers += 1

    def add(self, error: Exception) -> None:
        """Keep what a shard raised."""
        self._errors.append(error)

    def raise_if_nobody_answered(self) -> None:
        """Raise the worst when no call succeeded."""
        if not self._answers:
            self.raise_any()

    def raise_any(self) -> None:
        """Raise the worst there is: who is told that nothing was written relies on it."""
        if self._errors:
            raise max(self._errors, key=_badness)

    def raise_any_after_writing(self) -> None:
        """Raise the worst there is; when another shard has written, it isn't true that nothing was written."""
        try:
            self.raise_any()
        except TransientDataAccessError as error:
            if not self._answers:
                raise
            raise DataAccessError(
                "what belongs to some shards was written, the rest was not; repeat the call"
            ) from error


def _badness(error: Exception) -> int:
    if isinstance(error, TransientDataAccessError):
        return 0
    return 1 if isinstance(error, DataAccessError) else 2
