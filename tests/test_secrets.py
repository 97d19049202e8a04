"""
What has a secret in it never shows it: not in a repr, not in an error, not behind one.

Every field of every class of the package that can hold text is listed here, as secret or as one that is shown.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import pkgutil
import ssl
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import partial
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import attrs
import pytest

import callbackq
from callbackq import (
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackStatus,
    Dispatcher,
    HTTPTransport,
    InMemoryDataAccess,
    ResponsePolicy,
    RetryPhase,
    Signer,
    SMTPNotifier,
    SQLiteDataAccess,
    TargetPolicy,
    arguments,
    codec,
)
from callbackq.core.models import CHECKS, Headers
from callbackq.errors import InvalidRequestError, SignatureError
from callbackq.signing import verify
from callbackq.stores.postgres import PostgreSQLDataAccess
from callbackq.testing import ScriptedTransport
from support.canaries import ALL_CANARIES, HOSTILE_ID, Watch, canary, chain_of, text_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)

SECRET = {
    "core.delivery.Answer": [],
    "core.exchange.Reply": ["headers", "body"],
    "core.failure_email.FailureNotice": ["email_address"],
    "core.models.CallbackData": ["headers", "data"],
    "core.models.CallbackRequest": ["url", "notification_email_address"],
    "core.url.Target": ["path_and_query"],
    "dataaccess.Notification": ["email_address"],
    "signing.keys._SharedSecret": ["_secret"],
    "stores.memory._Mailing": ["email_address"],
    "stores.sql.changes.Changes": ["_history", "_owed"],
    "transport.request.RequestWriter": ["queue_key"],
}
"""Fields that hold what no display may show. (Of a URL all but its origin.)"""

SHOWN = {
    "core.delivery.Delivery": ["callback_id"],
    "core.models.CallbackRequest": ["application_id", "queue_id"],
    "core.models.CallbackAttempt": ["machine_name"],
    "core.models.CallbackLock": ["machine_name"],
    "core.models.CallbackStatus": ["id", "queue_id", "blocked_by"],
    "dataaccess.Acquired": ["id", "queue_id"],
    "core.failure_email.FailureNotice": ["queue_id"],
    "dataaccess.Notification": ["queue_id", "callback_ids"],
    "events.ObservedEvent": ["machine_name", "callback_id", "queue_id", "application_id", "origin", "abandoned_by"],
    "recorder.Slot": ["host"],
    "settings.Settings": ["machine_name"],
    "signing.verifier.Verified": ["id"],
    "stores.memory._Callback": ["id"],
    "stores.memory._Mailing": ["queue_id"],
    "stores.sql.rows.CallbackRow": ["callback", "id", "queue", "machine", "failed_reason"],
    "stores.sqlite.storing._Queue": ["head"],
    "testing.history.Arrival": ["callback_id", "queue_id"],
    "testing.history.Violation": ["callback_id", "detail"],
    "testing.simulation.account.Account": ["id"],
    "testing.simulation.scenario.PlannedCallback": ["queue"],
    "testing.simulation.small_scope._State": ["hit"],
    "testing.simulation.world.Entry": ["about", "detail"],
}
"""Ids and names. They are shown, escaped."""

OURS = {
    "core.addresses.SpecialBlock": ["what"],
    "core.delivery.Answer": ["detail"],
    "core.delivery.NotSent": ["detail"],
    "core.documents.Key": ["argument", "type"],
    "core.exchange.Reply": ["detail"],
    "core.failure_email.FailureNotice": ["key"],
    "core.models.CallbackAttempt": ["detail"],
    "core.targets._Entries": ["names", "domains"],
    "core.targets.TargetRules": ["allow", "deny"],
    "core.url.Target": ["scheme", "host"],
    "dispatcher.Health": ["state"],
    "events.ObservedEvent": ["detail"],
    "stores.postgres.transaction.Statement": ["text", "values"],
    "targets.TargetPolicy": ["allow", "deny"],
    "testing.history.Violation": ["rule"],
    "testing.simulation.campaign.Tally": ["counts", "failed"],
    "testing.simulation.run.Report": ["counts"],
    "testing.simulation.scenario.Fault": ["call"],
    "testing.simulation.scenario.Scenario": ["store"],
    "testing.simulation.small_scope.SmallScope": ["violations"],
    "testing.simulation.replayed.Life": ["call", "machine_name"],
    "testing.simulation.replayed.Reply": ["call"],
    "testing.simulation.world.Entry": ["who", "what"],
    "transport.request.RequestWriter": ["user_agent"],
}
"""Our own words, those of the operator, and hosts."""

MODELS = {
    "core.fairness._Places": ["under_way"],
    "stores.memory._Callback": ["entry"],
    "stores.memory._Mailing": ["entry"],
    "stores.sqlite.groupcommit.Ticket": ["result"],
    "testing.simulation.account.Account": ["recorded"],
    "testing.simulation.replayed.Reply": ["value"],
}
"""Containers of others that are listed."""


def classes() -> dict[str, type]:
    """Every class of the package that attrs has made, by module and name."""
    found = {}
    for module in pkgutil.walk_packages(callbackq.__path__, "callbackq."):
        if module.name.endswith(("__main__", "stateful")):
            continue
        for name, one in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if attrs.has(one) and one.__module__ == module.name:
                found[f"{module.name.removeprefix('callbackq.')}.{name}"] = one
    return found


CLASSES = classes()


def can_hold_text(kind: Any) -> bool:
    """Whether a value of an annotated type may be text, or hold some that no class listed here accounts for."""
    if kind in (Any, object, dict, list, tuple):
        return True
    origin = get_origin(kind)
    if origin is Literal:
        return False
    if origin in (Union, UnionType) or origin in (tuple, list, frozenset, set):
        return any(can_hold_text(part) for part in get_args(kind) if part is not Ellipsis)
    if origin is not None:
        return origin is dict or (isinstance(origin, type) and issubclass(origin, Mapping))
    return isinstance(kind, type) and issubclass(kind, (str, bytes, Headers))


def text_fields(one: type) -> set[str]:
    return {field.name for field in attrs.fields(attrs.resolve_types(one)) if can_hold_text(field.type)}


def test_every_field_that_can_hold_text_is_known_as_secret_shown_or_ours() -> None:
    listed = {
        name: {field for table in (SECRET, SHOWN, OURS, MODELS) for field in table.get(name, ())} for name in CLASSES
    }

    unknown = {name: text_fields(one) - listed[name] for name, one in CLASSES.items()}
    assert {name: fields for name, fields in unknown.items() if fields} == {}
    there = {name: {field.name for field in attrs.fields(one)} for name, one in CLASSES.items()}
    assert {name: fields - there[name] for name, fields in listed.items() if fields - there[name]} == {}
    assert {*SECRET, *SHOWN, *OURS, *MODELS} <= set(CLASSES)


def specimen(name: str) -> object:
    """An object with a canary in each secret field and hostile text in each that is shown."""
    one = CLASSES[name]
    thing = one.__new__(one)
    for field in attrs.fields(attrs.resolve_types(one)):
        value: object = None
        if field.name in SECRET.get(name, ()):
            value = secret_for(f"{name}.{field.name}", field.type)
        elif field.name in SHOWN.get(name, ()):
            value = HOSTILE_ID
        object.__setattr__(thing, field.name, value)
    return thing


def secret_for(place: str, kind: Any) -> object:
    text = canary(place)
    if place.endswith(".url"):
        return f"http://host.example/{text}?{text}#{text}"
    if get_origin(kind) is list:
        return [{"body": text.encode(), "headers": text}]
    if "headers" in place:
        return Headers({text: text})
    return text.encode() if bytes in (kind, *get_args(kind)) else text


@pytest.mark.parametrize("name", CLASSES)
def test_no_repr_shows_a_secret_and_every_one_is_a_harmless_line(name: str) -> None:
    seen = text_of(specimen(name))

    assert ALL_CANARIES not in seen
    assert seen.isprintable()


# Refusals.


class Talkative:
    """A value whose every display quotes something."""

    def __repr__(self) -> str:
        return canary("repr")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(canary("attribute"))


def wrong_values() -> Iterator[object]:
    text = canary("value")
    yield from (f"{text}\n", f"{text}\x1b[31m\ud800", text.encode(), [text], {text: text}, {5: text}, {text})
    yield from (Talkative(), Talkative, [Talkative()], {"Authorization": Talkative()}, {f"Authorization: {text}": ""})
    yield from ({"X": f"{text}\r\nY: z"}, {"Host": text}, {"A": text, "a": text}, {"\x00": text}, [{text: text}])
    yield from (f"http://{text}@host.example/", f"http://u:{text}@host.example/{text}", f"http://host.example/{text} ")
    yield from (
        f"http://host.example\\{text}",
        f"http://host.example:{text}/",
        f"ftp://host.example/{text}",
        f"//{text}",
    )
    yield from (f"{text}@", f"{text} <a@b.example>", f"a@b.example\r\nBcc: {text}@c.example", text * 1000)


TLS = ssl.create_default_context()

VALID: Mapping[Any, Mapping[str, Any]] = {
    CallbackData: {},
    RetryPhase: {"retries": 1, "delay": timedelta(0)},
    CallbackRequest: {"url": "http://host.example/"},
    CallbackAttempt: {"status_code": 200, "time": NOW, "duration": timedelta(0)},
    CallbackLock: {"acquired": NOW, "timeout": NOW},
    CallbackStatus: {"id": "a", "request": CallbackRequest(url="http://host.example/")},
    ResponsePolicy: {},
    TargetPolicy: {},
    HTTPTransport: {"ssl_context": TLS, "order_headers": "hashed", "queue_key": b"k" * 16},
    SMTPNotifier: {"host": "mail.example", "sender": "a@b.example", "username": "a", "password": "b"},
    Signer: {"secrets": b"s" * 32},
    SQLiteDataAccess: {"path": "never-made.db"},
    PostgreSQLDataAccess: {"where": "host=/never-made"},
    InMemoryDataAccess: {},
    Dispatcher: {"data_access": InMemoryDataAccess(), "transport": ScriptedTransport()},
}
"""What a host builds, and the least it takes."""

NAMES = (
    "id",
    "queue_id",
    "application_id",
    "blocked_by",
    "machine_name",
    "path",
    "schema",
    "host",
    "allow",
    "deny",
    "detail",
)
"""What is shown once it was accepted: names, and the words that a transport vouches for."""


def settings_of(kind: Any) -> list[str]:
    return [name for name in inspect.signature(kind).parameters if name not in ("random", "observer", "clock")]


@pytest.mark.parametrize(
    ("kind", "setting"), [(kind, setting) for kind in VALID for setting in settings_of(kind)], ids=str
)
def test_no_refusal_quotes_what_was_given(kind: Any, setting: str) -> None:
    refusals: list[str] = []

    with Watch() as watch:
        for wrong in wrong_values():
            try:
                built = kind(**{**VALID[kind], setting: wrong})
            except InvalidRequestError as error:
                refusals.append(str(error))
                watch.show("a refusal", error)
            else:
                watch.show("what was built", built)

    leaks = [leak for leak in watch.leaks() if setting not in NAMES or leak[0] != "what was built"]
    assert leaks == []
    assert refusals
    assert all(refusal.isprintable() for refusal in refusals)


def test_every_model_of_a_callback_is_tried() -> None:
    assert set(CHECKS) <= set(VALID)


@pytest.mark.parametrize("name", sorted(arguments._ARGUMENTS))
def test_no_refusal_of_a_store_quotes_an_argument(name: str) -> None:
    with Watch() as watch:
        for wrong in wrong_values():
            with contextlib.suppress(InvalidRequestError):
                try:
                    arguments.check_arguments(**{name: wrong})
                except InvalidRequestError as error:
                    watch.show("a refusal", error)
                    raise

    assert watch.leaks() == []


def test_no_refusal_of_a_document_quotes_it_nor_a_stack_trace_behind_it() -> None:
    text = canary("document")
    documents = [
        text,
        f'"{text}"',
        f'{{"{text[:6]}": "{text}"',
        f'{{"url": "http://{text}:{text}@host.example/{text}", "postdata": {{"headers": {{"X": "\\u0000{text}"}}}}}}',
        f'{{"url": 5, "Authorization: {text}": 1, "postdata": {{"headers": {{"Authorization: {text}": ""}}}}}}',
        f'{{"url": "http://a.example/", "postdata": {{"data": "{text}="}}, "method": "{text}"}}',
        f'{{"url": "http://a.example/", "retryphases": [{{"retries": "{text}", "delay": "{text}"}}]}}',
        "[" * 100_000 + text,
        b"\xff" + text.encode(),
    ]

    with Watch() as watch:
        for document in documents:
            for kind in (CallbackRequest, CallbackStatus, CallbackAttempt, CallbackData):
                error = watch.raised_by("a refusal", partial(codec.loads, document, kind))
                assert isinstance(error, InvalidRequestError)
                assert chain_of(error) == [error]
        for model in (text, Talkative(), {text: text}):
            watch.raised_by("a refusal", partial(codec.dumps, model))  # type: ignore[arg-type]

    assert watch.leaks() == []


def test_no_refusal_of_a_signature_quotes_request_or_secrets() -> None:
    text = canary("signature")
    good = {
        "webhook-id": "a",
        "webhook-timestamp": "1767225600",
        "webhook-signature": Signer(b"k" * 32).sign("a", 1767225600, b"b"),
    }
    changes = [{name: value} for name in good for value in (f"{text}.", f"{text}\n", f"v1,{text}", "")]
    requests: list[Mapping[str, str]] = [{}, {"Authorization": text}, {**good, "Webhook-Id": text}]
    requests += [{**good, **change} for change in changes]

    with Watch() as watch:
        for headers in requests:
            error = watch.raised_by("a check", partial(verify, headers, text.encode(), b"k" * 32, now=NOW))
            assert isinstance(error, SignatureError)
        for secrets in (text, f"whsec_{text}", [text.encode()], {text: text}, Talkative()):
            watch.raised_by("malformed secrets", partial(verify, good, b"b", secrets, now=NOW))  # type: ignore[arg-type]
            watch.raised_by("malformed secrets", partial(Signer, secrets))  # type: ignore[arg-type]
            watch.raised_by("malformed secrets", partial(Signer(lambda secrets=secrets: secrets).sign, "a", 1, b"b"))  # type: ignore[arg-type,return-value]
        watch.raised_by("a malformed id", lambda: Signer(b"k" * 32).sign(f"{text}.", 1, b"b"))

    assert watch.leaks() == []
