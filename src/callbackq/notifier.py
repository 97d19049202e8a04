"""
Telling somebody by e-mail that callbacks have failed for good.

A notifier sees one e-mail accepted, or raises. What it says is written in `callbackq.core.failure_email`; who is owed
one, and when it is tried again, is the outbox's business.
"""

from __future__ import annotations

import re
import smtplib
import socket
import ssl
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing, suppress
from datetime import timedelta
from io import BufferedReader
from typing import Final, Literal, Protocol

from tenacity import (
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential,
)

from callbackq.clock import Clock, SystemClock
from callbackq.core.failure_email import FailureNotice, compose
from callbackq.core.validation import Fault, check_duration, check_email_address
from callbackq.errors import InvalidRequestError, NotificationError

__all__ = ["STANDARD_INTERVAL", "FailureNotice", "Notifier", "SMTPNotifier"]

STANDARD_INTERVAL: Final = timedelta(hours=1)
"""How long after an e-mail its address gets no other about the same queue."""

_STANDARD_PORTS: Final = {"starttls": 587, "tls": 465, "none": 25}
_LONGEST_TIMEOUT: Final = timedelta(minutes=10)
_HOST = re.compile(
    r"(?=.{1,253}\Z)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*|(?=.{2,45}\Z)[0-9A-Fa-f]*:[0-9A-Fa-f:.]+"
)
_LOCAL_HOSTNAME = re.compile(r"[A-Za-z0-9\[\]:.-]{1,253}")
# smtplib can put nothing but ASCII into AUTH, and its error for other text quotes the password.
_CREDENTIAL = re.compile(r"[\x20-\x7e]{1,1024}")

_SENDS_PER_CALL: Final = 3
_MAX_CONVERSATIONS: Final = 4
_MAX_REPLIES_BYTES: Final = 64 * 1024
# RFC 3463, section 2: class, subject, detail.
_ENHANCED_CODE = re.compile(rb"[245]\.[0-9]{1,3}\.[0-9]{1,3}(?![0-9.])")


class Notifier(Protocol):
    """
    Tells somebody that callbacks have failed for good.

    May also have two attributes, timedeltas:

    * ``deadline``, which `notify` never outlasts: an e-mail is then leased for longer than that. Without it, a call
      that takes more than two minutes may be made twice.
    * ``interval``: how long an address is left alone about a queue after it was told something about that, one hour
      without it. What fails meanwhile is told together. Nothing is held back with an interval of 0.
    """

    def notify(self, notice: FailureNotice) -> None:
        """
        See one e-mail (or whatever it is) accepted, blocking.

        * Returning means accepted: nobody will ask again.
        * Raising anything means not accepted: the call is repeated later, for about a day.
        * A `NotificationError` with ``permanent=True`` means that repeating it is pointless.
        * The same may be told twice, with the same ``notice.key``: when the process dies after the e-mail was accepted
          and before that was recorded.

        Called from the outbox's thread, one call at a time; other machines may call at the same time for other
        addresses and queues.

        Args:
            notice: whom to tell, and what.
        """
        ...


class SMTPNotifier:
    """
    Send the e-mails through a mail server.

    The connection is encrypted and the server's certificate verified unless told otherwise; a server that offers no
    STARTTLS gets no e-mail. A short fault (a 4xx reply, a dropped connection) is tried again at once, within the
    deadline; every other one is raised as `NotificationError`, whose text quotes neither addresses nor the server.

    An address that the server refuses with a 5xx reply is refused for good, except with a 5.7 code (RFC 3463: policy),
    which speaks about us: a relay or login that the operator will repair. So do all refusals of sender, login or text.

    Args:
        host: the mail server: a name or an address.
        port: its port; ``None`` for the standard one: 587 with ``"starttls"``, 465 with ``"tls"``, 25 with ``"none"``.
        sender: who the e-mails come from, and where bounces go.
        username: for a server that wants a login; needs an encrypted connection.
        password: the same.
        security: ``"starttls"`` (encryption is negotiated and required), ``"tls"`` (from the first byte), or
            ``"none"``, which is for a server on this machine.
        timeout: the longest time one call of `notify` takes, name look-up, TLS and all further tries included.
        pause: before the second try in one call; doubled before the third and last.
        interval: how long after an e-mail its address gets no other about the same queue: what fails meanwhile comes in
            one e-mail. It holds for all dispatchers on one store. Not negative; 0: an e-mail as soon as possible.
        ssl_context: how to verify the server; ``None`` for the system's certificate authorities.
        allowed_domains: the domains that may be written to: ``"example.com"``, or ``".example.com"`` for all
            below it; ``None`` for any. The addresses come from whoever stores callbacks.
        local_hostname: how to introduce ourselves; ``None`` for our address literal (RFC 5321, section 4.1.3),
            which needs no look-up.
        clock: what dates the e-mails.

    Raises:
        InvalidRequestError: with every faulty setting.
    """

    def __init__(
        self,
        host: str,
        *,
        port: int | None = None,
        sender: str,
        username: str | None = None,
        password: str | None = None,
        security: Literal["starttls", "tls", "none"] = "starttls",
        timeout: timedelta = timedelta(seconds=30),
        pause: timedelta = timedelta(seconds=1),
        interval: timedelta = STANDARD_INTERVAL,
        ssl_context: ssl.SSLContext | None = None,
        allowed_domains: Collection[str] | None = None,
        local_hostname: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        faults = [
            *_server_faults(host, port, security, local_hostname),
            *_encryption_faults(security, username, password, ssl_context),
            *_time_faults(timeout, pause),
            *(("interval", reason) for _, reason in check_duration(interval)),
            *_mail_faults(sender, allowed_domains),
        ]
        if faults:
            raise InvalidRequestError(faults)
        self._host = host
        self._port = port or _STANDARD_PORTS[security]
        self._sender = sender
        self._username = username
        self._password = password
        self._security = security
        self._timeout = timeout
        self._pause = pause
        self._interval = interval
        self._ssl_context = ssl_context
        self._allowed_domains = None if allowed_domains is None else tuple(d.lower() for d in allowed_domains)
        self._local_hostname = local_hostname
        self._clock = clock or SystemClock()
        self._conversations: list[threading.Thread] = []

    def __repr__(self) -> str:
        return f"<SMTPNotifier {self._host}:{self._port} {self._security}>"

    @property
    def deadline(self) -> timedelta:
        """The longest time one call of `notify` takes."""
        return self._timeout

    @property
    def interval(self) -> timedelta:
        """How long after an e-mail its address gets no other about the same queue."""
        return self._interval

    def notify(self, notice: FailureNotice) -> None:
        """
        Send one e-mail.

        Returns when the mail server has accepted it. A second copy of the same e-mail has the same Message-ID.

        Raises:
            NotificationError: it was not accepted.
        """
        address = notice.email_address
        self._check_recipient(address)
        message = compose(notice, sender=self._sender, date=self._clock.now(), interval=self._interval)
        line = _Line()
        accepted: Future[None] = Future()

        def converse() -> None:
            try:
                self._send(line, address, message)
            except BaseException as error:  # whatever ends this thread, notify() is waiting for the news
                accepted.set_exception(error)
            else:
                accepted.set_result(None)

        # A name look-up can't be interrupted, and smtplib's own timeout starts anew with every byte. In a thread of its
        # own the conversation may hang as long as it likes: the caller leaves at the deadline and cuts the line.
        self._start_conversation(converse)
        try:
            accepted.result(timeout=self._timeout.total_seconds())
        except TimeoutError:
            raise NotificationError("the mail server did not accept it in time") from None
        finally:
            line.cut()

    def _check_recipient(self, address: str) -> None:
        # The model has checked it; what goes into an SMTP command and a header is checked where it goes in.
        if not address or list(check_email_address(address)):
            raise NotificationError("notification_email_address is no plain ASCII address", permanent=True)
        domain = address.rpartition("@")[2].lower()
        if self._allowed_domains is not None and not any(
            domain == allowed or (allowed.startswith(".") and domain.endswith(allowed))
            for allowed in self._allowed_domains
        ):
            raise NotificationError("the address is in none of the notifier's allowed_domains", permanent=True)

    def _start_conversation(self, converse: Callable[[], None]) -> None:
        # Without a bound, a resolver that hangs for ever would leave one more thread behind with every e-mail. Threads
        # of a process we were forked from count as ended.
        running = [thread for thread in self._conversations if thread.is_alive()]
        if len(running) >= _MAX_CONVERSATIONS:
            raise NotificationError("earlier conversations with the mail server still hang")
        thread = threading.Thread(target=converse, name="callbackq-smtp", daemon=True)
        thread.start()
        self._conversations = [*running, thread]

    def _send(self, line: _Line, address: str, message: bytes) -> None:
        retrying = Retrying(
            retry=retry_if_exception(_is_temporary),
            wait=wait_exponential(multiplier=self._pause.total_seconds()),
            stop=stop_after_attempt(_SENDS_PER_CALL) | stop_when_event_set(line.is_cut),
            sleep=sleep_using_event(line.is_cut),
            reraise=True,
        )
        try:
            retrying(self._converse, line, address, message)
        except (OSError, ValueError) as error:
            # smtplib's, ssl's and those of a reply that can't be decoded.
            explained = _explained(error)
        else:
            return
        # Raised out here, it has no context: servers like to repeat the address, and that would hold it.
        raise explained

    def _converse(self, line: _Line, address: str, message: bytes) -> None:
        with ExitStack() as opened:
            # For one address and one read. Longer than the deadline, which the caller keeps: it only bounds how long
            # this thread is left behind.
            sock = opened.enter_context(line.open(self._host, self._port, 2 * self._timeout))
            if self._security == "tls":
                sock = opened.enter_context(self._encrypted(sock))
            smtp = opened.enter_context(closing(self._smtp_over(sock)))
            code, reply = smtp.getreply()
            if code != 220:
                raise smtplib.SMTPConnectError(code, reply)
            if self._security == "starttls":
                smtp.ehlo_or_helo_if_needed()
                if not smtp.has_extn("starttls"):
                    raise smtplib.SMTPNotSupportedError
                code, reply = smtp.docmd("STARTTLS")
                if code != 220:
                    raise smtplib.SMTPResponseException(code, reply)
                sock = opened.enter_context(self._encrypted(sock))
                # A new client, because nothing said or sent ahead in the clear may count (RFC 3207, section 4.2).
                smtp = opened.enter_context(closing(self._smtp_over(sock)))
            if self._username is not None and self._password is not None:
                smtp.login(self._username, self._password)
            smtp.sendmail(self._sender, [address], message)
            # It is accepted: whether the server says goodbye must not make it sent again.
            with suppress(OSError):
                smtp.putcmd("QUIT")

    def _encrypted(self, sock: socket.socket) -> ssl.SSLSocket:
        # Made anew each time, so that a process which runs for months knows of changed authorities.
        context = self._ssl_context or ssl.create_default_context()
        return context.wrap_socket(sock, server_hostname=self._host)

    def _smtp_over(self, sock: socket.socket) -> smtplib.SMTP:
        smtp = smtplib.SMTP(local_hostname=self._local_hostname or _address_literal(sock))
        smtp.sock = sock
        smtp.file = _Replies(sock.makefile("rb"))
        return smtp


class _Line:
    """
    The connection of one conversation, which another thread can cut.

    `cut` works on a duplicate of the descriptor: shutting that down ends the connection behind it, under whatever
    object holds it (TLS moves the descriptor into a new one), and no other file can have got its number.
    """

    def __init__(self) -> None:
        self.is_cut = threading.Event()
        self._duplicate: socket.socket | None = None
        # Without it, a connection made at the very moment of the cut would stay.
        self._mutex = threading.Lock()

    def open(self, host: str, port: int, timeout: timedelta) -> socket.socket:
        """Connect, unless the line was cut."""
        sock = socket.create_connection((host, port), timeout.total_seconds())
        with self._mutex:
            if self.is_cut.is_set():
                sock.close()
                raise smtplib.SMTPServerDisconnected
            self._drop()
            self._duplicate = sock.dup()
        return sock

    def cut(self) -> None:
        """End the conversation, whatever it is waiting for. It can't open another connection. Idempotent."""
        with self._mutex:
            self.is_cut.set()
            self._drop()

    def _drop(self) -> None:
        if self._duplicate is not None:
            with suppress(OSError):  # the other side was faster
                self._duplicate.shutdown(socket.SHUT_RDWR)
            self._duplicate.close()
            self._duplicate = None


class _Replies:
    """What the server says, in bounds: smtplib would collect the lines of an endless reply."""

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._left = _MAX_REPLIES_BYTES

    def readline(self, size: int) -> bytes:
        line = self._file.readline(size)
        self._left -= len(line)
        if self._left < 0:
            raise OSError("the mail server talks too much")
        return line

    def close(self) -> None:
        self._file.close()


def _address_literal(sock: socket.socket) -> str:
    address = sock.getsockname()[0]
    return f"[IPv6:{address}]" if sock.family is socket.AF_INET6 else f"[{address}]"


# What went wrong.

_REFUSED: Final[dict[type[BaseException], str]] = {
    smtplib.SMTPConnectError: "the connection",
    smtplib.SMTPHeloError: "the greeting",
    smtplib.SMTPAuthenticationError: "the login",
    smtplib.SMTPSenderRefused: "the sender",
    smtplib.SMTPRecipientsRefused: "the recipient",
    smtplib.SMTPDataError: "the e-mail",
}


def _is_temporary(error: BaseException) -> bool:
    if reply := _reply_in(error):
        return 400 <= reply[0] <= 499
    return isinstance(error, (ConnectionError, smtplib.SMTPServerDisconnected))


def _explained(error: OSError | ValueError) -> NotificationError:
    """Say what happened without a word from the server beyond its codes."""
    if reply := _reply_in(error):
        code, enhanced_code = reply
        is_recipient = isinstance(error, smtplib.SMTPRecipientsRefused)
        return NotificationError(
            f"the mail server refused {_REFUSED.get(type(error), 'a command')}: {code} {enhanced_code}".rstrip(),
            permanent=is_recipient and 500 <= code <= 599 and not enhanced_code.startswith("5.7."),
        )
    if isinstance(error, smtplib.SMTPServerDisconnected):
        return NotificationError("the mail server closed the connection")
    if isinstance(error, smtplib.SMTPException):
        return NotificationError("the mail server does not offer the STARTTLS or login that is asked for")
    detail = error.strerror if isinstance(error, OSError) else None
    return NotificationError(f"no conversation with the mail server: {detail or type(error).__name__}")


def _reply_in(error: BaseException) -> tuple[int, str] | None:
    if isinstance(error, smtplib.SMTPRecipientsRefused):
        code, text = next(iter(error.recipients.values()))  # there was one
    elif isinstance(error, smtplib.SMTPResponseException):
        code, text = error.smtp_code, error.smtp_error  # type: ignore[assignment]  # str from smtplib itself
    else:
        return None
    enhanced_code = _ENHANCED_CODE.match(text) if isinstance(text, bytes) else None
    return code, enhanced_code[0].decode("ascii") if enhanced_code else ""


# The settings.


def _server_faults(host: object, port: object, security: object, local_hostname: object) -> Iterator[Fault]:
    if not isinstance(host, str) or not _HOST.fullmatch(host):
        yield "host", "must be a host name in ASCII or an IP address"
    if port is not None and (not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535):
        yield "port", "must be from 1 to 65535, or None for the standard one"
    if not isinstance(security, str) or security not in _STANDARD_PORTS:
        yield "security", "must be 'starttls', 'tls' or 'none'"
    if local_hostname is not None and not (
        isinstance(local_hostname, str) and _LOCAL_HOSTNAME.fullmatch(local_hostname)
    ):
        yield "local_hostname", "must be a host name in ASCII or an address literal in brackets"


def _encryption_faults(security: object, username: object, password: object, context: object) -> Iterator[Fault]:
    if (username is None) != (password is None):
        yield "password", "must be given together with username, or neither"
    for name, value in (("username", username), ("password", password)):
        if value is not None and not (isinstance(value, str) and _CREDENTIAL.fullmatch(value)):
            yield name, "must be 1 to 1024 visible ASCII characters and blanks"
    if password is not None and security == "none":
        yield "security", "must be 'starttls' or 'tls' with a password, which would be readable on its way"
    if context is not None and not isinstance(context, ssl.SSLContext):
        yield "ssl_context", "must be an ssl.SSLContext or None"
    if context is not None and security == "none":
        yield "ssl_context", "must be None when security is 'none'"


def _time_faults(timeout: object, pause: object) -> Iterator[Fault]:
    for name, value in (("timeout", timeout), ("pause", pause)):
        if not isinstance(value, timedelta) or not timedelta(0) < value <= _LONGEST_TIMEOUT:
            yield name, f"must be a timedelta, longer than nothing and at most {_LONGEST_TIMEOUT}"


def _mail_faults(sender: object, allowed_domains: object) -> Iterator[Fault]:
    if not sender or list(check_email_address(sender)):
        yield "sender", "must be one plain ASCII address (name@host)"
    if allowed_domains is None:
        return
    if not isinstance(allowed_domains, Collection) or isinstance(allowed_domains, (str, bytes)):
        yield "allowed_domains", "must be a collection of domain names, or None for any domain"
        return
    for index, domain in enumerate(allowed_domains):
        if not isinstance(domain, str) or list(check_email_address(f"name@{domain.removeprefix('.')}")):
            yield f"allowed_domains[{index}]", "must be a domain name such as 'example.com' or '.example.com'"
