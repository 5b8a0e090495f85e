"""What the page shows beside the status: states of the groups over time, and latencies. GET /kevlar/history."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeAlias

from sglang_kevlar.observability.latency import RollingLatency
from sglang_kevlar.observability.timeline import WINDOW, Timeline

States: TypeAlias = list[tuple[int, str, int]]

#: seconds between two looks at the states; what membership says is looked at as it comes
LOOK_INTERVAL = 0.25


class History:
    def __init__(self, latency: RollingLatency, states: Callable[[], States]) -> None:
        """``states``: id, state and epoch of each group, as the status says them."""
        self._latency = latency
        self._states = states
        self._timeline = Timeline()
        #: seconds are counted by this process's clock: those of another mean something else
        self._instance = uuid.uuid4().hex

    def look(self) -> None:
        self._timeline.observe(time.monotonic(), self._states())

    async def watch(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_INTERVAL)

    def json(self, instance: str, after: int) -> dict[str, Any]:
        """``after``: the last second that the asker has, of ``instance``; of another one it has none."""
        now = time.monotonic()
        return {
            "instance": self._instance,
            "now": round(now, 3),
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "window_s": WINDOW,
            "groups": self._timeline.changes(),
            "rolling": self._latency.rolling(now),
            "seconds": self._latency.seconds(now, after if instance == self._instance else -1),
        }
