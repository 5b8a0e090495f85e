"""Frontends and the gateway of one group over loopback, with a group that does what the test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

import msgspec
import pytest
from cluster_world import SAME

from frontend_fakes import AbortReq, plan, str_batch, tokenized
from sglang_kevlar.cluster import shared_group
from sglang_kevlar.cluster.shared_group import SharedGroup
from sglang_kevlar.control.membership import GroupChanged, GroupKill, GroupLost, GroupReady
from sglang_kevlar.frontend.channels import CannotSend
from sglang_kevlar.frontend.session_channel import SessionChannel
from sglang_kevlar.frontend.sessions import GroupSessions
from sglang_kevlar.launcher.join import JoinRefused, ask
from sglang_kevlar.protocol.cluster import Ask, GroupState
from sglang_kevlar.protocol.launch import JoinArgs, KevlarArgs, LaunchPlan, Paths
from sglang_kevlar.worker.resume import ShadowPlanReq, StartedReqOutput

# isort: split
from sglang.srt.managers.io_struct import (
    FlushCacheReqInput,
    FlushCacheReqOutput,
    GetInternalStateReq,
    GetInternalStateReqOutput,
    UpdateWeightFromDiskReqInput,
)

from e2e.server import free_port

LENGTH = {"type": "length", "length": 1}


class FakeLocalGroup:
    """cluster.local_group.LocalGroup without a group."""

    def __init__(self, plan: LaunchPlan, paths: Paths, on_message: Any, on_change: Any) -> None:
        self.say, self._on_change = on_message, on_change
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.told: list[Any] = []
        self.killed: list[tuple[int, str, bool]] = []
        self.phase, self.epoch, self.kind = "starting", 0, None

    def start(self) -> None: ...

    def close(self) -> None: ...

    def flush(self) -> None: ...

    @property
    def serving_epoch(self) -> int | None:
        return self.epoch if self.phase == "ready" else None

    def state(self) -> GroupState:
        init_info: Any = {"max_total_num_tokens": 9} if self.phase == "ready" else None
        cause = "rank0 exited" if self.phase == "down" else ""
        return GroupState(epoch=self.epoch, phase=self.phase, init_info=init_info, kind=self.kind, cause=cause)

    def become(self, phase: str, epoch: int, kind: Any = None) -> None:
        self.phase, self.epoch, self.kind = phase, epoch, kind
        self._on_change()

    def send(self, message: Any) -> None:
        self.told.append(message)

    def kill(self, epoch: int, cause: str, planned: bool = False) -> None:
        self.killed.append((epoch, cause, planned))


class Frontend:
    """The sessions of a frontend, and an actor that opens what is ready."""

    def __init__(self, address: str, launch: str, **differences: Any) -> None:
        args = KevlarArgs(worker_groups=0, listen=address, lease=1.0)
        common = msgspec.structs.replace(SAME, **differences)
        self.plan = msgspec.structs.replace(
            plan(args), launch_id=launch, configuration=common, argv=["--device", "cpu"]
        )
        self.events: list[Any] = []
        self.channel: SessionChannel | None = None
        self.sessions = GroupSessions(self.plan, self._on_event)

    def _on_event(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, GroupReady):
            self.channel = self.sessions.open(event, 9)
        elif isinstance(event, GroupLost) and self.channel is not None:
            self.channel.close()

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class World:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared_group, "LocalGroup", FakeLocalGroup)
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in range(2)]
        self.first, self.second = (Frontend(at, name) for at, name in zip(self.addresses, "AB", strict=True))
        self.shared: SharedGroup

    @property
    def group(self) -> FakeLocalGroup:
        group = self.shared.group
        assert isinstance(group, FakeLocalGroup)
        return group

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        join = JoinArgs(frontends=self.addresses, name="g", host="h")
        launch = msgspec.structs.replace(plan(KevlarArgs(worker_groups=1)), join=join, configuration=SAME)
        self.shared = SharedGroup(launch, Paths("run"), None, "instance")
        try:
            self.first.sessions.start()
            self.second.sessions.start()
            self.shared.start()
            self.group.become("ready", 1)
            await self.until(lambda: self.first.channel is not None and self.second.channel is not None, "both joined")
            await self.until(lambda: self.may_change(self.first), "the first is told that it is")
            yield
        finally:
            self.shared.close("the test ends")
            self.first.sessions.close()
            self.second.sessions.close()

    async def until(self, condition: Callable[[], bool], what: str) -> None:
        for _ in range(1000):
            if condition():
                return
            self.shared.tick()
            await asyncio.sleep(0.01)
        raise AssertionError(what)

    def may_change(self, frontend: Frontend) -> bool:
        assert frontend.channel is not None
        return frontend.channel.refusal(FlushCacheReqInput()) is None

    async def told(self, count: int) -> list[Any]:
        await self.until(lambda: len(self.group.told) >= count, f"{count} messages at the group")
        told, self.group.told = self.group.told, []
        assert len(told) == count
        return told


@pytest.fixture
def play(monkeypatch) -> Callable[[Callable[[World], Coroutine[Any, Any, None]]], None]:
    def run(script: Callable[[World], Coroutine[Any, Any, None]]) -> None:
        async def main() -> None:
            world = World(monkeypatch)
            async with world.running():
                await script(world)

        asyncio.run(main())

    return run


async def arrived(frontend: Frontend) -> Any:
    assert frontend.channel is not None
    async with asyncio.timeout(10):
        await frontend.channel.arrival()
    return frontend.channel.take()


def test_each_frontend_gets_what_is_of_its_requests(play) -> None:
    async def script(w: World) -> None:
        w.first.channel.send(tokenized("a~1;", [1]))
        w.second.channel.send(tokenized("b~2;", [2]))
        assert sorted(message.rid for message in await w.told(2)) == ["a~1;", "b~2;"]
        w.group.say(1, StartedReqOutput(rid="b~2;", recomputed_tokens=0))
        w.group.say(1, str_batch(("a~1;", [5], "x", None), ("b~2;", [6], "y", LENGTH), ("gone", [7], "z", None)))
        assert (await arrived(w.second)).rid == "b~2;"
        assert (await arrived(w.first)).rids == ["a~1;"] and (await arrived(w.second)).output_strs == ["y"]
        w.group.say(1, AbortReq(rid="a~1;"))
        assert (await arrived(w.first)).rid == "a~1;"
        w.group.say(1, str_batch(("a~1;", [5], "x", None), ("b~2;", [6], "y", None)))
        await asyncio.sleep(0.2)
        assert w.first.channel.drain() == w.second.channel.drain() == [], "both requests have ended"

    play(script)


def test_a_frontend_aborts_only_its_own(play) -> None:
    async def script(w: World) -> None:
        for rid in ("a~1;", "c~1;"):
            w.first.channel.send(tokenized(rid, [1]))
        w.second.channel.send(tokenized("b~2;", [2]))
        await w.told(3)
        w.second.channel.send(AbortReq(rid="a~1;"))
        w.second.channel.send(AbortReq(abort_all=True))
        assert [(message.rid, message.abort_all) for message in await w.told(1)] == [("b~2;", False)]
        w.first.sessions.close()
        assert sorted(message.rid for message in await w.told(2)) == ["a~1;", "c~1;"], "its clients are gone"

    play(script)


def test_an_id_that_runs_already_is_refused_and_the_other_request_is_left_alone(play) -> None:
    async def script(w: World) -> None:
        w.first.channel.send(tokenized("a~1;", [1]))
        await w.told(1)
        w.second.channel.send(tokenized("a~1;", [2]))
        refused = await arrived(w.second)
        assert isinstance(refused, AbortReq) and "runs already" in refused.finished_reason["message"]
        w.group.say(1, str_batch(("a~1;", [5], "x", None)))
        assert (await arrived(w.first)).rids == ["a~1;"] and not w.group.told

    play(script)


def test_only_the_first_changes_the_group_and_reads_go_to_those_who_asked(play) -> None:
    async def script(w: World) -> None:
        assert "only from the first frontend" in (w.second.channel.refusal(FlushCacheReqInput()) or "")
        assert w.second.channel.refusal(GetInternalStateReq()) is None
        w.second.channel.send(ShadowPlanReq(content="0"))
        w.second.channel.send(FlushCacheReqInput())  # on its way when it was no longer the first
        w.second.channel.send(GetInternalStateReq())
        w.first.channel.send(GetInternalStateReq())
        assert {type(message) for message in await w.told(2)} == {GetInternalStateReq}
        for answer in ("one", "two"):
            w.group.say(1, GetInternalStateReqOutput(internal_state={"of": answer}))
        assert {(await arrived(f)).internal_state["of"] for f in (w.first, w.second)} == {"one", "two"}
        w.first.channel.send(FlushCacheReqInput())
        await w.told(1)
        w.group.say(1, FlushCacheReqOutput(success=True))
        assert (await arrived(w.first)).success
        w.first.sessions.close()
        await w.until(lambda: w.may_change(w.second), "the next is the first")
        assert w.second.of(GroupChanged), "its actor has plans to tell now"

    play(script)


def test_a_change_puts_the_group_down_for_others_until_it_has_begun_anew(play, monkeypatch) -> None:
    monkeypatch.setattr(shared_group, "CHANGES_GRACE", 0.3)

    async def script(w: World) -> None:
        w.first.channel.send(UpdateWeightFromDiskReqInput(model_path="m"))
        await w.until(lambda: bool(w.second.of(GroupLost)), "down for the second")
        assert "changed at run time" in w.second.of(GroupLost)[0].cause and not w.first.of(GroupLost)
        w.first.sessions.close()
        await w.until(lambda: bool(w.group.killed), "the change of one that is gone")
        epoch, cause, planned = w.group.killed[0]
        assert (epoch, planned) == (1, True) and "is gone" in cause
        w.group.become("ready", 2)
        await w.until(lambda: len(w.second.of(GroupReady)) == 2, "it serves the second again")

    play(script)


def test_a_loss_is_what_the_group_says_and_nothing_of_it_comes_after(play) -> None:
    async def script(w: World) -> None:
        w.first.channel.send(tokenized("a~1;", [1]))
        await w.told(1)
        lost = w.first.channel
        w.group.say(1, str_batch(("a~1;", [5], "x", None)))
        w.group.become("down", 1, "exit")
        w.group.say(1, str_batch(("a~1;", [6], "too late", None)))
        await w.until(lambda: bool(w.first.of(GroupLost)), "lost")
        assert (w.first.of(GroupLost)[0].cause, w.first.of(GroupLost)[0].kind) == ("rank0 exited", "exit")
        assert lost.closed
        w.group.become("ready", 2)
        await w.until(lambda: len(w.first.of(GroupReady)) == 2, "ready again")
        assert w.first.channel.epoch > lost.epoch
        lost.send(tokenized("b~1;", [1]))
        await asyncio.sleep(0.1)
        assert not w.group.told, "a closed channel sends nothing"

    play(script)


def test_orders_of_a_frontend_reach_the_group(play) -> None:
    async def script(w: World) -> None:
        w.second.sessions.kill(0, w.second.channel.epoch, "an operator", planned=True)
        await w.until(lambda: bool(w.group.killed), "killed")
        # Asked for again while the group still says that it is ready: a kill may get lost.
        assert set(w.group.killed) == {(1, "an operator", True)}
        assert [event.kind for event in w.second.of(GroupLost)] == ["operator"] and w.second.of(GroupKill)
        assert not w.first.of(GroupLost), "for the others it is lost when it is"

    play(script)


def test_what_cannot_travel_is_refused_and_the_session_stays(play) -> None:
    async def script(w: World) -> None:
        with pytest.raises(CannotSend, match="at most"):
            w.first.channel.send(tokenized("a~1;", [1], input_text="x" * (64 << 20)))
        w.first.channel.send(tokenized("b~1;", [1]))
        await w.told(1)
        batch = str_batch(("b~1;", [5], "x", None))
        batch.customized_info = {"a": 1}
        w.group.say(1, batch)
        refused = await arrived(w.first)
        assert "customized_info" in refused.finished_reason["message"]
        assert [message.rid for message in await w.told(1)] == ["b~1;"], "it is aborted at the group"
        w.first.channel.send(tokenized("c~1;", [1]))
        await w.told(1)

    play(script)


def test_a_payload_that_is_none_ends_the_session_and_the_next_is_tried(play) -> None:
    async def script(w: World) -> None:
        session = w.first.sessions.table.groups[0].session
        w.first.sessions.listener.requests(session, 1, b"garbage")
        await w.until(lambda: bool(w.first.of(GroupLost)), "over")
        await w.until(lambda: len(w.first.of(GroupReady)) == 2, "joined again")
        # The frontend knows first; what the group sends before it has heard of it goes nowhere.
        await w.until(lambda: w.shared._ways[0].end.phase == "joined", "it knows")
        w.shared._ways[0].outputs(1, b"garbage")
        await w.until(lambda: len(w.first.of(GroupLost)) == 2, "over")
        await w.until(lambda: len(w.first.of(GroupReady)) == 3, "joined again")
        assert not w.second.of(GroupLost)

    play(script)


@pytest.mark.parametrize(("field", "here"), [("model_digest", "abc"), ("version", "0.1.0"), ("upstream", "0.5.21")])
def test_whoever_differs_is_refused_and_one_that_fits_suffices(play, field, here) -> None:
    async def script(w: World) -> None:
        w.second.sessions.close()
        w.second = Frontend(w.addresses[1], "C", **{field: "other"})
        w.second.sessions.start()
        await w.until(lambda: bool(w.shared.refused), "refused")
        (reason,) = w.shared.refused.values()
        assert f"{field}: 'other' here, '{here}' there" in reason and not w.shared.is_refused

    play(script)


def test_a_group_asks_with_what_to_start(play) -> None:
    async def script(w: World) -> None:
        setup = await asyncio.to_thread(ask, [f"127.0.0.1:{free_port()}", w.addresses[0]], None)
        assert setup.argv == ["--device", "cpu"] and setup.kevlar["lease"] == 1.0

    play(script)


def test_a_group_that_speaks_another_version_is_told_so_before_it_starts(play, monkeypatch) -> None:
    monkeypatch.setattr("sglang_kevlar.launcher.join.Ask", partial(Ask, version=2))

    async def script(w: World) -> None:
        with pytest.raises(JoinRefused, match="this frontend speaks version 1 of the cluster's protocol, the group 2"):
            await asyncio.to_thread(ask, w.addresses, None)

    play(script)
