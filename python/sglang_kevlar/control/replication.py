"""This frontend's records at its peers: an output is given to its endpoint, and so to a client, when they all have it.

That makes what a client was told a prefix of what every peer knows, so whichever of them goes on with a request goes on
exactly. A peer that was lost, or does not keep up, is waited for no longer; then the next best holds: what is
not at a peer that goes on is refused there (`control.lineage`), never made anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator

from sglang_kevlar.protocol.records import (
    Alone,
    Complete,
    Dropped,
    Ended,
    Name,
    Opened,
    Record,
    Yielded,
    name_of,
    size_of,
    without_content,
)

#: bytes published since a peer joined that it has not acknowledged: behind that it does not keep up
MAX_BEHIND = 64 << 20
#: bytes of all records. A peer that joins is sent them at once, and with those above a session must take them unread
#: (`control.session.MAX_UNSEEN_BYTES`)
MAX_RECORDS = 128 << 20


class _Peer:
    def __init__(self, position: int) -> None:
        #: position and bytes of what it has not acknowledged
        self.unacknowledged: deque[tuple[int, int]] = deque()
        #: the sum of these bytes
        self.behind = 0
        self.sent = 0
        #: the last position that it has
        self.has = -2
        #: it is waited for from when it has what there was as it joined; before, it would hold everything up
        self.waited_from = position - 1
        self.waited = False


class Replication:
    """Positions count the records of this frontend from 0, in the order in which all peers get them."""

    def __init__(self, max_behind: int = MAX_BEHIND) -> None:
        self._max_behind = max_behind
        #: of each request, in order
        self._records: dict[Name, list[Record]] = {}
        self._next = 0
        self._peers: dict[str, _Peer] = {}
        self.bytes = 0
        #: everything before this position may be told to clients: all peers that are waited for have it
        self.safe = 0

    @property
    def current(self) -> list[str]:
        """Peers that have all that clients were told."""
        return [name for name, peer in self._peers.items() if peer.waited and peer.has + 1 >= self.safe]

    def publish(self, record: Record) -> int:
        """The position of ``record``, which goes to every peer. It is safe as soon as `safe` is larger."""
        name = name_of(record)
        if isinstance(record, Opened):
            assert name not in self._records, f"request {name} is recorded already"
            self._records[name] = []
        elif isinstance(record, Yielded):
            assert record.number == len(self._records[name]) - 1, f"outputs of {name} out of order"
        position = self._next
        self._next += 1
        size = size_of(record)
        if isinstance(record, Dropped):
            self.bytes -= _bytes(self._records.pop(name))
        elif isinstance(record, Alone):
            before = self._records[name]
            assert isinstance(before[0], Opened) and not is_alone(before)
            kept: list[Record] = [without_content(before[0]), record]
            self._records[name] = kept
            self.bytes += _bytes(kept) - _bytes(before)
        else:
            self._records[name].append(record)
            self.bytes += size
        for peer in self._peers.values():
            self._sent(peer, position, size)
        self._update_safe()
        return position

    def largest(self, limit: int) -> Name | None:
        """Which request is to go on alone, when all of them take more than ``limit`` bytes."""
        if self.bytes <= limit:
            return None
        candidates = [name for name, records in self._records.items() if not is_alone(records)]
        return max(candidates, key=lambda name: _bytes(self._records[name]), default=None)

    def joined(self, name: str) -> list[Record | Complete]:
        """A session of a peer begins, in place of one before. Returns what it is sent first, before anything that is
        published later."""
        peer = self._peers[name] = _Peer(self._next)
        snapshot = [record for records in self._records.values() for record in records]
        for _ in snapshot:
            self._sent(peer, -1, 0)
        # Only with this does it have all that there was.
        self._sent(peer, self._next - 1, 0)
        return [*snapshot, Complete()]

    def left(self, name: str) -> None:
        """Its session ended. What waits for it waits no longer."""
        self._peers.pop(name, None)
        self._update_safe()

    def acknowledged(self, name: str, count: int) -> None:
        """The peer has the first ``count`` messages of its session. Raises ValueError for more than it was sent."""
        peer = self._peers[name]
        if count > peer.sent:
            raise ValueError(f"frontend {name} acknowledges {count} records of {peer.sent}")
        while peer.unacknowledged and peer.sent - len(peer.unacknowledged) < count:
            position, size = peer.unacknowledged.popleft()
            peer.behind -= size
            peer.has = max(peer.has, position)
        peer.waited |= peer.has >= peer.waited_from
        self._update_safe()

    def too_slow(self) -> list[str]:
        """Peers that do not keep up: their sessions are to be ended."""
        return [name for name, peer in self._peers.items() if peer.behind > self._max_behind]

    def _sent(self, peer: _Peer, position: int, size: int) -> None:
        peer.unacknowledged.append((position, size))
        peer.behind += size
        peer.sent += 1

    def _update_safe(self) -> None:
        # Not less than it was: what clients were told in the meantime, a peer that joined may still be behind of.
        everywhere = min((peer.has + 1 for peer in self._peers.values() if peer.waited), default=self._next)
        self.safe = max(self.safe, everywhere)

    def check(self) -> None:
        """Assert the invariants that hold between any two calls."""
        assert self.bytes == sum(size_of(record) for record in _all(self._records.values()))
        for peer in self._peers.values():
            assert peer.behind == sum(size for _, size in peer.unacknowledged)
            assert peer.has < self._next
        assert self.safe <= self._next
        for records in self._records.values():
            assert isinstance(records[0], Opened)
            assert not any(isinstance(record, Ended) for record in records[:-1])


def is_alone(records: list[Record]) -> bool:
    return len(records) > 1 and isinstance(records[1], Alone)


def _bytes(records: list[Record]) -> int:
    return sum(map(size_of, records))


def _all(lists: Iterable[list[Record]]) -> Iterator[Record]:
    return (record for records in lists for record in records)
