"""What dies or changes while weights go from one group to another: what counts is right, and no wait has no end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput, UpdateWeightsFromTensorReqInput

from frontend_fakes import FakeChannel, VirtualLoop, run_virtual
from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.frontend import weight_transfers as module
from sglang_kevlar.frontend.replay import RunTimeChanges
from sglang_kevlar.frontend.weight_transfers import ANSWER_GRACE, WeightTransfers
from sglang_kevlar.observability.metrics import NoMetrics
from sglang_kevlar.worker.weights.messages import (
    FetchWeightsReq,
    FetchWeightsReqOutput,
    ServeWeightsReq,
    ServeWeightsReqOutput,
)

TIMEOUT = 60.0
#: seconds that a group of the world takes for its part
WORK = 1.0
Result = tuple[str, str | None]


class World:
    """Groups that hand weights over as ranks would; what a group has is a name."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.loop = loop
        self.channels: dict[int, FakeChannel] = {}
        self.weights: dict[int, str] = {}
        #: groups that do not answer any more
        self.silent: set[int] = set()
        self.under_way = False
        #: called with each request, before the group acts on it
        self.hook: Callable[[int, Any], None] = lambda group, request: None
        self.sent_to: list[tuple[int, type]] = []
        #: by ticket: what the donor had when it began, and who it is
        self._offers: dict[str, tuple[int, str]] = {}
        self.fetching = 0
        self.counted: list[str] = []
        metrics = NoMetrics()
        metrics.weight_transfer = lambda outcome, size, seconds: self.counted.append(outcome)  # type: ignore[method-assign]
        self.changes = RunTimeChanges(frozenset())
        self.update()
        self.transfers = WeightTransfers(self, self.changes, lambda: self.under_way, TIMEOUT, metrics)  # type: ignore[arg-type]

    # -- what a channel and the actor do

    def opened(self, channel: FakeChannel) -> None:
        self.channels[channel.group] = channel

    def send(self, channel: FakeChannel, request: Any) -> bool:
        if channel.closed:
            return False
        channel.send(request)
        return True

    def sent(self, channel: FakeChannel, request: Any) -> None:
        self.sent_to.append((channel.group, type(request)))
        self.hook(channel.group, request)
        if channel.closed or channel.group in self.silent:
            return
        if isinstance(request, ServeWeightsReq):
            self._offers[request.ticket] = channel.group, self.weights[channel.group]
            self._answer(channel, ServeWeightsReqOutput(ticket=request.ticket, success=True, endpoints=["there"]))
        else:
            self.fetching += 1
            assert self.fetching == 1, "two transfers at once"
            self.loop.call_later(WORK, self._fetched, channel, request)

    def _fetched(self, channel: FakeChannel, request: FetchWeightsReq) -> None:
        self.fetching -= 1
        donor, offered = self._offers.pop(request.ticket)
        source = self.channels[donor]
        if source.closed:
            self._fail(channel, request, "rank 0: the connection was lost, or the rank there died", busy=False)
        elif self.weights[donor] != offered:
            self._fail(channel, request, "rank 0: its weights are just being changed", busy=True)
        else:
            self.weights[channel.group] = offered
            self._answer(channel, FetchWeightsReqOutput(ticket=request.ticket, success=True, bytes=100))

    def _fail(self, channel: FakeChannel, request: FetchWeightsReq, why: str, busy: bool) -> None:
        self.weights[channel.group] = "a part of another"
        self._answer(channel, FetchWeightsReqOutput(ticket=request.ticket, success=False, message=why, busy=busy))

    def _answer(self, channel: FakeChannel, answer: Any) -> None:
        if not channel.closed and channel.group not in self.silent:
            assert self.transfers.answer((channel.group, channel.epoch), answer)

    # -- what tests do

    def start(self, *groups: int, serving: bool = True, epoch: int = 1) -> None:
        for group in groups:
            channel = FakeChannel(self, group, epoch, 1000, Place("here"))
            channel.up_to_date = serving
            self.weights[group] = self.changes.content if serving else "of the file"

    def lose(self, group: int) -> None:
        channel = self.channels.pop(group)
        channel.close()
        self.channels[group] = channel  # for donors that are asked about; nobody chooses it
        self.transfers.group_lost((group, channel.epoch))

    def update(self) -> str:
        """Of tensors, to all that serve."""
        request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=[])
        self.changes.record(request)
        for group, channel in self.channels.items():
            if channel.up_to_date and not channel.closed:
                self.weights[group] = self.changes.content
        return self.changes.content

    def bring(self, group: int) -> asyncio.Task[Result]:
        return asyncio.ensure_future(self.transfers.bring(self.channels[group]))

    def at(self, kind: type, action: Callable[[], object], times: int = 1) -> None:
        """In the middle of the work of a group that was asked for this."""
        left = [None] * times

        def hook(_: int, request: Any) -> None:
            if isinstance(request, kind) and left:
                left.pop()
                self.loop.call_later(WORK / 2, action)

        self.hook = hook


def play(script: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    loop = VirtualLoop()

    async def main() -> None:
        world = World(loop)
        await script(world)
        assert not world.transfers._asked

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "time", loop)
        run_virtual(loop, main())


def test_from_the_next_one_when_the_donor_dies_in_the_middle() -> None:
    async def script(world: World) -> None:
        world.start(0, 2)
        world.start(1, serving=False)
        world.at(FetchWeightsReq, lambda: world.lose(0))
        assert await world.bring(1) == (world.changes.content, None)
        assert world.weights[1] == world.changes.content
        assert world.counted == ["failed", "done"]

    play(script)


def test_a_donor_that_dies_before_it_answers_is_not_waited_for() -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, serving=False)
        world.silent.add(0)
        world.at(ServeWeightsReq, lambda: world.lose(0))
        began = world.loop.time()
        content, reason = await world.bring(1)
        assert content == "" and "worker group 0 was lost" in str(reason)
        assert world.loop.time() - began < 2 * WORK

    play(script)


def test_a_target_that_dies_leaves_the_way_to_the_next_one() -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, 2, serving=False)
        first, second = world.bring(1), world.bring(2)

        def dies() -> None:
            world.fetching -= 1
            world._fetched = kept  # type: ignore[method-assign]
            world.lose(1)

        kept, world._fetched = world._fetched, lambda *_: None  # type: ignore[method-assign,assignment]
        world.at(FetchWeightsReq, dies)
        content, reason = await first
        assert content == "" and reason is not None
        assert await second == (world.changes.content, None)
        assert (2, FetchWeightsReq) in world.sent_to

    play(script)


def test_two_targets_one_after_the_other() -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, 2, serving=False)
        content = world.changes.content
        assert await asyncio.gather(world.bring(1), world.bring(2)) == [(content, None), (content, None)]
        assert [group for group, kind in world.sent_to if kind is FetchWeightsReq] == [1, 2]

    play(script)


@pytest.mark.parametrize("when", [ServeWeightsReq, FetchWeightsReq])
def test_an_update_in_the_middle_begins_it_anew(when: type) -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, serving=False)

        def updated() -> None:
            world.under_way = True
            world.update()
            world.loop.call_later(3.0, setattr, world, "under_way", False)

        world.at(when, updated)
        content, reason = await world.bring(1)
        assert reason is None and content == world.changes.content
        assert world.weights[1] == world.weights[0] == content
        assert world.counted == ["changed", "done"]
        # Nobody was asked while it was open what became of the update.
        assert [kind for _, kind in world.sent_to] == [ServeWeightsReq, FetchWeightsReq] * 2

    play(script)


def test_weights_that_are_changed_all_the_time_are_given_up_in_time() -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, serving=False)
        world.at(FetchWeightsReq, world.update, times=1000)
        began = world.loop.time()
        content, reason = await world.bring(1)
        assert content == "" and "being changed" in str(reason)
        assert TIMEOUT <= world.loop.time() - began <= TIMEOUT + 2 * WORK
        assert set(world.counted) == {"changed"}

    play(script)


@pytest.mark.parametrize("who", [0, 1])
def test_who_does_not_answer_is_not_waited_for_longer_than_allowed(who: int) -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, serving=False)
        world.silent.add(who)
        began = world.loop.time()
        content, reason = await world.bring(1)
        assert content == "" and f"worker group {who} did not answer" in str(reason)
        assert world.loop.time() - began <= TIMEOUT + ANSWER_GRACE + WORK

    play(script)


def test_what_is_left_of_the_time_is_what_the_target_gets() -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, serving=False)
        limits: list[float] = []

        def hook(group: int, request: Any) -> None:
            if isinstance(request, FetchWeightsReq):
                limits.append(request.timeout)
            else:
                # The ranks of a donor may take a while to agree.
                world.silent.add(0)
                world.loop.call_later(20, answer, request.ticket)

        def answer(ticket: str) -> None:
            world.silent.clear()
            world._offers[ticket] = 0, world.weights[0]
            world._answer(world.channels[0], ServeWeightsReqOutput(ticket=ticket, success=True, endpoints=["there"]))

        world.hook = hook
        assert (await world.bring(1))[1] is None
        assert limits == [pytest.approx(TIMEOUT - 20)]

    play(script)


def test_an_answer_of_another_transfer_is_none() -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, serving=False)
        stale = FetchWeightsReqOutput(ticket="of another one", success=True, bytes=1)
        world.at(FetchWeightsReq, lambda: world.transfers.answer((1, 1), stale))
        began = world.loop.time()
        assert (await world.bring(1))[1] is None
        assert world.loop.time() - began >= WORK
        assert world.transfers.answer((0, 1), stale) and world.transfers.answer((7, 1), stale)
        assert not world.transfers.answer((0, 1), object())

    play(script)


def test_weights_that_are_to_be_had_from_disk_by_now_are_not_waited_for() -> None:
    async def script(world: World) -> None:
        world.start(0)
        world.start(1, serving=False)

        def from_disk() -> None:
            world.lose(0)
            world.changes.record(UpdateWeightFromDiskReqInput(model_path="there"))

        world.at(FetchWeightsReq, from_disk)
        assert await world.bring(1) == ("", None)

    play(script)
