"""Groups that are drained: no new requests, and what they run is moved when its time is over."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

#: seconds between two tries to move what could not be moved: no other group serves, or it cannot be continued
RETRY = 1.0
#: seconds for which requests may end where they are, unless the operator says otherwise
DEFAULT_DEADLINE = 60.0
MAX_DEADLINE = 86_400.0


class Drains:
    """One waiting task per drained group. All of it is to be called on the event loop's thread."""

    def __init__(
        self,
        set_draining: Callable[[int, bool], None],
        move_away: Callable[[int], Awaitable[tuple[int, int]]],
        done: Callable[[asyncio.Task[None]], None],
    ) -> None:
        """``move_away``: see `Failover.move_away`. ``done`` is told of every task that ends, however it does."""
        self._set_draining = set_draining
        self._move_away = move_away
        self._done = done
        self._waiting: dict[int, asyncio.Task[None]] = {}
        self._deadlines: dict[int, float] = {}

    def drain(self, group: int, deadline: float) -> None:
        """What runs there may end there for ``deadline`` seconds; a later call replaces an earlier deadline."""
        self._cancel(group)
        self._set_draining(group, True)
        loop = asyncio.get_running_loop()
        self._deadlines[group] = loop.time() + deadline
        task = self._waiting[group] = loop.create_task(self._move(group, deadline))
        task.add_done_callback(self._done)

    def end(self, group: int) -> None:
        """It takes requests again."""
        self._cancel(group)
        self._deadlines.pop(group, None)
        self._set_draining(group, False)

    def moves_in(self, group: int) -> float | None:
        """Seconds until what the group runs is moved; None: it is not drained."""
        deadline = self._deadlines.get(group)
        return None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())

    def close(self) -> None:
        for group in list(self._waiting):
            self._cancel(group)

    async def _move(self, group: int, deadline: float) -> None:
        await asyncio.sleep(deadline)
        left = -1
        while left:
            moved, left = await self._move_away(group)
            if moved:
                logger.info("worker group %d is drained: %d requests moved, %d end there", group, moved, left)
            if left:
                await asyncio.sleep(RETRY)

    def _cancel(self, group: int) -> None:
        task = self._waiting.pop(group, None)
        if task is not None:
            task.cancel()
