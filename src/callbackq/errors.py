"""
Every exception callbackq raises, in one tree.

Two sides are kept apart: *your call was wrong* (`InvalidRequestError`, `NotAcceptedError`, `ConflictError`,
`IllegalTransitionError`, `CallbackNotFoundError`, `DispatcherStateError`) and *the world failed*
(`DataAccessError` and below, `LockLostError`, `NotificationError`). A receiver that answers 500 or not at
all is neither: it is a recorded attempt.

Each exception carries its evidence as attributes, survives pickling, and never quotes a URL, header
value, body or e-mail address.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "CallbackNotFoundError",
    "CallbackqError",
    "ConflictError",
    "DataAccessError",
    "DispatcherStateError",
    "IllegalTransitionError",
    "InvalidRequestError",
    "LockLostError",
    "NotAcceptedError",
    "NotificationError",
    "SchemaVersionError",
    "SignatureError",
    "TargetNotAllowedError",
    "TransientDataAccessError",
]


class CallbackqError(Exception):
    """The root of all exceptions raised by callbackq."""

    def __reduce__(self) -> tuple[object, ...]:
        # The default would call the class with the finished message; these classes take evidence instead.
        return (_rebuild, (type(self), self.args, self.__dict__.copy()))


def _rebuild(cls: type[CallbackqError], args: tuple[object, ...], evidence: dict[str, object]) -> CallbackqError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(evidence)
    return error


class InvalidRequestError(CallbackqError, ValueError):
    """
    A request, setting or document was refused at the door; nothing was stored.

    Attributes:
        errors: every fault found, as ``(path, reason)`` pairs in document order. The path is
            ``""`` when the fault concerns the whole. A reason says what would be accepted and
            never quotes the value.
    """

    def __init__(self, errors: Iterable[tuple[str, str]]) -> None:
        self.errors: list[tuple[str, str]] = list(errors)
        super().__init__("; ".join(f"{path}: {reason}" if path else reason for path, reason in self.errors))


class TargetNotAllowedError(InvalidRequestError):
    """
    The target policy forbids the host, port or address of a URL.

    Attributes:
        host: the host name or literal address that was judged.
        address: the forbidden address the name resolved to, or ``None`` when the name, scheme or port
            was refused by itself.
        rule: the rule that refused it, for example ``"10.0.0.0/8"`` or ``"port"``.
    """

    def __init__(self, host: str, address: str | None, rule: str, reason: str) -> None:
        self.host = host
        self.address = address
        self.rule = rule
        super().__init__([("url", reason)])


class NotAcceptedError(CallbackqError):
    """
    A sound request was not accepted now, because of the host's own rules; nothing was stored.

    Raised by what the host gives its store as ``accept``, for example when a tenant has used up its quota; callbackq
    itself never raises it. The request may be accepted later. Derive from it to carry more, such as the time to wait.

    Attributes:
        reason: why, for whoever wanted to store. It must not quote secrets.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


class CallbackNotFoundError(CallbackqError, LookupError):
    """
    No callback is stored under this id.

    Attributes:
        id: the id that was asked for.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        super().__init__(f"no callback is stored under the id {id!r}")


class ConflictError(CallbackqError):
    """
    The id is taken by a callback with other content.

    Storing the same request again under the same id is harmless and returns the stored callback;
    to send something else, choose another id.

    Attributes:
        id: the id in question.
    """

    def __init__(self, id: str) -> None:
        self.id = id
        super().__init__(f"the id {id!r} belongs to a callback with other content; choose another id")


class IllegalTransitionError(CallbackqError):
    """
    The callback's state does not allow what was asked.

    Attributes:
        id: the callback.
        state: its state, as a word (``"succeeded"``).
        action: what was asked (``"cancel"``).
    """

    def __init__(self, id: str, state: str, action: str) -> None:
        self.id = id
        self.state = state
        self.action = action
        super().__init__(f"cannot {action} callback {id!r}: it is {state}")


class LockLostError(CallbackqError):
    """
    The lock named in a write no longer holds its callback.

    Somebody else took over after it timed out, or it had been ended already, or the callback is gone. The
    callback's state is unchanged; an attempt that came with the write is kept as late, if the callback is
    there. Never repeat the write.

    Attributes:
        id: the callback.
        token: the stale token.
    """

    def __init__(self, id: str, token: int) -> None:
        self.id = id
        self.token = token
        super().__init__(f"the lock with token {token} no longer holds callback {id!r}")


class NotificationError(CallbackqError):
    """
    The news of a callback's final failure was not accepted; nobody has been told.

    Raised by notifiers. What they raise is written to the log, so the reason must not quote addresses,
    passwords or what a mail server says.

    Attributes:
        reason: what went wrong.
        permanent: telling this callback's address again is pointless: it is given up at once.
    """

    def __init__(self, reason: str, *, permanent: bool = False) -> None:
        self.reason = reason
        self.permanent = permanent
        super().__init__(reason)


class DataAccessError(CallbackqError):
    """A store failed. The driver's own exception is the ``__cause__``."""


class TransientDataAccessError(DataAccessError):
    """A store failed for the moment and nothing was written: the same call may be made again."""


class SchemaVersionError(DataAccessError):
    """
    The stored data has a version this release can't work with; nothing was changed.

    Attributes:
        found: the version of the stored data.
        expected: the newest version this release knows.
    """

    def __init__(self, found: int, expected: int) -> None:
        self.found = found
        self.expected = expected
        super().__init__(
            f"the store has schema version {found}, this release knows versions up to {expected}: "
            "upgrade callbackq on this machine"
        )


class DispatcherStateError(CallbackqError):
    """
    A Dispatcher was used in a state that does not allow it, for example started twice.

    Attributes:
        state: the dispatcher's state, as a word.
    """

    def __init__(self, state: str, reason: str) -> None:
        self.state = state
        super().__init__(f"the dispatcher is {state}: {reason}")


class SignatureError(CallbackqError):
    """
    A request that arrived can't be shown to come from the holder of a secret; don't act on it.

    The text says why, for the log. Tell the sender nothing more than 401.
    """
