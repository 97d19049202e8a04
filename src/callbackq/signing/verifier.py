"""The receiver's side: `verify`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from attrs import frozen

from callbackq.core.validation import Fault, check_callback_id
from callbackq.errors import InvalidRequestError, SignatureError
from callbackq.signing.keys import Secrets, signed_content, verifying_keys

__all__ = ["Verified", "verify"]

# No more digits than a Signer writes.
_TIMESTAMP = re.compile(r"0|[1-9][0-9]{0,10}")


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

    Works for callbackq's requests and for those of any other sender that follows Standard Webhooks. Shared secrets are
    compared in constant time. Signatures of a version for which there is no key are passed over.

    Args:
        headers: the request's headers; names in any case.
        body: the raw body, before any decoding or parsing.
        secrets: one or several, shared secrets (``whsec_``) and public keys (``whpk_``); any of them will do. Public
            keys need the extra ``ed25519``.
        now: the time, aware: ``datetime.now(UTC)``. It is an argument so that tests need no clock.
        tolerance: how far the timestamp may be from *now*, in both directions. A captured request can be replayed
            for so long; keep the ids seen meanwhile to refuse that, too.

    Raises:
        SignatureError: anything is missing, malformed, too old, too new or not signed with any of the secrets. No
            request can make it raise anything else.
        InvalidRequestError: the receiver's own arguments are unusable: *secrets*, *now*, *tolerance*, or a *body*
            that is not bytes; or the extra is missing.
    """
    _check_arguments(body, now, tolerance)
    keys = verifying_keys(secrets)
    id, timestamp, signatures = _webhook_headers(headers)
    if any(check_callback_id(id)):
        # A dot in the id would let signed text be cut at another place: a.1.2 is id "a" or id "a.1".
        raise SignatureError("the webhook-id header is not 1 to 255 visible ASCII characters without a dot")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise SignatureError("the webhook-timestamp header is not a whole number of seconds")
    made_at = datetime.fromtimestamp(int(timestamp), UTC)
    content, items = signed_content(id, timestamp, body), signatures.split(" ")
    if not any(key.has_signed(content, items) for key in keys):
        raise SignatureError("no signature matches: another secret or key, or a changed body")
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
