"""Changes at run time: in all groups that serve, or in none; what is wrong is refused, and not repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

from sglang.srt.managers.io_struct import (  # noqa: E402
    DestroyWeightsUpdateGroupReqInput,
    FlushCacheReqInput,
    FlushCacheReqOutput,
    InitWeightsUpdateGroupReqInput,
    InitWeightsUpdateGroupReqOutput,
    LoadLoRAAdapterReqInput,
    LoRAUpdateOutput,
    UpdateWeightFromDiskReqInput,
    UpdateWeightFromDiskReqOutput,
    UpdateWeightsFromDistributedReqInput,
    UpdateWeightsFromDistributedReqOutput,
)

from sglang_kevlar.control.shadow_partners import Place  # noqa: E402
from sglang_kevlar.frontend.control_requests import ControlRequests  # noqa: E402
from sglang_kevlar.frontend.replay import RunTimeChanges  # noqa: E402
from sglang_kevlar.observability.metrics import NoMetrics  # noqa: E402
from sglang_kevlar.worker.weights.messages import ServeWeightsReq, ServeWeightsReqOutput  # noqa: E402


class World:
    """Groups that take what they are sent and answer when the test says so."""

    def __init__(self, timeout: float = 20.0) -> None:
        self.channels: dict[int, Any] = {}
        self.journal = SimpleNamespace(weights="0")
        self.sent: list[tuple[int, Any]] = []
        self.killed: list[tuple[int, int]] = []
        #: groups have nothing to do, and say so at once
        self.idle = True
        self.changes = RunTimeChanges(frozenset())
        self.control = ControlRequests(
            self,  # type: ignore[arg-type]
            lambda group, epoch, why: self.killed.append((group, epoch)),
            self.changes,
            tp_size=2,
            timeout=timeout,
            metrics=NoMetrics(),
        )
        self.disk = self.control.communicator("disk", UpdateWeightFromDiskReqOutput)
        self.lora = self.control.communicator("lora", LoRAUpdateOutput)
        self.init = self.control.communicator("init", InitWeightsUpdateGroupReqOutput)
        self.live = self.control.communicator("live", UpdateWeightsFromDistributedReqOutput)

    async def first_group(self) -> None: ...

    def set_weights(self, channels: Any, weights: str) -> None:
        for channel in channels:
            channel.weights = weights

    def send(self, channel: Any, message: Any) -> bool:
        if self.idle and isinstance(message, FlushCacheReqInput):
            asyncio.get_running_loop().call_soon(self.answer, channel.group, FlushCacheReqOutput(success=True))
            return True
        self.sent.append((channel.group, message))
        return True

    def channel(self, group: int, epoch: int = 1, up_to_date: bool = True) -> Any:
        self.channels[group] = SimpleNamespace(
            group=group,
            epoch=epoch,
            up_to_date=up_to_date,
            given_up=False,
            suspect=False,
            closed=False,
            remote=False,
            place=Place("here"),
            refusal=lambda request: None,
        )
        return self.channels[group]

    def lose(self, group: int) -> None:
        channel = self.channels.pop(group)
        channel.closed = True
        self.control.group_lost((group, channel.epoch))

    def answer(self, group: int, answer: Any) -> None:
        assert self.control.answer((group, self.channels[group].epoch), answer)


def play(script: Callable[[World], Coroutine[Any, Any, None]], timeout: float = 20.0) -> None:
    async def main() -> None:
        await script(World(timeout))

    asyncio.run(main())


async def begin(call: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = asyncio.ensure_future(call)
    await asyncio.sleep(0.01)
    return task


def disk(path: str = "/w") -> Any:
    return UpdateWeightFromDiskReqInput(model_path=path)


def done(success: bool = True, message: str = "done") -> Any:
    return UpdateWeightFromDiskReqOutput(success=success, message=message, num_paused_requests=0)


def live() -> Any:
    return UpdateWeightsFromDistributedReqInput(names=[], dtypes=[], shapes=[])


def load(name: str = "a") -> Any:
    return LoadLoRAAdapterReqInput(lora_name=name, lora_path="/p")


def test_what_ends_every_group_is_not_replayed() -> None:
    async def script(w: World) -> None:
        w.channel(0), w.channel(1)
        call = await begin(w.lora(load()))
        assert len(w.changes.replay()) == 1
        w.lose(0), w.lose(1)
        with pytest.raises(HTTPException, match="503"):
            await call
        assert w.changes.replay() == [] and await w.control.prepare(w.channel(0, 2, up_to_date=False)) is None

    play(script)


def test_a_group_that_did_not_take_new_weights_starts_again_and_the_update_stands() -> None:
    async def script(w: World) -> None:
        w.channel(0), w.channel(1)
        update = disk()
        call = await begin(w.control.update_weights_from_disk(update))
        w.answer(0, done())
        w.answer(1, done(False, "no such file"))
        (answer,) = await call
        assert answer.success and "worker group 1" in answer.message and "no such file" in answer.message
        assert w.killed == [(1, 1)] and w.changes.replay() == [update] and w.journal.weights == w.changes.content != "0"

    play(script)


@pytest.mark.parametrize(("said", "spoiled"), [("Failed: x. Rolling back to original weights.", True), ("x", False)])
def test_what_all_failed_is_taken_back_and_half_changed_weights_are_not_served(said: str, spoiled: bool) -> None:
    async def script(w: World) -> None:
        w.channel(0), w.channel(1)
        call = await begin(w.control.update_weights_from_disk(disk()))
        w.answer(0, done(False, said))
        w.answer(1, done(False, said))
        assert not any(answer.success for answer in await call)
        assert w.changes.replay() == [] and w.killed == ([(0, 1), (1, 1)] if spoiled else [])

    play(script)


def test_a_group_that_started_with_a_change_that_then_failed_starts_again() -> None:
    async def script(w: World) -> None:
        w.channel(0)
        update = disk()
        call = await begin(w.control.update_weights_from_disk(update))
        late = w.channel(1, up_to_date=False)
        preparing = await begin(w.control.prepare(late))
        assert w.sent[-1] == (1, update)
        w.answer(1, done())
        assert await preparing is None
        late.up_to_date = True
        w.answer(0, done(False))
        await call
        assert w.killed == [(1, 1)] and w.changes.replay() == []

    play(script)


def test_weights_from_disk_bring_groups_back_that_could_not_be_brought_up_to_date() -> None:
    async def script(w: World) -> None:
        w.channel(0)
        call = await begin(w.live(live()))
        w.answer(0, UpdateWeightsFromDistributedReqOutput(success=True, message=""))
        await call
        w.lose(0)
        assert "only the running groups" in str(await w.control.prepare(w.channel(0, 2, up_to_date=False)))
        w.lose(0)

        update, weights = disk(), w.journal.weights
        call = await begin(w.control.update_weights_from_disk(update))
        # What waits had tokens of weights that nobody has any more.
        assert w.journal.weights == w.changes.content != weights
        preparing = await begin(w.control.prepare(w.channel(0, 3, up_to_date=False)))
        w.answer(0, done())
        assert await preparing is None
        assert (await call)[0].success and w.changes.not_replayable is None

    play(script)


def test_also_one_that_was_just_taking_them_from_a_group_that_is_lost() -> None:
    async def script(w: World) -> None:
        w.channel(0)
        w.changes.record(live())
        preparing = await begin(w.control.prepare(w.channel(1, up_to_date=False)))
        asked = w.sent[-1][1]
        assert isinstance(asked, ServeWeightsReq)
        w.answer(0, ServeWeightsReqOutput(ticket=asked.ticket, success=False, message="they change", busy=True))
        await asyncio.sleep(0)
        w.lose(0)
        update = disk()
        call = await begin(w.control.update_weights_from_disk(update))
        while w.sent[-1] != (1, update):
            await asyncio.sleep(0.01)
        w.answer(1, done())
        assert await preparing is None and (await call)[0].success

    play(script)


def test_and_when_they_cannot_be_loaded_all_is_as_before() -> None:
    async def script(w: World) -> None:
        w.changes.record(live())
        call = await begin(w.control.update_weights_from_disk(disk()))
        preparing = await begin(w.control.prepare(w.channel(0, 3, up_to_date=False)))
        w.answer(0, done(False, "no such file"))
        assert "no such file" in str(await preparing)
        (answer,) = await call
        assert not answer.success and "no such file" in answer.message and w.changes.not_replayable is not None

    play(script)


def test_and_when_no_group_starts_in_time_too() -> None:
    async def script(w: World) -> None:
        w.changes.record(live())
        (answer,) = await w.control.update_weights_from_disk(disk())
        assert not answer.success and w.changes.not_replayable is not None

    play(script, timeout=0.05)


def test_what_cannot_be_sent_changes_nothing() -> None:
    async def script(w: World) -> None:
        w.channel(0)
        deep: Any = 1
        for _ in range(5000):
            deep = {"a": deep}
        with pytest.raises(HTTPException, match="400"):
            await w.lora(LoadLoRAAdapterReqInput(lora_name="a", lora_path="/p", pinned=deep))
        assert not w.sent and w.changes.replay() == []

    play(script)


# ---- process groups of a trainer


def init(world_size: int, rank_offset: int = 1) -> Any:
    return InitWeightsUpdateGroupReqInput(
        master_address="h", master_port=1, rank_offset=rank_offset, world_size=world_size, group_name="t"
    )


def trainer_update() -> Any:
    return UpdateWeightsFromDistributedReqInput(names=[], dtypes=[], shapes=[], group_name="t")


def test_every_group_joins_a_process_group_with_ranks_of_its_own() -> None:
    async def script(w: World) -> None:
        w.channel(1), w.channel(0)
        call = await begin(w.init(init(5)))
        assert sorted((group, message.rank_offset) for group, message in w.sent) == [(0, 1), (1, 3)]
        for group in (0, 1):
            w.answer(group, InitWeightsUpdateGroupReqOutput(success=True, message=""))
        await call

    play(script)


def test_a_world_without_room_for_all_groups_is_refused() -> None:
    async def script(w: World) -> None:
        w.channel(0), w.channel(1)
        with pytest.raises(HTTPException, match="world_size must be at least 5, got 3") as refused:
            await w.init(init(3))
        assert refused.value.status_code == 400 and not w.sent

    play(script)


def test_an_update_for_which_a_rank_is_missing_is_refused_and_not_left_to_hang() -> None:
    async def script(w: World) -> None:
        w.channel(0), w.channel(1)
        w.control.broadcast(init(5))
        w.control.broadcast(trainer_update())
        w.lose(1)
        w.channel(1, 2)
        with pytest.raises(HTTPException, match="make it anew") as refused:
            w.control.broadcast(trainer_update())
        assert refused.value.status_code == 400
        w.control.broadcast(DestroyWeightsUpdateGroupReqInput(group_name="t"))
        w.control.broadcast(init(5))
        w.control.broadcast(trainer_update())

    play(script)


class Rolling:
    """An update that goes from group to group, as `ControlRequests` sees it."""

    old = "0"

    def __init__(self, needed: bool) -> None:
        self.needed = needed

    def starts_with_old(self) -> bool:
        return self.needed


def rolling(w: World, needed: bool = False) -> Any:
    update = disk("/new")
    w.changes.begin_rolling(update)
    w.control.rolling = Rolling(needed)
    return update


def test_a_group_is_idle_before_it_gets_other_weights() -> None:
    async def script(w: World) -> None:
        adapter = load()
        w.changes.record(adapter)
        update = rolling(w)
        w.idle = False
        taken = w.channel(0, up_to_date=False)
        taking = await begin(w.control.take_new_weights(taken))
        assert [type(message) for _, message in w.sent] == [FlushCacheReqInput] and w.sent[0][1].timeout_s
        w.answer(0, FlushCacheReqOutput(success=True))
        await asyncio.sleep(0.01)
        assert [message for _, message in w.sent[1:]] == [update], "it has the adapter"
        w.answer(0, done())
        assert await taking is None and taken.weights == w.changes.content
        assert w.changes.has_all(0, 1)

        busy = await begin(w.control.take_new_weights(w.channel(1, up_to_date=False)))
        w.answer(1, FlushCacheReqOutput(success=False, message="Timed out"))
        assert await busy == "it does not get idle: Timed out"

    play(script)


def test_a_group_that_starts_meanwhile_gets_the_weights_that_are_needed() -> None:
    async def script(w: World) -> None:
        update = rolling(w, needed=True)
        old = w.channel(0, up_to_date=False)
        assert await w.control.prepare(old) is None and old.weights == "0" and not w.changes.has_all(0, 1)
        w.control.rolling.needed = False
        new = w.channel(1, up_to_date=False)
        preparing = await begin(w.control.prepare(new))
        assert w.sent == [(1, update)]
        w.answer(1, done())
        assert await preparing is None and new.weights == w.changes.content

    play(script)


def test_what_changes_groups_is_refused_while_weights_go_around() -> None:
    async def script(w: World) -> None:
        w.channel(0), w.channel(1)
        rolling(w)
        for call in (w.lora(load()), w.disk(disk("/other"))):
            with pytest.raises(HTTPException, match="goes from group to group") as refused:
                await call
            assert refused.value.status_code == 409
        assert not w.sent and w.control.weights_change()

    play(script)


def test_an_update_that_is_taken_back_leaves_the_groups_as_they_were() -> None:
    async def script(w: World) -> None:
        w.channel(0).weights = w.channel(1).weights = "0"
        update = rolling(w)
        w.control.take_back(update)
        assert w.changes.content == w.journal.weights == "0" and not w.killed
        assert w.changes.has_all(0, 1) and w.changes.has_all(1, 1)

    play(script)


def test_what_a_group_has_yet_to_answer_is_known() -> None:
    async def script(w: World) -> None:
        w.channel(0), w.channel(1)
        call = await begin(w.lora(load()))
        assert w.control.awaits((0, 1)) and w.control.awaits((1, 1))
        w.answer(0, LoRAUpdateOutput(success=True))
        assert not w.control.awaits((0, 1)) and w.control.awaits((1, 1))
        await call
        assert w.killed == [(1, 1)]
        assert w.control.awaits((1, 1)), "its answer may still come"
        w.lose(1)
        assert not w.control.awaits((1, 1))

    play(script, timeout=0.2)


def test_a_group_that_a_lost_frontend_was_changing_starts_anew() -> None:
    async def script(w: World) -> None:
        w.changes._doubtful.add("here")
        w.changes.set_up_to_date(0, 1)
        assert "are not known" in str(await w.control.prepare(w.channel(0, up_to_date=False)))
        assert await w.control.prepare(w.channel(0, 2, up_to_date=False)) is None

    play(script)
