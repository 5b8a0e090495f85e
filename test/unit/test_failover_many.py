"""The actor: many requests of a lost group are moved in several goes, and others are served in between."""

from __future__ import annotations

import asyncio
from typing import Any

from actor_world import World, play

from frontend_fakes import AbortReq, str_batch, tokenized
from sglang_kevlar.frontend.requests import GIVEN_AT_ONCE, REQUEST_COST
from sglang_kevlar.protocol.launch import KevlarArgs

MANY = 3 * GIVEN_AT_ONCE // REQUEST_COST
#: two that serve and a standby: after a loss as many serve as before
ARGS = KevlarArgs(worker_groups=3, standby_groups=1, hold_queue=MANY, hold_timeout=10.0)
RIDS = [f"r{number:03d}" for number in range(MANY)]


async def many(w: World) -> None:
    """All of them run on group 0, and "other" on group 1."""
    await w.ready(0, 1, 2, capacity=1_000_000)
    for number, rid in enumerate(RIDS):
        w.actor.submit(*_request(rid, MANY - number), pinned_group=0)
    w.actor.submit(*_request("other", 1), pinned_group=1)
    assert len(w.requests(0)) == MANY


def _request(rid: str, prompt: int, **fields: Any) -> tuple[Any, None]:
    return tokenized(rid, [1] * prompt, **fields), None


async def begun(w: World) -> None:
    """Group 0 is lost, and the first of its requests have been moved."""
    w.lose(0)
    while not moved(w):
        await asyncio.sleep(0)
    assert 0 < len(moved(w)) < MANY and len(w.actor.hold) == MANY - len(moved(w))


def moved(w: World) -> list[str]:
    return [rid for rid in RIDS if (r := w.actor.requests.get(rid)) and r.entry.redirects and r.entry.attempt]


def test_tokens_of_other_groups_pass_between_two_goes():
    async def script(w: World) -> None:
        await many(w)
        await begun(w)
        w.actor.channels[1].put(str_batch((w.wire("other"), [1], "x", None)))  # type: ignore[attr-defined]
        while "other" not in w.text:
            await asyncio.sleep(0)
        assert len(moved(w)) < MANY
        await asyncio.sleep(0.01)
        assert moved(w) == RIDS and not len(w.actor.hold)
        # The longest first, as they were fenced.
        sent = [rid.split("~")[0] for group in (1, 2) for rid in w.requests(group) if rid[0] == "r"]
        assert sorted(sent) == RIDS and all(w.actor.journal.get(rid).redirects == 1 for rid in RIDS)
        for group in (1, 2):
            order = [rid for rid in w.requests(group) if rid[0] == "r"]
            assert order == sorted(order)

    play(script, ARGS)


def test_long_contexts_are_fewer_in_a_go():
    async def script(w: World) -> None:
        await w.ready(0, 1, 2, capacity=10_000_000)
        for rid in RIDS[:3]:
            w.actor.submit(*_request(rid, GIVEN_AT_ONCE), pinned_group=0)
        w.lose(0)
        seen = set()
        while len(moved(w)) < 3:
            await asyncio.sleep(0)
            seen.add(len(moved(w)))
        assert {1, 2, 3} <= seen

    play(script, ARGS)


def test_a_new_request_waits_behind_those_that_are_being_moved():
    async def script(w: World) -> None:
        await many(w)
        await begun(w)
        assert len(w.actor.router.groups) == 2  # the standby serves: no capacity is lost
        w.submit("new")
        assert "new" in w.actor.hold
        await asyncio.sleep(0.01)
        everything = [*w.requests(1), *w.requests(2)]
        assert [rid.split("~")[0] for rid in everything].count("new") == 1
        assert w.requests(w.attempt("new").group)[-1] == w.wire("new")

    play(script, ARGS)


def test_groups_that_are_lost_between_two_goes():
    async def script(w: World) -> None:
        await many(w)
        await begun(w)
        first = moved(w)
        w.lose(1)
        w.lose(2)
        await asyncio.sleep(0.01)
        assert not moved(w) and len(w.actor.hold) == MANY + 1
        await w.ready(0, epoch=2, capacity=1_000_000)
        assert moved(w) == RIDS and {w.attempt(rid).group for rid in RIDS} == {0}
        assert all(w.actor.journal.get(rid).redirects == (2 if rid in first else 1) for rid in RIDS)
        # Those that had not been moved yet are no later than before.
        assert [rid.split("~")[0] for rid in w.requests(0)][: MANY - len(first)] == RIDS[len(first) :]

    play(script, ARGS)


def test_what_is_aborted_between_two_goes_is_not_moved():
    async def script(w: World) -> None:
        await many(w)
        await begun(w)
        last = RIDS[-1]
        w.actor.abort(AbortReq(rid=last))
        await asyncio.sleep(0.01)
        assert [abort.rid for abort in w.aborted] == [last] and moved(w) == RIDS[:-1]

    play(script, ARGS)


def test_many_that_must_not_run_again_are_refused_in_goes_and_none_goes_on():
    async def script(w: World) -> None:
        await w.ready(0, 1, 2)
        for rid in RIDS:
            w.actor.submit(*_request(rid, 3, return_hidden_states=True), pinned_group=0)
        await w.output(0, *((w.wire(rid), [1], "x", None) for rid in RIDS))
        w.lose(0)
        while not w.aborted:
            await asyncio.sleep(0)
        assert len(w.aborted) < MANY
        await asyncio.sleep(0.01)
        assert w.refusals() == dict.fromkeys(RIDS, "not_continuable")
        assert not w.actor.requests and not w.requests(1) and not w.requests(2)

    play(script, ARGS)


def test_without_a_group_what_must_not_run_again_is_refused_at_once():
    async def script(w: World) -> None:
        await w.ready(0)
        w.actor.submit(*_request("a", 3, return_hidden_states=True), pinned_group=0)
        await w.output(0, (w.wire("a"), [1], "x", None))
        w.lose(0)
        await asyncio.sleep(0.01)
        assert w.refusals() == {"a": "not_continuable"}

    play(script, ARGS)
