"""The frontend's actor over channels in memory and in virtual time, with groups that do nothing by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from frontend_fakes import (
    AbortReq,
    BatchStrOutput,
    FakeChannel,
    FakeGroups,
    VirtualLoop,
    plan,
    run_virtual,
    str_batch,
    tokenized,
)
from sglang_kevlar.control.journal import Attempt
from sglang_kevlar.control.membership import GroupLost, GroupReady
from sglang_kevlar.frontend import failover as failover_module
from sglang_kevlar.frontend import requests as requests_module
from sglang_kevlar.frontend.failover import Failover, Host
from sglang_kevlar.frontend.outcome import RequestOutcome
from sglang_kevlar.observability.events import FailoverEvents, Redirect
from sglang_kevlar.observability.metrics import NoMetrics
from sglang_kevlar.protocol.launch import KevlarArgs, Paths
from sglang_kevlar.worker.resume import ShadowPlanReq

ARGS = KevlarArgs(worker_groups=2, hold_timeout=10.0, hold_queue=2)
LENGTH = {"type": "length"}


class World(Host):
    """Groups that do nothing by themselves, and the clients' side."""

    def __init__(self, loop: VirtualLoop, args: KevlarArgs) -> None:
        self.loop = loop
        self.killed: list[tuple[int, int, str]] = []
        self.errors: list[tuple[int, int]] = []
        self.draining: set[int] = set()
        self.inputs: dict[int, list[Any]] = {}
        self.plans: dict[int, list[ShadowPlanReq]] = {}
        self.batches: list[BatchStrOutput] = []
        self.text: dict[str, str] = {}
        self.aborted: list[AbortReq] = []
        self.replies: list[Any] = []
        self.unprepared: str | None = None
        self.connects = True
        self.hook: Callable[[], None] | None = None
        self.serving: dict[int, bool] = {}
        metrics = NoMetrics()
        metrics.group = lambda group, *, ready, epoch: self.serving.update({group: ready})  # type: ignore[method-assign]
        self.groups = FakeGroups(
            self,
            args,
            kill=lambda *kill: self.killed.append(kill),
            internal_error=lambda *group: self.errors.append(group),
            is_draining=self.draining.__contains__,
        )
        self.actor = Failover(
            host=self, groups=self.groups, plan=plan(args), paths=Paths("run"),
            incarnation="i", events=FailoverEvents(metrics, loop.time, loop.time), metrics=metrics,
        )  # fmt: skip

    def channel(self, group: int, epoch: int, name: str) -> str:
        return f"{group} {epoch} {name}"

    def opened(self, channel: FakeChannel) -> None:
        self.inputs[channel.group] = []
        self.plans[channel.group] = []

    async def connected(self, channel: FakeChannel) -> bool:
        await asyncio.sleep(0.1)
        return self.connects

    def sent(self, channel: FakeChannel, message: Any) -> None:
        kind = self.plans if isinstance(message, ShadowPlanReq) else self.inputs
        kind[channel.group].append(message)

    async def prepare_group(self, channel: Any) -> str | None:
        await asyncio.sleep(0.1)
        channel.weights = self.actor.journal.weights
        return self.unprepared

    async def deliver(self, batch: Any) -> None:
        self.batches.append(batch)
        for rid, text in zip(batch.rids, batch.output_strs, strict=True):
            self.text[rid] = self.text.get(rid, "") + text
        await asyncio.sleep(0)
        if self.hook is not None:
            self.hook()

    def finish_aborted(self, abort: AbortReq) -> None:
        self.aborted.append(abort)

    def delivered_text(self, rid: str) -> str:
        return self.text.get(rid, "")

    def control_reply(self, group: int, epoch: int, reply: Any) -> None:
        self.replies.append((group, epoch, reply))

    def group_lost(self, group: int, epoch: int) -> None:
        pass

    def redirect_through(self, rid: str, redirect: Redirect) -> None:
        pass

    # -- what tests do

    async def ready(self, *groups: int, epoch: int = 1, capacity: int = 10_000) -> None:
        for group in groups:
            self.actor.on_event(GroupReady(group, epoch, {"max_total_num_tokens": capacity}))
        await asyncio.sleep(0.5)

    def lose(self, group: int, epoch: int = 1, kind: Any = "exit") -> None:
        self.actor.on_event(GroupLost(group, epoch, "cause", kind, 0.0))

    def submit(self, rid: str = "a", prompt: int = 3, outcome: RequestOutcome | None = None, **fields: Any) -> None:
        self.actor.submit(tokenized(rid, [1] * prompt, **fields), outcome)

    def wire(self, rid: str = "a") -> str:
        return self.attempt(rid).wire_rid

    def attempt(self, rid: str = "a") -> Attempt:
        attempt = self.actor.requests[rid].entry.attempt
        assert attempt is not None
        return attempt

    async def output(self, group: int, *rows: Any) -> None:
        self.actor.channels[group].put(str_batch(*rows))  # type: ignore[attr-defined]
        await asyncio.sleep(0.01)

    def requests(self, group: int) -> list[str]:
        return [message.rid for message in self.inputs[group] if not isinstance(message, AbortReq)]

    def refusals(self) -> dict[str, str]:
        return {abort.rid: abort.finished_reason["err_type"] for abort in self.aborted if abort.finished_reason}


def play(script: Callable[[World], Coroutine[Any, Any, None]], args: KevlarArgs = ARGS) -> None:
    """Runs ``script(world)`` beside the actor; ends with what holds when nothing is going on."""
    loop = VirtualLoop()

    async def main() -> None:
        world = World(loop, args)
        running = loop.create_task(world.actor.run())
        await script(world)
        if running.done():
            running.result()
        world.actor.journal.check()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failover_module, "time", loop)
        patch.setattr(requests_module, "time", loop)
        run_virtual(loop, main())
