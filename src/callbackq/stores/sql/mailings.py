"""E-mails that are owed, within one write transaction. See `callbackq.dataaccess.SupportsNotifications`."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final

from callbackq.dataaccess import MOST_LISTED, Notification
from callbackq.stores.sql.instants import later
from callbackq.stores.sql.transaction import Transaction

__all__ = ["forget_debts", "lease_mailings", "settle_mailing"]

_MAILINGS_FORGOTTEN_AT_ONCE: Final = 100
_DEBTS_FORGOTTEN_AT_ONCE: Final = 250


def lease_mailings(transaction: Transaction, now: int, *, lock_timeout: timedelta, limit: int) -> list[Notification]:
    """Lease mailings that are due and owe something, and forget some that are due and don't."""
    _forget_mailings(transaction, now)
    due = transaction.all("due_mailings", now=now, limit=limit)
    if not due:
        return []
    first = transaction.draw_tokens(len(due), now)
    timeout = later(now, lock_timeout)
    return [_lease(transaction, row, token=token, timeout=timeout) for token, row in enumerate(due, first)]


def _lease(transaction: Transaction, row: Sequence[Any], *, token: int, timeout: int) -> Notification:
    mailing, email_address, queue_id, last, paid, covered, tries, first_token = row
    # An e-mail that was tried before tells of what it told then: of what came since, the next one.
    covered, first_token = covered or last, first_token or token
    transaction.run(
        "lease_mailing",
        {"mailing": mailing, "token": token, "due": timeout, "covered": covered, "first_token": first_token},
    )
    told = transaction.all("told_callbacks", mailing=mailing, paid=paid, until=min(covered, paid + MOST_LISTED))
    return Notification(
        email_address=email_address,
        queue_id=queue_id,
        callback_ids=tuple(id for (id,) in told),
        count=covered - paid,
        tries=tries,
        token=token,
        first_token=first_token,
    )


def _forget_mailings(transaction: Transaction, now: int) -> None:
    for (mailing,) in transaction.all("quiet_mailings", now=now, limit=_MAILINGS_FORGOTTEN_AT_ONCE):
        # Whoever paid was killed before all had been deleted. Numbers begin anew when the mailing is forgotten.
        if forget_debts(transaction, now, mailing=mailing):
            return
        transaction.run("forget_mailing", {"mailing": mailing})


def settle_mailing(
    transaction: Transaction, now: int, *, notification: Notification, retry_in: timedelta | None, quiet_for: timedelta
) -> int | None:
    """End a lease, unless it was lost. Name the mailing if it has paid debts that are still to be forgotten."""
    mailing: int | None = transaction.value(
        "leased_mailing",
        email_address=notification.email_address,
        queue_id=notification.queue_id,
        token=notification.token,
    )
    if mailing is None:
        return None
    if retry_in is not None:
        transaction.run("postpone_mailing", {"mailing": mailing, "due": later(now, retry_in)})
        return None
    transaction.run("pay_mailing", {"mailing": mailing, "due": later(now, quiet_for)})
    return mailing if forget_debts(transaction, now, mailing=mailing) else None


def forget_debts(transaction: Transaction, now: int, *, mailing: int) -> bool:
    """Delete some debts that were paid, and say whether there may be more."""
    batch = _DEBTS_FORGOTTEN_AT_ONCE
    return transaction.run("forget_debts", {"mailing": mailing, "limit": batch}) == batch
