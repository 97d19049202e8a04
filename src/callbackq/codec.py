"""
Models as JSON and back, in the words of the Go package of 2016.

A key is its attribute's name without the underscores. `SEED_KEYS` lists the keys of 2016; newer ones come after them
and are left out while they say nothing new, so that a document of 2016 comes back byte for byte. Reading is strict,
because documents come from strangers: nothing is guessed, converted or passed over, and one error names every fault
by its place in the document without quoting a value.

cattrs knows which hook belongs to which type, in both directions, and writes objects. They are read by
`callbackq.core.documents.object_of`, which asks the models' own checks, lists faults in the document's order and stops
when there are too many. (cattrs makes an exception of each, whose traceback holds the document: 2 MiB of faults took
it 70 s and 4 GB, where this takes 0.2 s.)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Final, Literal, TypeVar, get_args, get_origin

import attrs
from cattrs import Converter
from cattrs.gen import make_dict_unstructure_fn, override

from callbackq.core import validation as v
from callbackq.core.documents import (
    Key,
    ReadHook,
    as_it_is,
    enum_of,
    headers_of,
    list_of,
    object_of,
    read_body,
    read_bool,
    read_duration,
    read_instant,
    write_body,
    write_duration,
    write_headers,
    write_instant,
)
from callbackq.core.jsontext import parse_json, write_json
from callbackq.core.models import (
    CHECKS,
    REQUEST_DATA_CHECKS,
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    RetryPhase,
)
from callbackq.errors import InvalidRequestError

__all__ = ["DEFAULT_LIMIT_BYTES", "SEED_KEYS", "dumps", "loads"]

DEFAULT_LIMIT_BYTES: Final = 2 * 1024 * 1024

SEED_KEYS: Final[Mapping[type, tuple[str, ...]]] = {
    CallbackData: ("headers", "data"),
    RetryPhase: ("retries", "delay"),
    CallbackRequest: (
        "url",
        "method",
        "postdata",
        "retryphases",
        "applicationid",
        "queueid",
        "notificationemailaddress",
    ),
    CallbackAttempt: ("statuscode", "response", "time", "duration"),
    CallbackLock: ("acquired", "timeout", "completed", "machinename"),
    CallbackStatus: ("id", "request", "attempts", "locks", "success"),
}
"""The keys of 2016. A document of that time has all of them, in this order."""

Model = TypeVar("Model", CallbackRequest, CallbackStatus, CallbackAttempt, CallbackLock, CallbackData, RetryPhase)


def dumps(
    model: CallbackRequest | CallbackStatus | CallbackAttempt | CallbackLock | CallbackData | RetryPhase,
    *,
    seed: bool = False,
) -> bytes:
    """
    Write a model as JSON in UTF-8, byte for byte as Go's ``json.Marshal`` would.

    What `loads` makes of it is equal to *model*, unless *seed* has left something out. (A document longer than
    2 MiB needs a higher ``limit_bytes`` there.)

    Args:
        model: what to write.
        seed: write the keys of 2016 only, for programs that know no others.

    Raises:
        InvalidRequestError: *model* is none of the models.
    """
    write = (_SEED_WRITERS if seed else _WRITERS).get(type(model))
    if write is None:
        raise InvalidRequestError([("model", f"must be one of {_MODEL_NAMES}")])
    return write_json(write(model))


def loads(data: bytes | str, type: type[Model], *, limit_bytes: int = DEFAULT_LIMIT_BYTES) -> Model:
    """
    Read a model from JSON.

    Keys may come in any order; those whose attribute has a default may be missing. Durations are read exactly and
    then rounded up to a microsecond, so that no wait becomes shorter. Of instants, what is finer than a microsecond
    is cut off, so that none becomes later than it was.

    Args:
        data: the document.
        type: what it must be.
        limit_bytes: a longer document is refused unread. Raise it to read a request with a body of more than 1 MiB, or
            the status of a callback with a long history: each attempt may hold an answer.

    Raises:
        InvalidRequestError: with every fault, in the document's order and words (``retryphases[2].delay``); after
            `callbackq.core.validation.MAX_FAULTS` of them it says that there are more.
    """
    read = _READERS.get(type)
    if read is None:
        raise InvalidRequestError([("type", f"must be one of {_MODEL_NAMES}")])
    document = parse_json(data, limit_bytes=limit_bytes)
    faults: list[v.Fault] = []
    try:
        model: Model = read(document, type)
    except InvalidRequestError as error:
        faults = error.errors
    # Raised out here, the error has no context, which would hold the document.
    v.refuse((path.removeprefix("."), reason) for path, reason in faults)
    return model


_WriteHook = Callable[[Any], Any]


def _key_of(attribute: str) -> str:
    return attribute.replace("_", "")


def _keys_of(model: type, converter: Converter, checks: Mapping[str, v.Check], **readers: ReadHook) -> dict[str, Key]:
    return {
        _key_of(field.name): Key(
            argument=field.name,
            type=field.type,
            read=readers.get(field.name) or converter.get_structure_hook(field.type),
            check=checks[field.name],
            required=field.default is attrs.NOTHING,
        )
        for field in attrs.fields(attrs.resolve_types(model))
    }


def _tuple_of(kind: Any, converter: Converter, max_items: int | None = None) -> ReadHook:
    item = get_args(kind)[0]
    return list_of(item, converter.get_structure_hook(item), max_items=max_items)


def _phases_writer(_: Any, converter: Converter) -> _WriteHook:
    # Go writes a list that was never made as null; a request without phases had none made.
    write_phase = converter.get_unstructure_hook(RetryPhase)
    return lambda phases: [write_phase(phase) for phase in phases] or None


def _writer_of(model: type, converter: Converter, *, keys: Container[str]) -> _WriteHook:
    """Generate the function that writes these keys of a model: old ones always, new ones unless at their default."""
    overrides: dict[str, Any] = {
        field.name: override(
            rename=_key_of(field.name),
            omit=_key_of(field.name) not in keys,
            omit_if_default=_key_of(field.name) not in SEED_KEYS[model],
        )
        for field in attrs.fields(model)
    }
    return make_dict_unstructure_fn(model, converter, **overrides)


def _all_keys_of(model: type) -> set[str]:
    return {_key_of(field.name) for field in attrs.fields(model)}


# --- The status: in 2016 `success` stood for the state, and the queue was that of the request -------------------------


def _success_agrees_with_state(arguments: Mapping[str, Any]) -> Iterator[v.Fault]:
    succeeded = arguments.get("state") is CallbackState.SUCCEEDED
    if {"success", "state"} <= arguments.keys() and arguments["success"] is not succeeded:
        yield ".success", "must be true exactly when state is succeeded"


def _build_status(**arguments: Any) -> CallbackStatus:
    v.refuse(_success_agrees_with_state(arguments))
    success = arguments.pop("success", False)
    arguments.setdefault("state", CallbackState.SUCCEEDED if success else CallbackState.WAITING)
    arguments.setdefault("queue_id", arguments["request"].queue_id)
    return CallbackStatus(**arguments)


def _status_writer(converter: Converter, *, seed: bool) -> _WriteHook:
    new_keys = _all_keys_of(CallbackStatus) - {*SEED_KEYS[CallbackStatus], "state", "queueid"}
    write_old = _writer_of(CallbackStatus, converter, keys=SEED_KEYS[CallbackStatus])
    write_new = _writer_of(CallbackStatus, converter, keys=new_keys)

    def write(status: CallbackStatus) -> dict[str, Any]:
        document: dict[str, Any] = write_old(status)
        document["success"] = status.success
        if seed:
            return document
        if status.state not in (CallbackState.SUCCEEDED, CallbackState.WAITING):
            document["state"] = status.state.value
        if status.queue_id != status.request.queue_id:
            document["queueid"] = status.queue_id
        document.update(write_new(status))
        return document

    return write


# --- Assembly: everything is made once, here, and never changed afterwards --------------------------------------------


def _new_readers() -> dict[type, ReadHook]:
    converter = Converter()
    converter.register_structure_hook(str, as_it_is)
    converter.register_structure_hook(int, as_it_is)
    converter.register_structure_hook(bool, read_bool)
    converter.register_structure_hook(bytes, read_body)
    converter.register_structure_hook(datetime, read_instant)
    converter.register_structure_hook(timedelta, read_duration)
    converter.register_structure_hook_func(_origin_is(Literal), as_it_is)
    converter.register_structure_hook_factory(_is_enum, enum_of)
    converter.register_structure_hook_factory(_origin_is(tuple), _tuple_of)

    def data_of(checks: Mapping[str, v.Check]) -> ReadHook:
        headers = headers_of(checks["headers"])
        return object_of(_keys_of(CallbackData, converter, checks, headers=headers), CallbackData)

    converter.register_structure_hook(CallbackData, data_of(CHECKS[CallbackData]))
    for model in (RetryPhase, CallbackAttempt, CallbackLock):
        converter.register_structure_hook(model, object_of(_keys_of(model, converter, CHECKS[model]), model))
    request_keys = _keys_of(
        CallbackRequest,
        converter,
        CHECKS[CallbackRequest],
        post_data=data_of(REQUEST_DATA_CHECKS),
        retry_phases=_tuple_of(tuple[RetryPhase, ...], converter, max_items=v.MAX_PHASES),
    )
    converter.register_structure_hook(CallbackRequest, object_of(request_keys, CallbackRequest))
    status_keys = _keys_of(CallbackStatus, converter, CHECKS[CallbackStatus])
    status_keys["success"] = Key("success", bool, read_bool, v.check_bool, required=False)
    converter.register_structure_hook(CallbackStatus, object_of(status_keys, _build_status, _success_agrees_with_state))
    return {model: converter.get_structure_hook(model) for model in SEED_KEYS}


def _new_writers(*, seed: bool) -> dict[type, _WriteHook]:
    converter = Converter()
    converter.register_unstructure_hook(bytes, write_body)
    converter.register_unstructure_hook(datetime, write_instant)
    converter.register_unstructure_hook(timedelta, write_duration)
    converter.register_unstructure_hook_func(lambda kind: kind == Mapping[str, str], write_headers)
    converter.register_unstructure_hook_factory(lambda kind: kind == tuple[RetryPhase, ...], _phases_writer)
    for model in SEED_KEYS:
        keys = SEED_KEYS[model] if seed else _all_keys_of(model)
        converter.register_unstructure_hook(model, _writer_of(model, converter, keys=keys))
    converter.register_unstructure_hook(CallbackStatus, _status_writer(converter, seed=seed))
    return {model: converter.get_unstructure_hook(model) for model in SEED_KEYS}


def _origin_is(origin: object) -> Callable[[Any], bool]:
    return lambda kind: get_origin(kind) is origin


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


_READERS: Final = _new_readers()
_WRITERS: Final = _new_writers(seed=False)
_SEED_WRITERS: Final = _new_writers(seed=True)
_MODEL_NAMES: Final = ", ".join(model.__name__ for model in SEED_KEYS)
