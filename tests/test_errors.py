"""Every exception: one tree, evidence as attributes, a remedy in the message, and a way through pickle."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from callbackq import errors
from callbackq.errors import (
    CallbackNotFoundError,
    CallbackqError,
    ConflictError,
    DataAccessError,
    DispatcherStateError,
    IllegalTransitionError,
    InvalidRequestError,
    LockLostError,
    NotAcceptedError,
    NotificationError,
    SchemaVersionError,
    SignatureError,
    TargetNotAllowedError,
    TransientDataAccessError,
)

EXAMPLES: list[tuple[CallbackqError, str, dict[str, Any]]] = [
    (CallbackqError("words"), "words", {}),
    (
        InvalidRequestError([("url", "must be a string"), ("", "must be JSON")]),
        "url: must be a string; must be JSON",
        {"errors": [("url", "must be a string"), ("", "must be JSON")]},
    ),
    (
        TargetNotAllowedError("internal.example", "10.0.0.1", "10.0.0.0/8", "must not lead into 10.0.0.0/8"),
        "url: must not lead into 10.0.0.0/8",
        {
            "host": "internal.example",
            "address": "10.0.0.1",
            "rule": "10.0.0.0/8",
            "errors": [("url", "must not lead into 10.0.0.0/8")],
        },
    ),
    (NotAcceptedError("too many are pending"), "too many are pending", {"reason": "too many are pending"}),
    (CallbackNotFoundError("an id"), "no callback is stored under the id 'an id'", {"id": "an id"}),
    (
        ConflictError("an id"),
        "the id 'an id' belongs to a callback with other content; choose another id",
        {"id": "an id"},
    ),
    (
        IllegalTransitionError("an id", "succeeded", "cancel"),
        "cannot cancel callback 'an id': it is succeeded",
        {"id": "an id", "state": "succeeded", "action": "cancel"},
    ),
    (
        LockLostError("an id", 7),
        "the lock with token 7 no longer holds callback 'an id'",
        {"id": "an id", "token": 7},
    ),
    (
        NotificationError("the mail server refused the address", permanent=True),
        "the mail server refused the address",
        {"reason": "the mail server refused the address", "permanent": True},
    ),
    (
        NotificationError("the mail server is busy"),
        "the mail server is busy",
        {"reason": "the mail server is busy", "permanent": False},
    ),
    (SignatureError("the timestamp is too old"), "the timestamp is too old", {}),
    (DataAccessError("the disk is full"), "the disk is full", {}),
    (TransientDataAccessError("the database is locked"), "the database is locked", {}),
    (
        SchemaVersionError(9, 2),
        "the store has schema version 9, this release knows versions up to 2: upgrade callbackq on this machine",
        {"found": 9, "expected": 2},
    ),
    (
        DispatcherStateError("running", "start it once"),
        "the dispatcher is running: start it once",
        {"state": "running"},
    ),
]
ERRORS = [error for error, _, _ in EXAMPLES]

TREE = {
    CallbackqError: (Exception,),
    InvalidRequestError: (CallbackqError, ValueError),
    TargetNotAllowedError: (InvalidRequestError,),
    NotAcceptedError: (CallbackqError,),
    CallbackNotFoundError: (CallbackqError, LookupError),
    ConflictError: (CallbackqError,),
    IllegalTransitionError: (CallbackqError,),
    LockLostError: (CallbackqError,),
    DataAccessError: (CallbackqError,),
    TransientDataAccessError: (DataAccessError,),
    SchemaVersionError: (DataAccessError,),
    DispatcherStateError: (CallbackqError,),
    NotificationError: (CallbackqError,),
    SignatureError: (CallbackqError,),
}


def test_the_tree_is_that_of_the_contract() -> None:
    assert {kind: kind.__bases__ for kind in TREE} == TREE
    assert {kind.__name__ for kind in TREE} == set(errors.__all__)


def test_every_error_has_an_example_here() -> None:
    assert {type(error) for error in ERRORS} == set(TREE)


@pytest.mark.parametrize(("error", "message", "evidence"), EXAMPLES)
def test_an_error_says_what_was_wrong_and_carries_its_evidence(
    error: CallbackqError, message: str, evidence: dict[str, Any]
) -> None:
    assert str(error) == message
    assert vars(error) == evidence
    assert error.args == (message,)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling_and_copying(error: CallbackqError) -> None:
    error = copy.copy(error)  # the examples are shared: a note stays on the one it is given to
    error.add_note("seen by the host")
    copies = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    copies += [copy.copy(error), copy.deepcopy(error)]

    for one in copies:
        assert type(one) is type(error)
        assert (str(one), one.args, vars(one)) == (str(error), error.args, vars(error))


def test_an_error_of_the_hosts_own_survives_pickling_too() -> None:
    again = pickle.loads(pickle.dumps(HostError("a", b="c")))

    assert (str(again), again.b) == ("a", "c")


class HostError(DataAccessError):
    """As a store of the host's own may define it."""

    def __init__(self, text: str, *, b: str) -> None:
        super().__init__(text)
        self.b = b


def test_an_id_in_a_message_can_not_break_a_log_line() -> None:
    for error in (CallbackNotFoundError("a\r\nb\x1b[31m"), ConflictError("a\r\nb"), LockLostError("a\nb", 1)):
        assert str(error).isprintable()


def test_faults_may_come_from_a_generator() -> None:
    assert InvalidRequestError((path, "must be given") for path in "ab").errors == [
        ("a", "must be given"),
        ("b", "must be given"),
    ]
