"""What one endpoint sent as its response, event by event, for clients that read it at their own pace."""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

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

    __slots__ = ("_events", "_positions", "complete", "size", "start")

    def __init__(self) -> None:
        self._events: list[bytes] = []
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
        """Returns by how much it grew."""
        self._events.append(event)
        self._positions.append(position)
        grown = len(event) + EVENT_OVERHEAD
        self.size += grown
        return grown

    def read(self, index: int, most: int) -> tuple[bytes, int]:
        """Events from ``index`` on as one piece of about ``most`` bytes, at least one; and the index behind them.

        Empty when there is none yet. Raises Discarded.
        """
        first = index - self.start
        if first < 0:
            raise Discarded
        behind, size = first, 0
        while behind < len(self._events) and (behind == first or size + len(self._events[behind]) <= most):
            size += len(self._events[behind])
            behind += 1
        return b"".join(self._events[first:behind]), self.start + behind

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
        """Lets go of the events before ``index``. Returns by how much it shrank."""
        count = index - self.start
        if count <= 0:
            return 0
        shrunk = sum(len(event) + EVENT_OVERHEAD for event in self._events[:count])
        del self._events[:count], self._positions[:count]
        self.start = index
        self.size -= shrunk
        return shrunk
