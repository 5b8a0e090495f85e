"""Exponential back-off between restarts. No clock of its own: the caller says how long the last run was healthy."""

from __future__ import annotations


class Backoff:
    """Delays of ``base * 2**n`` seconds, at most ``cap``; the count starts again after a healthy period."""

    def __init__(self, base: float, cap: float, healthy_after: float | None = None) -> None:
        """``healthy_after``: seconds of health that forgive earlier failures (default: ``cap``)."""
        if not 0 <= base <= cap:
            raise ValueError(f"0 <= base <= cap does not hold for base={base}, cap={cap}")
        self._base = base
        self._cap = cap
        self._healthy_after = cap if healthy_after is None else healthy_after
        self._delay = base

    def failed(self, healthy_for: float) -> float:
        """Seconds to wait after a run that was healthy for ``healthy_for`` seconds (0: it never was)."""
        if healthy_for > 0 and healthy_for >= self._healthy_after:
            self._delay = self._base
        delay = self._delay
        self._delay = min(self._cap, delay * 2)
        return delay
