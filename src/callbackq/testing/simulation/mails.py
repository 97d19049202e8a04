"""Judges e-mails: each failure is told, none without need twice, and no address too often."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

from callbackq.dataaccess import Notification
from callbackq.testing.simulation.account import Account
from callbackq.testing.simulation.world import Actor

__all__ = ["Mails"]


class Mails:
    """
    Judge e-mails.

    Args:
        break_rule: notes a broken promise: rule, id, what was seen.
        accounts: of all callbacks, by id.
        now_us: the world's time.
        interval_us: how long an address is left alone after an e-mail.
    """

    def __init__(
        self,
        break_rule: Callable[[str, str, str], None],
        accounts: Mapping[str, Account],
        now_us: Callable[[], int],
        interval_us: int,
    ) -> None:
        self._break_rule = break_rule
        self._accounts = accounts
        self._now_us = now_us
        self._interval_us = interval_us
        self._owed: dict[str, int] = defaultdict(int)
        self._told: dict[str, int] = defaultdict(int)
        # The newest lease of each mailing, and what each holder has leased last.
        self._leases: dict[tuple[str, str], int] = {}
        self._lease_of: dict[Actor, tuple[Notification, int]] = {}
        # By the token of an e-mail's first lease: who sent it last, and how long that one had been hindered by then.
        self._sent: dict[int, tuple[Actor, int]] = {}
        self._excused: set[int] = set()
        self._quiet_until_us: dict[tuple[str, str], tuple[int, int]] = {}
        self.time_has_jumped = False

    def owe(self, account: Account) -> None:
        """A failure that owes an e-mail was committed."""
        account.debts += 1
        self._owed[account.id] += 1

    def leased(self, holder: Actor, notifications: Sequence[Notification]) -> None:
        """E-mails were leased."""
        for one in notifications:
            self._leases[one.email_address, one.queue_id] = one.token
            self._lease_of[holder] = (one, holder.hindered_us)

    def mailed(self, holder: Actor) -> None:
        """The e-mail that *holder* has leased was accepted by the mail server."""
        one, hindered_us = self._lease_of[holder]
        about = one.callback_ids[0]
        key = one.first_token
        if (earlier := self._sent.get(key)) is None:
            for id in one.callback_ids:
                self._told[id] += 1
        else:
            last_holder, hindered_then_us = earlier
            was_hindered = last_holder.is_dead or last_holder.hindered_us - hindered_then_us > 1_000_000
            if not was_hindered and key not in self._excused:
                self._break_rule("e-mail repeated", about, "though nothing had happened to the first")
        self._sent[key] = (holder, hindered_us)
        until, last_key = self._quiet_until_us.get((one.email_address, one.queue_id), (0, 0))
        if last_key not in (0, key) and self._now_us() < until and not self.time_has_jumped:
            self._break_rule("e-mail too soon", about, f"{(until - self._now_us()) / 1e6:.3f} s before its time")
        self._quiet_until_us[one.email_address, one.queue_id] = (self._now_us() + self._interval_us, key)

    def excuse(self, first_token: int) -> None:
        """Something happened to an e-mail, for which the contract allows another."""
        self._excused.add(first_token)

    def ended(self, notification: Notification, *, is_over: bool) -> None:
        """The end of an e-mail's lease was committed; of a lease that was lost, it changes nothing."""
        if self._leases.get((notification.email_address, notification.queue_id)) == notification.token:
            del self._leases[notification.email_address, notification.queue_id]
            for id in notification.callback_ids if is_over else ():
                self._accounts[id].debts -= 1

    def are_owed(self) -> bool:
        """Whether an e-mail is still owed."""
        return any(account.debts for account in self._accounts.values() if not account.was_purged)

    def judge_end(self, id: str) -> None:
        """Judge, when all is over, whether each failure of a callback was told."""
        owed, told = self._owed[id], self._told[id]
        if told < owed:
            self._break_rule("e-mail lost", id, f"it failed {owed} times, and was told {told} times")
