"""
What happens in a simulated run, as plain data drawn from a seed.

Everything that the world does to callbackq is in a `Scenario`, so that a failing one can be made smaller by leaving
things out.
"""

from __future__ import annotations

from enum import Enum
from random import Random
from typing import Final, Literal

from attrs import evolve, field, frozen

__all__ = [
    "BEHAVIOURS",
    "FAULTS",
    "Behaviour",
    "Command",
    "CommandKind",
    "Fault",
    "FaultKind",
    "MachinePlan",
    "PlannedCallback",
    "Reaction",
    "Scenario",
    "draw",
]


class Reaction(Enum):
    """What becomes of one attempt."""

    ACCEPT = "accepts"
    ERROR = "answers 503"
    RETRY_AFTER = "answers 429 with Retry-After"
    RETRY_AT = "answers 503 with Retry-After as a date"
    GONE = "answers 410"
    REDIRECT = "answers 302"
    SLOW = "accepts slowly"
    HANG = "takes it and hangs"
    HANG_UNREAD = "hangs before it has taken it"
    RESET_BEFORE = "resets before it has taken it"
    RESET_AFTER = "takes it and resets"
    DNS_HANG = "look-up hangs"
    NOT_SENT = "this machine has no descriptors left"
    NO_SECRETS = "the secrets are out of reach"
    STOLEN = "the transport never says what came of it"
    TWICE = "accepts, and the transport says so twice"
    LATE = "the transport says what came of it after the lock"
    RAISE = "the transport raises"
    GARBAGE = "the transport returns nonsense"
    POISON = "kills its dispatcher"


BEHAVIOURS: Final = tuple(Reaction)


@frozen
class Behaviour:
    """
    How one attempt fares.

    Attributes:
        reaction: what happens.
        seconds: how long that takes, or what Retry-After says.
        accepts: whether the receiver does, where the transport doesn't tell.
    """

    reaction: Reaction
    seconds: float
    accepts: bool = True


@frozen
class PlannedCallback:
    """
    A callback to be stored.

    Attributes:
        queue: its queue; empty for one of its own.
        phases: of its retries: how many, and the delay in seconds.
        hold: whether it holds its queue when it fails for good.
        is_told: whether somebody wants an e-mail about that.
        host: which receiver.
        behaviours: of its attempts, in turn; after these all are accepted at once.
    """

    queue: str
    phases: tuple[tuple[int, float], ...]
    hold: bool
    is_told: bool
    host: int
    behaviours: tuple[Behaviour, ...]


class CommandKind(Enum):
    """What the application and its operators do."""

    STORE = "store"
    CANCEL = "cancel"
    REDELIVER = "redeliver"
    SKIP = "skip"
    PURGE = "purge"


@frozen
class Command:
    """
    Something that the application or an operator does.

    Attributes:
        at: when, in seconds.
        kind: what.
        callbacks: to which, as places in `Scenario.callbacks`; of a STORE with several, all in one call. Who wants to
            redeliver or skip takes one that has failed, if there is any; the place chooses among them.
        is_repeated: of a STORE: called again with the same ids though it returned.
    """

    at: float
    kind: CommandKind
    callbacks: tuple[int, ...] = ()
    is_repeated: bool = False


class FaultKind(Enum):
    """What the world does to callbackq."""

    KILL = "kill"
    PAUSE = "pause"
    FREEZE = "freeze"
    REFUSED = "store refuses"
    LOST_REPLY = "reply of the store lost"
    UNKNOWN = "store raises, nothing written"
    DISK_FULL = "disk full"
    OUTAGE = "store out of reach"
    STEP_WALL = "wall clock stepped"
    SUSPEND = "suspended"
    STOP = "stop"
    HINTS_LOST = "hints lost"
    MAIL_FAILS = "mail server fails"
    MAIL_HANGS = "mail server hangs"
    REBOOT = "reboot"


FAULTS: Final = tuple(FaultKind)


@frozen
class Fault:
    """
    Something that goes wrong.

    Attributes:
        at: from when on, in seconds. One with a *place* strikes at the machine's next matching call after that.
        kind: what.
        machine: whose, as a place in `Scenario.machines`.
        place: before or after a call of store or transport; empty for a moment between them.
        call: the name of that call; empty for any.
        seconds: how long it lasts, or how far it goes.
    """

    at: float
    kind: FaultKind
    machine: int
    place: Literal["", "before", "after"] = ""
    call: str = ""
    seconds: float = 0.0


@frozen
class MachinePlan:
    """A dispatcher's settings; durations in seconds."""

    concurrency: int
    host_concurrency: int
    poll_interval: float
    retry_jitter: float


@frozen(kw_only=True)
class Scenario:
    """
    A run that is to be simulated.

    Attributes:
        seed: of chance within the run, and where the rest was drawn from.
        store: ``"memory"`` or ``"sqlite"``.
        lock_timeout: of all dispatchers, in seconds.
        deadline: of their transports.
        max_abandoned: of all dispatchers.
        horizon: seconds after which nothing goes wrong any more.
        machines: the dispatchers.
        callbacks: what may be stored.
        commands: what application and operators do, by time.
        faults: what goes wrong, by time.
    """

    seed: int
    store: str
    lock_timeout: float
    deadline: float
    max_abandoned: int
    horizon: float
    machines: tuple[MachinePlan, ...]
    callbacks: tuple[PlannedCallback, ...]
    commands: tuple[Command, ...] = field(repr=False)
    faults: tuple[Fault, ...] = field(repr=False)


_FAILING: Final = (
    Reaction.ERROR,
    Reaction.ERROR,
    Reaction.ERROR,
    Reaction.RETRY_AFTER,
    Reaction.REDIRECT,
    Reaction.HANG,
    Reaction.HANG_UNREAD,
    Reaction.RESET_BEFORE,
    Reaction.RESET_AFTER,
    Reaction.DNS_HANG,
)
_ODD: Final = (
    Reaction.GONE,
    Reaction.NOT_SENT,
    Reaction.NO_SECRETS,
    Reaction.STOLEN,
    Reaction.TWICE,
    Reaction.LATE,
    Reaction.RAISE,
    Reaction.GARBAGE,
)
_STORE_CALLS: Final = (
    "acquire_locks",
    "record_attempt",
    "release_lock",
    "acquire_notifications",
    "record_notification",
)
_CALLS: Final = (*_STORE_CALLS, "submit", "first byte", "notify", "")
_AT_A_CALL: Final = (FaultKind.KILL, FaultKind.PAUSE, FaultKind.REFUSED, FaultKind.UNKNOWN, FaultKind.LOST_REPLY)


def draw(seed: int, store: str = "memory") -> Scenario:
    """Draw a scenario. The same arguments give the same one, in every process."""
    chance = Random(seed)  # noqa: S311 - chance, not a secret
    deadline = chance.choice((5.0, 10.0, 15.0))
    lock_timeout = deadline + chance.choice((2.5, 6.0, 15.0))
    horizon = chance.choice((60.0, 120.0, 240.0, 1200.0))
    # Some worlds are calm, so that what needs no fault at all is seen as well, and without excuses.
    trouble = chance.choice((0, 0, 1, 2, 4, 7))
    machines = tuple(_machine(chance) for _ in range(chance.choice((1, 2, 2, 3))))
    queues = [f"q{number}" for number in range(chance.choice((1, 1, 2, 3)))]
    trials = chance.choice((0.1, 0.3, 0.6))
    callbacks = tuple(_callback(chance, queues, trials) for _ in range(chance.randint(3, 10)))
    commands = _commands(chance, len(callbacks), horizon)
    faults = sorted(
        (_fault(chance, len(machines), horizon, lock_timeout) for _ in range(trouble)), key=lambda fault: fault.at
    )
    return Scenario(
        seed=seed,
        store=store,
        lock_timeout=lock_timeout,
        deadline=deadline,
        max_abandoned=chance.choice((2, 3, 5)),
        horizon=horizon,
        machines=machines,
        callbacks=_varied(seed, callbacks),
        commands=tuple(commands),
        faults=tuple(faults),
    )


def _machine(chance: Random) -> MachinePlan:
    concurrency = chance.choice((1, 2, 4, 16))
    return MachinePlan(
        concurrency=concurrency,
        host_concurrency=chance.choice((1, max(1, concurrency // 4), concurrency)),
        poll_interval=chance.choice((2.0, 10.0, 30.0)),
        retry_jitter=chance.choice((0.0, 0.0, 0.5)),
    )


def _callback(chance: Random, queues: list[str], trials: float) -> PlannedCallback:
    behaviours: list[Behaviour] = []
    while chance.random() < trials and len(behaviours) < 5:
        behaviours.append(_behaviour(chance, chance.choice(_FAILING if chance.random() < 0.8 else _ODD)))
    if chance.random() < 0.15:
        behaviours.append(_behaviour(chance, Reaction.SLOW))
    if chance.random() < 0.02:
        behaviours += [_behaviour(chance, Reaction.POISON)] * chance.randint(1, 6)
    return PlannedCallback(
        queue=chance.choice(queues) if chance.random() < 0.85 else "",
        phases=((chance.choice((0, 1, 2, 3)), chance.choice((1.0, 5.0, 20.0, 40.0))),),
        hold=chance.random() < 0.25,
        is_told=chance.random() < 0.5,
        host=chance.choice((0, 0, 1)),
        behaviours=tuple(behaviours),
    )


def _varied(seed: int, callbacks: tuple[PlannedCallback, ...]) -> tuple[PlannedCallback, ...]:
    """Draw what was thought of later from a chance of its own, so that seeds stay what they were otherwise."""
    chance = Random(f"{seed} varied")  # noqa: S311 - chance, not a secret

    def behaviour(one: Behaviour) -> Behaviour:
        if one.reaction is Reaction.RETRY_AFTER and chance.random() < 0.4:
            return evolve(one, reaction=Reaction.RETRY_AT)
        return evolve(one, accepts=chance.random() < 0.5)

    def callback(one: PlannedCallback) -> PlannedCallback:
        more = tuple(
            (chance.choice((0, 1, 2)), chance.choice((0.0, 2.0, 10.0, 30.0)))
            for _ in range(chance.choice((0, 0, 1, 2)))
        )
        phases = () if chance.random() < 0.1 else (*one.phases, *more)
        return evolve(one, phases=phases, behaviours=tuple(behaviour(each) for each in one.behaviours))

    return tuple(callback(one) for one in callbacks)


def _behaviour(chance: Random, reaction: Reaction) -> Behaviour:
    match reaction:
        case Reaction.SLOW:
            return Behaviour(reaction, round(chance.uniform(1.0, 4.5), 3))
        case Reaction.POISON:
            return Behaviour(reaction, round(chance.uniform(0.5, 3.0), 3))
        case Reaction.RETRY_AFTER:
            return Behaviour(reaction, chance.choice((0.0, 3.0, 30.0, 120.0)))
        case _:
            return Behaviour(reaction, round(chance.uniform(0.005, 0.4), 3))


def _commands(chance: Random, callbacks: int, horizon: float) -> list[Command]:
    commands: list[Command] = []
    at, number = 0.0, 0
    span = chance.choice((0.0, 0.5, 5.0, 20.0))
    while number < callbacks:
        size = 1 if chance.random() < 0.7 else chance.randint(2, 4)
        batch = tuple(range(number, min(number + size, callbacks)))
        commands.append(Command(at, CommandKind.STORE, batch, is_repeated=chance.random() < 0.15))
        number += len(batch)
        at = min(round(at + chance.uniform(0.0, span), 6), horizon)
    for _ in range(chance.choice((0, 0, 1, 3))):
        kind = chance.choice((CommandKind.CANCEL, CommandKind.REDELIVER, CommandKind.REDELIVER, CommandKind.SKIP))
        soon = chance.choice((2.0, 20.0, horizon))
        commands.append(Command(round(chance.uniform(0.0, soon), 6), kind, (chance.randrange(callbacks),)))
    if chance.random() < 0.1:
        commands.append(Command(round(chance.uniform(horizon / 2, horizon), 6), CommandKind.PURGE))
    return sorted(commands, key=lambda command: command.at)


def _fault(chance: Random, machines: int, horizon: float, lock_timeout: float) -> Fault:
    kind = chance.choice((*FAULTS, *_AT_A_CALL, FaultKind.KILL, FaultKind.PAUSE))
    # Most of what happens does so early on.
    at = round(chance.uniform(0.0, chance.choice((2.0, 20.0, horizon * 0.8))), 6)
    machine = chance.randrange(machines)
    long = round(lock_timeout * chance.uniform(1.05, 2.5), 3)
    short = round(chance.choice((0.0, 0.02, 0.5, lock_timeout * 0.6)), 3)
    place: Literal["", "before", "after"] = ""
    call, seconds = "", long if chance.random() < 0.5 else short
    if kind in _AT_A_CALL:
        place = chance.choice(("before", "after"))
        call = chance.choice(_CALLS if kind in (FaultKind.KILL, FaultKind.PAUSE) else (*_STORE_CALLS, ""))
        if chance.random() < 0.15:  # the application's calls
            machine, call = machines, ""
        elif kind is FaultKind.PAUSE and chance.random() < 0.25:
            # The worst moment: locks are taken, and nobody works on them.
            place, call, seconds = "after", "acquire_locks", long
    match kind:
        case FaultKind.KILL:
            seconds = round(chance.uniform(0.1, lock_timeout * 1.5), 3)
            if chance.random() < 0.3 and machine < machines:
                place, call = "", ""
        case FaultKind.REFUSED | FaultKind.UNKNOWN:
            place = "before"
        case FaultKind.LOST_REPLY:
            place = "after"
        case FaultKind.STEP_WALL:
            machine = chance.randrange(machines + 1)
            seconds = chance.choice((-86400.0, 86400.0, -3.0, 3.0))
        case FaultKind.STOP:
            seconds = chance.choice((0.0, 1.0, 20.0))
        case FaultKind.DISK_FULL | FaultKind.OUTAGE:
            seconds = long if chance.random() < 0.3 else 1.5
        case FaultKind.MAIL_FAILS | FaultKind.MAIL_HANGS:
            seconds = round(chance.uniform(5.0, 90.0), 3)
        case _:
            pass
    return Fault(at, kind, machine, place, call, seconds)
