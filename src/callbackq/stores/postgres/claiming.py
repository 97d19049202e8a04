"""Taking locks, and where to search for what can be locked."""

from __future__ import annotations

from datetime import timedelta
from math import inf
from typing import Final

import psycopg
from attrs import define

from callbackq.stores.postgres.transaction import PostgreSQLTransaction
from callbackq.stores.sql import locking
from callbackq.stores.sql.instants import later
from callbackq.stores.sql.rows import LOCKED, CallbackRow

__all__ = ["Mark", "claim", "give_back"]

_LAG_US: Final = 1_000_000
# Searches from the beginning take a twentieth of the time at most, unless they are as slow as all that.
_RESTS_PER_SEARCH: Final = 20
_SHORTEST_REST_SECONDS: Final = 0.1
_LONGEST_REST_SECONDS: Final = 1.0


def claim(
    transaction: PostgreSQLTransaction, now: int, *, machine_name: str, lock_timeout: timedelta, limit: int
) -> list[locking.Claim]:
    """Lock due heads."""
    timeout = later(now, lock_timeout)

    def take(rows: list[CallbackRow]) -> None:
        for row in rows:
            # No counter, which all claims would wait for. Time gives a token that even a callback which was purged and
            # stored again never had; adding one makes it rise also when somebody has turned the clock back.
            row.take(
                token=max(row.token + 1, transaction.began), acquired=now, timeout=timeout, machine_name=machine_name
            )
        if transaction.run_many("lock", map(vars, rows)) != len(rows):
            raise psycopg.errors.SerializationFailure("others have locked some of them, or ended their locks")

    return locking.claim(transaction, now, limit=limit, take=take)


def give_back(transaction: PostgreSQLTransaction, now: int, *, claims: list[locking.Claim]) -> None:
    """
    End the locks of claims that nobody was given, if they were committed at all.

    More than the token is compared: a claim that was undone may have drawn the same as another after it.
    """
    rows = transaction.rows_to_change(row.id for row, _ in claims)
    held = [locking.acquired(claim) for claim in claims if _is_held(claim[0], rows.get(claim[0].id))]
    locking.end_locks(transaction, now, locking.releases((one, timedelta(0)) for one in held), released=True)


def _is_held(claimed: CallbackRow, found: CallbackRow | None) -> bool:
    return (
        found is not None
        and found.state == LOCKED
        and (found.token, found.acquired, found.due, found.machine)
        == (claimed.token, claimed.acquired, claimed.due, claimed.machine)
    )


@define
class Mark:
    """
    Where a search for due heads begins.

    Each claim and each result leaves a dead entry in the index of due heads. As long as any transaction in the whole
    server is open that might still look at them, they can't be removed, and a search from the index's beginning walks
    over all of them. So it begins behind the earliest that the last one found. What comes to lie before that (stored
    by a transaction that stayed open for long, say) is found by a search from the beginning: at every look where that
    costs little, and once a second at least.
    """

    _mark: int = 0
    _next_full_search: float = -inf

    def wants_full_search(self, now: float) -> bool:
        """Whether the next search is to begin at the beginning, at this reading of the monotonic clock."""
        return now >= self._next_full_search

    def begin(self, now: int) -> int:
        """Say from where to search otherwise."""
        # A clock that was turned back makes heads before the mark, and the mark would be far ahead for as long as that.
        return 0 if now < self._mark else self._mark

    def found(self, earliest_due: int | None, now: int, *, began: float, ended: float) -> None:
        """
        Learn from a search from the beginning.

        Args:
            earliest_due: the earliest entry; ``None`` when there is none.
            now: the server's time.
            began: reading of the monotonic clock before it.
            ended: and after it.
        """
        self._mark = min(now if earliest_due is None else earliest_due, now) - _LAG_US
        rest = _RESTS_PER_SEARCH * (ended - began)
        self._next_full_search = ended + min(max(rest, _SHORTEST_REST_SECONDS), _LONGEST_REST_SECONDS)
