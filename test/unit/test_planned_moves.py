"""A group that is drained: what it runs is moved when its time is over, once, and nothing of it is lost or doubled."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from actor_world import LENGTH, World, play

from frontend_fakes import AbortReq, VirtualLoop, run_virtual
from sglang_kevlar.control.journal import Journal
from sglang_kevlar.frontend.drains import RETRY, Drains
from sglang_kevlar.protocol.launch import KevlarArgs


def test_moved_requests_go_on_behind_their_last_token_and_the_old_group_is_not_listened_to() -> None:
    async def script(world: World) -> None:
        await world.ready(0, 1)
        world.submit("a")
        old = world.attempt()
        await world.output(old.group, (old.wire_rid, [5], "x", None))
        world.draining.add(old.group)
        world.actor.route()
        assert await world.actor.move_away(old.group) == (1, 0)
        new = world.attempt()
        assert new.group == 1 - old.group
        assert [m.rid for m in world.inputs[old.group] if isinstance(m, AbortReq) and m.rid] == [old.wire_rid]
        await world.output(old.group, (old.wire_rid, [6], "WRONG", None), (old.wire_rid, [], "", {"type": "abort"}))
        await world.output(new.group, (new.wire_rid, [6], "xy", None), (new.wire_rid, [7], "z", LENGTH))
        assert world.text["a"] == "xyz" and not world.actor.requests
        assert world.actor.events.history()[-1]["cause"] == "drained by an operator"
        assert await world.actor.move_away(old.group) == (0, 0)

    play(script)


def test_with_nobody_to_take_them_they_end_where_they_are() -> None:
    async def script(world: World) -> None:
        await world.ready(0)
        world.submit("a")
        wire = world.wire()
        world.draining.add(0)
        world.actor.route()
        assert await world.actor.move_away(0) == (0, 1)
        await world.output(0, (wire, [5], "x", LENGTH))
        assert world.text["a"] == "x" and not world.actor.requests

    play(script)


def test_what_cannot_be_continued_stays_and_the_others_go() -> None:
    async def script(world: World) -> None:
        await world.ready(0, 1)
        group = None
        for rid in ("fixed", "a", "b"):
            world.submit(rid)
            group = world.attempt(rid).group if group is None else group
        world.draining.add(1 - group)
        world.actor.route()
        world.submit("c")
        world.draining.clear()
        world.actor.route()
        await world.output(group, *((world.wire(r), [5], "x", None) for r in ("c", "fixed") if _on(world, r, group)))
        world.actor.requests["fixed"].entry.not_continuable = "it has no way to"
        world.draining.add(group)
        world.actor.route()
        moved, left = await world.actor.move_away(group)
        assert moved and left == 1 and _on(world, "fixed", group)
        assert all(world.attempt(rid).group != group for rid in ("a", "b", "c"))
        # It no longer drains: nothing is taken away, and nobody has to look again.
        world.draining.clear()
        assert await world.actor.move_away(1 - group) == (0, 0)
        assert all(_on(world, rid, 1 - group) for rid in ("a", "b", "c"))

    play(script)


def test_what_reports_nothing_before_its_end_is_not_begun_anew_elsewhere() -> None:
    async def script(world: World) -> None:
        await world.ready(0, 1)
        world.submit("a")
        old = world.attempt()
        entry = world.actor.requests["a"].entry
        entry.not_continuable, entry.started = "it has no way to", True
        world.draining.add(old.group)
        world.actor.route()
        assert await world.actor.move_away(old.group) == (0, 1) and _on(world, "a", old.group)
        entry.started = False  # it only waits there
        assert await world.actor.move_away(old.group) == (1, 0)

    play(script)


def _on(world: World, rid: str, group: int) -> bool:
    return world.attempt(rid).group == group


def test_maintenance_does_not_use_up_the_moves_that_failures_may_take() -> None:
    journal = Journal(KevlarArgs(max_redirects=1), "i")
    entry = journal.open("a", 3, 10)
    for epoch in range(5):
        journal.begin_attempt(entry, 0, epoch)
        journal.take_away(entry)
        assert journal.refusal(entry) is None
    for epoch, kinds in ((6, "operator"), (7, "failure")):
        journal.begin_attempt(entry, 0, epoch)
        journal.fence(0, epoch, planned=True, counted=kinds == "failure")
        assert journal.refusal(entry) is None
    journal.begin_attempt(entry, 0, 8)
    journal.fence(0, 8, planned=True)
    refusal = journal.refusal(entry)
    assert refusal is not None and refusal.kind == "redirect_limit"
    journal.check()


class Moved:
    def __init__(self, *answers: tuple[int, int]) -> None:
        self.answers = list(answers)
        self.at: list[float] = []
        self.draining: list[tuple[int, bool]] = []
        self.ended: list[asyncio.Task[None]] = []
        self.drains = Drains(lambda *said: self.draining.append(said), self.move_away, self.ended.append)

    async def move_away(self, group: int) -> tuple[int, int]:
        self.at.append(asyncio.get_running_loop().time())
        return self.answers.pop(0)


def test_a_drain_moves_at_its_deadline_and_tries_again_as_long_as_something_is_left() -> None:
    async def script() -> None:
        made, begun = Moved((2, 1), (0, 1), (1, 0)), asyncio.get_running_loop().time()
        made.drains.drain(0, 5.0)
        assert made.drains.moves_in(0) == pytest.approx(5.0) and made.drains.moves_in(1) is None
        await asyncio.sleep(60)
        assert [at - begun for at in made.at] == pytest.approx([5.0, 5.0 + RETRY, 5.0 + 2 * RETRY])
        assert made.draining == [(0, True)] and made.drains.moves_in(0) == 0.0

    run_virtual(VirtualLoop(), script())


def test_a_drain_that_is_taken_back_or_given_another_deadline() -> None:
    async def script() -> None:
        made, begun = Moved((1, 0)), asyncio.get_running_loop().time()
        made.drains.drain(0, 5.0)
        made.drains.drain(0, 0.5)
        made.drains.drain(1, 5.0)
        made.drains.end(1)
        await asyncio.sleep(60)
        assert [at - begun for at in made.at] == pytest.approx([0.5])
        assert made.draining == [(0, True), (0, True), (1, True), (1, False)] and made.drains.moves_in(1) is None

    run_virtual(VirtualLoop(), script())


def test_an_error_while_moving_ends_the_frontend_as_any_in_the_actor_does() -> None:
    async def script(world: World) -> None:
        async def broken(group: int) -> Any:
            raise RuntimeError("half changed")

        drains = Drains(lambda *_: None, broken, world.actor._task_done)
        drains.drain(0, 0.0)
        await asyncio.sleep(1)

    with pytest.raises(RuntimeError, match="half changed"):
        play(script)
