"""Who signs a request, and what becomes of one that nobody can sign."""

from __future__ import annotations

import asyncio
import base64
import errno
import logging
import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import nacl.signing
import pytest
from standardwebhooks.webhooks import Webhook

from callbackq import CallbackRequest, CallbackState, Dispatcher, InMemoryDataAccess, RetryPhase
from callbackq.core.delivery import Answer, NotSent, NotSentReason, Outcome
from callbackq.core.models import AttemptFailure
from callbackq.errors import SignatureError
from callbackq.events import EventKind
from callbackq.signing import Signer, public_key_of, verify
from callbackq.testing import FakeClock
from callbackq.transport import HTTPTransport
from support.deliveries import make_delivery
from support.dispatching import InlineSender, Witness, an_engine, drive
from support.receivers import Receiver, SeenRequest

Receive = Callable[..., Receiver]
MakeTransport = Callable[..., HTTPTransport]

CANARY = "yranac"[::-1]
PRIVATE_KEY = "whsk_" + base64.b64encode(b"k" * 32).decode()


def who_signed(request: SeenRequest, keys: dict[str, Any]) -> list[str]:
    """Name the keys by which the request verifies."""
    found = []
    for name, key in keys.items():
        try:
            verify(request.fields, request.body, key, now=datetime.now(UTC))
        except SignatureError:
            continue
        found.append(name)
    return found


# One signer


def test_signature_covers_what_arrives(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    secret = b"s" * 32

    make_transport(signer=Signer(secret)).send(make_delivery(receiver.url(), data=b"signed"))

    [request] = receiver.requests
    assert verify(request.fields, request.body, secret, now=datetime.now(UTC)).id == request.fields["webhook-id"]


def test_a_request_signed_with_a_shared_secret_and_a_key_pair_verifies_with_either(
    receive: Receive, make_transport: MakeTransport
) -> None:
    receiver = receive()
    secret = b"s" * 32

    make_transport(signer=Signer([PRIVATE_KEY, secret])).send(make_delivery(receiver.url(), data=b'{"a": 1}'))

    [request] = receiver.requests
    assert who_signed(request, {"pair": public_key_of(PRIVATE_KEY), "secret": secret}) == ["pair", "secret"]
    # And by what isn't ours.
    Webhook(secret).verify(request.body, request.fields)
    by_key, _ = request.fields["webhook-signature"].split(" ")
    content = f"{request.fields['webhook-id']}.{request.fields['webhook-timestamp']}.".encode() + request.body
    nacl.signing.SigningKey(b"k" * 32).verify_key.verify(content, base64.b64decode(by_key.removeprefix("v1a,")))


# A signer for each receiver

SECRETS = {"acme": b"a" * 32, "globex": b"g" * 32}


def of_application(request: CallbackRequest) -> Signer | None:
    secret = SECRETS.get(request.application_id)
    return None if secret is None else Signer(secret)


def test_each_request_is_signed_by_the_signer_chosen_for_it(receive: Receive, make_transport: MakeTransport) -> None:
    receiver = receive()
    transport = make_transport(signer=of_application)

    for application_id in ("acme", "globex", "acme"):
        transport.send(make_delivery(receiver.url(), application_id=application_id))

    assert [who_signed(request, SECRETS) for request in receiver.requests] == [["acme"], ["globex"], ["acme"]]


def test_a_request_for_which_no_signer_is_chosen_goes_out_unsigned(
    receive: Receive, make_transport: MakeTransport
) -> None:
    receiver = receive()

    outcome = make_transport(signer=of_application).send(make_delivery(receiver.url(), application_id="other"))

    assert isinstance(outcome, Answer)
    assert outcome.status_code == 200
    assert "webhook-signature" not in receiver.requests[0].fields
    assert "webhook-id" in receiver.requests[0].fields


def test_the_choice_sees_the_request_and_is_made_at_every_attempt_in_the_callers_thread(
    receive: Receive, make_transport: MakeTransport
) -> None:
    receiver = receive()
    seen: list[tuple[CallbackRequest, threading.Thread]] = []
    secrets = [b"1" * 32, b"2" * 32]

    def choose(request: CallbackRequest) -> Signer:
        seen.append((request, threading.current_thread()))
        return Signer(secrets[len(seen) - 1])

    delivery = make_delivery(receiver.url())
    transport = make_transport(signer=choose)
    transport.send(delivery)
    transport.send(delivery)

    assert seen == [(delivery.request, threading.current_thread())] * 2
    keys = {"old": secrets[0], "new": secrets[1]}
    assert [who_signed(request, keys) for request in receiver.requests] == [["old"], ["new"]]


# What the host's code raises


def signer_that_raises(error: BaseException) -> list[Any]:
    """Both places where the host's code is asked."""

    def choose(request: CallbackRequest) -> Signer:
        raise error

    def secrets() -> bytes:
        raise error

    return [choose, Signer(secrets)]


def outcomes_of(signers: list[Any], make_transport: MakeTransport, url: str) -> list[Outcome]:
    return [make_transport(signer=signer).send(make_delivery(url)) for signer in signers]


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, CANARY), "no secrets: ECONNREFUSED"),
        (ConnectionError(CANARY), "no secrets: ConnectionError"),
        (TimeoutError(CANARY), "no secrets: TimeoutError"),
        (OSError(errno.EMFILE, CANARY), "no secrets: EMFILE"),
    ],
    ids=repr,
)
def test_secrets_that_are_out_of_reach_are_no_attempt(
    receive: Receive,
    make_transport: MakeTransport,
    caplog: pytest.LogCaptureFixture,
    error: OSError,
    detail: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver = receive()

    outcomes = outcomes_of(signer_that_raises(error), make_transport, receiver.url())

    # Of one receiver alone where there is a choice, of all where there is none.
    reasons = [NotSentReason.NO_SECRETS, NotSentReason.LOCAL_FAULT]
    assert outcomes == [NotSent(reason=reason, detail=detail) for reason in reasons]
    [record] = caplog.records
    assert re.fullmatch(
        f"callback 'callback-[0-9]+' can't be signed for the moment, and waits: {detail}", record.getMessage()
    )
    assert receiver.connections == 0
    assert CANARY not in caplog.text


def test_machine_without_memory_to_sign_with_is_a_local_fault(make_transport: MakeTransport) -> None:
    outcomes = outcomes_of(signer_that_raises(MemoryError()), make_transport, "http://127.0.0.1/")

    assert outcomes == [NotSent(reason=NotSentReason.LOCAL_FAULT, detail="MemoryError")] * 2


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (KeyError(CANARY), "KeyError"),
        (RuntimeError(CANARY), "RuntimeError"),
        (FileNotFoundError(errno.ENOENT, CANARY), "ENOENT"),
        (OSError(CANARY), "OSError"),
        (asyncio.CancelledError(CANARY), "CancelledError"),
        (SystemExit(CANARY), "SystemExit"),
        (BaseException(CANARY), "BaseException"),
    ],
    ids=repr,
)
def test_a_callback_that_nobody_can_sign_has_failed_an_attempt_and_the_words_stay_out_of_the_log(
    receive: Receive,
    make_transport: MakeTransport,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    detail: str,
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver = receive()

    outcomes = outcomes_of(signer_that_raises(error), make_transport, receiver.url())

    for outcome in outcomes:
        assert isinstance(outcome, Answer)
        assert (outcome.status_code, outcome.failure, outcome.detail) == (0, AttemptFailure.INTERNAL, detail)
        assert outcome.time <= datetime.now(UTC)
    assert receiver.connections == 0
    assert [record.name for record in caplog.records] == ["callbackq.transport"] * 2
    assert type(error).__name__ in caplog.text
    assert CANARY not in caplog.text


def test_wish_to_end_the_program_is_passed_on(make_transport: MakeTransport) -> None:
    for signer in signer_that_raises(KeyboardInterrupt()):
        with pytest.raises(KeyboardInterrupt):
            make_transport(signer=signer).submit(make_delivery("http://127.0.0.1:9/"), lambda outcome: None)


@pytest.mark.parametrize("returned", [b"s" * 32, "whsec_" + CANARY, Signer, 0, False, [None]], ids=repr)
def test_a_choice_that_is_no_signer_is_not_taken_for_unsigned(
    receive: Receive, make_transport: MakeTransport, returned: Any, caplog: pytest.LogCaptureFixture
) -> None:
    receiver = receive()

    outcome = make_transport(signer=lambda request: returned).send(make_delivery(receiver.url()))

    assert isinstance(outcome, Answer)
    assert (outcome.failure, outcome.detail) == (AttemptFailure.INTERNAL, "InvalidRequestError")
    assert receiver.connections == 0
    assert CANARY not in caplog.text


@pytest.mark.parametrize("signature", ["v1,a\r\nX-Evil: 1", "v1,a\nX-Evil: 1", "v1,a\rX-Evil: 1", "v1,\u00e9"])
def test_a_signature_that_is_no_field_value_is_not_sent(
    receive: Receive, make_transport: MakeTransport, signature: str
) -> None:
    class Careless(Signer):
        def sign(self, id: str, timestamp: int, body: bytes) -> str:
            return signature

    receiver = receive()

    outcome = make_transport(signer=Careless(secrets=list)).send(make_delivery(receiver.url()))

    assert isinstance(outcome, Answer)
    assert (outcome.failure, outcome.detail) == (AttemptFailure.INTERNAL, "ValueError")
    assert receiver.connections == 0


def test_a_function_that_is_called_with_too_much_fails_attempts_and_not_the_dispatcher(
    receive: Receive, make_transport: MakeTransport
) -> None:
    [outcome] = outcomes_of([lambda: None], make_transport, receive().url())

    assert isinstance(outcome, Answer)
    assert (outcome.failure, outcome.detail) == (AttemptFailure.INTERNAL, "TypeError")


# From the store to the receiver


def test_an_outage_of_the_secrets_uses_up_no_attempt_and_delivers_when_it_is_over(
    receive: Receive, make_transport: MakeTransport
) -> None:
    receiver = receive()
    store, witness = InMemoryDataAccess(), Witness()
    refusals = 3

    def secrets() -> bytes:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise ConnectionRefusedError(CANARY)
        return SECRETS["acme"]

    id = store.store_callback_request(CallbackRequest(url=receiver.url())).id  # one attempt is all it has
    dispatcher = Dispatcher(store, transport=make_transport(signer=Signer(secrets)), observer=witness)
    assert dispatcher.run_until_idle(timeout=20)

    status = store.get_callback_status(id)
    assert [attempt.status_code for attempt in status.attempts] == [200]
    assert [who_signed(request, SECRETS) for request in receiver.requests] == [["acme"]]
    assert witness.kinds().count(EventKind.RELEASED) == 3
    assert EventKind.LOCAL_FAULT in witness.kinds()


def test_one_customers_secrets_out_of_reach_hold_up_nobody_else(
    receive: Receive, make_transport: MakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    receiver, clock, witness = receive(), FakeClock(), Witness()
    store = InMemoryDataAccess(clock=clock)
    began = clock.monotonic()

    def choose(request: CallbackRequest) -> Signer:
        if request.application_id == "acme" and clock.monotonic() < began + 100:
            raise ConnectionRefusedError(CANARY)
        return Signer(SECRETS[request.application_id])

    ids = [
        store.store_callback_request(CallbackRequest(url=receiver.url(), application_id=name)).id
        for name in ("acme",) * 10 + ("globex",) * 10
    ]
    sender = InlineSender(make_transport(signer=choose, clock=clock))
    engine = an_engine(store, sender, clock, witness)

    drive(engine, clock, until=lambda: witness.kinds().count(EventKind.SUCCEEDED) == 10)
    assert clock.monotonic() < began + 1
    assert [store.get_callback_status(id).success for id in ids] == [False] * 10 + [True] * 10
    drive(engine, clock, until=engine.is_idle)

    assert [len(store.get_callback_status(id).attempts) for id in ids] == [1] * 20
    assert EventKind.LOCAL_FAULT not in witness.kinds()
    # Each waits 15 to 30 seconds, and all of them together say it once a minute.
    assert 10 * 4 <= witness.kinds().count(EventKind.RELEASED) <= 10 * 7
    assert caplog.text.count("can't be signed for the moment") == 2


def test_a_customer_without_a_secret_fails_for_good_and_holds_up_nobody_else(
    receive: Receive, make_transport: MakeTransport
) -> None:
    receiver = receive()
    store = InMemoryDataAccess()
    phases = [RetryPhase(retries=2, delay=timedelta(0))]
    ids = {
        name: store.store_callback_request(
            CallbackRequest(url=receiver.url(), application_id=name, queue_id=name, retry_phases=phases)
        ).id
        for name in ("nobody", *SECRETS)
    }
    signers = {name: Signer(secret) for name, secret in SECRETS.items()}
    transport = make_transport(signer=lambda request: signers[request.application_id])

    assert Dispatcher(store, transport=transport).run_until_idle(timeout=20)

    unsigned = store.get_callback_status(ids["nobody"])
    assert unsigned.state is CallbackState.FAILED
    assert [(attempt.failure, attempt.detail) for attempt in unsigned.attempts] == [
        (AttemptFailure.INTERNAL, "KeyError")
    ] * 3
    assert all(store.get_callback_status(ids[name]).success for name in SECRETS)
    assert sorted(who_signed(request, SECRETS) for request in receiver.requests) == [["acme"], ["globex"]]
