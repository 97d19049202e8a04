"""
Deliver HTTP callbacks (webhooks) durably and in order, from inside your application.

Store a `CallbackRequest` in a `DataAccess`; a `Dispatcher` in a thread of yours delivers it: in order within its
queue, at least once, with retries in phases, through crashes, and from as many processes as share the store.
"""

from __future__ import annotations

from callbackq.clock import Clock, SystemClock
from callbackq.core.lifecycle import Action
from callbackq.core.limits import RequestLimits
from callbackq.core.models import (
    AttemptFailure,
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
    RetryPhase,
)
from callbackq.core.verdict import ResponsePolicy
from callbackq.dataaccess import DataAccess
from callbackq.dispatcher import Dispatcher, Health, StopReport
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
from callbackq.events import LoggingObserver, Observer
from callbackq.notifier import FailureNotice, Notifier, SMTPNotifier
from callbackq.signing import Signer
from callbackq.stores.memory import InMemoryDataAccess
from callbackq.stores.sqlite import SQLiteDataAccess
from callbackq.targets import TargetPolicy
from callbackq.transport import HTTPTransport, Transport

__all__ = [
    "Action",
    "AttemptFailure",
    "CallbackAttempt",
    "CallbackData",
    "CallbackLock",
    "CallbackNotFoundError",
    "CallbackRequest",
    "CallbackState",
    "CallbackStatus",
    "CallbackqError",
    "Clock",
    "ConflictError",
    "DataAccess",
    "DataAccessError",
    "Dispatcher",
    "DispatcherStateError",
    "FailedReason",
    "FailureNotice",
    "HTTPTransport",
    "Health",
    "IllegalTransitionError",
    "InMemoryDataAccess",
    "InvalidRequestError",
    "LockLostError",
    "LoggingObserver",
    "NotAcceptedError",
    "NotificationError",
    "Notifier",
    "Observer",
    "RequestLimits",
    "ResponsePolicy",
    "RetryPhase",
    "SMTPNotifier",
    "SQLiteDataAccess",
    "SchemaVersionError",
    "SignatureError",
    "Signer",
    "StopReport",
    "SystemClock",
    "TargetNotAllowedError",
    "TargetPolicy",
    "TransientDataAccessError",
    "Transport",
]
