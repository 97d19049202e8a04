"""The e-mail about a final failure, sent to real mail servers on the loopback, well-behaved and otherwise."""

from __future__ import annotations

import asyncio
import logging
import pickle
import re
import socket
import ssl
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from email.utils import parsedate_to_datetime
from typing import Any

import pytest
import trustme
from hypothesis import given, settings
from hypothesis import strategies as st

from callbackq.core.models import (
    AttemptFailure,
    CallbackAttempt,
    CallbackData,
    CallbackLock,
    CallbackRequest,
    CallbackState,
    CallbackStatus,
    FailedReason,
)
from callbackq.errors import InvalidRequestError, NotificationError
from callbackq.notifier import FailureNotice, SMTPNotifier
from callbackq.testing import FakeClock
from support.mail import Mailbox, PostOffice, Script

NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
ADDRESS = "ops@example.com"
SENDER = "callbacks@example.org"
# What must be found nowhere but where it was put.
HEADER_CANARY, QUERY_CANARY, BODY_CANARY, PASSWORD_CANARY = "c4n4ry-h", "c4n4ry-q", "c4n4ry-b", "c4n4ry-p"
CANARIES = (HEADER_CANARY, QUERY_CANARY, BODY_CANARY, PASSWORD_CANARY)


def a_failed_callback(
    *,
    id: str = "callback-1",
    queue_id: str = "orders",
    application_id: str = "shop",
    address: str = ADDRESS,
    on_exhausted: Any = "continue",
    state: CallbackState = CallbackState.FAILED,
    failed_reason: FailedReason | None = FailedReason.EXHAUSTED,
    attempts: int = 2,
    last_failure: AttemptFailure | None = None,
    detail: str = "",
    tokens: tuple[int, ...] = (1, 2),
) -> CallbackStatus:
    secrets = CallbackData(headers={"x-api-key": HEADER_CANARY}, data=BODY_CANARY.encode())
    return CallbackStatus(
        id=id,
        request=CallbackRequest(
            url=f"https://receiver.example:8443/hook?key={QUERY_CANARY}",
            post_data=secrets,
            queue_id=queue_id,
            application_id=application_id,
            notification_email_address=address,
            on_exhausted=on_exhausted,
        ),
        attempts=[
            CallbackAttempt(
                status_code=0 if last_failure else 503,
                failure=last_failure,
                response=secrets,
                time=NOON + timedelta(minutes=number),
                duration=timedelta(seconds=1),
                detail=detail,
            )
            for number in range(attempts)
        ],
        locks=[CallbackLock(acquired=NOON, timeout=NOON, token=token) for token in tokens],
        state=state,
        queue_id=queue_id,
        sequence=17,
        failed_reason=failed_reason,
    )


def a_notice(*callbacks: CallbackStatus, **changes: Any) -> FailureNotice:
    """About these callbacks, or about one that failed."""
    callbacks = callbacks or (a_failed_callback(),)
    return FailureNotice(
        **{
            "email_address": callbacks[0].request.notification_email_address,
            "queue_id": callbacks[0].queue_id,
            "callbacks": callbacks,
            "count": len(callbacks),
            "key": "0" * 32,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def post_office() -> Iterator[PostOffice]:
    office = PostOffice()
    yield office
    office.close()


@pytest.fixture
def mailbox() -> Mailbox:
    return Mailbox(password=PASSWORD_CANARY)


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="session")
def server_tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture(scope="session")
def trusting(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def a_notifier(port: int, *, host: str = "localhost", **options: Any) -> SMTPNotifier:
    return SMTPNotifier(
        host,
        **{
            "port": port,
            "sender": SENDER,
            "security": "none",
            "timeout": timedelta(seconds=10),
            "pause": timedelta(milliseconds=5),
            **options,
        },
    )


# What the e-mail says.


def text_of(message: EmailMessage) -> str:
    text: str = message.get_content()
    return text.replace("\r\n", "\n")


def sent(post_office: PostOffice, mailbox: Mailbox, notice: FailureNotice, **options: Any) -> EmailMessage:
    a_notifier(post_office.open(mailbox), **options).notify(notice)
    [message] = mailbox.messages
    return message


def test_the_email_says_which_callback_failed_how_and_what_to_do(post_office: PostOffice, mailbox: Mailbox) -> None:
    clock = FakeClock(NOON + timedelta(hours=1))

    message = sent(post_office, mailbox, a_notice(), clock=clock)

    assert message["Subject"] == "callbackq: a callback could not be delivered"
    assert message["From"] == SENDER
    assert message["To"] == ADDRESS
    assert parsedate_to_datetime(message["Date"]) == clock.now()
    assert message["Auto-Submitted"] == "auto-generated"
    assert message.get_content_type() == "text/plain"
    assert text_of(message).splitlines() == [
        "A callback could not be delivered.",
        "",
        "Callback:      'callback-1'",
        "Queue:         'orders', number 17",
        "Application:   'shop'",
        "Request:       POST https://receiver.example:8443",
        "Reason:        exhausted: every attempt its retry phases allow has failed",
        "Attempts:      2",
        "First attempt: 2026-03-01 12:00:00+00:00",
        "Last attempt:  2026-03-01 12:01:00+00:00",
        "Last answer:   status 503",
        "",
        "Its queue goes on with the callbacks behind it.",
        "To try it again:  data_access.request_transition('callback-1', Action.REDELIVER)",
        "",
        "The next e-mail about this queue comes 1:00:00 (h:mm:ss) after this one at the earliest. It will tell",
        "of all failures until then.",
        "",
        "This address was stored with the callback as notification_email_address.",
    ]


@pytest.mark.parametrize(
    ("changes", "says", "never_says"),
    [
        ({"on_exhausted": "hold"}, "Its queue is held", "goes on"),
        ({"on_exhausted": "hold"}, "Action.SKIP", "goes on"),
        ({"on_exhausted": "hold", "queue_id": ""}, "one of its own", "SKIP"),
        ({"application_id": ""}, "Application:   not named", "''"),
        ({"last_failure": AttemptFailure.TIMEOUT}, "Last answer:   none (timeout)", "status"),
        ({"last_failure": AttemptFailure.CONNECT, "detail": "ECONNREFUSED"}, "none (connect: ECONNREFUSED)", "status"),
        (
            {"last_failure": AttemptFailure.TARGET_NOT_ALLOWED, "detail": "10.0.0.0/8 (10.1.2.3)"},
            "none (target_not_allowed)",
            "10.",
        ),
        ({"attempts": 0, "failed_reason": FailedReason.ABANDONED}, "Attempts:      0", "Last"),
        ({"failed_reason": FailedReason.UNDECODABLE}, "undecodable: the stored request can't be read", "phases"),
        ({"state": CallbackState.SUCCEEDED, "failed_reason": None}, "Its state is now: succeeded.", "REDELIVER"),
    ],
)
def test_the_email_fits_the_callback(
    post_office: PostOffice, mailbox: Mailbox, changes: dict[str, Any], says: str, never_says: str
) -> None:
    text = text_of(sent(post_office, mailbox, a_notice(a_failed_callback(**changes))))

    assert says in text
    assert never_says not in text


@pytest.mark.parametrize("reason", FailedReason)
def test_every_reason_of_failure_can_be_told(post_office: PostOffice, mailbox: Mailbox, reason: FailedReason) -> None:
    text = text_of(sent(post_office, mailbox, a_notice(a_failed_callback(failed_reason=reason))))

    assert f"Reason:        {reason.value}: " in text


def test_a_second_copy_can_be_recognised_and_another_email_is_another(
    post_office: PostOffice, mailbox: Mailbox
) -> None:
    notifier = a_notifier(post_office.open(mailbox))

    for notice in (
        a_notice(),
        a_notice(a_failed_callback(attempts=3, state=CallbackState.WAITING)),  # somebody redelivered it since
        a_notice(key="1" * 32),
        a_notice(key="1" * 32 + "\r\nBcc: a@example.net"),
    ):
        notifier.notify(notice)

    first, again, *others = [message["Message-ID"] for message in mailbox.messages]
    assert first == again
    assert len({first, *others}) == 3
    for id in (first, *others):
        assert re.fullmatch(r"<callbackq\.[0-9a-f]{32}@example\.org>", id)


# What it says about many.


def test_the_email_about_many_lists_the_first_and_counts_all(post_office: PostOffice, mailbox: Mailbox) -> None:
    callbacks = (
        a_failed_callback(id="callback-1"),
        a_failed_callback(id="callback-2", attempts=0, failed_reason=FailedReason.ABANDONED),
        a_failed_callback(id="callback-3", state=CallbackState.WAITING, failed_reason=None),
    )

    message = sent(post_office, mailbox, a_notice(*callbacks, count=9999, unlisted=9996))

    assert message["Subject"] == "callbackq: 9999 callbacks could not be delivered"
    assert (message["From"], message["To"]) == (SENDER, ADDRESS)
    assert text_of(message).splitlines() == [
        "Callbacks could not be delivered.",
        "",
        "Failures: 9999",
        "Queue:    'orders'",
        "",
        "'callback-1', number 17",
        "    POST https://receiver.example:8443",
        "    exhausted, attempts: 2",
        "    last attempt 2026-03-01 12:01:00+00:00: status 503",
        "",
        "'callback-2', number 17",
        "    POST https://receiver.example:8443",
        "    abandoned, attempts: 0",
        "",
        "'callback-3', number 17",
        "    POST https://receiver.example:8443",
        "    taken up again since; its state is now: waiting",
        "    attempts: 2",
        "    last attempt 2026-03-01 12:01:00+00:00: status 503",
        "",
        "and 9996 more.",
        "",
        "To see them all:  data_access.list_callbacks(state=CallbackState.FAILED, queue_id='orders')",
        "To try one again: data_access.request_transition(id, Action.REDELIVER)",
        "",
        "The next e-mail about this queue comes 1:00:00 (h:mm:ss) after this one at the earliest. It will tell",
        "of all failures until then.",
        "",
        "This address was stored with the callbacks as notification_email_address.",
    ]


@pytest.mark.parametrize(
    ("changes", "more", "says", "never_says"),
    [
        ({"queue_id": ""}, {}, "Queue:    each has one of its own", "number"),
        ({"queue_id": ""}, {}, "e-mail about callbacks without a queue", "this queue"),
        ({}, {}, "Failures: 2", "more."),
        ({}, {"callbacks": (), "count": 30, "unlisted": 30}, "None of them can be listed.", "more."),
        ({"on_exhausted": "hold"}, {}, "A failed callback that holds its queue", "SKIP"),
        ({"last_failure": AttemptFailure.TIMEOUT}, {}, "+00:00: none (timeout)", "status"),
        ({"last_failure": AttemptFailure.TARGET_NOT_ALLOWED, "detail": "10.0.0.0/8"}, {}, "target_not_allowed", "10."),
    ],
)
def test_the_email_about_many_fits_the_callbacks(
    post_office: PostOffice,
    mailbox: Mailbox,
    changes: dict[str, Any],
    more: dict[str, Any],
    says: str,
    never_says: str,
) -> None:
    callbacks = [a_failed_callback(id=id, **changes) for id in ("a", "b")]

    text = text_of(sent(post_office, mailbox, a_notice(*callbacks, **more)))

    assert says in text
    assert never_says not in text


def test_one_callback_that_failed_twice_is_an_email_about_two_failures(
    post_office: PostOffice, mailbox: Mailbox
) -> None:
    message = sent(post_office, mailbox, a_notice(count=2))

    assert "2 callbacks" in message["Subject"]
    assert "more." not in text_of(message)


@pytest.mark.parametrize("callbacks", [1, 2])
def test_without_an_interval_nothing_is_said_of_a_next_email(
    post_office: PostOffice, mailbox: Mailbox, callbacks: int
) -> None:
    notice = a_notice(*[a_failed_callback()] * callbacks)

    text = text_of(sent(post_office, mailbox, notice, interval=timedelta(0)))

    assert "next e-mail" not in text


# Nothing gets into it that is not meant to.


def smuggle(status: CallbackStatus, field: str, value: str) -> CallbackStatus:
    """Put a value past the model's checks, as a hostile row in a store might."""
    object.__setattr__(status.request if field == "application_id" else status, field, value)
    return status


@pytest.mark.parametrize(
    "address",
    [
        "",
        "ops@example.com\r\nBcc: victim@example.net",
        "ops@example.com\nBcc: victim@example.net",
        "ops@example.com\r\nRCPT TO:<victim@example.net>",
        "ops@example.com, victim@example.net",
        "Ops <ops@example.com>",
        "ops@example.com> SIZE=1",
        "-oQ/tmp@example.com",
        "ops@exämple.com",
        "ops@example.com\x00",
        "=?utf-8?q?a?=@example.com\r\n",
    ],
)
def test_no_email_goes_to_an_address_that_is_not_one_plain_address(
    post_office: PostOffice, mailbox: Mailbox, address: str
) -> None:
    notifier = a_notifier(post_office.open(mailbox))

    with pytest.raises(NotificationError) as refusal:
        notifier.notify(a_notice(email_address=address))

    assert refusal.value.permanent
    assert mailbox.commands == []


NASTY = "x\r\nBcc: a@example.net\r\n\r\n.\r\nRCPT TO:<a@example.net>\u2028\u202egnp.exe\x1b[31m\u2066=?utf-8?q?a?="


@pytest.mark.parametrize("field", ["id", "queue_id", "application_id"])
def test_ids_can_add_no_header_line_or_recipient(post_office: PostOffice, mailbox: Mailbox, field: str) -> None:
    message = sent(post_office, mailbox, a_notice(smuggle(a_failed_callback(), field, NASTY)))

    [envelope] = mailbox.envelopes
    assert (envelope.mail_from, envelope.rcpt_tos) == (SENDER, [ADDRESS])
    assert message["Bcc"] is None
    assert len(message.keys()) == 9
    assert repr(NASTY) in text_of(message)
    assert not re.search(r"[^\n -~]", message["Subject"] + text_of(message))


@pytest.mark.parametrize("field", ["id", "queue_id", "application_id"])
def test_ids_of_many_can_add_no_header_line_or_recipient(post_office: PostOffice, mailbox: Mailbox, field: str) -> None:
    callbacks = [smuggle(a_failed_callback(), field, NASTY) for _ in range(2)]

    message = sent(post_office, mailbox, a_notice(*callbacks, queue_id=NASTY))

    [envelope] = mailbox.envelopes
    assert (envelope.mail_from, envelope.rcpt_tos) == (SENDER, [ADDRESS])
    assert message["Bcc"] is None
    assert len(message.keys()) == 9
    assert message["Subject"] == "callbackq: 2 callbacks could not be delivered"
    assert not re.search(r"[^\n -~]", message["Subject"] + text_of(message))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=255)


def test_an_id_always_arrives_as_it_is_in_the_text_and_never_in_the_subject(
    post_office: PostOffice, mailbox: Mailbox
) -> None:
    notifier = a_notifier(post_office.open(mailbox))

    @settings(max_examples=60, deadline=None, database=None)
    @given(id=TEXT | st.sampled_from(["=?utf-8?q?a?=", "é 日本 " * 36, "a" * 255, "'\"\\"]))
    def check(id: str) -> None:
        mailbox.envelopes.clear()
        notifier.notify(a_notice(smuggle(a_failed_callback(), "id", id)))

        [message] = mailbox.messages
        assert message["Subject"] == "callbackq: a callback could not be delivered"
        assert f"Callback:      {id!r}\n" in text_of(message)
        assert mailbox.envelopes[0].content.isascii()  # type: ignore[union-attr]

    check()


# Encryption and login.


@pytest.mark.parametrize("security", ["starttls", "tls"])
def test_an_encrypted_connection_is_verified_and_used_for_the_login(
    post_office: PostOffice, mailbox: Mailbox, server_tls: ssl.SSLContext, trusting: ssl.SSLContext, security: str
) -> None:
    how: dict[str, Any] = {"tls": server_tls, "auth_require_tls": False}
    if security == "starttls":
        how = {"tls_context": server_tls, "require_starttls": True, "auth_required": True}
    port = post_office.open(mailbox, authenticator=mailbox.authenticate, **how)

    a_notifier(port, security=security, ssl_context=trusting, username="callbackq", password=PASSWORD_CANARY).notify(
        a_notice()
    )

    assert mailbox.commands == ["AUTH callbackq", "MAIL", "RCPT", "DATA"]
    assert len(mailbox.messages) == 1


@pytest.mark.parametrize("security", ["starttls", "tls"])
@pytest.mark.parametrize("fault", ["unknown authority", "other name"])
def test_a_server_that_cannot_prove_its_name_gets_nothing(
    post_office: PostOffice,
    mailbox: Mailbox,
    server_tls: ssl.SSLContext,
    trusting: ssl.SSLContext,
    security: str,
    fault: str,
) -> None:
    how = {"tls": server_tls} if security == "tls" else {"tls_context": server_tls}
    options: dict[str, Any] = {} if fault == "unknown authority" else {"ssl_context": trusting, "host": "127.0.0.1"}

    with pytest.raises(NotificationError, match="certificate verify failed") as refusal:
        a_notifier(post_office.open(mailbox, **how), security=security, **options).notify(a_notice())

    assert not refusal.value.permanent
    assert mailbox.commands == []


def test_a_server_without_starttls_gets_neither_password_nor_email(post_office: PostOffice, mailbox: Mailbox) -> None:
    port = post_office.open(mailbox, authenticator=mailbox.authenticate, auth_require_tls=False)
    notifier = a_notifier(port, security="starttls", username="callbackq", password=PASSWORD_CANARY)

    with pytest.raises(NotificationError, match="does not offer the STARTTLS"):
        notifier.notify(a_notice())

    assert mailbox.commands == []


def test_a_server_that_offers_no_login_is_told_apart(
    post_office: PostOffice, mailbox: Mailbox, server_tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    port = post_office.open(mailbox, tls=server_tls)
    notifier = a_notifier(port, security="tls", ssl_context=trusting, username="callbackq", password=PASSWORD_CANARY)

    with pytest.raises(NotificationError, match="or login that is asked for"):
        notifier.notify(a_notice())


def test_what_was_said_before_encryption_began_does_not_count(
    post_office: PostOffice, server_tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    said_to_server: list[bytes] = []

    async def inject(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
        writer.write(b"220 mail.test\r\n")
        await reader.readline()
        writer.write(b"250-mail.test\r\n250 STARTTLS\r\n")
        await reader.readline()
        # In one packet with the go-ahead: what a man in the middle adds, as if it were the answer to the next command.
        writer.write(b"220 go ahead\r\n250 mail.test\r\n554 injected\r\n")
        await writer.start_tls(server_tls)
        await converse(reader, writer, closing, greet=False, log=said_to_server)

    a_notifier(post_office.misbehave(inject), security="starttls", ssl_context=trusting).notify(a_notice())

    assert [line.split()[0].upper() for line in said_to_server[:4]] == [b"EHLO", b"MAIL", b"RCPT", b"DATA"]


# Refusals.


@pytest.mark.parametrize(
    ("command", "answer", "words", "permanent"),
    [
        ("RCPT", "550 5.1.1 ops@example.com is unknown", "the recipient: 550 5.1.1", True),
        ("RCPT", "550 no ops@example.com here", "the recipient: 550", True),
        ("RCPT", "554 5.7.1 relaying for ops@example.com is denied", "the recipient: 554 5.7.1", False),
        ("MAIL", "550 5.1.8 bad sender", "the sender: 550 5.1.8", False),
        ("DATA", "554 5.6.0 we do not like it", "the e-mail: 554 5.6.0", False),
        ("DATA", "552 5.2.2.2 not a code", "the e-mail: 552", False),
    ],
)
def test_a_refusal_is_told_by_its_codes_and_not_repeated_at_once(
    post_office: PostOffice, mailbox: Mailbox, command: str, answer: str, words: str, permanent: bool
) -> None:
    mailbox.script[command] = [answer]

    with pytest.raises(NotificationError) as refusal:
        a_notifier(post_office.open(mailbox)).notify(a_notice())

    assert str(refusal.value) == f"the mail server refused {words}"
    assert refusal.value.permanent is permanent
    assert mailbox.commands.count(command) == 1


def test_a_refused_login_is_not_the_address_s_fault(
    post_office: PostOffice, mailbox: Mailbox, server_tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    port = post_office.open(mailbox, tls=server_tls, authenticator=mailbox.authenticate, auth_require_tls=False)
    notifier = a_notifier(port, security="tls", ssl_context=trusting, username="callbackq", password="wrong")

    with pytest.raises(NotificationError, match="refused the login: 535") as refusal:
        notifier.notify(a_notice())

    assert not refusal.value.permanent


@pytest.mark.parametrize("command", ["MAIL", "RCPT", "DATA"])
def test_a_temporary_refusal_is_tried_again_at_once(post_office: PostOffice, mailbox: Mailbox, command: str) -> None:
    mailbox.script[command] = ["451 4.3.0 busy"]

    a_notifier(post_office.open(mailbox)).notify(a_notice())

    assert mailbox.commands.count(command) == 2
    assert len(mailbox.messages) == 1


def test_a_server_that_stays_busy_is_left_to_the_outbox(post_office: PostOffice, mailbox: Mailbox) -> None:
    mailbox.script["RCPT"] = ["450 4.2.0 greylisted"] * 9

    with pytest.raises(NotificationError, match=r"the recipient: 450 4\.2\.0") as refusal:
        a_notifier(post_office.open(mailbox)).notify(a_notice())

    assert not refusal.value.permanent
    assert mailbox.commands.count("RCPT") == 3


@pytest.mark.parametrize(
    ("allowed", "address", "may"),
    [
        (["example.com"], "ops@example.com", True),
        (["Example.COM"], "ops@eXample.com", True),
        (["example.com"], "ops@sub.example.com", False),
        ([".example.com"], "ops@sub.example.com", True),
        ([".example.com"], "ops@example.com", False),
        (["example.com"], "ops@notexample.com", False),
        ([".example.com"], "ops@notexample.com", False),
        (["a.test", "example.com"], "ops@example.com", True),
        ([], "ops@example.com", False),
    ],
)
def test_only_allowed_domains_are_written_to(
    post_office: PostOffice, mailbox: Mailbox, allowed: list[str], address: str, may: bool
) -> None:
    notifier = a_notifier(post_office.open(mailbox), allowed_domains=allowed)

    if may:
        notifier.notify(a_notice(a_failed_callback(address=address)))
    else:
        with pytest.raises(NotificationError, match="allowed_domains") as refusal:
            notifier.notify(a_notice(a_failed_callback(address=address)))
        assert refusal.value.permanent

    assert len(mailbox.messages) == may


# Servers that misbehave.

Misdeed = Callable[[asyncio.StreamWriter, asyncio.Event], Awaitable[None]]


async def converse(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    closing: asyncio.Event,
    *,
    at: bytes = b"",
    misdeed: Misdeed | None = None,
    greet: bool = True,
    log: list[bytes] | None = None,
) -> None:
    """Speak SMTP properly until the misdeed is due: at a command, at ``.`` (the end of the e-mail) or at once."""
    if misdeed is not None and at == b"":
        return await misdeed(writer, closing)
    if greet:
        writer.write(b"220 mail.test\r\n")
    while line := await reader.readline():
        if log is not None:
            log.append(line)
        verb = line.split()[0].upper()
        if misdeed is not None and verb == at:
            return await misdeed(writer, closing)
        if verb == b"DATA":
            writer.write(b"354 go on\r\n")
            while await reader.readline() != b".\r\n":
                pass
            if misdeed is not None and at == b".":
                return await misdeed(writer, closing)
        writer.write(b"221 bye\r\n" if verb == b"QUIT" else b"250 OK\r\n")
    return None


async def hang(writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
    await closing.wait()


async def drip(writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
    while not closing.is_set():
        writer.write(b"2")
        await writer.drain()
        try:
            await asyncio.wait_for(closing.wait(), 0.01)
        except TimeoutError:
            continue


async def drip_a_handshake(writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
    writer.write(b"\x16\x03\x03\x40\x00")  # the head of a TLS record of 16 KiB
    await drip(writer, closing)


async def drip_lines(writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
    while not closing.is_set():
        writer.write(b"250-more\r\n")
        await writer.drain()
        try:
            await asyncio.wait_for(closing.wait(), 0.01)
        except TimeoutError:
            continue


async def flood(writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
    while not closing.is_set():
        writer.write(b"250-" + b"x" * 1000 + b"\r\n")
        await writer.drain()


async def drop(writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
    writer.transport.abort()


def say(words: bytes) -> Misdeed:
    async def say_and_wait(writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
        writer.write(words)
        await closing.wait()

    return say_and_wait


def a_server_that(misdeed: Misdeed, *, at: bytes = b"", times: int | None = None) -> Script:
    done = [0]

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
        done[0] += 1
        if times is None or done[0] <= times:
            await converse(reader, writer, closing, at=at, misdeed=misdeed)
        else:
            await converse(reader, writer, closing)

    return script


def conversations() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "callbackq-smtp"]


def all_conversations_end() -> bool:
    for thread in conversations():
        thread.join(5)
    return not conversations()


@pytest.mark.parametrize(
    ("security", "at", "misdeed"),
    [
        ("none", b"", hang),
        ("none", b"", drip),
        ("none", b"EHLO", drip_lines),
        ("none", b"RCPT", drip),
        ("none", b".", drip),
        ("tls", b"", drip),
        ("tls", b"DATA", drip),
        ("tls over nothing", b"", drip_a_handshake),
        ("starttls", b"EHLO", drip_lines),
        ("none", b"MAIL", say(b"250 half a li")),
    ],
)
def test_the_deadline_holds_against_a_server_that_is_slow_anywhere(
    post_office: PostOffice,
    server_tls: ssl.SSLContext,
    trusting: ssl.SSLContext,
    security: str,
    at: bytes,
    misdeed: Misdeed,
) -> None:
    port = post_office.misbehave(a_server_that(misdeed, at=at), tls=server_tls if security == "tls" else None)
    notifier = a_notifier(
        port,
        security=security.split()[0],
        ssl_context=None if security == "none" else trusting,
        # A busy machine may need a tenth of a second for a handshake, and the misdeed comes after it.
        timeout=timedelta(seconds=0.1 if security == "none" else 0.5),
    )

    began = time.monotonic()
    with pytest.raises(NotificationError, match="in time"):
        notifier.notify(a_notice())
    took = time.monotonic() - began

    # The servers go on for as long as they are listened to. What is above the deadline is the machine's own delay.
    assert notifier.deadline.total_seconds() <= took < notifier.deadline.total_seconds() + 2
    assert all_conversations_end(), "the connection was not cut"
    assert post_office.connections[port] == 1


def test_the_deadline_holds_between_two_tries(post_office: PostOffice, mailbox: Mailbox) -> None:
    mailbox.script["RCPT"] = ["451 busy"] * 9
    notifier = a_notifier(post_office.open(mailbox), timeout=timedelta(seconds=0.1), pause=timedelta(minutes=1))

    with pytest.raises(NotificationError, match="in time"):
        notifier.notify(a_notice())

    assert all_conversations_end()
    assert mailbox.commands.count("RCPT") == 1


def test_a_name_lookup_that_hangs_holds_nobody_and_sends_nothing_later(
    post_office: PostOffice, mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = post_office.open(mailbox)
    answered, look_up = threading.Event(), socket.getaddrinfo

    def slow_getaddrinfo(*args: Any) -> Any:
        assert answered.wait(10)
        return look_up(*args)

    monkeypatch.setattr(socket, "getaddrinfo", slow_getaddrinfo)
    notifier = a_notifier(port, timeout=timedelta(seconds=0.02))

    for _ in range(4):
        with pytest.raises(NotificationError, match="in time"):
            notifier.notify(a_notice())
    with pytest.raises(NotificationError, match="still hang"):
        notifier.notify(a_notice())

    assert len(conversations()) == 4
    answered.set()
    assert all_conversations_end()
    assert mailbox.commands == []
    monkeypatch.undo()
    a_notifier(port).notify(a_notice())
    assert len(mailbox.messages) == 1


@pytest.mark.parametrize("at", [b"", b"EHLO", b"MAIL", b"DATA", b"."])
def test_a_dropped_connection_is_tried_again_at_once(post_office: PostOffice, at: bytes) -> None:
    port = post_office.misbehave(a_server_that(drop, at=at, times=1))

    a_notifier(port).notify(a_notice())

    assert post_office.connections[port] == 2


@pytest.mark.parametrize("misdeed", [hang, drip, drop, say(b"500 what?\r\n"), say(b"\xff\r\n")])
def test_an_accepted_email_stays_accepted_however_the_conversation_ends(
    post_office: PostOffice, misdeed: Misdeed
) -> None:
    port = post_office.misbehave(a_server_that(misdeed, at=b"QUIT"))

    a_notifier(port).notify(a_notice())

    assert post_office.connections[port] == 1
    assert all_conversations_end()


@pytest.mark.parametrize(
    ("at", "misdeed", "words"),
    [
        (b"", say(b"554 go away ops@example.com\r\n"), "refused the connection: 554"),
        (b"", say(b"\xff\xfe\r\n"), "refused the connection: -1"),
        (b"", say(b"x" * 9000), "refused a command: 500"),
        (b"EHLO", drop, "closed the connection"),
        (b"EHLO", flood, "closed the connection"),
    ],
)
def test_junk_becomes_one_clear_error(post_office: PostOffice, at: bytes, misdeed: Misdeed, words: str) -> None:
    port = post_office.misbehave(a_server_that(misdeed, at=at))

    with pytest.raises(NotificationError, match=words) as failure:
        a_notifier(port).notify(a_notice())

    assert not failure.value.permanent


def test_a_server_that_goes_back_on_starttls_gets_nothing(post_office: PostOffice) -> None:
    async def change_its_mind(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, closing: asyncio.Event
    ) -> None:
        writer.write(b"220 mail.test\r\n")
        await reader.readline()
        writer.write(b"250-mail.test\r\n250 STARTTLS\r\n")
        await reader.readline()
        writer.write(b"502 5.5.1 not today\r\n")
        assert await reader.readline() == b""

    port = post_office.misbehave(change_its_mind)

    with pytest.raises(NotificationError, match=r"refused a command: 502 5\.5\.1"):
        a_notifier(port, security="starttls").notify(a_notice())


def test_a_challenge_that_cannot_be_decoded_is_a_failure_like_others(
    post_office: PostOffice, server_tls: ssl.SSLContext, trusting: ssl.SSLContext
) -> None:
    async def challenge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
        writer.write(b"220 mail.test\r\n")
        await reader.readline()
        writer.write(b"250-mail.test\r\n250 AUTH CRAM-MD5\r\n")
        await reader.readline()
        writer.write(b"334 x\r\n")
        await closing.wait()

    port = post_office.misbehave(challenge, tls=server_tls)
    notifier = a_notifier(port, security="tls", ssl_context=trusting, username="callbackq", password=PASSWORD_CANARY)

    with pytest.raises(NotificationError, match="no conversation with the mail server: Error"):
        notifier.notify(a_notice())


def test_a_server_that_is_not_there_is_a_failure_in_words() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and doesn't listen

        with pytest.raises(NotificationError, match="no conversation with the mail server: Connection refused"):
            a_notifier(nobody.getsockname()[1]).notify(a_notice())


@pytest.mark.parametrize(("local_hostname", "said"), [(None, b"[127.0.0.1]"), ("app.example.org", b"app.example.org")])
def test_we_introduce_ourselves_by_address_unless_told_otherwise(
    post_office: PostOffice, local_hostname: str | None, said: bytes
) -> None:
    said_to_server: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, closing: asyncio.Event) -> None:
        await converse(reader, writer, closing, log=said_to_server)

    a_notifier(post_office.misbehave(listen), local_hostname=local_hostname).notify(a_notice())

    assert said_to_server[0].split()[1] == said


# What is shown to others.


def test_no_secret_gets_into_emails_logs_errors_or_reprs(
    post_office: PostOffice,
    mailbox: Mailbox,
    server_tls: ssl.SSLContext,
    trusting: ssl.SSLContext,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, logger="callbackq")
    mailbox.script = {"RCPT": ["550 ops@example.com is unknown"], "DATA": ["554 ops@example.com"]}
    port = post_office.open(mailbox, tls=server_tls, authenticator=mailbox.authenticate, auth_require_tls=False)
    options: dict[str, Any] = {"security": "tls", "ssl_context": trusting, "username": "callbackq"}
    notifier = a_notifier(port, password=PASSWORD_CANARY, **options)
    shown: list[str] = [repr(notifier)]

    for one in (
        notifier,
        notifier,
        a_notifier(port, password="x", **options),
        a_notifier(1, password=PASSWORD_CANARY, **options),
    ):
        with pytest.raises(NotificationError) as failure:
            one.notify(a_notice())
        shown += traceback.format_exception(failure.value)
        assert failure.value.__cause__ is failure.value.__context__ is None
    shown.append(repr(a_notice()))
    assert ADDRESS not in "".join(shown)

    notifier.notify(a_notice())
    notifier.notify(a_notice(a_failed_callback(), a_failed_callback(), count=30, unlisted=28))
    shown += [*(message.as_string() for message in mailbox.messages), caplog.text]
    assert not [canary for canary in CANARIES if canary in "".join(shown)]


def test_its_repr_says_where_it_sends_to() -> None:
    assert repr(SMTPNotifier("mail.example.org", sender=SENDER)) == "<SMTPNotifier mail.example.org:587 starttls>"


@pytest.mark.parametrize(("security", "port"), [("starttls", 587), ("tls", 465), ("none", 25)])
def test_the_port_is_the_standard_one_unless_given(security: Any, port: int) -> None:
    assert f":{port} " in repr(SMTPNotifier("mail.example.org", sender=SENDER, security=security))


def test_the_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(NotificationError("the recipient: 550", permanent=True)))

    assert (str(error), error.reason, error.permanent) == ("the recipient: 550", "the recipient: 550", True)


# The settings.


@pytest.mark.parametrize("interval", [timedelta(0), timedelta(hours=1), timedelta(days=7)])
def test_its_interval_is_what_it_was_told(interval: timedelta) -> None:
    assert SMTPNotifier("h", sender=SENDER, interval=interval).interval == interval


def test_its_interval_is_an_hour_by_default() -> None:
    assert SMTPNotifier("h", sender=SENDER).interval == timedelta(hours=1)


def test_its_deadline_is_the_timeout() -> None:
    assert SMTPNotifier("h", sender=SENDER, timeout=timedelta(seconds=7)).deadline == timedelta(seconds=7)


@pytest.mark.parametrize("host", ["localhost", "mail-1.example.org", "192.0.2.1", "2001:db8::1", "a_b"])
def test_names_and_addresses_are_hosts(host: str) -> None:
    SMTPNotifier(host, sender=SENDER)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        *[
            ("host", {"host": host})
            for host in ("", " ", "a b", "a..b", "a" * 64, "é.test", "h\r\n", "h/", ".a" * 127, 5)
        ],
        *[("port", {"port": port}) for port in (0, -1, 65536, "25", True, 25.0)],
        *[
            ("sender", {"sender": sender})
            for sender in ("", "nobody", "A <a@b.test>", "a@b.test\r\nBcc: c@d.test", None)
        ],
        *[("security", {"security": security}) for security in ("ssl", "", None, ["tls"])],
        *[("timeout", {"timeout": t}) for t in (timedelta(0), timedelta(-1), timedelta(hours=1), 30, None)],
        *[("interval", {"interval": interval}) for interval in (timedelta(-1), timedelta.max, 3600, None)],
        *[("local_hostname", {"local_hostname": name}) for name in ("", "a b", "a\r\nRSET", 7)],
        ("password", {"username": "u"}),
        ("password", {"password": "p"}),
        *[("username", {"username": name, "password": "p"}) for name in ("", "é", "a\0b", "u" * 1025, b"u")],
        *[("password", {"username": "u", "password": p}) for p in ("", "pässword", "a\r\nb", b"p")],
        ("security", {"username": "u", "password": "p", "security": "none"}),
        ("ssl_context", {"ssl_context": True}),
        ("ssl_context", {"ssl_context": ssl.create_default_context(), "security": "none"}),
        *[("allowed_domains", {"allowed_domains": domains}) for domains in ("example.com", b"a", 5)],
        *[("allowed_domains[1]", {"allowed_domains": ["a.test", d]}) for d in ("", ".", "a b", "x@y", "..a", 5)],
    ],
)
def test_a_faulty_setting_is_refused_by_name(field: str, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"host": "mail.example.org", "sender": SENDER, **options}

    with pytest.raises(InvalidRequestError) as refusal:
        SMTPNotifier(settings.pop("host"), **settings)

    assert [path for path, _ in refusal.value.errors] == [field]


def test_all_faulty_settings_are_named_at_once() -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        SMTPNotifier("", port=0, sender="", timeout=timedelta(0))

    assert [path for path, _ in refusal.value.errors] == ["host", "port", "timeout", "sender"]
