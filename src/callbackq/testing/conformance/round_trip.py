"""Clause 4: what goes in comes out."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from attrs import evolve

from callbackq.core.models import AttemptFailure, CallbackAttempt, CallbackData, CallbackRequest, RetryPhase
from callbackq.core.validation import MAX_DELAY
from callbackq.testing.conformance.base import DELIVERED, DUE_AGAIN, MOMENT, Conformance, a_request, an_attempt

__all__ = ["RoundTrip"]

# Each plane of Unicode, what looks alike, what changes when it is normalised, right-to-left, and the ends of ranges.
_TEXTS: Final = (
    "plain ASCII with 'quotes', \"double\", \\ and % _ ; --",
    "\u00e9 e\u0301 \u212b \u00c5 \ufb01",
    "\u05d0\u0628 \u4f60\u597d \u0939\u093f \U0001f468\u200d\U0001f469\u200d\U0001f466",
    "\u00a0\ufeff\ue000\ufffd\uffff",
    "".join(chr(plane * 0x10000 + 0xFEDC) for plane in range(17)),
    " leading and trailing ",
    "x" * 255,
)
_BODIES: Final = {
    "no body": None,
    "an empty body": b"",
    "every byte": bytes(range(256)),
    "text that is no UTF-8": b"\xff\xfe\x00caf\xe9",
    "1 MiB": bytes(range(256)) * 4096,
}


class RoundTrip(Conformance):
    """Clause 4: every field comes back as it was given."""

    def _check(self, request: CallbackRequest, what: str, id: str | None = None) -> None:
        status = self.store.store_callback_request(request, id=id)
        assert status.request == request, f"{what}: the returned status must hold the request as it was given"
        assert self.status(status.id).request == request, f"{what}: the request must be read as it was given"
        acquired = self.acquire_one()
        assert acquired.request == request, f"{what}: the request must be acquired as it was given"
        assert (acquired.id, acquired.queue_id) == (status.id, request.queue_id), f"{what}: id and queue must be kept"
        self.succeed(acquired)

    def test_texts_come_back_as_they_were(self) -> None:
        """All of Unicode survives in labels."""
        for text in _TEXTS:
            self._check(a_request(queue_id=text, application_id=text), f"the label {text!a}")

    def test_bodies_come_back_as_they_were(self) -> None:
        """No body, an empty body and a body of a megabyte are three different things."""
        for name, body in _BODIES.items():
            self._check(a_request(post_data=CallbackData(data=body)), name)

    def test_header_names_keep_their_case(self) -> None:
        """Header names and values are kept as given."""
        headers = {"X-Mixed-Case": "Value; q=\"1\", b='2'", "lower": "", "UPPER": "a\tb", "!#$%&'*+.^_`|~9": "x" * 8000}

        self._check(a_request(post_data=CallbackData(headers=headers)), "headers")

        stored = self.store.store_callback_request(a_request(post_data=CallbackData(headers=headers)))
        assert dict(stored.request.post_data.headers) == headers, "names must keep their case"

    def test_every_other_field_comes_back_as_it_was(self) -> None:
        """Every field of a request survives."""
        table: list[dict[str, Any]] = [
            {"method": "GET"},
            {"method": "PUT"},
            {"url": "http://127.0.0.1:8080/a%20b/?q=1&q=2;x='%00'#part"},
            {"notification_email_address": "someone+tag@host.example"},
            {"on_exhausted": "hold"},
            {"retry_phases": (RetryPhase(retries=0, delay=timedelta(0)),)},
            {"retry_phases": (RetryPhase(retries=10_000, delay=timedelta(microseconds=1)),) * 100},
            {"retry_phases": (RetryPhase(retries=1, delay=MAX_DELAY), RetryPhase(retries=2, delay=timedelta(hours=1)))},
            {"retry_phases": (RetryPhase(retries=1, delay=timedelta(days=1, seconds=2, microseconds=345_679)),)},
        ]

        for changes in table:
            self._check(a_request(**changes), ", ".join(changes))

    def test_what_a_final_failure_does_to_the_queue_is_acquired_too(self) -> None:
        """Acquired.on_exhausted is that of the request."""
        for given in ("continue", "hold"):
            self.stored("queue", on_exhausted=given)
            acquired = self.acquire_one()
            assert acquired.on_exhausted == given, f"a request with on_exhausted={given!r} must be acquired with it"
            self.succeed(acquired)

    def test_ids_come_back_as_they_were(self) -> None:
        """An id is 1 to 255 visible ASCII characters other than the dot, told apart exactly."""
        visible = "".join(chr(code) for code in range(0x21, 0x7F) if chr(code) != ".")

        for id in ("x", "X", "0", "00", visible, "i" * 255, "i" * 254, "';DROP/**/TABLE/**/callbacks;--", "/up/%2e"):
            self._check(a_request(), f"the id {id}", id=id)
            assert self.status(id).id == id, "an id must be kept as it was given"

    def test_attempts_come_back_as_they_were(self) -> None:
        """Every field of an attempt survives, to the microsecond."""
        hostile = {text: text for text in _TEXTS} | {"X-Case": "\x00\r\n\u2028", "x-case": "", "": ""}
        table: list[CallbackAttempt] = [
            an_attempt(999, response=CallbackData(headers=hostile)),
            *(an_attempt(200, response=CallbackData(data=body)) for body in _BODIES.values()),
            *(an_attempt(0, failure=failure) for failure in AttemptFailure),
            an_attempt(0, failure=None),
            an_attempt(time=datetime(2026, 1, 1, 12, 30, 59, 999_999, tzinfo=UTC), duration=timedelta(microseconds=1)),
            an_attempt(time=datetime.min.replace(tzinfo=UTC), duration=timedelta(0)),
            an_attempt(time=datetime.max.replace(tzinfo=UTC), duration=timedelta(days=365, microseconds=1)),
            *(an_attempt(machine_name=text) for text in _TEXTS),
            an_attempt(truncated=True, detail="connection_lost: ECONNRESET"),
            an_attempt(0, failure=AttemptFailure.TLS, detail="".join(map(chr, range(0x20, 0x7F))) + "~" * 25),
        ]
        id = self.stored()

        for attempt in table:
            self.store.record_attempt(self.acquire_one(), attempt, DUE_AGAIN)

        for expected, actual in zip(table, self.status(id).attempts, strict=True):
            assert actual == expected, f"an attempt must come back as it was: {expected!a}"

    def test_locks_come_back_as_they_were(self) -> None:
        """A lock keeps its holder's name, and its times to the microsecond."""
        id = self.stored()
        self.clock.advance(timedelta(microseconds=123_457))
        acquired = []

        for text in _TEXTS:
            acquired.append(self.acquire_one(machine_name=text, lock_timeout=timedelta(seconds=9, microseconds=1)))
            self.store.release_lock(acquired[-1])

        locks = self.status(id).locks
        for expected, lock, text in zip(acquired, locks, _TEXTS, strict=True):
            assert lock.machine_name == text, "a lock must keep its holder's name"
            assert lock.timeout - lock.acquired == timedelta(seconds=9, microseconds=1), "a lock must live so long"
            assert evolve(lock, completed=False, ended=None) == expected.lock, "the log must show the lock as acquired"

    def test_delays_are_kept_to_the_microsecond(self) -> None:
        """WAITING is due its delay from now."""
        for delay in (timedelta(microseconds=1), timedelta(seconds=1, microseconds=999_999), MAX_DELAY):
            id = self.stored()
            self.retry(self.acquire_only(id), delay=delay)
            assert self.status(id).next_attempt_at == self.store.now() + delay, f"due {delay} from now"
            self.clock.advance(delay + MOMENT)
            self.store.record_attempt(self.acquire_only(id), an_attempt(200), DELIVERED)
