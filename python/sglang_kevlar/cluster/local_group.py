"""The group of a gateway: watched, connected to, and spoken to as a frontend does with a group of its own host."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import msgspec
import zmq.asyncio
from sglang.srt.managers.io_struct import AbortReq

from sglang_kevlar.control.membership import Event, GroupLost, GroupReady
from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.frontend.channels import ChannelFull, GroupChannel
from sglang_kevlar.frontend.loads import GroupLoadReader
from sglang_kevlar.frontend.monitor import GroupMonitor
from sglang_kevlar.frontend.shadow_status import ShadowReader
from sglang_kevlar.protocol.cluster import GroupState
from sglang_kevlar.protocol.group import GroupPhase, LossKind
from sglang_kevlar.protocol.launch import LaunchPlan, Paths

logger = logging.getLogger(__name__)

#: the only one of this launch
GROUP = 0


class LocalGroup:
    """``on_message`` is called with each message of the group, and its epoch; ``on_change`` when its state is another,
    after all messages that came before that, and before any that came after it."""

    def __init__(
        self, plan: LaunchPlan, paths: Paths, on_message: Callable[[int, Any], None], on_change: Callable[[], None]
    ) -> None:
        assert plan.join is not None
        self._plan = plan
        self._paths = paths
        self._on_message = on_message
        self._on_change = on_change
        self._monitor = GroupMonitor(paths, plan.kevlar, self._on_event)
        self._context = zmq.asyncio.Context()
        self._shadows = ShadowReader(plan, paths)
        self._channels: dict[int, GroupChannel] = {}
        self._loads = GroupLoadReader(plan, SimpleNamespace(channels=self._channels))  # type: ignore[arg-type]
        self._init_info: dict[str, object] = {}
        self._endpoints: list[str] = []
        self._kind: LossKind | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        #: what went wrong in a task: the gateway ends with it
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def start(self) -> None:
        self._monitor.start()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for channel in self._channels.values():
            channel.close()
        self._monitor.close()

    @property
    def serving_epoch(self) -> int | None:
        """The incarnation that takes requests now."""
        channel = self._channels.get(GROUP)
        return channel.epoch if channel is not None and channel.up_to_date else None

    def state(self) -> GroupState:
        group = self._monitor.membership.group(GROUP)
        ready = self.serving_epoch == group.epoch
        phase: GroupPhase = "ready" if ready else "down" if group.stage == "down" else "starting"
        pids = {name: pid for name, pid in self._pids().items() if pid is not None}
        load = self._loads.read(GROUP) if ready else None
        join = self._plan.join
        assert join is not None
        return GroupState(
            epoch=group.epoch,
            phase=phase,
            init_info=self._init_info if ready else None,
            cause="" if ready else group.cause,
            kind=self._kind if phase == "down" else None,
            suspicions=list(group.watch.suspicions),
            pids=pids,
            role="standby" if join.standby else "active",
            loads=[] if load is None else [msgspec.to_builtins(load)],
            shadow=self._shadows.read(GROUP, group.epoch),
            shadow_endpoints=self._endpoints if ready else [],
        )

    def send(self, message: Any) -> None:
        """To the incarnation that serves. A group that does not read is given up."""
        channel = self._channels[GROUP]
        try:
            channel.send(message)
        except ChannelFull as full:
            self.kill(channel.epoch, str(full))

    def flush(self) -> None:
        """Hand on what has already arrived."""
        channel = self._channels.get(GROUP)
        if channel is not None and channel.up_to_date:
            for message in channel.drain():
                self._on_message(channel.epoch, message)

    def kill(self, epoch: int, cause: str, planned: bool = False) -> None:
        self._monitor.kill(GROUP, epoch, cause, planned)

    def _pids(self) -> dict[str, int | None]:
        pids = self._monitor.snapshot()[0]["pids"]
        ranks = {f"rank{rank}": pid for rank, pid in enumerate(pids["ranks"])}
        return {
            "launcher": os.getppid(),
            "gateway": os.getpid(),
            "supervisor": pids["supervisor"],
            "detokenizer": pids["detokenizer"],
            **ranks,
        }

    def _on_event(self, event: Event) -> None:
        if isinstance(event, GroupReady):
            assert not self._channels, "the group is attached twice"
            capacity = int(event.init_info.get("max_total_num_tokens") or 0)  # type: ignore[call-overload]
            place = Place(str(GROUP))
            channel = GroupChannel(self._context, self._paths, GROUP, event.epoch, capacity, place)
            self._endpoints = event.shadow_endpoints
            self._channels[GROUP] = channel
            self._init_info = event.init_info
            self._spawn(self._attach(channel))
        elif isinstance(event, GroupLost):
            self.flush()
            self._kind = event.kind
            channel_lost = self._channels.pop(GROUP, None)
            if channel_lost is not None:
                channel_lost.close()
            logger.warning("the group (epoch %d) is lost: %s", event.epoch, event.cause)
            self._on_change()

    async def _attach(self, channel: GroupChannel) -> None:
        if not await channel.connected():
            self.kill(channel.epoch, "did not connect to the gateway after it became ready")
            return
        if channel.closed:
            return
        # Requests of a gateway that died: it has no sessions any more.
        channel.send(AbortReq(abort_all=True))
        channel.up_to_date = True
        logger.info("the group (epoch %d) is ready", channel.epoch)
        self._on_change()
        while not channel.closed:
            await channel.arrival()
            if not channel.closed:
                self._on_message(channel.epoch, channel.take())
            # A message that is already there does not suspend: let the others of this loop run.
            await asyncio.sleep(0)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.failed.done():
            self.failed.set_exception(error)
