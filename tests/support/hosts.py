"""
The hostile receivers, listening: one host for each behaviour.

A behaviour is chosen by the host name (``drip-body.hostile.example``), so that to the sender each is a host of its
own, with look-ups, limits and kept connections of its own. Whatever a host has done before, a request for ``/own`` it
answers properly, with the id of that very callback: who gets another's answer shows it.

Behaviours that begin with the connection, before there is a name to read, have a port of their own; the others share
one for http and one for https.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Final, Self

import trustme
from attrs import field, frozen

from callbackq.transport.tls import CHEAP_CIPHERS
from support.hostile import DOMAIN, behaviours, wildcard
from support.receivers import Conversation, Receiver, full_listener

__all__ = ["OWN_STATUS", "HostileHosts", "HostileReceivers"]

OWN_STATUS: Final = 203
"""The status of an answer that holds the id of its own callback. No behaviour says it."""

_OWN_PATH: Final = "/own"


@frozen(kw_only=True)
class HostileHosts:
    """
    Where the hostile receivers are, also for another process.

    Attributes:
        ports: of ``"http"``, ``"https"`` and the behaviours that have their own.
        authority: the certificate to trust, in PEM.
        asked: every host that was looked up, each time.
    """

    ports: Mapping[str, int]
    authority: str
    asked: list[str] = field(factory=list)

    def url(self, name: str, scheme: str) -> str:
        """Where to meet a behaviour."""
        return f"{scheme}://{name}.{DOMAIN}:{self.ports.get(name) or self.ports[scheme]}/hook"

    def own_url(self, name: str, scheme: str) -> str:
        """Where the same host answers properly."""
        return f"{scheme}://{name}.{DOMAIN}:{self.ports[scheme]}{_OWN_PATH}"

    def resolve(self, host: str, port: int) -> list[str]:
        """A resolver that knows these hosts and no others."""
        self.asked.append(host)
        return ["127.0.0.1"] if host.endswith(f".{DOMAIN}") else []

    def client_tls(self) -> ssl.SSLContext:
        """A client's context that trusts their authority and nobody else."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.set_ciphers(CHEAP_CIPHERS)
        context.load_verify_locations(cadata=self.authority)
        return context


class HostileReceivers:
    """
    All behaviours, listening. A context manager.

    Attributes:
        hosts: where they are.
        canary: a receiver that nobody must ever connect to.
    """

    hosts: HostileHosts
    canary: Receiver

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            self.canary = self._open(opened, Receiver())
            self._behaviours = behaviours(self.canary.url("/taken"))
            authority = trustme.CA()
            ports = {
                "http": self._open(opened, Receiver(self._serve)).port,
                "https": self._open(opened, Receiver(self._serve, tls=wildcard(authority))).port,
                "never-accepts": opened.enter_context(full_listener()),
            }
            for name, one in self._behaviours.items():
                if one.begins_with == "connection" and name not in ports:
                    context = one.tls(authority) if one.tls else None
                    ports[name] = self._open(opened, Receiver(one.act, tls=context)).port
            self.hosts = HostileHosts(ports=ports, authority=authority.cert_pem.bytes().decode())
            self._opened = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def _open(self, opened: ExitStack, receiver: Receiver) -> Receiver:
        opened.callback(receiver.close)
        return receiver

    def _serve(self, conversation: Conversation) -> None:
        while head := conversation.read_head():
            if _OWN_PATH in head.line:
                conversation.read_body()
                conversation.send(own_answer(head.fields["webhook-id"]))
                continue
            behaviour = self._behaviours[head.fields["host"].partition(".")[0]]
            if behaviour.begins_with == "head" or conversation.read_body():
                behaviour.act(conversation)


def own_answer(callback_id: str) -> bytes:
    """An answer that can be told from every other callback's."""
    return b"HTTP/1.1 %d Own\r\nContent-Length: %d\r\n\r\n%s" % (OWN_STATUS, len(callback_id), callback_id.encode())
