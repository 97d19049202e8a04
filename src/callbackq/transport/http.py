"""`HTTPTransport`: what the host sets, and the network thread of this process."""

from __future__ import annotations

import logging
import os
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from importlib.metadata import version
from math import inf
from typing import Final, get_args

from attrs import field, mutable

from callbackq.clock import Clock, SystemClock
from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure, CallbackRequest
from callbackq.core.validation import Fault, check_request_headers
from callbackq.errors import InvalidRequestError
from callbackq.faultlog import log_fault
from callbackq.settings import check_collaborator
from callbackq.signing import Signer
from callbackq.targets import TargetPolicy
from callbackq.transport.attempt import LOCAL_FAULTS, Attempt, AttemptSettings
from callbackq.transport.connections import KeptConnections
from callbackq.transport.details import detail_of
from callbackq.transport.loop import NetworkLoop
from callbackq.transport.protocol import SupportsSubmit, Transport
from callbackq.transport.proxy import Proxy, check_proxy
from callbackq.transport.request import OrderHeaders, RequestWriter
from callbackq.transport.tls import CHEAP_CIPHERS, check_ssl_context, lets_receivers_choose_the_cost, verifying_context

__all__ = ["HTTPTransport"]

_log = logging.getLogger("callbackq.transport")

_PUBLIC_INTERNET: Final = TargetPolicy()
# How much longer than its deadline a blocking send waits before it no longer believes in its network thread.
_GRACE_SECONDS: Final = 5.0
# After it has said that secrets are out of reach.
_SILENCE_SECONDS: Final = 60.0


class HTTPTransport(Transport, SupportsSubmit):
    """
    Sends requests over HTTP/1.1, many at a time, from one thread.

    An attempt is one request: no redirects, no retries, no proxies from the environment, nothing decoded. Its
    deadline covers all of it, whatever the receiver does: look-up, connection, TLS, request, head and body. Once the
    complete head of an answer has come, its status counts, also when the body breaks off.

    A connection is kept for the next request to the same host only after an answer that ended beyond doubt. A
    request that fails on a kept connection has failed; it is never sent again within the attempt, since the receiver
    may have it.

    The thread is started by the first attempt and ends with `close`. One object may be used from any number of
    threads, and after a fork in both processes: the child begins with no connections. What is under way in the
    parent stays the parent's. With its first attempt in a process it says in the log what its policy opens and what
    its *ssl_context* leaves to receivers (WARNING), and through which proxy it sends (INFO).

    Args:
        target_policy: what may be reached. Asked at every attempt, also about a host that was reached before.
        deadline: the longest time one attempt takes.
        connect_timeout: the longest time to wait for a TCP connection, for all addresses of a host together. No more
            than eight are tried. With a proxy: for the connection to it.
        signer: signs requests in the manner of Standard Webhooks: a `Signer` all of them, or a function from the
            `CallbackRequest` to the `Signer` of its receiver, or to ``None``, which sends no signature. The function is
            called at every attempt, in the dispatcher's thread, so it must answer from memory. When it, or a function
            that provides a Signer's secrets, raises a ``ConnectionError`` or a ``TimeoutError``, nothing is sent and
            nothing counts as an attempt. With one `Signer` for all the dispatcher rests, and tries again; with a
            function, that callback alone waits for 15 to 30 seconds, and a WARNING says so, once a minute at most.
            Whatever else it raises is an attempt that failed with ``internal``. What the exception says is kept
            nowhere.
        response_limit: how many bytes of an answer's body to read and keep.
        order_headers: ``"plain"`` sends ``callbackq-queue``, ``-sequence``, ``-attempt`` and ``-token``, by which a
            receiver drops duplicates and stale copies. The queue id is percent-encoded where it isn't visible
            ASCII. ``"hashed"`` sends the HMAC-SHA256 under *queue_key* in its place, ``"none"`` leaves all four out.
        queue_key: the key for ``"hashed"``, at least 16 bytes.
        user_agent: sent with requests that bring no User-Agent; ``callbackq/`` and the version by default.
        ssl_context: for receivers' certificates: a CA bundle or a client certificate of your own. It must verify
            certificates and host names, and not go below TLS 1.2. The system's certificates by default. Python's
            contexts offer key exchanges whose cost the server chooses (DHE): a hostile receiver can have the network
            thread compute for a second, in which nothing else is sent. Take them out with
            ``context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")``; until then there is a WARNING in the log.
        idle_timeout: how long to keep an unused connection. Zero keeps none, and asks receivers to close.
        max_connection_age: how long after its beginning a connection may still be used.
        proxy: send everything through this forward proxy, ``http://host:port``: plain http by requests in absolute
            form, https through tunnels (CONNECT), encrypted end to end. Then it is the proxy that looks up the
            names of targets, so **it must judge their addresses**: *target_policy* still judges URL, port, name and
            literal address, but what a name leads to it never sees, and its resolver is not asked. Local names must
            be allowed by name. The proxy's own name is looked up by the system, and its address judged by nobody.
            A proxy that can't be reached makes no attempt, so it uses up no retries; the dispatcher rests. A tunnel
            that it refuses is a failed attempt. ``None`` sends directly; the environment is never asked.
        proxy_credentials: user name and password for the proxy, sent to it in the clear (Basic), to nobody else.
        clock: for deadlines and timestamps. ``Delivery.ends_at`` is a reading of the same clock.

    Raises:
        InvalidRequestError: with every setting that can't work.
    """

    def __init__(
        self,
        *,
        target_policy: TargetPolicy = _PUBLIC_INTERNET,
        deadline: timedelta = timedelta(seconds=15),
        connect_timeout: timedelta = timedelta(seconds=5),
        signer: Signer | Callable[[CallbackRequest], Signer | None] | None = None,
        response_limit: int = 16384,
        order_headers: OrderHeaders = "plain",
        queue_key: bytes = b"",
        user_agent: str | None = None,
        ssl_context: ssl.SSLContext | None = None,
        idle_timeout: timedelta = timedelta(seconds=4),
        max_connection_age: timedelta = timedelta(seconds=60),
        proxy: str | None = None,
        proxy_credentials: tuple[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        faults = [
            *_check_target_policy(target_policy),
            *_check_times(timedelta.resolution, deadline=deadline, connect_timeout=connect_timeout),
            *_check_times(timedelta(0), idle_timeout=idle_timeout, max_connection_age=max_connection_age),
            *_check_response_limit(response_limit),
            *_check_order_headers(order_headers, queue_key),
            *_check_user_agent(user_agent),
            *check_ssl_context(ssl_context),
            *_check_signer(signer),
            *check_proxy(proxy, proxy_credentials),
            *(() if clock is None else check_collaborator("clock", clock, "now", "monotonic")),
        ]
        if faults:
            raise InvalidRequestError(faults)
        self.deadline = deadline
        self._clock = SystemClock() if clock is None else clock
        user_agent = f"callbackq/{version('callbackq')}" if user_agent is None else user_agent
        through = None if proxy is None else Proxy(proxy, proxy_credentials, user_agent)
        self._writer = RequestWriter(
            user_agent=user_agent,
            order_headers=order_headers,
            queue_key=queue_key,
            signer=signer,
            close=not idle_timeout,
            proxy=through,
        )
        self._settings = AttemptSettings(
            policy=target_policy,
            # Now, not at the first need: with all descriptors in use it would quietly come out without certificates.
            ssl_context=verifying_context() if ssl_context is None else ssl_context,
            deadline_seconds=deadline.total_seconds(),
            connect_seconds=connect_timeout.total_seconds(),
            response_limit=response_limit,
            proxy=through,
        )
        self._idle_seconds = idle_timeout.total_seconds()
        self._max_age_seconds = max_connection_age.total_seconds()
        # By process id: threads don't survive a fork, and not even a mutex may be taken over, since another thread may
        # have held it at that moment. What was inherited stays here unused, so that it is never closed or collected.
        self._presences: dict[int, _Presence] = {}

    def send(self, delivery: Delivery) -> Outcome:
        """
        Make one attempt, blocking. See `Transport.send`.

        Not to be called from a callback given to `submit`.
        """
        outcomes: list[Outcome] = []
        is_done = threading.Event()

        def done(outcome: Outcome) -> None:
            outcomes.append(outcome)
            is_done.set()

        started = self._clock.monotonic()
        self.submit(delivery, done)
        if is_done.wait(self._settings.deadline_seconds + _GRACE_SECONDS):
            return outcomes[0]
        # The network thread hangs in somebody's callback. It may have sent the request, so this is an attempt.
        return self._internal("the network thread hangs", self._clock.now(), started)

    def submit(self, delivery: Delivery, done: Callable[[Outcome], None]) -> None:
        """
        Begin an attempt and return at once. See `SupportsSubmit.submit`.

        The request is written and signed here, in the caller's thread. *done* is called from the network thread,
        which waits for it; or from here, when the request can't be signed or no network thread can be started.
        """
        time = self._clock.now()
        started = self._clock.monotonic()
        try:
            request = self._writer.write(delivery, delivery.request.target, time)
        except KeyboardInterrupt:
            raise  # somebody wants the whole program to end
        except BaseException as error:
            # Signers and secrets come from the host, whose code may raise anything. A wish to end a thread or a task
            # must not leave the callback locked with nobody at work on it.
            done(self._unsigned(error, delivery, time, started))
            return
        attempt = Attempt(delivery, done, request=request, time=time, started=started)
        presence = self._presence()
        if not presence.is_announced:
            self._announce(presence)
        with presence.mutex:
            try:
                if presence.loop is None or not presence.loop.submit(attempt):
                    presence.loop = self._start_loop()
                    presence.loop.submit(attempt)
                return
            except (OSError, RuntimeError) as error:  # no descriptor or no thread left
                presence.loop = None
                fault = type(error).__name__
        done(NotSent(reason=NotSentReason.LOCAL_FAULT, detail=f"no network thread: {fault}"))

    def interrupt(self, deliveries: Iterable[Delivery]) -> None:
        """
        End these attempts at once. See `SupportsSubmit.interrupt`.

        An answer whose head is complete stands: its status is known, and to forget it would make a duplicate.
        """
        loop = self._presence().loop
        if loop is not None:
            loop.interrupt(deliveries)

    def close(self) -> None:
        """
        End all attempts as `interrupt` does, all connections and the thread. The next attempt starts anew.

        All callbacks have been called on return.
        """
        presence = self._presence()
        with presence.mutex:
            loop, presence.loop = presence.loop, None
        if loop is not None:
            loop.stop()

    def __repr__(self) -> str:
        loop = self._presence().loop
        return f"<HTTPTransport {0 if loop is None else loop.attempts_under_way} attempts under way>"

    def _presence(self) -> _Presence:
        process = os.getpid()
        presence = self._presences.get(process)
        if presence is None:
            for inherited in list(self._presences.values()):
                inherited.abandon()
            # One step, so that two threads get the same one.
            presence = self._presences.setdefault(process, _Presence())
        return presence

    def _unsigned(self, error: BaseException, delivery: Delivery, time: datetime, started: float) -> Outcome:
        """
        Say what it means that a request could not be signed.

        Secrets out of reach are a fault of this side that passes: it must use up nobody's retries. Where each receiver
        has its own, they may come from places of their own, so one that is out of reach holds up no others. No secret
        for this callback, or a malformed one, stays so until somebody acts: its retries end, and a final failure is
        seen.
        """
        if isinstance(error, MemoryError):
            return NotSent(reason=NotSentReason.LOCAL_FAULT, detail=detail_of(error))
        is_out_of_reach = isinstance(error, ConnectionError | TimeoutError)
        if is_out_of_reach or (isinstance(error, OSError) and error.errno in LOCAL_FAULTS):
            detail = f"no secrets: {detail_of(error)}"
            if isinstance(self._writer.signer, Signer):
                return NotSent(reason=NotSentReason.LOCAL_FAULT, detail=detail)
            self._tell_of_missing_secrets(delivery, detail)
            return NotSent(reason=NotSentReason.NO_SECRETS, detail=detail)
        log_fault(_log, "a request could not be signed", error)
        return self._internal(detail_of(error), time, started)

    def _tell_of_missing_secrets(self, delivery: Delivery, detail: str) -> None:
        presence, now = self._presence(), self._clock.monotonic()
        # All of one customer's callbacks meet this again and again, which must not flood the log.
        if now >= presence.silent_until:
            presence.silent_until = now + _SILENCE_SECONDS
            _log.warning("callback %a can't be signed for the moment, and waits: %s", delivery.callback_id, detail)

    def _internal(self, detail: str, time: datetime, started: float) -> Answer:
        duration = timedelta(seconds=max(0.0, self._clock.monotonic() - started))
        failure = AttemptFailure.INTERNAL
        return Answer(status_code=0, time=time, duration=duration, failure=failure, detail=detail)

    def _announce(self, presence: _Presence) -> None:
        with presence.mutex:
            if presence.is_announced:
                return
            presence.is_announced = True
        # Not under the mutex: a handler of the host's may do anything.
        if openings := self._settings.policy.openings():
            _log.warning("callbacks may reach what is closed by default: %s", ", ".join(openings))
        if lets_receivers_choose_the_cost(self._settings.ssl_context):
            _log.warning(
                "the ssl_context lets receivers choose what a handshake costs, up to seconds of the network thread: "
                "call set_ciphers(%a) on it",
                CHEAP_CIPHERS,
            )
        if (proxy := self._settings.proxy) is not None:
            _log.info("callbacks go out through the proxy %s, whose task it is to judge their addresses", proxy.name)

    def _start_loop(self) -> NetworkLoop:
        kept = KeptConnections(idle_timeout=self._idle_seconds, max_age=self._max_age_seconds)
        loop = NetworkLoop(self._settings, kept, self._clock)
        loop.start()
        return loop


@mutable(eq=False)
class _Presence:
    """A transport in one process."""

    loop: NetworkLoop | None = None
    is_announced: bool = False
    silent_until: float = -inf
    # Held while a loop is started and handed over: without it two threads would start one each, or give an attempt to
    # one that is just being closed.
    mutex: threading.Lock = field(factory=threading.Lock)

    def abandon(self) -> None:
        if self.loop is not None:
            self.loop.abandon()


def _check_target_policy(policy: object) -> Iterator[Fault]:
    if not isinstance(policy, TargetPolicy):
        yield "target_policy", "must be a TargetPolicy, for example TargetPolicy(allow=[...])"


def _check_signer(signer: object) -> Iterator[Fault]:
    if not isinstance(signer, Signer | None) and (isinstance(signer, type) or not callable(signer)):
        yield "signer", "must be a Signer, made of a secret: Signer(secret), or a function that returns one"


def _check_times(least: timedelta, **times: timedelta) -> Iterator[Fault]:
    for name, time in times.items():
        if not isinstance(time, timedelta) or time < least:
            yield name, f"must be a timedelta {'above zero' if least else 'that is not negative'}"


def _check_user_agent(user_agent: str | None) -> Iterator[Fault]:
    if user_agent is not None:
        for _, reason in check_request_headers({"User-Agent": user_agent}):
            yield "user_agent", reason


def _check_response_limit(limit: int) -> Iterator[Fault]:
    if type(limit) is not int or limit < 0:
        yield "response_limit", "must be a whole number of bytes that is not negative"


def _check_order_headers(order_headers: str, queue_key: bytes) -> Iterator[Fault]:
    if order_headers not in get_args(OrderHeaders):
        yield "order_headers", "must be 'plain', 'hashed' or 'none'"
    if order_headers == "hashed" and (not isinstance(queue_key, bytes) or len(queue_key) < 16):
        yield "queue_key", "must be at least 16 secret bytes: without them hashed queue ids can be guessed"
