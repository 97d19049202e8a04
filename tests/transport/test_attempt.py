"""One attempt's life, driven by hand over a connection that exists on paper only."""

from __future__ import annotations

import errno
import selectors
import ssl
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import chain

import pytest

from callbackq.clock import SystemClock
from callbackq.core.delivery import Answer, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure
from callbackq.targets import TargetPolicy
from callbackq.transport.attempt import Attempt, AttemptSettings, DeadlinePassed, Interrupted, Network
from callbackq.transport.connections import KeptConnections, Route
from callbackq.transport.deadlines import Deadlines
from callbackq.transport.proxy import Proxy
from callbackq.transport.resolver import ResolverPool
from support.deliveries import make_delivery, seconds_from_now

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
REFUSAL = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"
REQUEST = b"0123456789"


class PaperConnection:
    """
    A kept connection with a script.

    Args:
        sends: what each call of `send` takes.
        receives: what each call of `receive` after the first `send` brings.
        before: what is there before anything was sent.

    An exception is raised instead.
    """

    def __init__(
        self,
        sends: Iterable[int | Exception],
        receives: Iterable[bytes | Exception | None],
        *,
        before: bytes | None = None,
    ) -> None:
        self.route = Route("http", "127.0.0.1", 8000, "127.0.0.1")
        self.is_encrypted = False
        self.user: object | None = None
        self.opened_at = self.idle_since = SystemClock().monotonic()
        self.sent = b""
        self.watched: list[int] = []
        self.is_closed = False
        self._sends = iter(sends)
        self._receives = chain([before], receives)

    def send(self, data: memoryview) -> int:
        step = next(self._sends)
        if isinstance(step, Exception):
            raise step
        self.sent += data[:step]
        return min(step, len(data))

    def receive(self) -> bytes | None:
        step = next(self._receives)
        if isinstance(step, Exception):
            raise step
        return step

    def watch(self, events: int) -> None:
        self.watched.append(events)

    def is_quiet(self) -> bool:
        return True

    def close(self) -> None:
        self.is_closed = True


def begin(
    connection: PaperConnection,
    *,
    url: str = "http://127.0.0.1:8000/",
    ends_in: float = 60.0,
    deadline: float = 15.0,
    proxy: Proxy | None = None,
) -> Attempt:
    clock = SystemClock()
    kept = KeptConnections(idle_timeout=4.0, max_age=60.0)
    kept.keep(connection, clock.monotonic())  # type: ignore[arg-type]
    connection.watched.clear()
    network = Network(
        settings=AttemptSettings(
            policy=TargetPolicy(allow=["127.0.0.1"]),
            ssl_context=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
            deadline_seconds=deadline,
            connect_seconds=5.0,
            response_limit=100,
            proxy=proxy,
        ),
        clock=clock,
        selector=selectors.DefaultSelector(),
        deadlines=Deadlines(),
        kept=kept,
        resolver=ResolverPool(),
        resume=lambda attempt: None,
    )
    network.selector.close()  # nothing here may need it
    delivery = make_delivery(url, ends_in=ends_in)
    attempt = Attempt(
        delivery, lambda outcome: None, request=REQUEST, time=datetime.now(UTC), started=seconds_from_now(0)
    )
    attempt.life = attempt.live(network)
    return attempt


def outcome_of(attempt: Attempt, *, steps: int = 100, then: Exception | None = None) -> Outcome:
    """Resume the attempt so many times, or until it ends; throw *then* into it if it doesn't."""
    try:
        for _ in range(steps):
            next(attempt.life)
        assert then is not None, "the attempt doesn't end"
        attempt.life.throw(then)
    except StopIteration as end:
        outcome = end.value
        assert isinstance(outcome, Answer | NotSent)
        return outcome
    raise AssertionError("the attempt survived")


def status_and_failure(outcome: Outcome) -> tuple[int, AttemptFailure | None]:
    assert isinstance(outcome, Answer)
    return outcome.status_code, outcome.failure


def test_request_that_the_system_takes_in_pieces_is_sent_whole() -> None:
    connection = PaperConnection([3, 0, 7], [None, None, OK])

    outcome = outcome_of(begin(connection))

    assert status_and_failure(outcome) == (200, None)
    assert connection.sent == REQUEST
    both = selectors.EVENT_READ | selectors.EVENT_WRITE
    assert connection.watched == [both, both, selectors.EVENT_READ, selectors.EVENT_READ]
    assert not connection.is_closed


def test_success_before_the_request_was_written_is_no_delivery() -> None:
    connection = PaperConnection([3], [OK])

    outcome = outcome_of(begin(connection))

    assert status_and_failure(outcome) == (0, AttemptFailure.PROTOCOL)
    assert connection.is_closed


@pytest.mark.parametrize(
    ("before", "expected"),
    [(OK, (0, AttemptFailure.PROTOCOL)), (REFUSAL, (413, None)), (b"", (0, AttemptFailure.CONNECTION_LOST))],
    ids=["success", "refusal", "end of stream"],
)
def test_answer_that_is_there_before_the_request_keeps_it_from_being_sent(
    before: bytes, expected: tuple[int, AttemptFailure | None]
) -> None:
    connection = PaperConnection([], [], before=before)

    assert status_and_failure(outcome_of(begin(connection))) == expected
    assert connection.is_closed


def test_refusal_before_the_request_was_written_is_the_answer() -> None:
    connection = PaperConnection([3], [REFUSAL])

    outcome = outcome_of(begin(connection))

    assert status_and_failure(outcome) == (413, None)
    assert connection.is_closed


def test_refusal_is_still_read_when_sending_on_fails() -> None:
    connection = PaperConnection([3, BrokenPipeError()], [None, REFUSAL])

    assert status_and_failure(outcome_of(begin(connection))) == (413, None)


def test_success_is_no_delivery_when_sending_on_fails() -> None:
    connection = PaperConnection([3, BrokenPipeError()], [None, OK])

    assert status_and_failure(outcome_of(begin(connection))) == (0, AttemptFailure.PROTOCOL)


@pytest.mark.parametrize("ending", [b"", ConnectionResetError()], ids=["end of stream", "reset"])
@pytest.mark.parametrize(
    ("received", "expected"),
    [
        (None, (0, AttemptFailure.CONNECTION_LOST)),
        (OK[:20], (0, AttemptFailure.CONNECTION_LOST)),
        (OK[:-1], (200, None)),
    ],
    ids=["no answer", "half a head", "half a body"],
)
def test_connection_that_ends_is_lost_unless_the_head_was_complete(
    received: bytes | None, expected: tuple[int, AttemptFailure | None], ending: bytes | OSError
) -> None:
    connection = PaperConnection([10], [received, ending])

    assert status_and_failure(outcome_of(begin(connection))) == expected
    assert connection.is_closed


@pytest.mark.parametrize(
    ("end", "failure"),
    [(DeadlinePassed(), AttemptFailure.TIMEOUT), (Interrupted(), AttemptFailure.INTERRUPTED)],
    ids=["deadline", "interruption"],
)
@pytest.mark.parametrize("received", [None, OK[:20], OK[:-1]], ids=["no answer", "half a head", "half a body"])
def test_complete_head_outlasts_the_end_of_the_attempt(
    received: bytes | None, end: Exception, failure: AttemptFailure
) -> None:
    connection = PaperConnection([10], [received])

    outcome = outcome_of(begin(connection), steps=2, then=end)

    assert status_and_failure(outcome) == ((200, None) if received == OK[:-1] else (0, failure))
    assert connection.is_closed


@pytest.mark.parametrize(
    ("end", "ends_in", "reason"),
    [
        (Interrupted(), 60.0, NotSentReason.STOPPED),
        (DeadlinePassed(), 14.0, NotSentReason.TIME_IS_UP),
    ],
    ids=["interruption", "end of the lock"],
)
def test_attempt_that_has_sent_nothing_was_not_made(end: Exception, ends_in: float, reason: NotSentReason) -> None:
    connection = PaperConnection([0], [])

    assert outcome_of(begin(connection, ends_in=ends_in), steps=1, then=end) == NotSent(reason=reason)


def test_receiver_that_takes_nothing_until_the_deadline_is_at_fault() -> None:
    connection = PaperConnection([0], [])

    outcome = outcome_of(begin(connection), steps=1, then=DeadlinePassed())

    assert status_and_failure(outcome) == (0, AttemptFailure.TIMEOUT)
    assert isinstance(outcome, Answer)
    assert outcome.detail == "sending"


@pytest.mark.parametrize(
    ("fault", "failure"),
    [(ssl.SSLError(1, "alert"), AttemptFailure.TLS), (ssl.SSLEOFError(8, "eof"), AttemptFailure.CONNECTION_LOST)],
    ids=["alert", "unsigned end"],
)
def test_refusal_by_tls_is_told_from_a_lost_connection_also_after_the_handshake(
    fault: ssl.SSLError, failure: AttemptFailure
) -> None:
    assert status_and_failure(outcome_of(begin(PaperConnection([10], [fault])))) == (0, failure)


@pytest.mark.parametrize("errno_name", ["ENOBUFS", "ENOMEM"])
def test_machine_out_of_buffers_before_the_first_byte_is_a_local_fault(errno_name: str) -> None:
    connection = PaperConnection([OSError(getattr(errno, errno_name), "no")], [])

    assert outcome_of(begin(connection)) == NotSent(reason=NotSentReason.LOCAL_FAULT, detail=errno_name)


def test_machine_out_of_memory_before_the_first_byte_is_a_local_fault() -> None:
    connection = PaperConnection([MemoryError()], [])

    assert outcome_of(begin(connection)) == NotSent(reason=NotSentReason.LOCAL_FAULT, detail="MemoryError")


def begin_tunnel(connection: PaperConnection) -> Attempt:
    """An attempt that has reached the proxy and is about to ask it for a tunnel."""
    connection.route = Route("https", "8.8.8.8", 443, "127.0.0.1", 3128)
    return begin(connection, url="https://8.8.8.8/", proxy=Proxy("http://127.0.0.1:3128", None, "test"))


def test_tunnel_is_asked_for_whole_in_whatever_pieces_the_system_takes_it() -> None:
    connection = PaperConnection([3, 0, 999], [None, None, b"HTTP/1.1 403 No\r\n\r\n"])

    outcome = outcome_of(begin_tunnel(connection))

    assert status_and_failure(outcome) == (0, AttemptFailure.CONNECT)
    assert connection.sent == b"CONNECT 8.8.8.8:443 HTTP/1.1\r\nHost: 8.8.8.8:443\r\nUser-Agent: test\r\n\r\n"
    assert connection.is_closed


def test_refusal_of_a_tunnel_is_still_read_when_asking_on_fails() -> None:
    connection = PaperConnection([3, BrokenPipeError()], [None, b"HTTP/1.1 431 Too Large\r\n\r\n"])

    outcome = outcome_of(begin_tunnel(connection))

    assert isinstance(outcome, Answer)
    assert (outcome.failure, outcome.detail) == (AttemptFailure.CONNECT, "the proxy refused the tunnel: 431")


def test_machine_out_of_buffers_while_a_tunnel_is_asked_for_is_a_local_fault() -> None:
    connection = PaperConnection([OSError(errno.ENOBUFS, "no")], [])

    assert outcome_of(begin_tunnel(connection)) == NotSent(reason=NotSentReason.LOCAL_FAULT, detail="ENOBUFS")


@pytest.mark.parametrize(
    ("end", "reason"),
    [(Interrupted(), NotSentReason.STOPPED), (DeadlinePassed(), NotSentReason.TIME_IS_UP)],
    ids=["interruption", "end of the lock"],
)
def test_callback_of_which_only_the_proxy_has_heard_was_not_sent(end: Exception, reason: NotSentReason) -> None:
    connection = PaperConnection([999], [None])
    connection.route = Route("https", "8.8.8.8", 443, "127.0.0.1", 3128)
    proxy = Proxy("http://127.0.0.1:3128", None, "test")

    attempt = begin(connection, url="https://8.8.8.8/", proxy=proxy, ends_in=14.0)

    assert outcome_of(attempt, steps=1, then=end) == NotSent(reason=reason)


@pytest.mark.parametrize("fault", [MemoryError(), ValueError("anything")])
def test_any_other_exception_is_an_internal_failure_once_the_request_has_begun(fault: Exception) -> None:
    connection = PaperConnection([10], [fault])

    assert status_and_failure(outcome_of(begin(connection))) == (0, AttemptFailure.INTERNAL)
    assert connection.is_closed
