"""The network, the receivers behind it and the mail server, as one dispatcher meets them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from email.utils import format_datetime

from attrs import mutable

from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure, CallbackData
from callbackq.notifier import FailureNotice
from callbackq.testing.history import Arrival
from callbackq.testing.simulation.ledger import Ledger
from callbackq.testing.simulation.scenario import Behaviour, Reaction
from callbackq.testing.simulation.verdicts import SILENCE
from callbackq.testing.simulation.world import Actor, Killed, MachineClock, Strand, World, microseconds

__all__ = ["MailServer", "SimulatedNotifier", "SimulatedTransport"]

_STATUS = {
    Reaction.ERROR: 503,
    Reaction.RETRY_AFTER: 429,
    Reaction.RETRY_AT: 503,
    Reaction.GONE: 410,
    Reaction.REDIRECT: 302,
}
_FAILURE = {
    Reaction.HANG: AttemptFailure.TIMEOUT,
    Reaction.HANG_UNREAD: AttemptFailure.TIMEOUT,
    Reaction.DNS_HANG: AttemptFailure.DNS,
    Reaction.RESET_BEFORE: AttemptFailure.CONNECTION_LOST,
    Reaction.RESET_AFTER: AttemptFailure.CONNECTION_LOST,
}
_ACCEPTING = (
    Reaction.ACCEPT,
    Reaction.SLOW,
    Reaction.RESET_AFTER,
    Reaction.STOLEN,
    Reaction.TWICE,
    Reaction.LATE,
    Reaction.GARBAGE,
)
_TELLS_NOTHING = (Reaction.STOLEN, Reaction.LATE, Reaction.GARBAGE)
_NEVER_ARRIVES = (Reaction.HANG_UNREAD, Reaction.DNS_HANG, Reaction.RESET_BEFORE)
_TELLS_WHEN = (Reaction.RETRY_AFTER, Reaction.RETRY_AT)
_HANGS = (Reaction.HANG, Reaction.HANG_UNREAD, Reaction.DNS_HANG)
# Names are looked up and connections made before the first byte goes out.
_CONNECT_US = 3_000
_LATE_US = 4_000_000


@mutable(eq=False)
class _UnderWay:
    delivery: Delivery
    done: Callable[[Outcome], None]
    behaviour: Behaviour
    has_begun: bool = False
    arrival: int = -1
    will_be_accepted: bool = False
    is_over: bool = False


class SimulatedTransport:
    """
    Sends for one process.

    Args:
        actor: the process.
        clock: of its machine.
        ledger: what hears of each arrival.
        deadline: the longest an attempt takes.
        lock_timeout: how long the process lets a transport go on that doesn't end an attempt when it is to.
        behaviour_of: says how the next attempt of a callback fares.

    Attributes:
        may_interrupt: whether the process may interrupt requests.
    """

    def __init__(
        self,
        actor: Actor,
        clock: MachineClock,
        ledger: Ledger,
        *,
        deadline: timedelta,
        lock_timeout: timedelta,
        behaviour_of: Callable[[str], Behaviour],
    ) -> None:
        self.deadline = deadline
        self._lock_timeout_us = microseconds(lock_timeout.total_seconds())
        self.strand: Strand | None = None
        self.may_interrupt = True
        self._actor = actor
        self._world: World = actor.world
        self._clock = clock
        self._ledger = ledger
        self._behaviour_of = behaviour_of
        self._lost_answer = ledger.excuses.lost_answer
        self._under_way: dict[Delivery, _UnderWay] = {}

    def send(self, delivery: Delivery) -> Outcome:
        raise AssertionError("the engine must use submit")

    def close(self) -> None:
        pass

    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        id = delivery.callback_id
        self._actor.reach("before", "submit", id)
        behaviour = self._behaviour_of(id)
        self._world.counts[behaviour.reaction.value] += 1
        self._ledger.verdicts.told(self._actor, delivery, None)
        if behaviour.reaction is Reaction.RAISE:
            self._ledger.verdicts.told(self._actor, delivery, self._answer(0, AttemptFailure.INTERNAL))
            raise RuntimeError("simulated: a transport of the host's raises")
        if behaviour.reaction is Reaction.POISON:
            self._world.tell(self._actor.name, "KILLED BY A REQUEST", id, f"token {delivery.token}")
            self._actor.die(behaviour.seconds)
            raise Killed
        under_way = self._under_way[delivery] = _UnderWay(delivery, done, behaviour)
        if behaviour.reaction is Reaction.NOT_SENT:
            self._end(under_way, NotSent(reason=NotSentReason.LOCAL_FAULT))
        elif behaviour.reaction is Reaction.NO_SECRETS:
            self._end(under_way, NotSent(reason=NotSentReason.NO_SECRETS))
        else:
            self._world.at(self._world.now_us + _CONNECT_US, lambda: self._begin(under_way))
        self._actor.reach("after", "submit", id)

    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in list(deliveries):
            under_way = self._under_way.get(delivery)
            if under_way is None or under_way.behaviour.reaction is Reaction.STOLEN:
                continue
            if under_way.has_begun:
                if not self.may_interrupt:
                    self._ledger.break_rule("stop", delivery.callback_id, "interrupted before the stop's time was up")
                self._world.counts["interrupted"] += 1
                self._lost_answer(delivery.token)
                self._cut(under_way)
                self._end(under_way, self._answer(0, AttemptFailure.INTERRUPTED))
            else:
                self._end(under_way, NotSent(reason=NotSentReason.STOPPED))

    def _begin(self, under_way: _UnderWay) -> None:
        """Come to the first byte."""
        actor, delivery = self._actor, under_way.delivery
        if actor.is_dead or under_way.is_over:
            return
        if actor.frozen_until_us > self._world.now_us:
            self._world.at(actor.frozen_until_us, lambda: self._begin(under_way))
            return
        ends_us = min(
            self._world.now_us + microseconds(self.deadline.total_seconds()) - _CONNECT_US,
            self._clock.us_at(delivery.ends_at),
        )
        if self._world.now_us >= ends_us:
            self._world.counts["time is up"] += 1
            self._end(under_way, NotSent(reason=NotSentReason.TIME_IS_UP))
            return
        under_way.has_begun = True
        began_us = self._world.now_us
        # Should it stand still here for too long, the dispatcher may give it up without its word.
        self._ledger.verdicts.told(self._actor, delivery, SILENCE)
        try:
            actor.reach("before", "first byte", delivery.callback_id)
        except Killed:  # nothing was sent
            return
        if self._world.now_us == began_us:
            self._ledger.verdicts.told(self._actor, delivery, None)
        elif not self._ledger.is_locked_by(delivery.callback_id, delivery.token):
            # It stood still between its look at the clock and the first byte, which no design can rule out.
            self._ledger.stale_requests.add((delivery.callback_id, delivery.token))
            self._lost_answer(delivery.token)
        self._send(under_way, ends_us)
        try:
            actor.reach("after", "first byte", delivery.callback_id)
        except Killed:  # with the request under way
            return

    def _send(self, under_way: _UnderWay, ends_us: int) -> None:
        world, delivery, behaviour = self._world, under_way.delivery, under_way.behaviour
        reaction = behaviour.reaction
        answers_us = world.now_us + microseconds(0.0 if reaction in _TELLS_WHEN else behaviour.seconds)
        world.tell(
            self._actor.name,
            "sent",
            delivery.callback_id,
            f"token {delivery.token} attempt {delivery.attempt}: {reaction.value}",
        )
        if reaction not in _NEVER_ARRIVES:
            is_accepted = reaction in _ACCEPTING and (answers_us <= ends_us or reaction is Reaction.STOLEN)
            is_accepted = is_accepted and (behaviour.accepts or reaction not in _TELLS_NOTHING)
            self._arrive(under_way, answers_us if is_accepted else None)
        if reaction is Reaction.STOLEN:
            self._lost_answer(delivery.token)
            self._ledger.verdicts.told(self._actor, delivery, SILENCE)
            self._ledger.excuses.never_told([delivery.token])
            return
        if reaction in _HANGS or answers_us > ends_us:
            failure = _FAILURE.get(reaction, AttemptFailure.TIMEOUT)
            self._lost_answer(delivery.token)
            world.at(ends_us, lambda: self._end(under_way, self._answer(0, failure)))
        elif reaction in _FAILURE:
            self._lost_answer(delivery.token)
            world.at(answers_us, lambda: self._end(under_way, self._answer(0, _FAILURE[reaction])))
        elif reaction is Reaction.LATE:
            self._lost_answer(delivery.token)
            self._ledger.verdicts.told(self._actor, delivery, SILENCE)
            self._ledger.excuses.never_told([delivery.token])
            late_us = self._clock.us_at(delivery.ends_at) + _LATE_US
            world.at(late_us, lambda: self._end(under_way, self._answer(200 if behaviour.accepts else 503)))
        elif reaction is Reaction.GARBAGE:
            self._lost_answer(delivery.token)
            world.at(answers_us, lambda: self._end(under_way, "no answer"))
        else:
            headers = {"Retry-After": self._retry_after(behaviour)} if reaction in _TELLS_WHEN else {}
            status = _STATUS.get(reaction, 200)
            world.at(answers_us, lambda: self._end(under_way, self._answer(status, headers=headers)))
            if reaction is Reaction.TWICE:
                again_us = answers_us + 500_000
                world.at(again_us, lambda: self._end(under_way, self._answer(503), is_repeated=True))

    def _arrive(self, under_way: _UnderWay, accepted_us: int | None) -> None:
        world, delivery = self._world, under_way.delivery
        under_way.arrival = self._ledger.arrived(
            Arrival(
                callback_id=delivery.callback_id,
                queue_id=delivery.request.queue_id,
                sequence=delivery.sequence,
                token=delivery.token,
                started=world.now_us / 1e6,
                accepted=None,
            )
        )
        if accepted_us is not None:
            under_way.will_be_accepted = True
            world.at(accepted_us, lambda: self._accept(under_way))

    def _accept(self, under_way: _UnderWay) -> None:
        if under_way.will_be_accepted:
            under_way.will_be_accepted = False
            self._world.tell(
                "receiver", "accepts", under_way.delivery.callback_id, f"number {under_way.delivery.sequence}"
            )
            self._ledger.accepted(under_way.arrival)

    def _cut(self, under_way: _UnderWay) -> None:
        """Let the receiver see the end of the connection: what it has read may be accepted all the same."""
        if self._world.random.random() < 0.5:
            self._accept(under_way)
        under_way.will_be_accepted = False

    def die(self) -> None:
        """End with the process."""
        for under_way in self._under_way.values():
            self._cut(under_way)

    def _end(self, under_way: _UnderWay, outcome: object, *, is_repeated: bool = False) -> None:
        actor, world = self._actor, self._world
        if actor.is_dead or (under_way.is_over and not is_repeated):
            return
        # A second word comes after the first, also when a freeze has kept back both.
        is_early = is_repeated and not under_way.is_over
        if is_early or actor.frozen_until_us > world.now_us:
            at_us = max(actor.frozen_until_us, world.now_us + is_early)
            world.at(at_us, lambda: self._end(under_way, outcome, is_repeated=is_repeated))
            return
        if not is_repeated:
            under_way.is_over = True
            self._under_way.pop(under_way.delivery, None)
            delivery = under_way.delivery
            is_overdue = world.now_us >= self._clock.us_at(delivery.ends_at) + self._lock_timeout_us
            self._ledger.verdicts.told(self._actor, delivery, outcome, is_overdue=is_overdue)
        under_way.done(outcome)  # type: ignore[arg-type]  # nonsense, too
        if self.strand is not None:
            self.strand.wake(world.now_us)

    def _retry_after(self, behaviour: Behaviour) -> str:
        if behaviour.reaction is Reaction.RETRY_AFTER:
            return f"{behaviour.seconds:.0f}"
        return format_datetime(self._clock.now() + timedelta(seconds=behaviour.seconds), usegmt=True)

    def _answer(
        self, status: int, failure: AttemptFailure | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        return Answer(
            status_code=status,
            response=CallbackData(headers=headers or {}),
            time=self._clock.now(),
            duration=timedelta(0),
            failure=failure,
        )


class MailServer:
    """Whether e-mails are accepted at the moment."""

    def __init__(self) -> None:
        self.fails_until_us = 0
        self.hangs_until_us = 0


class SimulatedNotifier:
    """Hands the e-mails of one process to the mail server."""

    deadline = timedelta(seconds=30)

    def __init__(self, actor: Actor, ledger: Ledger, server: MailServer, interval: timedelta) -> None:
        self.interval = interval
        self._actor = actor
        self._ledger = ledger
        self._server = server

    def notify(self, notice: FailureNotice) -> None:
        actor, world, server = self._actor, self._actor.world, self._server
        actor.reach("before", "notify")
        if server.hangs_until_us > world.now_us and world.can_nest():
            world.counts["mail hangs"] += 1
            ends_us = world.now_us + microseconds(self.deadline.total_seconds())
            world.stand_still(lambda: max(ends_us, actor.frozen_until_us))
            actor.reach("after", "notify")
            raise TimeoutError("simulated: the mail server hangs")
        if server.fails_until_us > world.now_us:
            world.counts["mail fails"] += 1
            raise ConnectionError("simulated: the mail server can't be reached")
        world.tell(actor.name, "mailed", "", ",".join(one.id for one in notice.callbacks))
        self._ledger.mails.mailed(actor)
        world.counts["e-mail"] += 1
        actor.reach("after", "notify")
