"""Weights that go from group to group, by the real driver over groups in memory and in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from actor_world import LENGTH, World, play

from frontend_fakes import tokenized
from sglang_kevlar.control.membership import GroupReady
from sglang_kevlar.frontend import rolling_weights as rolling_module
from sglang_kevlar.frontend.in_flight import Call
from sglang_kevlar.frontend.rolling_weights import RollingWeights
from sglang_kevlar.protocol.launch import KevlarArgs


class Update:
    model_path, weight_version = "new", "v2"


class Control:
    """`ControlRequests` and `RunTimeChanges`: groups take the weights in a second, or die of them (``deadly``)."""

    def __init__(self, world: World, deadly: bool = False) -> None:
        self.world, self.deadly = world, deadly
        self.rolling: Any = None
        self.paused, self.not_replayable, self.content = False, None, "old"
        self.taken: list[int] = []

    def begin_rolling(self, update: Any) -> None:
        self.content = "new"

    def end_rolling(self) -> None: ...

    def changes_under_way(self) -> bool:
        return False

    def check(self, request: Any, channels: Any) -> None: ...

    def awaits(self, member: Any) -> bool:
        return False

    def take_back(self, update: Any) -> None:
        self.content = "old"

    async def take_new_weights(self, channel: Any) -> str | None:
        self.taken.append(channel.group)
        await asyncio.sleep(1.0)
        if not self.deadly:
            channel.weights = "new"
            return None
        self.world.lose(channel.group, channel.epoch)
        self.world.actor.spawn(self.world_back(channel.group, channel.epoch + 1))
        await asyncio.sleep(0.1)
        return "no answer"

    async def world_back(self, group: int, epoch: int) -> None:
        await asyncio.sleep(20)
        self.world.actor.on_event(GroupReady(group, epoch, {"max_total_num_tokens": 10_000}))


Script = Callable[[World, Control, RollingWeights], Awaitable[None]]


@pytest.fixture
def roll(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def run(script: Script, groups: int = 2, capacity: int = 10_000, deadly: bool = False, **flags: Any) -> None:
        async def main(w: World) -> None:
            monkeypatch.setattr(rolling_module, "time", w.loop)
            control = Control(w, deadly)
            w.actor.journal.weights = "old"
            driver = RollingWeights(w.actor, w.groups, control, control, 600.0, lambda update: None)  # type: ignore

            async def prepare(channel: Any) -> None:
                old = control.rolling is not None and driver.starts_with_old()
                channel.weights = "old" if old else control.content

            w.prepare_group = prepare  # type: ignore[method-assign]
            await w.ready(*range(groups), capacity=capacity)
            await script(w, control, driver)

        play(main, KevlarArgs(worker_groups=groups, **flags))

    return run


def ask(w: World, rid: str, prompt: int = 3, call: Call | None = None) -> None:
    w.actor.submit(tokenized(rid, [1] * prompt, max_new_tokens=100), None, call=call or Call())


def test_what_is_held_for_one_set_of_weights_does_not_hold_up_the_other(roll: Any) -> None:
    async def script(w: World, control: Control, driver: RollingWeights) -> None:
        for i in range(4):
            ask(w, f"r{i}", 300)
        driver.start(Update(), "v1", 600.0)  # type: ignore[arg-type]
        await asyncio.sleep(0.5)
        for i in range(3):
            ask(w, f"held{i}", 300)
        assert len(w.actor.hold) == 3, "half of the capacity is away"
        await asyncio.sleep(5)
        assert driver.status()["switched"]  # type: ignore[index]
        ask(w, "fresh")
        await asyncio.sleep(1)
        begun = [w.actor.requests[rid].entry for rid in ("held0", "held1", "fresh")]
        assert {(entry.attempt.group, entry.weights) for entry in begun if entry.attempt} == {(0, "new")}
        assert all(w.attempt(f"r{i}").group == 1 for i in range(4))

    roll(script, capacity=1000, hold_timeout=60.0)


def test_a_client_that_does_not_read_holds_nothing_up(roll: Any) -> None:
    async def script(w: World, control: Control, driver: RollingWeights) -> None:
        w.groups.kill = lambda *kill: pytest.fail(f"killed: {kill}")  # type: ignore[method-assign]
        stalled = Call()
        ask(w, "a", call=stalled)
        group = w.attempt("a").group
        driver.start(Update(), "v1", 60.0)  # type: ignore[arg-type]
        await asyncio.sleep(3)
        await w.output(w.attempt("a").group, (w.wire("a"), [7], "x", LENGTH))
        assert group is not None and not w.actor.requests
        await asyncio.sleep(30)
        assert driver.status()["requests_left"] == 1, "more of it may come"  # type: ignore[index]
        await asyncio.sleep(60)
        assert driver.status()["state"] == "done"  # type: ignore[index]
        ask(w, "rest of it", call=stalled)
        await asyncio.sleep(0.1)
        assert w.refusals() == {"rest of it": "weights"}

    roll(script)


def test_weights_that_groups_die_of_are_taken_back(roll: Any) -> None:
    async def script(w: World, control: Control, driver: RollingWeights) -> None:
        driver.start(Update(), "v1", 600.0)  # type: ignore[arg-type]
        await asyncio.sleep(60)
        status = driver.status()
        assert status is not None and status["state"] == "failed" and "were lost while" in status["error"]
        assert len(control.taken) == 2 and control.content == "old"
        await asyncio.sleep(60)
        assert sorted(w.actor.router.having("old")) == [0, 1, 2, 3]

    roll(script, groups=4, deadly=True)


def test_without_a_deadline_what_can_move_moves(roll: Any) -> None:
    async def script(w: World, control: Control, driver: RollingWeights) -> None:
        for i in range(4):
            ask(w, f"r{i}")
        driver.start(Update(), "v1", 0.0)  # type: ignore[arg-type]
        await asyncio.sleep(0.5)
        assert not w.refusals() and {w.attempt(f"r{i}").group for i in range(4)} == {1}
        assert driver.status()["requests_left"] == 4  # type: ignore[index]

    roll(script)


def test_groups_that_cannot_be_emptied_do_not_stop_the_frontend(roll: Any) -> None:
    async def script(w: World, control: Control, driver: RollingWeights) -> None:
        w.groups.active = 0  # only standbys are left
        w.actor.route()
        driver.start(Update(), "v1", 60.0)  # type: ignore[arg-type]
        await asyncio.sleep(700)
        status = driver.status()
        assert status is not None and status["state"] == "failed" and "can be emptied" in status["error"]

    roll(script)
