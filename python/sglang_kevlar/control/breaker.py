"""A circuit breaker: what fails repeatedly is not tried for a time, but never given up for good. Pure."""

from __future__ import annotations


class Breaker:
    """Open after so many failures in a row, for ``shortest`` seconds; twice as long after each further one, at most
    ``longest``.

    So a way that never works is tried ever more rarely, at last once in ``longest``; and one that works again may be
    tried after no more time than it had been failing for and ``shortest``, and within ``longest`` in any case.
    """

    def __init__(self, failures: int, shortest: float, longest: float) -> None:
        if not (failures >= 1 and 0 < shortest <= longest):
            raise ValueError(f"{failures} failures, {shortest} to {longest} s: not a breaker")
        self._allowed = failures
        self._shortest = shortest
        self._longest = longest
        #: in a row
        self.failures = 0
        self._length = shortest
        self.open_until = float("-inf")

    def is_open(self, now: float) -> bool:
        return now < self.open_until

    def failed(self, now: float) -> None:
        self.failures += 1
        if self.failures >= self._allowed:
            self.open_until = now + self._length
            self._length = min(self._longest, 2 * self._length)

    def worked(self) -> None:
        self.failures, self._length, self.open_until = 0, self._shortest, float("-inf")
