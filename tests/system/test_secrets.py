"""
Canaries in every field that may hold a secret, every failure driven with all loggers at DEBUG, nothing of it emitted.

One callback for each way to fail goes through a real dispatcher, transport, store and mail server; the host's hooks
raise exceptions that quote; the database's rows are junk. What is emitted meanwhile is in `support.canaries.Watch`.
"""

from __future__ import annotations

import base64
import os
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme
from attrs import fields

from callbackq import (
    CallbackData,
    CallbackRequest,
    CallbackStatus,
    Dispatcher,
    HTTPTransport,
    InMemoryDataAccess,
    LoggingObserver,
    ResponsePolicy,
    RetryPhase,
    Signer,
    SMTPNotifier,
    SQLiteDataAccess,
    TargetPolicy,
)
from callbackq.core.delivery import Answer, Delivery, Outcome
from callbackq.core.failure_email import FailureNotice
from callbackq.core.models import AttemptFailure
from callbackq.core.verdict import Verdict
from callbackq.dataaccess import Action, DataAccess
from callbackq.errors import CallbackqError, DataAccessError, NotificationError
from callbackq.events import EventKind, ObservedEvent
from callbackq.testing import FakeClock, ScriptedTransport
from support.canaries import ALL_CANARIES, HOSTILE_ID, Watch, canary, leaky
from support.dispatching import LIMIT, Witness
from support.mail import Mailbox, PostOffice
from support.proxies import forward
from support.receivers import Conversation, Receiver

pytestmark = pytest.mark.system

SECRET_KEY = canary("signing-secret-of-32-bytes").ljust(32, "-").encode()
PASSWORD = canary("mail-password")
PROXY_CREDENTIALS = (canary("proxy-user"), canary("proxy-password"))
ADDRESS = f"{canary('address')}@ops.example"
SHORT = timedelta(seconds=0.5)

SECRETS_OF_A_REQUEST = {
    "url": "/{0}/path?query={0}&token={0}#{0}",
    "post_data": CallbackData(
        headers={"Authorization": f"Bearer {canary('authorization')}", "X-Api-Key": canary("header")},
        data=canary("body").encode(),
    ),
    "notification_email_address": ADDRESS,
}
IDS_OF_A_REQUEST = {"application_id": HOSTILE_ID, "queue_id": HOSTILE_ID}
PLAIN = ("method", "retry_phases", "on_exhausted")


def a_request(origin: str, **changes: Any) -> CallbackRequest:
    """A request that has a canary or hostile text wherever text can be."""
    secrets = {**SECRETS_OF_A_REQUEST, "url": origin + SECRETS_OF_A_REQUEST["url"].format(canary("url"))}  # type: ignore[attr-defined]
    return CallbackRequest(**{**secrets, **IDS_OF_A_REQUEST, **changes})


def test_every_field_of_a_request_is_planted() -> None:
    assert {field.name for field in fields(CallbackRequest)} == {*SECRETS_OF_A_REQUEST, *IDS_OF_A_REQUEST, *PLAIN}
    assert {field.name for field in fields(CallbackData)} == {"headers", "data"}


# Receivers that quote.


def says(head: str, body: str = "") -> Callable[[Conversation], object]:
    """Answer once, then close."""
    raw = head.replace("\n", "\r\n").encode("latin-1") + b"\r\n\r\n" + body.encode()

    def script(conversation: Conversation) -> None:
        conversation.read_request()
        conversation.send(raw)

    return script


def hangs(conversation: Conversation) -> None:
    conversation.read_request()
    conversation.hang()


def closes(conversation: Conversation) -> None:
    conversation.read_request()


TEXT = canary("answer")
SPOKEN = f"{TEXT}\x1b[31m\x07"
ANSWERS: dict[str, Callable[[Conversation], object]] = {
    "refused": says(
        f"HTTP/1.1 500 {SPOKEN}\nX-Echo: {SPOKEN}\nSet-Cookie: {TEXT}\nContent-Length: {len(SPOKEN)}", SPOKEN
    ),
    "gone": says(f"HTTP/1.1 410 {TEXT}\nLocation: http://{TEXT}.example/\nContent-Length: 0"),
    "redirected": says(f"HTTP/1.1 307 {TEXT}\nLocation: http://{TEXT}.example/{TEXT}\nContent-Length: 0"),
    "busy": says(f"HTTP/1.1 503 {TEXT}\nRetry-After: {SPOKEN}\nContent-Length: 0"),
    "broken-off": says(f"HTTP/1.1 404 {TEXT}\nContent-Length: 9999", TEXT),
    "bad-length": says(f"HTTP/1.1 404 {TEXT}\nContent-Length: {TEXT}", TEXT),
    "bad-chunk": says(f"HTTP/1.1 404 {TEXT}\nTransfer-Encoding: chunked", f"{TEXT}\r\n"),
    "too-long": says(f"HTTP/1.1 404 {TEXT}\nContent-Length: 99999", TEXT * 3000),
    "no-http": says(f"{SPOKEN} ready"),
    "too-large": says(f"HTTP/1.1 200 OK\nX: {TEXT * 9000}"),
    "two-lengths": says(f"HTTP/1.1 200 OK\nContent-Length: 1{TEXT}, 2{TEXT}"),
    "hanging": hangs,
    "closing": closes,
}
FAILING_HOSTS = (
    "no-name",
    "forbidden",
    "raising-resolver",
    "junk-resolver",
    "unreachable",
    "bad-certificate",
    "no-tls",
)


class Receivers:
    """All of them, found by host name, and a resolver that raises what quotes."""

    def __init__(self, opened: ExitStack) -> None:
        authority, stranger = trustme.CA(), trustme.CA(organization_name=canary("authority"))
        self.client_tls = ssl.create_default_context()
        authority.configure_trust(self.client_tls)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        stranger.issue_cert(f"{canary('certificate')}.example", organization_name=canary("subject")).configure_cert(tls)
        mismatch = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(f"{canary('certificate')}.example").configure_cert(mismatch)
        answering = {name: self._open(opened, Receiver(script)) for name, script in ANSWERS.items()}
        self.hanging = answering["hanging"]
        self.ports = {name: receiver.port for name, receiver in answering.items()}
        self.ports["bad-certificate"] = self._open(opened, Receiver(tls=tls)).port
        self.ports["wrong-certificate"] = self._open(opened, Receiver(tls=mismatch)).port
        self.ports["no-tls"] = self.ports["no-http"]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.ports["unreachable"] = listener.getsockname()[1]

    @staticmethod
    def _open(opened: ExitStack, receiver: Receiver) -> Receiver:
        opened.callback(receiver.close)
        return receiver

    def origin(self, name: str) -> str:
        scheme = "https" if name in ("bad-certificate", "wrong-certificate", "no-tls") else "http"
        return f"{scheme}://{name}.example:{self.ports.get(name, 8080)}"

    def resolve(self, host: str, port: int) -> list[str]:
        match host.removesuffix(".example"):
            case "no-name":
                raise leaky_socket_error()
            case "raising-resolver":
                raise leaky(place="resolver")
            case "junk-resolver":
                return [canary("address-of-resolver")]
            case "forbidden":
                return ["10.1.2.3"]
        return ["127.0.0.1"]

    @property
    def names(self) -> list[str]:
        return sorted({*self.ports, *FAILING_HOSTS})


def leaky_socket_error() -> socket.gaierror:
    error = socket.gaierror(socket.EAI_NONAME, canary("gaierror"))
    error.__cause__ = leaky(place="gaierror")
    return error


@pytest.fixture(scope="module")
def receivers() -> Iterator[Receivers]:
    with ExitStack() as opened:
        yield Receivers(opened)


@pytest.fixture(scope="module")
def post_office() -> Iterator[PostOffice]:
    office = PostOffice()
    yield office
    office.close()


@pytest.fixture(scope="module")
def mail_authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[DataAccess]:
    made = InMemoryDataAccess() if request.param == "memory" else SQLiteDataAccess(tmp_path / "callbacks.db")
    with made:
        yield made


# A whole run.


def a_mailer(
    post_office: PostOffice, mailbox: Mailbox, authority: trustme.CA, *, password: str = PASSWORD
) -> SMTPNotifier:
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context()
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(client)
    port = post_office.open(mailbox, tls=server, authenticator=mailbox.authenticate, auth_require_tls=False)
    return SMTPNotifier(
        "localhost",
        port=port,
        sender="callbacks@shop.example",
        username="callbackq",
        password=password,
        security="tls",
        ssl_context=client,
        pause=timedelta(milliseconds=1),
    )


def a_transport(
    receivers: Receivers, signer: Signer, *, deadline: timedelta = SHORT, proxy: str | None = None
) -> HTTPTransport:
    return HTTPTransport(
        target_policy=TargetPolicy(allow=["127.0.0.1"], resolver=receivers.resolve),
        ssl_context=receivers.client_tls,
        deadline=deadline,
        response_limit=1000,
        signer=signer,
        proxy=proxy,
        proxy_credentials=PROXY_CREDENTIALS if proxy else None,
    )


def test_nothing_secret_is_emitted_whatever_becomes_of_a_callback(
    store: Any,
    receivers: Receivers,
    post_office: PostOffice,
    mail_authority: trustme.CA,
    capfd: pytest.CaptureFixture[str],
) -> None:
    mailbox = Mailbox(password=PASSWORD)
    notifier = a_mailer(post_office, mailbox, mail_authority)
    witness = Witness()
    capfd.readouterr()

    with Watch() as watch:
        for name in receivers.names:
            store.store_callback_request(a_request(receivers.origin(name), queue_id=f"{name} {HOSTILE_ID}"), id=name)
        for signer in (Signer(SECRET_KEY), Signer(lambda: refuse_secrets())):
            transport = a_transport(receivers, signer)
            dispatcher = Dispatcher(
                store, machine_name=HOSTILE_ID, transport=transport, notifier=notifier, observer=Both(witness)
            )
            assert dispatcher.run_until_idle(timeout=30)
            transport.close()
            store.store_callback_request(a_request(receivers.origin("refused")), id="unsigned")
        interrupt_one(store, receivers, witness)
        cancel_and_redeliver(store)
        statuses = list(store.list_callbacks())
        for thing in (transport, dispatcher, notifier, store, signer, *statuses, *witness.events):
            watch.show("an object", thing)

    shown = capfd.readouterr()
    met = {attempt.failure for status in statuses for attempt in status.attempts if attempt.failure}
    assert met == set(AttemptFailure)
    assert {event.kind for event in witness.events} >= {EventKind.FAILED, EventKind.INTERRUPTED}
    assert len(watch.records) > 3 * len(receivers.names)
    assert watch.leaks() == []
    assert watch.unfit_lines() == []
    assert (shown.out, shown.err) == ("", "")
    assert len(mailbox.messages) > len(receivers.names)
    for message in mailbox.messages:
        assert message["To"] == ADDRESS
        del message["To"]
        assert ALL_CANARIES not in message.as_string() + message.get_content()


def refuses_and_quotes(conversation: Conversation) -> None:
    """A proxy that repeats what it was told, also to those that it lets through no tunnel."""
    while request := conversation.read_request():
        said = f"{TEXT} {request.fields['proxy-authorization']}"
        conversation.send(f"HTTP/1.1 407 {said}\r\nX-Echo: {said}\r\nContent-Length: 0\r\n\r\n".encode())


@pytest.mark.parametrize("script", [forward, refuses_and_quotes], ids=["forwards", "refuses"])
def test_nothing_secret_is_emitted_when_callbacks_go_through_a_proxy(
    script: Callable[[Conversation], None], receivers: Receivers, capfd: pytest.CaptureFixture[str]
) -> None:
    witness = Witness()
    encoded = base64.b64encode(":".join(PROXY_CREDENTIALS).encode()).decode()
    capfd.readouterr()

    with ExitStack() as opened, Watch() as watch:
        proxy = Receiver(script)
        opened.callback(proxy.close)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for where, seconds in ((nobody, 0.3), (proxy.url(""), 30)):
            # Anew each time: those that nobody took are not due again at once.
            store = InMemoryDataAccess()
            for name in receivers.names:
                store.store_callback_request(a_request(receivers.origin(name), queue_id=name), id=name)
            transport = a_transport(receivers, Signer(SECRET_KEY), proxy=where)
            dispatcher = Dispatcher(store, transport=transport, observer=Both(witness))
            assert dispatcher.run_until_idle(timeout=seconds) is (where != nobody)
            transport.close()
            for thing in (transport, dispatcher, *store.list_callbacks(), *witness.events):
                watch.show("an object", thing)

    shown = capfd.readouterr()
    assert {request.fields["proxy-authorization"] for request in proxy.requests} == {f"Basic {encoded}"}
    assert EventKind.LOCAL_FAULT in {event.kind for event in witness.events}
    assert "through the proxy" in watch.messages()
    assert watch.leaks() == []
    assert watch.leaks(of=encoded) == []
    assert watch.unfit_lines() == []
    assert (shown.out, shown.err) == ("", "")


def refuse_secrets() -> bytes:
    raise leaky(place="secrets")


class Both:
    """Logs, as the default does, and remembers."""

    def __init__(self, witness: Witness) -> None:
        self._observers = (LoggingObserver(), witness)

    def observe(self, event: ObservedEvent) -> None:
        for observer in self._observers:
            observer.observe(event)


def interrupt_one(store: Any, receivers: Receivers, witness: Witness) -> None:
    transport = a_transport(receivers, Signer(SECRET_KEY), deadline=timedelta(seconds=20))
    store.store_callback_request(a_request(receivers.origin("hanging"), queue_id="another"), id="interrupted")
    dispatcher = Dispatcher(store, transport=transport, observer=Both(witness))
    before = len(receivers.hanging.requests)
    dispatcher.start()
    receivers.hanging.wait_for_requests(before + 1)
    dispatcher.stop(0)
    transport.close()


def cancel_and_redeliver(store: Any) -> None:
    for id, action in (("refused", Action.REDELIVER), ("interrupted", Action.CANCEL), ("gone", Action.REDELIVER)):
        with suppress(CallbackqError):
            store.request_transition(id, action)


# Hooks of the host that raise.


class Hook:
    """Raises what quotes, the first time it is asked."""

    def __init__(self, error: BaseException) -> None:
        self._errors = [error]

    def __call__(self) -> None:
        if self._errors:
            raise self._errors.pop()


class RaisingStore(InMemoryDataAccess):
    """Raises in one of its methods, once, before or after it has done its work."""

    def __init__(self, method: str, error: BaseException, *, after: bool) -> None:
        super().__init__()
        super().store_callback_request(a_request("http://host.example"), id="one")
        hook, work = Hook(error), getattr(self, method)

        def raising(*args: Any, **options: Any) -> Any:
            result = work(*args, **options) if after else None
            hook()
            return result if after else work(*args, **options)

        setattr(self, method, raising)


class RaisingObserver:
    def __init__(self, error: BaseException) -> None:
        self._hook = Hook(error)

    def observe(self, event: ObservedEvent) -> None:
        self._hook()


class RaisingNotifier:
    def __init__(self, error: BaseException) -> None:
        self._hook = Hook(error)

    def notify(self, notice: FailureNotice) -> None:
        self._hook()


class RaisingChance(Hook):
    def __call__(self) -> Any:
        super().__call__()
        return 0.5


class RaisingPolicy(ResponsePolicy):
    def judge(self, status_code: int) -> Verdict:
        raise leaky(place="policy")


class RaisingTransport:
    """Blocks, raises, and returns what is no answer."""

    deadline = timedelta(seconds=1)

    def __init__(self, *results: object) -> None:
        self._results = list(results)

    def send(self, delivery: Delivery) -> Any:
        result = self._results.pop() if self._results else ScriptedTransport([500]).send(delivery)
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        raise leaky(place="close")


class RaisingSender(RaisingTransport):
    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        raise leaky(place="submit")

    def interrupt(self, deliveries: object) -> None:
        raise leaky(place="interrupt")


class Talkative:
    def __repr__(self) -> str:
        return canary("repr-of-an-answer")


STORE_METHODS = ("acquire_locks", "record_attempts", "next_due", "now", "acquire_notifications", "record_notification")
ERRORS: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": leaky,
    "OSError": lambda: OSError(5, canary("strerror"), canary("filename")),
    "UnicodeDecodeError": lambda: UnicodeDecodeError("utf-8", canary("undecodable").encode(), 0, 1, canary("reason")),
    "ExceptionGroup": lambda: ExceptionGroup(canary("group"), [leaky(place="grouped")]),  # type: ignore[list-item]
    "DataAccessError": lambda: raised_from(DataAccessError("our words"), leaky(place="driver")),
    "NotificationError": lambda: raised_from(NotificationError("our words"), leaky(place="mail")),
}


def raised_from(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


HOOKS: dict[str, Callable[[BaseException], dict[str, Any]]] = {
    "observer": lambda error: {"observer": RaisingObserver(error)},
    "notifier": lambda error: {"notifier": RaisingNotifier(error)},
    "policy": lambda _: {"response_policy": RaisingPolicy()},
    "random": lambda error: {"random": RaisingChance(error)},
    "transport": lambda error: {"transport": RaisingTransport(error)},
    "sender": lambda _: {"transport": RaisingSender()},
    "no answer": lambda _: {"transport": RaisingTransport(Talkative())},
    "text for an answer": lambda _: {"transport": RaisingTransport(canary("text-for-an-answer"))},
    "an unfit answer": lambda _: {
        "transport": RaisingTransport(
            Answer(status_code=canary("status"), time=Talkative(), duration=Talkative(), response=Talkative())  # type: ignore[arg-type]
        )
    },
    **{
        f"store {method}, {when}": lambda error, method=method, when=when: {  # type: ignore[misc]
            "data_access": RaisingStore(method, error, after=when == "after")
        }
        for method in STORE_METHODS
        for when in ("before", "after")
    },
}


RAISING_THE_ERROR = {
    hook for hook in HOOKS if hook.startswith(("observer", "notifier", "random", "transport", "store"))
}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("hook", HOOKS)
def test_nothing_that_a_hook_of_the_host_raises_is_quoted(
    hook: str, kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    error = ERRORS[kind]()
    settings = {
        "data_access": RaisingStore("close", error, after=True),
        "transport": RaisingTransport(),
        "notifier": RaisingNotifier(NotificationError("ours")),
        "observer": LoggingObserver(),
        "poll_interval": timedelta(milliseconds=10),
        **HOOKS[hook](error),
    }
    capfd.readouterr()

    with Watch() as watch:
        dispatcher = Dispatcher(**settings)
        dispatcher.run_until_idle(timeout=LIMIT)
        watch.show("dispatcher", dispatcher)

    shown = capfd.readouterr()
    assert watch.leaks() == []
    assert watch.unfit_lines() == []
    assert (shown.out, shown.err) == ("", "")
    assert "failed: callback='one'" in watch.messages() or hook in ("observer", "store acquire_locks, after")
    if hook in RAISING_THE_ERROR:
        assert kind in watch.messages() or "our words" in watch.messages()


# The mail server.


def smtp(*lines: str) -> Any:
    """A mail server that says these, one for each line it is told, and then goes."""

    async def script(reader: Any, writer: Any, _: object) -> None:
        for line in lines:
            writer.write(line.encode("latin-1") + b"\r\n")
            await reader.readline()

    return script


QUOTED = f"{canary('mail-server')} \x1b[31m {ADDRESS}"
MAIL_SERVERS: dict[str, Any] = {
    "refuses at once": smtp(f"554 {QUOTED}"),
    "is no mail server": smtp(f"HTTP/1.1 {QUOTED}"),
    "refuses HELO": smtp("220 hi", f"550 {QUOTED}", f"550 {QUOTED}"),
    "refuses the login": smtp("220 hi", "250-hi\r\n250 AUTH PLAIN", f"535 5.7.8 {QUOTED}", f"535 {QUOTED}"),
    "challenges with junk": smtp("220 hi", "250-hi\r\n250 AUTH CRAM-MD5", f"334 {QUOTED}", f"334 {QUOTED}"),
    "refuses the sender": smtp("220 hi", "250-hi\r\n250 AUTH PLAIN", "235 ok", f"550 {QUOTED}", f"550 {QUOTED}"),
    "refuses the recipient": smtp(
        "220 hi", "250-hi\r\n250 AUTH PLAIN", "235 ok", "250 ok", f"550 5.1.1 {QUOTED}", "250"
    ),
    "refuses the data": smtp(
        "220 hi", "250-hi\r\n250 AUTH PLAIN", "235 ok", "250 ok", "250 ok", f"554 {QUOTED}", "250"
    ),
    "speaks no text": smtp("220 \xff\xfe", f"250 \xff{QUOTED}", "\xff\xff"),
    "offers nothing": smtp("220 hi", "250 hi"),
    "breaks off": smtp("220 hi"),
}


def a_notice(status: CallbackStatus) -> FailureNotice:
    address = status.request.notification_email_address
    return FailureNotice(email_address=address, queue_id=status.queue_id, callbacks=(status,), count=1, key="0" * 32)


@pytest.mark.parametrize("server", [*MAIL_SERVERS, "nobody", "stranger"])
def test_nothing_that_a_mail_server_says_is_quoted_nor_what_it_is_told(
    server: str, post_office: PostOffice, mail_authority: trustme.CA
) -> None:
    notifier = a_mailer(post_office, Mailbox(), mail_authority)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    name = f"{canary('certificate')}.example" if server == "stranger" else "localhost"
    mail_authority.issue_cert(name).configure_cert(context)
    notifier._port = (
        1 if server == "nobody" else post_office.misbehave(MAIL_SERVERS.get(server, smtp("220")), tls=context)
    )
    store = InMemoryDataAccess()
    store.store_callback_request(a_request("http://host.example"), id="one")

    with Watch() as watch:
        dispatcher = Dispatcher(store, transport=ScriptedTransport([410]), notifier=notifier)
        assert dispatcher.run_until_idle(timeout=LIMIT)
        error = watch.raised_by("notify", lambda: notifier.notify(a_notice(store.get_callback_status("one"))))
        watch.show("notifier", notifier)

    assert isinstance(error, NotificationError)
    assert "the e-mail about callback 'one'" in watch.messages()
    assert watch.leaks() == []
    assert watch.unfit_lines() == []


# The database.

SHOWN_COLUMNS = {"id", "name", "machine", "attempt_machine", "application_id"}
"""Ids and names: they are shown, whatever they hold, escaped."""


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with a row in every table: a waiting, a locked and a failed callback, one with a history."""
    path = tmp_path_factory.mktemp("rows") / "callbacks.db"
    clock = FakeClock()
    with SQLiteDataAccess(path, clock=clock) as store:
        for name in ("failed", "retried", "late"):
            store.store_callback_request(
                a_request(
                    "http://host.example", queue_id=name, retry_phases=[RetryPhase(retries=1, delay=timedelta(0))]
                ),
                id=name,
            )
        transport = ScriptedTransport([410, AttemptFailure.DNS, 200], clock=clock)
        Dispatcher(store, transport=transport, clock=clock, observer=RaisingObserver(RuntimeError())).run_until_idle()
        store.store_callback_request(a_request("http://host.example", queue_id="locked"), id="locked")
        store.acquire_locks("machine", lock_timeout=timedelta(seconds=30), limit=1)
        store.store_callback_request(a_request("http://host.example", queue_id="waiting"), id="waiting")
    return path.read_bytes()


def columns_of(database: bytes) -> list[tuple[str, str, str]]:
    """Table, column and type, of all."""
    with closing(sqlite3.connect(":memory:")) as connection:
        # As a database in memory can be: without a write-ahead log.
        connection.deserialize(database[:18] + b"\1\1" + database[20:])
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        return [
            (table, column, kind)
            for table in tables
            for _, column, kind, *_ in connection.execute(f"PRAGMA table_info({table})")
        ]


def use_all_of(store: SQLiteDataAccess, watch: Watch) -> None:
    """Call whatever reads rows."""
    calls: list[Callable[[], object]] = [
        lambda: list(store.list_callbacks()),
        *(lambda id=id: store.get_callback_status(id) for id in ("failed", "retried", "late", "locked", "waiting")),  # type: ignore[misc]
        lambda: store.store_callback_request(a_request("http://other.example"), id="waiting"),
        lambda: store.request_transition("failed", Action.REDELIVER),
        store.next_due,
        lambda: store.acquire_notifications(lock_timeout=timedelta(minutes=1), limit=9),
        lambda: store.acquire_locks("machine", lock_timeout=timedelta(seconds=30), limit=1),
        lambda: Dispatcher(store, transport=ScriptedTransport(default=410)).run_until_idle(timeout=0.02),
    ]
    for call in calls:
        try:
            watch.show("what a store returns", call())
        except Exception as error:
            watch.show("what a store raises", error)


def junk_for(column: str, kind: str) -> Iterator[object]:
    """What is shown, ids and numbers, gets what a terminal would obey; all else a canary, too."""
    is_shown = column in SHOWN_COLUMNS or kind == "INTEGER"
    planted = f"{'x' if is_shown else canary(column)}\r\n\x1b[31m\u202e"
    yield planted
    if kind != "INTEGER":
        yield planted.encode()
    if column in ("headers", "retry_phases"):
        yield "[" * 20_000


@pytest.mark.thorough
def test_no_junk_in_any_column_is_quoted_or_obeyed(database: bytes, tmp_path: Path) -> None:
    path = tmp_path / "callbacks.db"
    spoilt = 0

    with Watch() as watch:
        for table, column, kind in columns_of(database):
            for junk in junk_for(column, kind):
                path.write_bytes(database)
                with closing(sqlite3.connect(path, isolation_level=None)) as connection, suppress(sqlite3.Error):
                    connection.execute("PRAGMA synchronous = OFF")
                    spoilt += connection.execute(f"UPDATE OR REPLACE {table} SET {column} = ?", [junk]).rowcount
                with closing(SQLiteDataAccess(path, busy_timeout=timedelta(0), durability="process")) as store:
                    use_all_of(store, watch)
                for left in tmp_path.iterdir():
                    left.unlink()

    assert spoilt > 100
    assert len(watch.records) > 100
    assert watch.leaks() == []
    assert watch.unfit_lines() == []


def test_no_error_of_the_database_quotes_a_row(database: bytes, tmp_path: Path) -> None:
    path = tmp_path / "callbacks.db"
    pages = bytearray(database)
    for start in range(4096 * 2, len(pages), 4096):
        pages[start : start + 40] = canary("page").encode().ljust(40, b"-")
    broken = {
        "damaged": bytes(pages),
        "no database": canary("file").encode() * 1000,
        "cut": database[:5000],
        "empty": b"",
    }

    with Watch() as watch:
        for content in broken.values():
            path.write_bytes(content)
            with suppress(DataAccessError), closing(SQLiteDataAccess(path)) as store:
                use_all_of(store, watch)
            for left in tmp_path.iterdir():
                left.unlink()
        path.write_bytes(database)
        with SQLiteDataAccess(path, busy_timeout=timedelta(0)) as store, closing(sqlite3.connect(path)) as other:
            other.execute("BEGIN IMMEDIATE")
            use_all_of(store, watch)

    assert "SQLITE_" in watch.messages()
    assert watch.leaks() == []
    assert watch.unfit_lines() == []


def test_no_secret_of_the_operator_is_stored_and_only_the_owner_may_read_what_is(
    tmp_path: Path, receivers: Receivers, post_office: PostOffice, mail_authority: trustme.CA
) -> None:
    mailbox = Mailbox(password=PASSWORD)
    notifier = a_mailer(post_office, mailbox, mail_authority)
    umask = os.umask(0)
    try:
        with SQLiteDataAccess(tmp_path / "callbacks.db") as store:
            store.store_callback_request(a_request(receivers.origin("refused")), id="one")
            transport = a_transport(receivers, Signer(SECRET_KEY))
            assert Dispatcher(store, transport=transport, notifier=notifier).run_until_idle(timeout=LIMIT)
            transport.close()
            store.backup(tmp_path / "backup.db")
            files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    finally:
        os.umask(umask)

    everything = b"".join(files.values())
    assert len(mailbox.messages) == 1
    assert len(files) >= 4  # with -wal, -shm or a sign of life, and the backup
    assert set(modes.values()) == {0o600}
    assert canary("body").encode() in everything
    assert SECRET_KEY not in everything
    assert PASSWORD.encode() not in everything


# A program that configures nothing.

PROGRAM = """
import logging, sys, threading
sys.path[:0] = {path!r}
sys.argv = ["program"]
from system.test_secrets import *
if {debug}:
    logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
with ExitStack() as opened:
    receivers = Receivers(opened)
    store = SQLiteDataAccess({file!r})
    for name in receivers.names:
        store.store_callback_request(a_request(receivers.origin(name), queue_id=name), id=name)
    transport = a_transport(receivers, Signer(SECRET_KEY))
    dispatcher = Dispatcher(store, transport=transport, notifier=RaisingNotifier(leaky()))
    dispatcher.run_until_idle(timeout=20)
    print(dispatcher, transport, store, list(store.list_callbacks()))
    for thread in threading.enumerate():
        print(thread)
    store.close()
    transport.close()
"""


@pytest.mark.parametrize("debug", [False, True], ids=["as it comes", "at DEBUG"])
def test_a_program_prints_nothing_secret(debug: bool, tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    program = PROGRAM.format(path=[str(tests)], debug=debug, file=str(tmp_path / "callbacks.db"))

    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "always", "-c", program],
        capture_output=True,
        text=True,
        timeout=50,
        check=True,
    )

    assert "failed: callback='refused'" in done.stdout + done.stderr
    assert ALL_CANARIES not in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
