"""Checks of the arguments of a store's methods, in the same words in every store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from os import PathLike, fspath
from types import MappingProxyType
from typing import Final

from callbackq.core.lifecycle import Action
from callbackq.core.models import CallbackRequest, CallbackState
from callbackq.core.validation import Check, Fault, check_callback_id, check_duration, check_text, is_path_text, refuse

__all__ = ["check_arguments", "ids_for"]


def ids_for(requests: Sequence[CallbackRequest], ids: Sequence[str | None] | None) -> Sequence[str | None]:
    """
    Pair requests with ids, for `DataAccess.store_callback_requests`.

    Raises:
        InvalidRequestError: one of the requests is none, one of the ids is malformed, or there are more or fewer ids
            than requests.
    """
    refuse(_faults_of_batch(requests, ids))
    return [None] * len(requests) if ids is None else ids


def _faults_of_batch(requests: object, ids: object) -> Iterator[Fault]:
    if not isinstance(requests, Sequence):
        yield "requests", "must be a sequence of CallbackRequests"
        return
    for index, request in enumerate(requests):
        yield from ((f"requests[{index}]", reason) for _, reason in _check_request(request))
    if ids is None:
        return
    if not isinstance(ids, Sequence) or isinstance(ids, str) or len(ids) != len(requests):
        yield "ids", "must be as many as the requests, in the same order"
        return
    for index, id in enumerate(ids):
        yield from ((f"ids[{index}]", reason) for _, reason in _check_new_id(id))


def check_arguments(**arguments: object) -> None:
    """
    Refuse arguments of a store's methods that are of another type or out of bounds, in the same words in every store.

    To be called before anything is written, with the names they have in the protocols::

        check_arguments(machine_name=machine_name, lock_timeout=lock_timeout, limit=limit)

    Names that can be checked: action, delay, finished_for, id (for storing), limit, lock_timeout, machine_name,
    page_size, path (of a backup), queue_id, quiet_for, request, retry_in, state.

    Raises:
        InvalidRequestError: with every fault; its path is the argument's name.
    """
    refuse((name, reason) for name, value in arguments.items() for _, reason in _ARGUMENTS[name](value))


def _check_request(value: object) -> Iterator[Fault]:
    if not isinstance(value, CallbackRequest):
        yield "", "must be a CallbackRequest"


def _check_new_id(value: object) -> Iterator[Fault]:
    if value is not None:
        yield from check_callback_id(value)


def _check_action(value: object) -> Iterator[Fault]:
    if not isinstance(value, Action):
        yield "", "must be Action.CANCEL, Action.REDELIVER or Action.SKIP"


def _check_state(value: object) -> Iterator[Fault]:
    if value is not None and not isinstance(value, CallbackState):
        yield "", "must be a CallbackState, or None for all"


def _check_queue_id(value: object) -> Iterator[Fault]:
    # Any string: the queue of a name that none can have is empty.
    if value is not None and not isinstance(value, str):
        yield "", "must be a string, or None for all"


def _check_count(value: object) -> Iterator[Fault]:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        yield "", "must be a whole number, at least 1"


def _check_path(value: object) -> Iterator[Fault]:
    text = fspath(value) if isinstance(value, PathLike) else value
    if not is_path_text(text):
        yield "", "must be the path of a file: a string or a path-like object"


def _check_lease(value: object) -> Iterator[Fault]:
    yield from check_duration(value)
    if isinstance(value, timedelta) and not value:
        yield "", "must be longer than nothing"


def _check_retry_in(value: object) -> Iterator[Fault]:
    if value is not None:
        yield from check_duration(value)


_ARGUMENTS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "action": _check_action,
        "delay": check_duration,
        "finished_for": check_duration,
        "id": _check_new_id,
        "limit": _check_count,
        "lock_timeout": _check_lease,
        "machine_name": check_text,
        "page_size": _check_count,
        "path": _check_path,
        "queue_id": _check_queue_id,
        "quiet_for": check_duration,
        "request": _check_request,
        "retry_in": _check_retry_in,
        "state": _check_state,
    }
)
