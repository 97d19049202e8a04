"""The door of our stores: what the host's own rules say about a request that is about to be stored."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from typing import Final

from callbackq.core.limits import RequestLimits
from callbackq.core.models import CallbackRequest
from callbackq.core.validation import Fault
from callbackq.errors import InvalidRequestError

__all__ = ["ORDINARY_LIMITS", "ask", "check_accept"]

ORDINARY_LIMITS: Final = RequestLimits()


def check_accept(accept: object) -> Iterator[Fault]:
    # A class can be called, too: it would build an object of each request, and refuse none.
    if not callable(accept) or isinstance(accept, type):
        yield "accept", "must be a function of a CallbackRequest, such as a RequestLimits"


def ask(
    accept: Callable[[CallbackRequest], None],
    requests: Sequence[tuple[str | None, CallbackRequest]],
    *,
    stored: Container[str],
) -> None:
    """
    Ask about each request that is new, in their order.

    To be called before anything is written, in the caller's own thread and without a lock: the host's function may
    take its time, and may read the store.

    Args:
        accept: the host's rules.
        requests: what is to be stored, each with its id, or ``None`` for a new one.
        stored: ids that were found in the store. Who repeats a call must learn that it had worked; a refusal would say
            that nothing is stored.

    Raises:
        Exception: what the rules raise, as it is. Of a batch, a note says which request it was.
        InvalidRequestError: the rules answered something.
    """
    asked: set[str] = set()
    for index, (id, request) in enumerate(requests):
        if id is not None and (id in stored or id in asked):
            continue
        if id is not None:
            asked.add(id)
        try:
            _ask_one(accept, request)
        except Exception as error:
            if len(requests) > 1:
                error.add_note(f"requests[{index}]")
            raise


def _ask_one(accept: Callable[[CallbackRequest], None], request: CallbackRequest) -> None:
    answer: object = accept(request)  # type: ignore[func-returns-value]  # see below
    # False, or the coroutine of an async function, was meant to refuse, and would let everything in.
    if answer is not None:
        raise InvalidRequestError([("accept", "must return nothing: to refuse a request, raise NotAcceptedError")])
