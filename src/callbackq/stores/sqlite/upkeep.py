"""E-mails that are owed, callbacks that can be forgotten, and holders that died, within one write transaction."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from callbackq.dataaccess import Notification
from callbackq.stores.sqlite.timeline import earlier, later
from callbackq.stores.sqlite.transaction import Transaction

__all__ = ["end_locks_of", "lease_notifications", "purge", "settle_notification"]


def lease_notifications(
    transaction: Transaction, now: int, *, lock_timeout: timedelta, limit: int
) -> list[Notification]:
    """Lease owed e-mails that are due."""
    due = transaction.all("due_notifications", now=now, limit=limit)
    if not due:
        return []
    transaction.run("draw_tokens", {"count": len(due), "now": now})
    first_token = transaction.value("last_token") - len(due) + 1
    leases = [
        {"notification": row[0], "token": token, "timeout": later(now, lock_timeout)}
        for token, row in enumerate(due, first_token)
    ]
    transaction.run_many("lease_notification", leases)
    return [
        Notification(callback_id=id, email_address=email_address, tries=tries, token=token)
        for token, (_, id, email_address, tries) in enumerate(due, first_token)
    ]


def settle_notification(
    transaction: Transaction, now: int, notification: Notification, *, retry_in: timedelta | None
) -> None:
    """End a lease; nothing happens when it was lost."""
    lease = {"id": notification.callback_id, "token": notification.token}
    if retry_in is None:
        transaction.run("pay_notification", lease)
    else:
        transaction.run("postpone_notification", {**lease, "due": later(now, retry_in)})


def purge(transaction: Transaction, now: int, *, finished_for: timedelta, limit: int) -> int:
    """Forget finished callbacks, and say how many."""
    rows = transaction.all("purgeable", before=earlier(now, finished_for), limit=limit)
    callbacks = [{"callback": key} for (key,) in rows]
    for statement in ("forget_history", "forget_request", "forget_callback"):
        transaction.run_many(statement, callbacks)
    return len(callbacks)


def end_locks_of(transaction: Transaction, now: int, dead: Iterable[int]) -> None:
    """Let the locks of dead holders time out at once, and forget the holders."""
    for holder in dead:
        # A holder that removed itself meanwhile has been closed: its locks live on until their timeout.
        if transaction.run("remove_holder", {"holder": holder}):
            transaction.run("end_locks_of_holder", {"holder": holder, "now": now})
