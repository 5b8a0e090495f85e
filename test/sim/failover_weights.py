"""Weights that go from group to group in the simulated world: the real course and driver, with simulated groups."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException

from frontend_fakes import FakeChannel
from sglang_kevlar.frontend.rolling_weights import RollingWeights

if TYPE_CHECKING:
    from failover_world import Sim

#: virtual seconds for which a group is waited for
TIMEOUT = 5.0


@dataclass(frozen=True)
class Roll:
    """To a group: take these weights."""

    weights: int


@dataclass(frozen=True)
class Rolled:
    success: bool


@dataclass(frozen=True)
class Update:
    """What `RollingWeights` needs of upstream's message."""

    model_path: str
    weight_version: str


class SimWeights:
    """`ControlRequests` and `RunTimeChanges` as `RollingWeights` sees them. Weights are numbers."""

    def __init__(self, sim: Sim) -> None:
        self.sim = sim
        self.rolling: RollingWeights | None = None
        self.paused = False
        self.before = 0
        self.replayable = True
        self.asked: dict[tuple[int, int], asyncio.Future[bool]] = {}
        self.driver: Any = None

    @property
    def not_replayable(self) -> str | None:
        return None if self.replayable else "sim"

    @property
    def content(self) -> str:
        return str(self.sim.weights)

    def start(self, deadline: float) -> None:
        if self.driver is None:
            sim = self.sim
            groups: Any = sim.failover._groups
            control: Any = self
            self.driver = RollingWeights(sim.failover, groups, control, control, TIMEOUT, lambda update: None)
        self.replayable = self.sim.faults.chance(0.8)
        name = str(self.sim.newest + 1)
        try:
            self.driver.start(Update(name, name), str(self.sim.weights), deadline)
        except HTTPException:
            self.sim.faults.counts["weight update refused"] += 1

    def target(self) -> int:
        """For a group that starts."""
        rolling = self.rolling
        return self.before if rolling is not None and rolling.starts_with_old() else self.sim.weights

    # -- RunTimeChanges

    def begin_rolling(self, update: Update) -> None:
        self.before = self.sim.weights
        self.sim.weights = self.sim.newest = self.sim.newest + 1

    def end_rolling(self) -> None:
        self.sim.faults.counts["weights in all groups"] += self.driver._failure is None

    # -- ControlRequests

    def changes_under_way(self) -> bool:
        return False

    def check(self, request: Any, channels: Any) -> None: ...

    def awaits(self, member: tuple[int, int]) -> bool:
        return self.sim.faults.chance(0.1)

    async def take_new_weights(self, channel: FakeChannel) -> str | None:
        member = channel.group, channel.epoch
        self.asked[member] = asyncio.get_running_loop().create_future()
        self.sim.failover.send(channel, Roll(self.sim.weights))
        try:
            async with asyncio.timeout(TIMEOUT):
                success = await self.asked[member]
        except (TimeoutError, ConnectionError):
            return "no answer"
        finally:
            del self.asked[member]
        if success:
            channel.weights = str(self.sim.weights)
        return None if success else "cannot be loaded"

    def answer(self, group: int, epoch: int, reply: Rolled) -> None:
        future = self.asked.get((group, epoch))
        if future is not None and not future.done():
            future.set_result(reply.success)

    def group_lost(self, group: int, epoch: int) -> None:
        future = self.asked.get((group, epoch))
        if future is not None and not future.done():
            future.set_exception(ConnectionError())

    def take_back(self, update: Update) -> None:
        self.sim.faults.counts["weights taken back"] += 1
        self.sim.weights = self.before
        up = [channel for channel in self.sim.failover.channels.values() if channel.up_to_date]
        assert {channel.weights for channel in up} <= {str(self.before)}, "weights that were taken back are served"
