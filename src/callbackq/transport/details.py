"""
The cause of a failure in a few words, for the person who looks for it.

They are kept, logged and mailed. So they are made of names that the system, OpenSSL and we have given, never of the
text of an exception, which may quote a URL, a header or what the receiver sent. The one exception is the address that
the target policy refused: without it nobody finds out which of a name's addresses it was.
"""

from __future__ import annotations

import errno
import re
import socket
import ssl
from typing import Final

from callbackq.errors import TargetNotAllowedError
from callbackq.targets import NO_ADDRESS

__all__ = ["detail_of"]

_LOOK_UP_NAMES: Final = {
    value: name for name, value in vars(socket).items() if name.startswith("EAI_") and isinstance(value, int)
}
# "Hostname mismatch, certificate is not valid for ..." goes on with what the URL says.
_AFTER_THE_FAULT = re.compile(r"[^A-Za-z0-9 ()-].*", re.DOTALL)


def detail_of(error: BaseException) -> str:
    """Name what lies behind a failure."""
    if isinstance(error, TargetNotAllowedError):
        return error.rule if error.address is None else f"{error.rule} ({error.address})"
    if isinstance(error, socket.gaierror):
        return "no address" if error.errno == NO_ADDRESS else _LOOK_UP_NAMES.get(error.errno or 0, "gaierror")
    if isinstance(error, ssl.SSLError):  # whose number is none of the system's
        reason = getattr(error, "reason", None) or type(error).__name__
        fault = _AFTER_THE_FAULT.sub("", getattr(error, "verify_message", ""))
        return f"{reason}: {fault}" if fault else reason
    number = error.errno if isinstance(error, OSError) else None
    return type(error).__name__ if number is None else errno.errorcode.get(number, type(error).__name__)
