"""
Proof of who called: signatures in the manner of Standard Webhooks 1.0.0, and their check for receivers.

What is signed is ``id.timestamp.body``: the callback's id, the whole seconds of the attempt and the raw bytes of the
body. The scheme is ``v1``, HMAC-SHA256. No clock is read here, and no secret is shown, stored or logged.
"""

from __future__ import annotations

import base64
import hmac
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from attrs import field, frozen

from callbackq.core.validation import Fault, check_callback_id
from callbackq.errors import InvalidRequestError, SignatureError

__all__ = ["Secret", "Secrets", "Signer", "Verified", "verify"]

Secret = str | bytes
"""24 to 64 random bytes, or the same as text: ``whsec_`` and their base64."""

Secrets = Secret | Sequence[Secret]
"""One secret, or several: the newest first."""

_PREFIX: Final = "whsec_"
_KEY_SIZES: Final = range(24, 65)
_KEY_FAULT: Final = f"must be {_KEY_SIZES[0]} to {_KEY_SIZES[-1]} bytes, or '{_PREFIX}' and the base64 of as many"
_VERSION: Final = "v1"
# Eleven digits last until the year 5138, and a datetime can hold them.
_MAX_TIMESTAMP: Final = 99_999_999_999
_TIMESTAMP = re.compile(r"0|[1-9][0-9]{0,10}")


def _key_provider(secrets: Secrets | Callable[[], Secrets]) -> Callable[[], list[bytes]]:
    if callable(secrets):
        return lambda: _read_keys(secrets())
    keys = _read_keys(secrets)
    return lambda: keys


@frozen(eq=False, repr=False)
class Signer:
    """
    Signs requests with one secret or several.

    With several, every request carries one signature for each: that is how a secret is changed without a gap. Put
    the new one first, wait until all receivers know it, and take the old one away.

    Args:
        secrets: a `Secret`, several of them, or a function without arguments that returns the one or the other. The
            function is called for every attempt, from any thread, so it should answer from memory; what it raises
            comes out of `sign`. Secrets it returns are not kept.

    Raises:
        InvalidRequestError: a secret is malformed or there is none.
    """

    _keys: Callable[[], list[bytes]] = field(alias="secrets", converter=_key_provider)

    def sign(self, id: str, timestamp: int, body: bytes) -> str:
        """
        Compute the value of the ``webhook-signature`` header.

        Args:
            id: what goes out as ``webhook-id``.
            timestamp: what goes out as ``webhook-timestamp``: the attempt's time in seconds since 1970, so that
                every attempt has a fresh one.
            body: the bytes that go out.

        Raises:
            InvalidRequestError: the id holds a dot or isn't visible ASCII, the timestamp is not a whole number, or
                the function that provides the secrets returned malformed ones.
        """
        faults = [(f"id{path}", reason) for path, reason in check_callback_id(id)]
        if type(timestamp) is not int or not 0 <= timestamp <= _MAX_TIMESTAMP:
            faults.append(("timestamp", "must be a whole number of seconds since 1970"))
        if faults:
            raise InvalidRequestError(faults)
        return " ".join(_signature(key, id, str(timestamp), body) for key in self._keys())

    def __repr__(self) -> str:
        return "<Signer>"


@frozen(kw_only=True)
class Verified:
    """
    What a signature vouches for, besides the body.

    Attributes:
        id: the callback's id: the same on every attempt, so a receiver drops duplicates by it.
        timestamp: when the attempt was made, by the sender's clock.
    """

    id: str
    timestamp: datetime


def verify(
    headers: Mapping[str, str],
    body: bytes,
    secrets: Secrets,
    *,
    now: datetime,
    tolerance: timedelta = timedelta(minutes=5),
) -> Verified:
    """
    Check that a request comes from the holder of one of the secrets, and was made just now.

    Works for callbackq's requests and for those of any other sender that follows Standard Webhooks with symmetric
    secrets. Secrets are compared in constant time. Signatures of other versions are passed over.

    Args:
        headers: the request's headers; names in any case.
        body: the raw body, before any decoding or parsing.
        secrets: one secret or several; any of them will do.
        now: the time, aware: ``datetime.now(UTC)``. It is an argument so that tests need no clock.
        tolerance: how far the timestamp may be from *now*, in both directions. A captured request can be replayed
            for so long; keep the ids seen meanwhile to refuse that, too.

    Raises:
        SignatureError: anything is missing, malformed, too old, too new or not signed with any of the secrets. No
            request can make it raise anything else.
        InvalidRequestError: the receiver's own arguments are unusable: *secrets*, *now*, *tolerance*, or a *body*
            that is not bytes.
    """
    _check_arguments(body, now, tolerance)
    keys = _read_keys(secrets)
    id, timestamp, signatures = _webhook_headers(headers)
    if next(check_callback_id(id), None) is not None:
        # A dot in the id would let signed text be cut at another place: a.1.2 is id "a" or id "a.1".
        raise SignatureError("the webhook-id header is not 1 to 255 visible ASCII characters without a dot")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise SignatureError("the webhook-timestamp header is not a whole number of seconds")
    made_at = datetime.fromtimestamp(int(timestamp), UTC)
    if not any(_is_among(_signature(key, id, timestamp, body), signatures) for key in keys):
        raise SignatureError("no signature matches: another secret, or a changed body")
    if abs(now - made_at) > tolerance:
        raise SignatureError("the timestamp is too far from now: an old request, or a clock that is wrong")
    return Verified(id=id, timestamp=made_at)


def _check_arguments(body: object, now: object, tolerance: object) -> None:
    faults: list[Fault] = []
    if not isinstance(body, bytes):
        faults.append(("body", "must be the raw bytes of the body, before any decoding or parsing"))
    if not isinstance(now, datetime) or now.utcoffset() is None:
        faults.append(("now", "must be an aware datetime: datetime.now(UTC)"))
    if not isinstance(tolerance, timedelta) or tolerance < timedelta(0):
        faults.append(("tolerance", "must be a timedelta that is not negative"))
    if faults:
        raise InvalidRequestError(faults)


def _webhook_headers(headers: Mapping[str, str]) -> tuple[str, str, str]:
    found: dict[str, str] = {}
    for name, value in headers.items():
        lower = name.lower() if isinstance(name, str) else ""
        if lower in found:
            raise SignatureError(f"the {lower} header is there twice")
        if lower in ("webhook-id", "webhook-timestamp", "webhook-signature") and isinstance(value, str):
            found[lower] = value
    try:
        return found["webhook-id"], found["webhook-timestamp"], found["webhook-signature"]
    except KeyError as missing:
        raise SignatureError(f"there is no {missing.args[0]} header") from None


def _is_among(signature: str, items: str) -> bool:
    # As bytes, because compare_digest() refuses text beyond ASCII, and a header can be anything.
    expected = signature.encode("ascii")
    return any(hmac.compare_digest(expected, item.encode("utf-8", "replace")) for item in items.split(" "))


def _signature(key: bytes, id: str, timestamp: str, body: bytes) -> str:
    digest = hmac.digest(key, f"{id}.{timestamp}.".encode("ascii") + body, "sha256")
    return f"{_VERSION},{base64.b64encode(digest).decode('ascii')}"


def _read_keys(secrets: object) -> list[bytes]:
    given = [secrets] if isinstance(secrets, (str, bytes)) else secrets
    if not isinstance(given, Sequence) or not given:
        raise InvalidRequestError([("secrets", "must be a secret or a sequence of at least one")])
    keys = [_read_key(secret) for secret in given]
    faults = [(f"secrets[{index}]", _KEY_FAULT) for index, key in enumerate(keys) if key is None]
    if faults:
        raise InvalidRequestError(faults)
    return [key for key in keys if key is not None]


def _read_key(secret: object) -> bytes | None:
    if isinstance(secret, str):
        secret = _decode(secret.removeprefix(_PREFIX)) if secret.startswith(_PREFIX) else None
    return secret if isinstance(secret, bytes) and len(secret) in _KEY_SIZES else None


def _decode(text: str) -> bytes | None:
    # Some who hand out secrets leave the padding away.
    unpadded = text.rstrip("=")
    try:
        return base64.b64decode(unpadded + "=" * (-len(unpadded) % 4), validate=True)
    except ValueError:
        return None
