"""The source's end of a shadow link: what the target holds or will, and how much may be on its way.

The window is memory that the source writes and the target reads. Parcels take room in it in order and give it back in
order, when the target has acknowledged them, so the amount in flight is bounded by construction. When the target says
that something did not arrive as sent, or says nothing for too long, the link starts over under a new session: what is
known of the target then is what it says it holds, and the rest is sent again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sent:
    sequence: int
    #: first byte behind this parcel in the ring; room up to here is free when it is acknowledged
    end: int
    tokens: int


class WindowRing:
    """Room in a ring of ``size`` bytes. Parcels are contiguous: one that does not fit before the end starts at 0."""

    def __init__(self, size: int) -> None:
        assert size > 0
        self.size = size
        #: bytes ever taken and ever given back, gaps at the end of the ring included
        self._head = 0
        self._tail = 0

    @property
    def used(self) -> int:
        return self._head - self._tail

    def take(self, size: int) -> tuple[int, int] | None:
        """``(offset, end)`` of a contiguous piece, or None while there is no room. ``end`` is for `give_back`."""
        assert 0 < size <= self.size, f"a parcel of {size} bytes never fits into a window of {self.size}"
        if not self.used:
            self._head = self._tail = 0
        offset = self._head % self.size
        gap = self.size - offset if offset + size > self.size else 0
        if self.used + gap + size > self.size:
            return None
        self._head += gap + size
        return (offset + gap) % self.size, self._head

    def give_back(self, end: int) -> None:
        assert self._tail <= end <= self._head
        self._tail = end


class ShadowLink:
    """Bookkeeping of one session with one target."""

    def __init__(self, window: int, held: Iterable[bytes] = ()) -> None:
        """``window``: bytes. ``held``: keys that the target holds from before."""
        self.ring = WindowRing(window)
        #: keys that the target holds, or will when what is in flight has arrived
        self.known: set[bytes] = set(held)
        self._in_flight: deque[Sent] = deque()
        #: a plain number, because the scheduler's thread reads it while the sender's changes what is in flight
        self.in_flight_tokens = 0

    def missing(self, keys: Sequence[bytes], start: int) -> int:
        """The first of ``keys[start:]`` that the target does not have; ``len(keys)`` when it has all."""
        for position in range(start, len(keys)):
            if keys[position] not in self.known:
                return position
        return len(keys)

    def send(self, size: int, tokens: int, sequence: int) -> int | None:
        """Offset in the window for parcel ``sequence``, or None while there is no room."""
        assert not self._in_flight or sequence > self._in_flight[-1].sequence
        room = self.ring.take(size)
        if room is None:
            return None
        offset, end = room
        self._in_flight.append(Sent(sequence, end, tokens))
        self.in_flight_tokens += tokens
        return offset

    def acknowledge(self, sequence: int, gone: Iterable[bytes]) -> int:
        """Everything up to ``sequence`` arrived; ``gone``: keys the target evicted, or could not keep.

        Returns the tokens that were acknowledged. Other messages are numbered with the parcels, so
        ``sequence`` need not be one of a parcel.
        """
        tokens = 0
        while self._in_flight and self._in_flight[0].sequence <= sequence:
            sent = self._in_flight.popleft()
            self.ring.give_back(sent.end)
            tokens += sent.tokens
        self.in_flight_tokens -= tokens
        self.known.difference_update(gone)
        return tokens
