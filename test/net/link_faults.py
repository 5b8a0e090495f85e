"""What happens to frames between two hosts: decided here, without a clock; done in ``wire.py``."""

from __future__ import annotations

import random
from dataclasses import dataclass, fields

#: seconds by which a frame that others overtake comes later than it would have
REORDER_LAG = 0.005
#: bytes that wait for a limited rate; what comes then is lost, as in a switch
RATE_QUEUE = 256 * 1024
#: bytes on their way at once; what comes then is lost
IN_FLIGHT = 16 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Faults:
    """Of one direction between two hosts. Times are seconds, shares 0 to 1."""

    #: nothing arrives, and nobody is told
    blocked: bool = False
    #: share of the frames that are lost
    drop: float = 0.0
    delay: float = 0.0
    #: up to so much more, for each frame; it keeps their order
    jitter: float = 0.0
    #: share of the frames that are overtaken by those behind them
    reorder: float = 0.0
    #: bytes a second; 0: as fast as it goes
    rate: float = 0.0
    #: for so long nothing arrives, every ``outage_every``, the first time at once
    outage: float = 0.0
    outage_every: float = 0.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 <= getattr(self, field.name) < float("inf"):
                raise ValueError(f"{field.name} must not be negative or infinite: {getattr(self, field.name)}")
        for name in ("drop", "reorder"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} is a share, 0 to 1: {getattr(self, name)}")
        if (self.outage > 0) != (self.outage_every > 0) or self.outage > self.outage_every:
            raise ValueError(f"an outage of {self.outage:g} s every {self.outage_every:g} s is none")


NONE = Faults()


class Path:
    """One direction between two hosts. Which frames are hit depends on the seed, and on how many came before while
    there were faults, only."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self.faults = NONE
        self._since = 0.0
        #: when the frame before is through the limited rate, and when the last one in order arrives
        self._sent = self._last = 0.0
        self.in_flight = 0
        self.passed = self.lost = 0

    def set(self, faults: Faults, now: float) -> None:
        """From the next frame on. What is on its way arrives, unless the path is blocked."""
        self.faults = NONE if faults == NONE else faults
        self._since = self._sent = now

    def enter(self, size: int, now: float) -> float | None:
        """When a frame that enters now arrives; None: it is lost. Each that has a time needs its ``leave``."""
        faults = self.faults
        if faults is NONE and not self.in_flight:
            self.in_flight = size
            return now
        # Always three: which frames are dropped does not change with the other faults.
        drop, jitter, reorder = self._random.random(), self._random.random(), self._random.random()
        lost = self._closed(now) or drop < faults.drop or self.in_flight + size > IN_FLIGHT
        due = None if lost else self._through(size, now)
        if due is None:
            self.lost += 1
            return None
        self.in_flight += size
        due = max(due + faults.delay + jitter * faults.jitter, self._last)
        if reorder < faults.reorder:
            return due + REORDER_LAG
        self._last = due
        return due

    def leave(self, size: int) -> bool:
        """A frame is at its end: whether it arrives. A blocked path has lost what was on its way."""
        self.in_flight -= size
        if self.faults.blocked:
            self.lost += 1
            return False
        self.passed += 1
        return True

    def _through(self, size: int, now: float) -> float | None:
        """When the frame has passed the limited rate; None: its queue is full."""
        if not self.faults.rate:
            return now
        start = max(now, self._sent)
        if (start - now) * self.faults.rate > RATE_QUEUE:
            return None
        self._sent = start + size / self.faults.rate
        return self._sent

    def _closed(self, now: float) -> bool:
        faults = self.faults
        return faults.blocked or (faults.outage > 0 and (now - self._since) % faults.outage_every < faults.outage)
