"""
One request's answer as a state machine over bytes.

`Exchange` is fed what the receiver sends, in whatever pieces it comes, and says when the answer is over, what it was
and whether the connection may carry another request. It holds no socket, clock or thread, so a hostile receiver is a
table of byte strings in a test. Nothing is decoded: a body is stored as it came.

**The complete head decides.** Once the blank line after the header fields has come, the status stands, whatever
becomes of the body: a receiver that says 200 and then breaks off has the callback, and a retry would be a duplicate.
Before that line there is no status: a head cut off in the middle reads like a success to parsers that take the end
of the stream for the end of the head.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from attrs import field, frozen

from callbackq.core.models import AttemptFailure, Headers

__all__ = ["MAX_HEAD_BYTES", "MAX_INTERIM_ANSWERS", "Exchange", "Reply"]

MAX_HEAD_BYTES: Final = 64 * 1024
"""All heads of one answer together, interim ones included."""
MAX_INTERIM_ANSWERS: Final = 10
# To take apart as many small fields as fit into a head costs 12 ms of the one thread that all attempts share: fifty
# ordinary attempts. Most servers and clients stop at a tenth of this number.
_MAX_FIELDS: Final = 1000
_MAX_KEPT_FIELDS: Final = 100
_MAX_KEPT_FIELD_BYTES: Final = 16 * 1024
_MAX_CHUNK_LINE_BYTES: Final = 256
# A body of single-byte chunks would cost as much computing as a thousand ordinary answers.
_MAX_CHUNKS: Final = 1000
_MAX_TRAILER_BYTES: Final = 8 * 1024

_STATUS_LINE_START: Final = b"HTTP/1."
_STATUS_LINE = re.compile(rb"HTTP/1\.([0-9]) ([1-5][0-9]{2})(?: [^\n]*)?\r?\n")
_HEAD_END = re.compile(rb"\n\r?\n")
# RFC 9110, section 5.6.2: token.
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_BLANKED = str.maketrans("\r\0", "  ")
# RFC 9110, section 5.6.3. Never a bare strip(): to Python a vertical tab and Latin-1's 0xA0 are blanks, too, so that
# what is no length and no coding to anybody else would become one here.
_BLANKS: Final = " \t"
_LENGTH = re.compile(r"[0-9]{1,18}")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[^\r\n]*)?\r\n")


@frozen(kw_only=True)
class Reply:
    """
    What came of the exchange.

    Attributes:
        status_code: of a complete head; 0 when there was none.
        headers: of that head, repeated fields joined (RFC 9110, section 5.3), bounded in number and size.
        body: as much of it as is kept, raw; ``None`` without a head, and for an answer that can't have one.
        failure: why there was no complete head; ``None`` when there was one.
        truncated: the body was longer than the limit, or broke off.
        detail: the cause of *failure* or *truncated*: which rule was broken, in words of our own.
    """

    status_code: int = 0
    headers: Headers = field(factory=Headers)
    body: bytes | None = field(default=None, repr=False)
    failure: AttemptFailure | None = None
    truncated: bool = False
    detail: str = ""


class Exchange:
    """
    Reads the answer to one request.

    Args:
        response_limit: bytes of body to keep. An answer with a longer one is over as soon as that is known.

    Attributes:
        has_begun: a byte of the request is on its way; set by who sends it.
    """

    def __init__(self, *, response_limit: int = 0) -> None:
        self.has_begun = False
        self._limit = response_limit
        self._reply: Reply | None = None
        self._request_written = False
        # Whether everything so far was as RFC 9112 has it. Only then is it certain where the answer ends, so that the
        # next one on this connection belongs to the next request.
        self._is_clean = True

        self._buffer = bytearray()
        # A plain function: a bound method would make a cycle, and the answer would stay until the collector comes by.
        self._step: Callable[[Exchange], bool] = Exchange._read_head
        self._searched = 0
        self._has_status_line = False
        self._head_bytes = 0
        self._interim_answers = 0

        self._status_code = 0
        self._headers = Headers()
        self._body = bytearray()
        self._remaining = 0
        self._chunks = 0

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to read."""
        return self._reply is not None

    @property
    def reply(self) -> Reply:
        """What came of it; only when it is over."""
        if self._reply is None:
            raise AssertionError("the exchange is not over")
        return self._reply

    @property
    def is_reusable(self) -> bool:
        """Whether the connection may carry another request."""
        return self._reply is not None and self._is_clean

    @property
    def stage(self) -> str:
        """What is being waited for, in words."""
        if self._status_code:
            return "reading the body"
        return "waiting for the head" if self._request_written else "sending"

    def request_written(self) -> None:
        """Say that the last byte of the request is on its way."""
        self._request_written = True

    def receive(self, data: bytes) -> None:
        """Take the next bytes from the receiver, at least one."""
        self._buffer += data
        while self._reply is None and self._step(self):
            pass
        if self._reply is not None and self._buffer:
            self._is_clean = False  # bytes nobody asked for: the next request would take them for its answer

    def receive_end(self) -> None:
        """Take note that the receiver has ended the stream."""
        self._is_clean = False
        if self._reply is None and self._step is Exchange._read_until_end:
            self._end()
        self.give_up(AttemptFailure.CONNECTION_LOST, f"closed while {self.stage}")

    def give_up(self, failure: AttemptFailure, detail: str) -> None:
        """
        End it here, for lack of time or because the connection is broken.

        With a complete head the answer stands, truncated; without one it is *failure*. *detail* is the cause. Does
        nothing when the exchange is over.
        """
        if self._reply is not None:
            return
        if self._status_code:
            self._break_off(f"{failure.value}: {detail}")
        else:
            self._fail(failure, detail)

    # The head. Each step takes from the buffer what it can use, and returns whether the next one may find more.

    def _read_head(self) -> bool:
        window = min(len(self._buffer), MAX_HEAD_BYTES - self._head_bytes)
        if not self._has_status_line and not self._check_status_line(window):
            return False
        end = _HEAD_END.search(self._buffer, max(0, self._searched - 2), window)
        self._searched = window
        if end is None:
            if window < len(self._buffer) or self._head_bytes + window >= MAX_HEAD_BYTES:
                self._fail(AttemptFailure.TOO_LARGE, f"head longer than {MAX_HEAD_BYTES} bytes")
            return False
        self._take_head(bytes(self._take(end.end())))
        return True

    def _check_status_line(self, window: int) -> bool:
        """Tell another protocol's banner at once instead of waiting for a blank line that will never come."""
        line_end = self._buffer.find(b"\n", self._searched, window)
        if line_end >= 0 and _STATUS_LINE.match(self._buffer, 0, window):
            self._has_status_line = True
        elif line_end >= 0 or not _STATUS_LINE_START.startswith(self._buffer[: len(_STATUS_LINE_START)]):
            self._fail(AttemptFailure.PROTOCOL, "no status line of HTTP/1")
            return False
        return True

    def _take_head(self, head: bytes) -> None:
        self._head_bytes += len(head)
        self._searched = 0
        self._has_status_line = False
        status_line = _STATUS_LINE.match(head)
        if status_line is None:
            raise AssertionError  # it was checked before the rest was waited for
        status_code = int(status_line[2])
        if status_code < 200:
            self._skip_interim_answer(status_code)
        elif status_code < 300 and not self._request_written:
            # Success of what has not been said yet. Answers that refuse early (413) are taken at their word.
            self._fail(AttemptFailure.PROTOCOL, "success before the request was sent")
        elif head.count(b"\n") > _MAX_FIELDS + 2:  # with the status line and the blank one
            self._fail(AttemptFailure.TOO_LARGE, f"more than {_MAX_FIELDS} header fields")
        else:
            # Only HTTP/1.1 keeps connections without being asked.
            if status_line[1] != b"1" or not _has_proper_lines(head) or not self._request_written:
                self._is_clean = False
            fields = self._take_fields(head[status_line.end() :].decode("latin-1"))
            self._status_code = status_code
            self._frame_body(fields)

    def _skip_interim_answer(self, status_code: int) -> None:
        # 101 would make this another protocol, which nobody asked for.
        self._interim_answers += 1
        if status_code == 101:
            self._fail(AttemptFailure.PROTOCOL, "switches protocols")
        elif self._interim_answers > MAX_INTERIM_ANSWERS:
            self._fail(AttemptFailure.PROTOCOL, f"more than {MAX_INTERIM_ANSWERS} interim answers")
        # An interim answer nobody asked for may just as well be a late answer to an earlier request.
        self._is_clean = False

    def _take_fields(self, text: str) -> dict[str, str]:
        """Return the fields by lower-case name, and keep them under the name as it was sent, within bounds."""
        values: dict[str, list[str]] = {}
        names: dict[str, str] = {}
        for line in text.split("\n")[:-2]:
            name, colon, value = line.partition(":")
            if not colon or not _FIELD_NAME.fullmatch(name):
                self._is_clean = False  # also folded lines (RFC 9112, section 5.2)
                continue
            value = value.strip(" \t\r")
            if "\r" in value or "\0" in value:
                # RFC 9110, section 5.5: replace or reject. Most stores can't hold a NUL.
                self._is_clean = False
                value = value.translate(_BLANKED)
            lower = name.lower()
            values.setdefault(lower, []).append(value)
            names.setdefault(lower, name)
        fields = {lower: ", ".join(several) for lower, several in values.items()}
        self._headers = _within_bounds({name: fields[lower] for lower, name in names.items()})
        return fields

    # The body. RFC 9112, section 6.3 decides how long it is.

    def _frame_body(self, fields: dict[str, str]) -> None:
        coding = fields.get("transfer-encoding")
        lengths = _members(fields.get("content-length"))
        # The same length twice (section 6.3 lets it pass) was still put together by two writers.
        if "close" in _members(fields.get("connection")) or "," in fields.get("content-length", ""):
            self._is_clean = False
        if self._status_code in (204, 304):
            # Whoever announces a body here may also send one.
            if coding is not None or (self._status_code == 204 and not lengths <= {"0"}):
                self._is_clean = False
            self._end(has_body=False)
        elif coding is not None:
            if lengths or coding.lower() != "chunked":
                self._is_clean = False
            is_chunked = coding.lower().rpartition(",")[2].strip(_BLANKS) == "chunked"
            self._step = Exchange._read_chunk_line if is_chunked else Exchange._read_until_end
        elif not lengths:
            self._step = Exchange._read_until_end
        elif len(lengths) > 1:
            # Two writers disagree about where this answer ends: somebody may be splitting answers.
            self._fail(AttemptFailure.PROTOCOL, "several content lengths")
        elif not _LENGTH.fullmatch(length := lengths.pop()):
            self._break_off("unusable content length")
        else:
            self._remaining = int(length)
            self._step = Exchange._read_known_length
            self._read_known_length()

    def _read_known_length(self) -> bool:
        data = self._take(self._remaining)
        self._remaining -= len(data)
        self._keep(data)
        if self._remaining == 0 and self._reply is None:
            self._end()
        return False

    def _read_until_end(self) -> bool:
        self._is_clean = False
        self._keep(self._take(len(self._buffer)))
        return False

    def _read_chunk_line(self) -> bool:
        end = self._buffer.find(b"\r\n", 0, _MAX_CHUNK_LINE_BYTES)
        if end < 0:
            if len(self._buffer) >= _MAX_CHUNK_LINE_BYTES:
                self._break_off("malformed chunk")
            return False
        line = _CHUNK_LINE.match(self._buffer, 0, end + 2)
        self._chunks += 1
        if line is None or self._chunks > _MAX_CHUNKS:
            self._break_off("malformed chunk" if line is None else f"more than {_MAX_CHUNKS} chunks")
            return False
        self._remaining = int(line[1], 16)
        if self._remaining:
            self._take(end + 2)
            self._step = Exchange._read_chunk
        else:
            # The line break stays: with it, "no trailers" and "trailers" both end with an empty line.
            self._take(end)
            self._step = Exchange._read_trailers
        return True

    def _read_chunk(self) -> bool:
        data = self._take(self._remaining)
        self._remaining -= len(data)
        self._keep(data)
        if self._remaining == 0:
            self._step = Exchange._read_chunk_end
        return self._remaining == 0

    def _read_chunk_end(self) -> bool:
        if len(self._buffer) < 2:
            return False
        if self._take(2) != b"\r\n":
            self._break_off("malformed chunk")
            return False
        self._step = Exchange._read_chunk_line
        return True

    def _read_trailers(self) -> bool:
        end = self._buffer.find(b"\r\n\r\n", 0, _MAX_TRAILER_BYTES)
        if end >= 0:
            if not _has_proper_lines(self._take(end + 4)):
                self._is_clean = False
            self._end()
        elif len(self._buffer) >= _MAX_TRAILER_BYTES:
            self._break_off(f"trailers longer than {_MAX_TRAILER_BYTES} bytes")
        return False

    def _take(self, count: int) -> bytearray:
        data = self._buffer[:count]
        del self._buffer[:count]
        return data

    def _keep(self, data: bytearray) -> None:
        room = self._limit - len(self._body)
        self._body += data[:room]
        if len(data) > room:
            self._break_off(f"longer than the limit of {self._limit} bytes")

    # The end.

    def _end(self, *, has_body: bool = True, truncated: bool = False, detail: str = "") -> None:
        self._reply = Reply(
            status_code=self._status_code,
            headers=self._headers,
            body=bytes(self._body) if has_body else None,
            truncated=truncated,
            detail=detail,
        )

    def _break_off(self, detail: str) -> None:
        self._is_clean = False
        self._end(truncated=True, detail=detail)

    def _fail(self, failure: AttemptFailure, detail: str) -> None:
        self._is_clean = False
        self._reply = Reply(failure=failure, detail=detail)


def _has_proper_lines(data: bytes | bytearray) -> bool:
    """Whether all lines end in CR LF: a CR or LF by itself ends a line to some parsers and not to others."""
    return data.count(b"\n") == data.count(b"\r") == data.count(b"\r\n")


def _within_bounds(headers: dict[str, str]) -> Headers:
    kept: dict[str, str] = {}
    room = _MAX_KEPT_FIELD_BYTES
    for name, value in headers.items():
        room -= len(name) + len(value)
        if room < 0 or len(kept) == _MAX_KEPT_FIELDS:
            break
        kept[name] = value
    return Headers(kept)


def _members(field: str | None) -> set[str]:
    """The members of a field that is a list (RFC 9110, section 5.6.1), in lower case."""
    return set() if field is None else {member.strip(_BLANKS).lower() for member in field.split(",")}
