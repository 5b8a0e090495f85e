"""What one endpoint sent as its response, event by event, for clients that read it at their own pace."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from sglang_kevlar.control.event_delta import Delta, decode, encode

#: longer events are kept as what has changed since the one before; every so many is kept whole
_LONG = 1024
_WHOLE_EVERY = 32
#: what a list, a bytes object and a position take beside the bytes themselves
EVENT_OVERHEAD = 160


class Position(NamedTuple):
    """Where an event is in its stream: output tokens its endpoint had seen, and how many events it had sent since."""

    tokens: int
    number: int


class Discarded(Exception):
    """The events at this index are not kept any more."""


class EventLog:
    """Events have indices from 0 on, and positions that only grow. Those before ``start`` are gone."""

    __slots__ = ("_deltas", "_events", "_positions", "_tail", "complete", "size", "start")

    def __init__(self) -> None:
        self._events: list[bytes] = []
        #: the last event, if it is a long one; and how many deltas there are at the end
        self._tail = b""
        self._deltas = 0
        self._positions: list[Position] = []
        #: index of the oldest event that is still there
        self.start = 0
        #: bytes that it takes in memory
        self.size = 0
        #: nothing follows
        self.complete = False

    @property
    def end(self) -> int:
        """Index behind the last event."""
        return self.start + len(self._events)

    @property
    def last(self) -> Position | None:
        return self._positions[-1] if self._positions else None

    def append(self, event: bytes, position: Position) -> int:
        """Returns by how much it grew in memory, which may be negative."""
        stored, tail = event, event if len(event) > _LONG else b""
        if tail and self._tail and self._events and self._deltas < _WHOLE_EVERY:
            stored = encode(self._tail, event) or event
        self._deltas = self._deltas + 1 if isinstance(stored, Delta) else 0
        self._events.append(stored)
        self._positions.append(position)
        grown = len(stored) + EVENT_OVERHEAD + len(tail) - len(self._tail)
        self._tail = tail
        self.size += grown
        return grown

    def read(self, index: int, most: int) -> tuple[bytes, int]:
        """Events from ``index`` on as one piece of about ``most`` bytes, at least one; and the index behind them.

        Empty when there is none yet. Raises Discarded.
        """
        if index < self.start:
            raise Discarded
        events: list[bytes] = []
        size = 0
        for event in self._whole(index - self.start):
            if events and size + len(event) > most:
                break
            events.append(event)
            size += len(event)
        return b"".join(events), index + len(events)

    def _whole(self, first: int) -> Iterator[bytes]:
        if self._tail and first == len(self._events) - 1:
            yield self._tail
            return
        begin = first
        while begin < len(self._events) and isinstance(self._events[begin], Delta):
            begin -= 1
        event = b""
        for number in range(begin, len(self._events)):
            stored = self._events[number]
            event = decode(event, stored) if isinstance(stored, Delta) else stored
            if number >= first:
                yield event

    def from_position(self, position: Position) -> int:
        """Index of the first event at or behind it."""
        return self.start + bisect_left(self._positions, position)

    def behind(self, position: Position) -> int | None:
        """Index behind the event of exactly this position; None when there is no such event."""
        index = bisect_left(self._positions, position)
        if index == len(self._positions) or self._positions[index] != position:
            return None
        return self.start + index + 1

    def discard(self, index: int) -> int:
        """Lets go of the events before ``index``. Returns by how much it shrank in memory, which may be negative."""
        count = index - self.start
        if count <= 0:
            return 0
        before = self.size
        if count < len(self._events) and isinstance(self._events[count], Delta):
            whole = next(self._whole(count))
            self.size += len(whole) - len(self._events[count])
            self._events[count] = whole
        elif count == len(self._events):
            self.size -= len(self._tail)
            self._tail = b""
        self.size -= sum(len(event) + EVENT_OVERHEAD for event in self._events[:count])
        del self._events[:count], self._positions[:count]
        self.start = index
        return before - self.size
