"""The channel of a group that joined: its session, as far as it belongs to one incarnation."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from sglang.srt.managers.load_snapshot import LoadSnapshot

from sglang_kevlar.cluster import wire
from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.frontend.channels import CannotSend, Channel

#: outputs that may wait for the actor; more than that it does not keep up with, and the group is given up
MAX_WAITING = 65_536


class SessionChannel(Channel):
    """The session hands it what arrived, decoded and in order, until it is closed."""

    remote = True

    def __init__(
        self,
        group: int,
        epoch: int,
        capacity: int,
        place: Place,
        send: Callable[[bytes], None],
        load: Callable[[], LoadSnapshot | None],
        is_primary: Callable[[], bool] = lambda: False,
        may_change: bool = True,
    ) -> None:
        """``send`` may end the session when the other end does not read, and raise CannotSend. ``load``: what the group
        last said of its load. ``is_primary``: whether this frontend is the first of those it joined. ``may_change``:
        whether that one may change it."""
        super().__init__(group, epoch, capacity, place)
        self._send = send
        self.load = load
        self._is_primary = is_primary
        self._may_change = may_change
        self._waiting: deque[Any] = deque()
        self._arrived = asyncio.Event()

    def tells_plans(self) -> bool:
        return self._is_primary()

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
        self._send(payload)

    def refusal(self, message: Any) -> str | None:
        kind = type(message)
        if not wire.reads(message) and not (self._may_change and self._is_primary()):
            only = "only from the first frontend of its --join, and not from one with --peers"
            return f"worker group {self.group} takes {kind.__name__} {only}"
        try:
            wire.encode(message)
        except wire.NotForNetwork as reason:
            return f"worker group {self.group} is on another host: {reason}"
        return None

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

    def close(self) -> None:
        self.closed = True
        self._waiting.clear()
        self._arrived.set()
