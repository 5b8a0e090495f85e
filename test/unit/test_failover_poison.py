"""A request that ends every group it is sent to, before one begins to run it, and requests that only look like it."""

from __future__ import annotations

import asyncio
from typing import Any

from actor_world import World, play

from sglang_kevlar.worker.resume import StartedReqOutput


async def lose_again(w: World, after: float, kind: Any = "exit") -> None:
    """Whichever group has the request dies ``after`` seconds; it comes back as its next epoch."""
    attempt = w.attempt()
    await asyncio.sleep(after)
    w.lose(attempt.group, attempt.epoch, kind)
    await asyncio.sleep(0.01)
    await w.ready(attempt.group, epoch=attempt.epoch + 1)


def test_it_is_refused_by_name_after_three_deaths():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit()
        for _ in range(2):
            await lose_again(w, after=0.1)
            assert not w.aborted
        # Between its second death and now it was sent to the group that lived.
        await asyncio.sleep(0)
        attempt = w.attempt()
        w.lose(attempt.group, attempt.epoch)
        await asyncio.sleep(0.01)
        assert w.refusals() == {"a": "poison"} and not w.actor.requests

    play(script)


def test_groups_that_are_killed_at_once_are_nobody_s_fault():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit()
        for epoch in (1, 2, 3):
            first = w.attempt().group
            # One after the other: what the first had is sent to the second, which is dead already.
            w.lose(first, epoch)
            await asyncio.sleep(0.001)
            w.lose(1 - first, epoch)
            await asyncio.sleep(0.01)
            await w.ready(0, 1, epoch=epoch + 1)
            assert not w.aborted
            w.actor.channels[w.attempt().group].put(StartedReqOutput(rid=w.wire(), recomputed_tokens=0))
            await w.output(w.attempt().group, (w.wire(), [epoch], "x", None))

    play(script)


def test_a_group_that_hangs_or_is_restarted_was_not_ended_by_what_waits_there():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit()
        for kind in ("stopped", "hang", "operator", "unfit", "errors"):
            await lose_again(w, after=0.1, kind=kind)
        assert not w.aborted and w.attempt()

    play(script)
