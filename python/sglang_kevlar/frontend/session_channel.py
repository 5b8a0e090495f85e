"""The channel of a group that joined: its session, as far as it belongs to one incarnation."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.load_snapshot import LoadSnapshot

from sglang_kevlar.cluster import wire
from sglang_kevlar.frontend.channels import CannotSend, Channel, ChannelFull

#: outputs that may wait for the actor; more than that it does not keep up with, and the group is given up
MAX_WAITING = 65_536


class SessionChannel(Channel):
    """The session hands it what arrived, decoded and in order, until it is closed."""

    remote = True

    def __init__(
        self, group: int, epoch: int, capacity: int, send: Callable[[bytes], bool], load: Callable[[], Any | None]
    ) -> None:
        """``send``: False when the other end does not read. ``load``: what the group last said of its load."""
        super().__init__(group, epoch, capacity)
        self._send = send
        self._load = load
        self._waiting: deque[Any] = deque()
        self._arrived = asyncio.Event()

    async def connected(self) -> bool:
        # It is ready, so its gateway has connected to it, and the session is what we are told that by.
        return not self.closed

    def send(self, message: Any) -> None:
        if self.closed:
            return
        try:
            payload = wire.encode(message)
        except wire.NotForNetwork as reason:
            raise CannotSend(str(reason)) from reason
        if not self._send(payload):
            raise ChannelFull(f"worker group {self.group} (epoch {self.epoch}) does not read its input")

    def put(self, message: Any) -> bool:
        """False: nothing more is taken."""
        if self.closed or len(self._waiting) >= MAX_WAITING:
            return False
        self._waiting.append(message)
        self._arrived.set()
        return True

    async def arrival(self) -> None:
        while not self._waiting and not self.closed:
            self._arrived.clear()
            await self._arrived.wait()

    def take(self) -> Any:
        return self._waiting.popleft()

    def drain(self) -> list[Any]:
        arrived = list(self._waiting)
        self._waiting.clear()
        return arrived

    def load(self) -> LoadSnapshot | None:
        return self._load()

    def close(self) -> None:
        self.closed = True
        self._waiting.clear()
        self._arrived.set()
