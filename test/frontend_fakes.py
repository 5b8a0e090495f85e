"""What the frontend's actor (`frontend.failover.Failover`) needs around it, in memory and in virtual time."""

from __future__ import annotations

import asyncio
import selectors
from array import array
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

# Tests import these from here: sglang itself must not be imported before the line above.
from sglang.srt.managers.io_struct import AbortReq as AbortReq  # noqa: E402
from sglang.srt.managers.io_struct import BatchStrOutput as BatchStrOutput  # noqa: E402
from sglang.srt.managers.io_struct import TokenizedGenerateReqInput  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from sglang_kevlar.control.membership import GroupReady  # noqa: E402
from sglang_kevlar.control.shadow_partners import Place  # noqa: E402
from sglang_kevlar.frontend.channels import Channel, ChannelFull  # noqa: E402
from sglang_kevlar.protocol.launch import KevlarArgs, LaunchPlan  # noqa: E402


class _Skip(selectors.SelectSelector):
    """Waits for nothing: the clock jumps to the next timer."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits for something that never comes")
        self.loop.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while nothing is to be done."""

    def __init__(self) -> None:
        selector = _Skip()
        super().__init__(selector)
        selector.loop = self
        self.now = 1000.0
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self.now

    # The name of the time module's function, so that the loop can stand in for the module.
    monotonic = time


def run_virtual(loop: VirtualLoop, main: Coroutine[Any, Any, Any]) -> Any:
    try:
        return loop.run_until_complete(main)
    finally:
        loop.run_until_complete(_end(asyncio.all_tasks(loop)))
        loop.close()


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def plan(args: KevlarArgs) -> LaunchPlan:
    return LaunchPlan(
        version=1,
        upstream="test",
        launch_id="test",
        kevlar=args,
        tp_size=1,
        pp_size=1,
        gpu_ids=[[0]] * args.worker_groups,
        host="",
        port=0,
        server_args_file="",
    )


class FakeGroups:
    """frontend.host.Groups: as many as ``args`` says, in the world they are made for."""

    def __init__(
        self,
        world: Any,
        args: KevlarArgs,
        kill: Callable[[int, int, str], None],
        internal_error: Callable[[int, int], None],
        is_draining: Callable[[int], bool],
    ) -> None:
        self._world = world
        self._ids = list(range(args.worker_groups))
        self.active = args.worker_groups - args.standby_groups
        self.kill, self.on_internal_error, self.is_draining = kill, internal_error, is_draining

    def ids(self) -> list[int]:
        return self._ids

    def is_standby(self, group: int) -> bool:
        return group >= self.active

    def open(self, ready: GroupReady, capacity: int) -> FakeChannel:
        place = Place(str(ready.group), standby=self.is_standby(ready.group), endpoints=tuple(ready.shadow_endpoints))
        return FakeChannel(self._world, ready.group, ready.epoch, capacity, place)


class FakeChannel(Channel):
    """A channel without sockets. The world it is made for sees what is sent and puts what arrives."""

    def __init__(self, world: Any, group: int, epoch: int, capacity: int, place: Place) -> None:
        super().__init__(group, epoch, capacity, place)
        self.world = world
        self.full = False
        self.inbox: deque[Any] = deque()
        self._waiter: asyncio.Future[None] | None = None
        world.opened(self)

    async def connected(self) -> bool:
        return bool(await self.world.connected(self))

    def send(self, message: Any) -> None:
        if self.closed:
            return
        if self.full:
            raise ChannelFull(f"worker group {self.group} (epoch {self.epoch}) does not read its input")
        self.world.sent(self, message)

    def put(self, message: Any) -> None:
        if self.closed:
            return
        self.inbox.append(message)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def arrival(self) -> None:
        while not self.inbox and not self.closed:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def take(self) -> Any:
        return self.inbox.popleft()

    def drain(self) -> list[Any]:
        arrived = list(self.inbox)
        self.inbox.clear()
        return arrived

    def close(self) -> None:
        self.closed = True
        if self._waiter is not None:
            self._waiter.cancel()


def tokenized(rid: str, prompt: list[int], max_new_tokens: int = 16, **changes: Any) -> TokenizedGenerateReqInput:
    fields: dict[str, Any] = {
        "rid": rid,
        "input_text": None,
        "input_ids": array("q", prompt),
        "input_embeds": None,
        "mm_inputs": None,
        "token_type_ids": None,
        "sampling_params": SamplingParams(max_new_tokens=max_new_tokens),
        "return_logprob": False,
        "logprob_start_len": -1,
        "top_logprobs_num": 0,
        "token_ids_logprob": None,
        "stream": True,
    }
    return TokenizedGenerateReqInput(**(fields | changes))


_UNUSED = {
    name: None
    for name in BatchStrOutput.__struct_fields__
    if name.startswith(("input_", "output_token", "output_top", "output_hidden", "placeholder"))
    or name in ("routed_experts", "indexer_topk")
}


def str_batch(*rows: tuple[str, list[int], str, dict[str, Any] | None]) -> BatchStrOutput:
    """One output message: rows of (wire id, new tokens, new text, finish reason)."""
    count = len(rows)
    return BatchStrOutput(
        rids=[row[0] for row in rows],
        output_ids=[array("q", row[1]) for row in rows],
        output_strs=[row[2] for row in rows],
        finished_reasons=[row[3] for row in rows],
        prompt_tokens=[1] * count,
        completion_tokens=[1] * count,
        reasoning_tokens=[0] * count,
        cached_tokens=[0] * count,
        **_UNUSED,
    )
