"""
One attempt from look-up to answer, as one straight story.

`Attempt.live` is a generator: it yields where a blocking client would wait, and the network thread resumes it when
its connection is ready. What ends an attempt from outside (its deadline, an interruption) is thrown into it there. So
whatever a receiver does, the thread is never stuck in it.
"""

from __future__ import annotations

import errno
import logging
import selectors
import ssl
from collections.abc import Callable, Generator, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Final, NamedTuple

from attrs import frozen

from callbackq.clock import Clock
from callbackq.core.delivery import Answer, Delivery, NotSent, NotSentReason, Outcome
from callbackq.core.exchange import Exchange
from callbackq.core.models import AttemptFailure, CallbackData, unchecked
from callbackq.core.tunnel import TunnelExchange
from callbackq.core.url import Target
from callbackq.errors import TargetNotAllowedError
from callbackq.faultlog import log_fault
from callbackq.targets import TargetPolicy
from callbackq.transport.connections import Connection, KeptConnections, Route
from callbackq.transport.deadlines import Deadlines
from callbackq.transport.details import detail_of
from callbackq.transport.proxy import Proxy
from callbackq.transport.resolver import LookUp, ResolverPool

__all__ = ["LOCAL_FAULTS", "Attempt", "AttemptSettings", "DeadlinePassed", "Interrupted", "Network"]

_log = logging.getLogger("callbackq.transport")

# Receivers across an ocean answer in less. With not even that left, the likeliest end is a request that arrives, an
# answer that comes too late, and so a duplicate.
_SMALLEST_USEFUL_SECONDS: Final = 0.25

# A name may have thousands of addresses, none of them its owner's: without a bound, one callback would be thousands of
# connections to somebody else.
_MAX_ADDRESSES: Final = 8

LOCAL_FAULTS: Final = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.ENOSPC}
)
"""
Numbers of faults that say something about this machine and nothing about the receiver: descriptors, memory, ports, and
(ENOSPC) registrations with the selector.
"""


class _Stage(NamedTuple):
    """
    How far an attempt is.

    Attributes:
        meaning: what a fault of the network means there.
        words: what is being waited for; empty where the exchange knows better.
    """

    meaning: AttemptFailure
    words: str = ""


_LOOK_UP: Final = _Stage(AttemptFailure.DNS, "looking up the name")
_CONNECT: Final = _Stage(AttemptFailure.CONNECT, "connecting")
_TUNNEL: Final = _Stage(AttemptFailure.CONNECTION_LOST, "waiting for the proxy's answer to CONNECT")
_TLS: Final = _Stage(AttemptFailure.TLS, "TLS handshake")
_EXCHANGE: Final = _Stage(AttemptFailure.CONNECTION_LOST)

Life = Generator[None, None, Outcome]
Wait = Generator[None, None, None]


class DeadlinePassed(Exception):
    """A message into an attempt's life: the deadline that was set for the attempt has passed."""


class Interrupted(Exception):
    """A message into an attempt's life: it is to end now."""


class _NoAnswer(Exception):
    def __init__(self, failure: AttemptFailure, detail: str) -> None:
        self.failure = failure
        self.detail = detail


class _Unsendable(Exception):
    def __init__(self, reason: NotSentReason, detail: str = "") -> None:
        self.outcome = NotSent(reason=reason, detail=detail)


@frozen(kw_only=True)
class AttemptSettings:
    """What the host decided about attempts. Durations in seconds; see `callbackq.HTTPTransport`."""

    policy: TargetPolicy
    ssl_context: ssl.SSLContext
    deadline_seconds: float
    connect_seconds: float
    response_limit: int
    proxy: Proxy | None = None


@frozen(kw_only=True)
class Network:
    """
    What attempts find around them, all of one network thread.

    Attributes:
        resume: have an attempt resumed soon. The only member that may be used from other threads.
    """

    settings: AttemptSettings
    clock: Clock
    selector: selectors.BaseSelector
    deadlines: Deadlines[Attempt]
    kept: KeptConnections
    resolver: ResolverPool
    resume: Callable[[Attempt], object]


class Attempt:
    """
    A request on its way.

    Args:
        delivery: what to send.
        done: whom to tell.
        request: head and body.
        time: wall time of its beginning.
        started: clock reading of its beginning.

    Attributes:
        life: what is resumed; set by whoever begins it.
    """

    life: Life

    def __init__(
        self,
        delivery: Delivery,
        done: Callable[[Outcome], None],
        *,
        request: bytes,
        time: datetime,
        started: float,
    ) -> None:
        self.delivery = delivery
        self.done = done
        self._request = request
        self._time = time
        self._started = started
        self._ends_at = delivery.ends_at
        self._target: Target = delivery.request.target
        self._connection: Connection | None = None
        self._stage = _LOOK_UP

    def live(self, network: Network) -> Life:
        """Make the attempt; return what came of it."""
        exchange = Exchange(response_limit=network.settings.response_limit)
        try:
            self._ends_at = min(self._started + network.settings.deadline_seconds, self.delivery.ends_at)
            network.deadlines.set(self, self._ends_at)
            connection = yield from self._reach(network)
            yield from self._converse(network, connection, exchange)
        except _Unsendable as error:
            return error.outcome
        except Interrupted:
            if not exchange.has_begun:
                return NotSent(reason=NotSentReason.STOPPED)
            exchange.give_up(AttemptFailure.INTERRUPTED, exchange.stage)
        except DeadlinePassed:
            if self._ends_at == self.delivery.ends_at and not exchange.has_begun:
                return NotSent(reason=NotSentReason.TIME_IS_UP)
            exchange.give_up(AttemptFailure.TIMEOUT, self._stage.words or exchange.stage)
        except _NoAnswer as error:
            exchange.give_up(error.failure, error.detail)
        except TargetNotAllowedError as error:
            exchange.give_up(AttemptFailure.TARGET_NOT_ALLOWED, detail_of(error))
        except OSError as error:
            if error.errno in LOCAL_FAULTS and not exchange.has_begun:
                return NotSent(reason=NotSentReason.LOCAL_FAULT, detail=errno.errorcode[error.errno])
            exchange.give_up(self._meaning_of(error), detail_of(error))
        except MemoryError as error:
            if not exchange.has_begun:
                return NotSent(reason=NotSentReason.LOCAL_FAULT, detail=detail_of(error))
            exchange.give_up(AttemptFailure.INTERNAL, detail_of(error))
        except Exception as error:
            # A bug here, or in the host's resolver: this attempt fails, the others go on.
            log_fault(_log, "an attempt failed", error)
            exchange.give_up(AttemptFailure.INTERNAL, detail_of(error))
        finally:
            self._leave(network, exchange)
        return self._answer(network, exchange)

    def broken(self, error: Exception) -> Answer:
        """Return the outcome of an attempt whose life ended in an exception all the same."""
        return Answer(
            status_code=0,
            time=self._time,
            duration=timedelta(0),
            failure=AttemptFailure.INTERNAL,
            detail=detail_of(error),
        )

    # The stages.

    def _reach(self, network: Network) -> Generator[None, None, Connection]:
        proxy = network.settings.proxy
        if proxy is None:
            connection = yield from self._reach_target(network)
        else:
            connection = yield from self._reach_proxy(network, proxy)
        if self._target.scheme == "https" and not connection.is_encrypted:
            if proxy is not None:
                yield from self._open_tunnel(connection, proxy)
            self._stage = _TLS
            connection.start_tls(network.settings.ssl_context)
            while not connection.shake_hands():
                yield
        return connection

    def _reach_target(self, network: Network) -> Generator[None, None, Connection]:
        if self._target.is_literal_address:
            network.settings.policy.check_target(self._target)
            addresses = [self._target.host]
        else:
            resolve = partial(network.settings.policy.resolve, self.delivery.request.url)
            addresses = yield from self._look_up(network, self._target.host, resolve)
        return (yield from self._connect(network, addresses))

    def _reach_proxy(self, network: Network, proxy: Proxy) -> Generator[None, None, Connection]:
        """
        Reach the proxy in the target's place.

        A proxy that can't be reached says nothing about the receiver, no more than a machine without descriptors
        does: that is no attempt, and uses up no retry. Once it has been told the name it is one, whatever it does:
        it may be the name that makes it stumble, and no callback may go round for ever.
        """
        network.settings.policy.check_target(self._target, is_looked_up=False)
        try:
            addresses = proxy.known_addresses(network.clock.monotonic())
            if not addresses:
                addresses = yield from self._look_up(network, proxy.host, partial(proxy.look_up, network.clock))
            return (yield from self._connect(network, addresses, proxy.port))
        except DeadlinePassed:
            if self._ends_at == self.delivery.ends_at:
                raise  # perhaps there was never enough time
            fault = f"timeout, {self._stage.words}"
        except _NoAnswer as error:
            fault = error.detail
        except OSError as error:
            if error.errno in LOCAL_FAULTS:
                raise  # which says nothing about the proxy
            fault = detail_of(error)
        proxy.forget()
        raise _Unsendable(NotSentReason.LOCAL_FAULT, f"the proxy can't be reached: {fault}")

    def _open_tunnel(self, connection: Connection, proxy: Proxy) -> Wait:
        self._stage = _TUNNEL
        tunnel = TunnelExchange()
        try:
            yield from self._talk(connection, tunnel, proxy.connect_request(self._target))
        except OSError as error:
            if error.errno in LOCAL_FAULTS:
                raise
            tunnel.give_up(self._stage.meaning, detail_of(error))
        if (failure := tunnel.failure()) is not None:
            raise _NoAnswer(*failure)

    def _look_up(
        self, network: Network, host: str, resolve: Callable[[], list[str]]
    ) -> Generator[None, None, list[str]]:
        look_up = LookUp(host, resolve, partial(network.resume, self))
        self._submit_look_up(network, look_up)
        try:
            yield
        except DeadlinePassed:
            if network.resolver.give_up(look_up):
                raise _Unsendable(NotSentReason.TIME_IS_UP, "other hosts' look-ups hang") from None
            raise
        except Interrupted:
            network.resolver.give_up(look_up)
            raise
        return look_up.result()

    def _submit_look_up(self, network: Network, look_up: LookUp) -> None:
        try:
            network.resolver.submit(look_up)
        except RuntimeError as error:
            raise _Unsendable(NotSentReason.LOCAL_FAULT, "no thread for a look-up") from error

    def _connect(
        self, network: Network, addresses: Sequence[str], proxy_port: int | None = None
    ) -> Generator[None, None, Connection]:
        """Take a kept connection to one of the addresses, or try them one after the other."""
        target = self._target
        routes = [Route(target.scheme, target.host, target.port, one, proxy_port) for one in addresses[:_MAX_ADDRESSES]]
        kept = network.kept.take(routes, network.clock.monotonic())
        if kept is None:
            return (yield from self._open(network, routes))
        kept.user = self
        self._connection = kept
        return kept

    def _open(self, network: Network, routes: Sequence[Route]) -> Generator[None, None, Connection]:
        """Try the routes one after the other. Each gets an equal share of the time that is left."""
        self._stage = _CONNECT
        now = network.clock.monotonic()
        ends_at = min(self._ends_at, now + network.settings.connect_seconds)
        details: dict[str, None] = {}
        for left, route in zip(range(len(routes), 0, -1), routes, strict=True):
            now = network.clock.monotonic()
            network.deadlines.set(self, ends_at if left == 1 else now + (ends_at - now) / left)
            try:
                self._connection = self._begin_to_connect(network, route, now)
                yield
                self._connection.check_connected()
            except DeadlinePassed:
                if network.clock.monotonic() >= self._ends_at:
                    raise
                details["no answer in time"] = None
            except OSError as error:
                # For IPv6 "no address available" mostly means that this machine has no IPv6.
                no_ipv6 = error.errno == errno.EADDRNOTAVAIL and ":" in route.address
                if error.errno in LOCAL_FAULTS and not no_ipv6:
                    raise
                details[detail_of(error)] = None
            else:
                network.deadlines.set(self, self._ends_at)
                return self._connection
            self._disconnect()
        raise _NoAnswer(AttemptFailure.CONNECT, ", ".join(details))

    def _begin_to_connect(self, network: Network, route: Route, now: float) -> Connection:
        try:
            return Connection(route, network.selector, self, now)
        except OSError as error:
            # With all descriptors in use, an idle connection has to make room.
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not network.kept.drop_one():
                raise
        return Connection(route, network.selector, self, now)

    def _converse(self, network: Network, connection: Connection, exchange: Exchange) -> Wait:
        self._stage = _EXCHANGE
        if network.clock.monotonic() > self.delivery.ends_at - _SMALLEST_USEFUL_SECONDS:
            raise _Unsendable(NotSentReason.TIME_IS_UP)
        # What is there before the request is no answer to it.
        self._receive(connection, exchange)
        yield from self._talk(connection, exchange, self._request)

    def _talk(self, connection: Connection, exchange: Exchange, request: bytes) -> Wait:
        unsent = memoryview(request)
        while not exchange.is_over:
            if unsent:
                unsent = self._send(connection, exchange, unsent)
            # Also while sending: a receiver may refuse before it has read everything.
            connection.watch(selectors.EVENT_READ | selectors.EVENT_WRITE if unsent else selectors.EVENT_READ)
            yield
            self._receive(connection, exchange)

    def _send(self, connection: Connection, exchange: Exchange, unsent: memoryview) -> memoryview:
        """Send what can be sent now; return what is left."""
        try:
            sent = connection.send(unsent)
        except OSError:
            if not exchange.has_begun:
                raise
            # Who closes without reading on may have said why. What has come is still to be read.
            return unsent[len(unsent) :]
        exchange.has_begun |= sent > 0
        if sent == len(unsent):
            exchange.request_written()
        return unsent[sent:]

    def _receive(self, connection: Connection, exchange: Exchange) -> None:
        data = connection.receive()
        if data:
            exchange.receive(data)
        elif data is not None:
            exchange.receive_end()

    # The end.

    def _leave(self, network: Network, exchange: Exchange) -> None:
        try:
            if self._connection is not None and exchange.is_reusable:
                network.kept.keep(self._connection, network.clock.monotonic())
                self._connection = None
            self._disconnect()
        except Exception as error:
            # The answer stands, whatever is wrong with the connection now.
            log_fault(_log, "a connection could not be put away", error)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _meaning_of(self, error: OSError) -> AttemptFailure:
        # Also in the middle of an answer: TLS 1.3 refuses a client only after the client's handshake is over.
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            return AttemptFailure.TLS
        return self._stage.meaning

    def _answer(self, network: Network, exchange: Exchange) -> Answer:
        reply = exchange.reply
        return Answer(
            status_code=reply.status_code,
            # The reader of answers has made sure of both.
            response=unchecked(CallbackData, headers=reply.headers, data=reply.body),
            time=self._time,
            duration=self._duration(network),
            failure=reply.failure,
            truncated=reply.truncated,
            detail=reply.detail,
        )

    def _duration(self, network: Network) -> timedelta:
        return timedelta(seconds=max(0.0, network.clock.monotonic() - self._started))
