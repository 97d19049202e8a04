"""The sender's side: `Signer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from attrs import field, frozen

from callbackq.core.validation import check_callback_id
from callbackq.errors import InvalidRequestError
from callbackq.signing.keys import Secrets, SigningKey, signed_content, signing_keys

__all__ = ["MAX_TIMESTAMP", "Signer"]

MAX_TIMESTAMP: Final = 99_999_999_999
"""Eleven digits last until the year 5138, and a datetime can hold them."""


def _key_provider(secrets: Secrets | Callable[[], Secrets]) -> Callable[[], list[SigningKey]]:
    if callable(secrets):
        return lambda: signing_keys(secrets())
    keys = signing_keys(secrets)
    return lambda: keys


@frozen(eq=False, repr=False)
class Signer:
    """
    Signs requests with one secret or several, shared ones and private keys.

    With several, every request carries one signature for each: that is how a secret is changed without a gap, or a
    shared secret by a key pair. Put the new one first, wait until all receivers know it (of a key pair, the public
    key), and take the old one away.

    A private key is ``whsk_`` and the base64 of 32 random bytes, or of 64 where the public key stands behind them.
    `callbackq.signing.public_key_of` tells what receivers need. Private keys need the extra ``ed25519``.

    Args:
        secrets: a `Secret`, several of them, or a function without arguments that returns the one or the other. The
            function is called for every attempt, from any thread, so it should answer from memory; what it raises
            comes out of `sign`. Secrets it returns are not kept.

    Raises:
        InvalidRequestError: a secret is malformed, can't sign or needs the extra, or there is none.
    """

    _keys: Callable[[], list[SigningKey]] = field(alias="secrets", converter=_key_provider)

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
        if type(timestamp) is not int or not 0 <= timestamp <= MAX_TIMESTAMP:
            faults.append(("timestamp", "must be a whole number of seconds since 1970"))
        if faults:
            raise InvalidRequestError(faults)
        content = signed_content(id, str(timestamp), body)
        return " ".join(key.sign(content) for key in self._keys())

    def __repr__(self) -> str:
        return "<Signer>"
