"""What may be on a disk after the power was cut: what was synced, and of the rest whatever chance has let through."""

from __future__ import annotations

import random
from collections.abc import Iterator

from attrs import define, field

from support.sqlite_vfs import Event

__all__ = ["Disk"]

_SECTOR_BYTES = 512


@define
class _Content:
    """A file, whatever it is called: as it was synced last, and what was done to it since."""

    synced: bytearray = field(factory=bytearray)
    since: list[Event] = field(factory=list)


class Disk:
    """
    One folder, as events make it.

    Nothing but a sync makes anything last. Until then each write may be on the disk or not, whole or in sectors, in
    whatever order; and so may each truncation, creation and deletion. What lies between the old end of a file and what
    came through is zeros, or garbage.

    Args:
        loses_syncs: a planted fault: the disk says that it has synced, and has not.
    """

    def __init__(self, *, loses_syncs: bool = False) -> None:
        self._loses_syncs = loses_syncs
        self._present: dict[str, _Content] = {}
        self._synced: dict[str, _Content] = {}
        # Names that were given or taken away since the folder was synced.
        self._since: list[tuple[str, _Content | None]] = []

    def apply(self, event: Event) -> None:
        """Let something happen."""
        match event.kind:
            case "open":
                if event.file not in self._present:
                    self._name(event.file, _Content())
            case "delete":
                if event.file in self._present:
                    self._name(event.file, None)
            case "write" | "truncate":
                self._present[event.file].since.append(event)
            case "sync" if not self._loses_syncs:
                content = self._present[event.file]
                for one in content.since:
                    _do(one, content.synced)
                content.since.clear()
            case "sync directory" if not self._loses_syncs:
                self._synced = dict(self._present)
                self._since.clear()

    def _name(self, file: str, content: _Content | None) -> None:
        self._since.append((file, content))
        if content is None:
            del self._present[file]
        else:
            self._present[file] = content

    def after_power_cut(self, chance: random.Random) -> dict[str, bytes]:
        """Give the files that are found when the power is back."""
        # All the way from a disk that had nothing in its cache to one that was just about to write all of it.
        share = chance.choice([0.0, 0.1, 0.5, 0.9, 1.0])
        files = dict(self._synced)
        for file, content in self._since:
            if chance.random() < share:
                if content is None:
                    files.pop(file, None)
                else:
                    files[file] = content
        return {file: bytes(_survivor(content, share, chance)) for file, content in files.items()}


def _survivor(content: _Content, share: float, chance: random.Random) -> bytearray:
    found = bytearray(content.synced)
    end = len(found)
    has_garbage = chance.random() < 0.2
    came_through = [event for event in content.since if chance.random() < share]
    for event in came_through:
        for part in _parts(event, share, chance):
            _do(part, found)
    if has_garbage:
        covered = [(event.at, event.at + len(event.data)) for event in came_through if event.kind == "write"]
        for at in range(end - end % _SECTOR_BYTES + _SECTOR_BYTES, len(found), _SECTOR_BYTES):
            if not any(begin <= at < finish for begin, finish in covered):
                found[at : at + _SECTOR_BYTES] = chance.randbytes(len(found[at : at + _SECTOR_BYTES]))
    return found


def _parts(event: Event, share: float, chance: random.Random) -> Iterator[Event]:
    """A write is torn now and then: some of its sectors are there, the others as they were."""
    if event.kind != "write" or share == 1.0 or chance.random() < 0.7:
        yield event
        return
    begin = event.at
    end = event.at + len(event.data)
    while begin < end:
        next_sector = min(begin - begin % _SECTOR_BYTES + _SECTOR_BYTES, end)
        if chance.random() < 0.5:
            yield Event("write", event.file, begin, event.data[begin - event.at : next_sector - event.at])
        begin = next_sector


def _do(event: Event, content: bytearray) -> None:
    size = event.at
    if len(content) < size:
        content.extend(bytes(size - len(content)))
    if event.kind == "truncate":
        del content[size:]
    else:
        content[event.at : event.at + len(event.data)] = event.data
