"""What clients waited for their tokens, second by second, for the last minutes. Pure: time is passed in."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from typing import Any

#: seconds that are kept; with no traffic in a second there is nothing of it
WINDOW = 600
#: seconds over which `rolling` looks
ROLLING = 60
#: upper bounds of the counted classes, in seconds: 1 ms to a minute, each a quarter more than the one before
BOUNDS = tuple(0.001 * 1.25**i for i in range(50))


class _Second:
    __slots__ = ("first_max", "firsts", "gap_max", "gaps", "second", "tokens")

    def __init__(self, second: int) -> None:
        self.second = second
        self.tokens = 0
        #: of first tokens, by class
        self.firsts = [0] * (len(BOUNDS) + 1)
        self.first_max = 0.0
        #: of later tokens, by class
        self.gaps = [0] * (len(BOUNDS) + 1)
        self.gap_max = 0.0


class RollingLatency:
    """``now``: monotonic seconds, not running backwards. Called for each output of a request."""

    def __init__(self) -> None:
        self._current = _Second(-1)
        self._past: deque[_Second] = deque(maxlen=WINDOW)

    def tokens(self, now: float, waited: float, count: int, first: bool) -> None:
        """A request got ``count`` tokens at once, ``waited`` seconds after those before, or after it came.

        As upstream counts it: of several tokens each took its share of the time. The longest wait is not shared out:
        it is what a client saw.
        """
        current = self._current
        second = int(now)
        if second != current.second:
            current = self._turn(second)
        current.tokens += count
        if first:
            current.firsts[bisect_left(BOUNDS, waited)] += 1
            if waited > current.first_max:
                current.first_max = waited
        else:
            current.gaps[bisect_left(BOUNDS, waited / count)] += count
            if waited > current.gap_max:
                current.gap_max = waited

    def _turn(self, second: int) -> _Second:
        if self._current.tokens:
            self._past.append(self._current)
        self._current = _Second(second)
        return self._current

    def seconds(self, now: float, after: int) -> list[list[Any]]:
        """Those that are over and later than ``after``: second, tokens, time to first token (p50, longest) and
        between tokens (p50, p99, longest wait), in ms; None where there were none."""
        return [
            [
                one.second,
                one.tokens,
                _quantile(one.firsts, 0.5, one.first_max),
                _ms(one.firsts, one.first_max),
                _quantile(one.gaps, 0.5, one.gap_max),
                _quantile(one.gaps, 0.99, one.gap_max),
                _ms(one.gaps, one.gap_max),
            ]
            for one in self._over(now, WINDOW)
            if one.second > after
        ]

    def rolling(self, now: float) -> dict[str, Any]:
        """Over the last ROLLING whole seconds."""
        recent = list(self._over(now, ROLLING))
        firsts = [sum(counts) for counts in zip(*(one.firsts for one in recent), strict=True)] if recent else []
        gaps = [sum(counts) for counts in zip(*(one.gaps for one in recent), strict=True)] if recent else []
        first_max = max((one.first_max for one in recent), default=0.0)
        gap_max = max((one.gap_max for one in recent), default=0.0)
        return {
            "seconds": ROLLING,
            "tokens_per_s": round(sum(one.tokens for one in recent) / ROLLING, 1),
            "first_token_ms": _summary(firsts, first_max),
            "inter_token_ms": _summary(gaps, gap_max),
        }

    def _over(self, now: float, seconds: int) -> Iterator[_Second]:
        last = int(now)
        for one in (*self._past, self._current):
            if last - seconds <= one.second < last and one.tokens:
                yield one


def _summary(counts: list[int], longest: float) -> dict[str, float | None]:
    return {
        "p50": _quantile(counts, 0.5, longest),
        "p99": _quantile(counts, 0.99, longest),
        "max": _ms(counts, longest),
    }


def _quantile(counts: list[int], share: float, longest: float) -> float | None:
    """The upper bound of the class in which it is, in ms: at most a quarter too much."""
    total = sum(counts)
    if not total:
        return None
    wanted, seen = share * total, 0
    for bound, count in zip(BOUNDS, counts, strict=False):
        seen += count
        if seen >= wanted:
            return round(min(bound, longest) * 1e3, 2)
    return round(longest * 1e3, 2)


def _ms(counts: list[int], longest: float) -> float | None:
    return round(longest * 1e3, 2) if any(counts) else None
