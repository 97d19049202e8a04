"""Walking over callbacks, page by page."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Final

from callbackq.core.models import CallbackState, CallbackStatus
from callbackq.core.validation import check_text
from callbackq.stores.postgres.database import Database
from callbackq.stores.postgres.transaction import PostgreSQLTransaction
from callbackq.stores.sql.reading import readable_statuses
from callbackq.stores.sql.rows import code_of

__all__ = ["pages"]

_LARGEST_PAGE: Final = 10_000
_Place = tuple[int, str]
"""Where a page ended: when its last callback was stored, and its id."""


def pages(
    database: Database, *, state: CallbackState | None, queue_id: str | None, page_size: int
) -> Iterator[CallbackStatus]:
    """Give callbacks in the order in which they were stored; nothing is held open between two pages."""
    if queue_id and any(check_text(queue_id)):
        return  # no queue can have this name, and a lone surrogate in it could not be bound
    page_size = min(page_size, _LARGEST_PAGE)
    place: _Place | None = (-1, "")
    while place is not None:
        statuses, place = database.read(
            partial(_page, after=place, state=state, queue_id=queue_id, page_size=page_size)
        )
        yield from statuses


def _page(
    transaction: PostgreSQLTransaction,
    *,
    after: _Place,
    state: CallbackState | None,
    queue_id: str | None,
    page_size: int,
) -> tuple[list[CallbackStatus], _Place | None]:
    values: dict[str, object] = {"after": after[0], "after_callback": after[1], "limit": page_size}
    found = (
        transaction.all("list_queue", queue=queue_id, **values)
        if queue_id
        else transaction.all("list_callbacks", **values)
    )
    ids = [id for id, _ in found]
    if state is not None or queue_id == "":
        code = None if state is None else code_of(state)
        wanted = {
            id
            for id, its_state, queue in transaction.all("states", ids=ids)
            if code in (None, its_state) and (queue_id is None or (queue or "") == queue_id)
        }
        ids = [id for id in ids if id in wanted]
    last = found[-1] if len(found) == page_size else None
    return readable_statuses(transaction, ids), None if last is None else (last[1], last[0])
