"""Turns of a socket on an event loop, and a log that a flood of bad frames does not fill."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from sglang_kevlar.control.session import TICK

#: seconds between two lines of one kind
LOG_INTERVAL = 1.0


class RareLog:
    """One line per kind and second. Kinds are few and ours; what others sent is no kind."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._at: dict[str, float] = {}

    def __call__(self, kind: str, message: str, *args: object, exc_info: bool = False) -> None:
        now = time.monotonic()
        if now - self._at.get(kind, -LOG_INTERVAL) >= LOG_INTERVAL:
            self._at[kind] = now
            self._logger.warning(message, *args, exc_info=exc_info)


class Driver:
    """Calls ``turn`` on the event loop when one of its files becomes readable, when asked to, and every ``TICK``.

    ``turn`` tells whether there may be more to do; the others of the loop have their turn before it does it.
    """

    def __init__(self, turn: Callable[[], bool], log: RareLog) -> None:
        self._turn = turn
        self._log = log
        self._loop: asyncio.AbstractEventLoop | None = None
        self._fds: list[int] = []
        self._soon: asyncio.Handle | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        for fd in self._fds:
            self._loop.add_reader(fd, self.soon)
        self._tick()

    def watch(self, fds: list[int]) -> None:
        """These files from now on, instead of those before. To be called while those are still open."""
        if self._loop is not None:
            for fd in self._fds:
                self._loop.remove_reader(fd)
            for fd in fds:
                self._loop.add_reader(fd, self.soon)
            self.soon()
        self._fds = fds

    def soon(self) -> None:
        """After each send, too: ZMQ's files tell edges, and a send may have taken one."""
        if self._loop is not None and self._soon is None:
            self._soon = self._loop.call_soon(self._run)

    def stop(self) -> None:
        self.watch([])
        for handle in (self._soon, self._timer):
            if handle is not None:
                handle.cancel()
        self._loop = self._soon = self._timer = None

    def _run(self) -> None:
        self._soon = None
        try:
            more = self._turn()
        except Exception:
            # Not for ever in a circle: what is left is looked at in the next tick.
            self._log("turn", "a turn of the cluster's socket", exc_info=True)
            more = False
        if more:
            self.soon()

    def _tick(self) -> None:
        assert self._loop is not None
        self._timer = self._loop.call_later(TICK, self._tick)
        self.soon()
