"""The actor: who waits, who is let in, who is aborted."""

from __future__ import annotations

import asyncio

import pytest
from actor_world import LENGTH, World, play

from frontend_fakes import (
    AbortReq,
)
from sglang_kevlar.control.membership import GroupReady, GroupTrusted
from sglang_kevlar.frontend.outcome import RequestOutcome
from sglang_kevlar.frontend.requests import RETRY_AFTER
from sglang_kevlar.protocol.launch import KevlarArgs

# ---- holding


def test_a_full_hold_queue_refuses_after_the_call():
    async def script(w: World) -> None:
        outcome = RequestOutcome()
        for rid in "ab":
            w.submit(rid)
        w.submit("c", outcome=outcome)
        assert not w.aborted  # upstream is not done with the request yet
        await asyncio.sleep(0)
        assert w.refusals() == {"c": "queue_full"}
        assert (outcome.failure.status, outcome.failure.retry_after) == (503, RETRY_AFTER)
        assert "c" in outcome.failure.message and len(w.actor.hold) == 2

    play(script)


@pytest.mark.parametrize("noise", [False, True])
def test_a_held_request_ends_after_its_time(noise):
    async def script(w: World) -> None:
        await asyncio.sleep(3)  # the actor has been waiting for events before
        outcome = RequestOutcome()
        w.submit(outcome=outcome)
        for _ in range(100):
            if noise:  # events come faster than the actor looks at the time
                w.actor.on_event(GroupTrusted(1, 7))
            await asyncio.sleep(0.11)
        assert w.refusals() == {"a": "no_group"}
        assert outcome.failure.status == 503 and outcome.failure.retry_after and not len(w.actor.hold)

    play(script)


def test_after_a_loss_new_requests_wait_for_room_behind_redirected_ones():
    async def script(w: World) -> None:
        await w.ready(0, capacity=60)
        w.submit("a", prompt=30, max_new_tokens=10)
        w.submit("b", prompt=30, max_new_tokens=10)  # degraded: one of two groups
        assert w.requests(0) == [w.wire("a")] and "b" in w.actor.hold
        w.submit("small", prompt=1, max_new_tokens=1)  # there is room, but b waits
        assert "small" in w.actor.hold
        await w.output(0, (w.wire("a"), [1], "x", LENGTH))
        assert [rid.split("~")[0] for rid in w.requests(0)] == ["a", "b", "small"]

    play(script)


def test_an_idle_group_takes_a_request_larger_than_it():
    async def script(w: World) -> None:
        await w.ready(0, capacity=20)
        w.submit("a", prompt=30)
        assert w.requests(0) == [w.wire()]

    play(script)


def test_whatever_frees_room_lets_others_in():
    async def script(w: World) -> None:
        await w.ready(0, capacity=60)
        for rid, prompt in (("a", 40), ("b", 40), ("c", 5)):
            w.submit(rid, prompt=prompt, max_new_tokens=10)
        w.actor.abort(AbortReq(rid="b"))  # the one in the way leaves
        await asyncio.sleep(0.01)
        w.submit("d", prompt=30, max_new_tokens=10)
        assert [rid.split("~")[0] for rid in w.requests(0)] == ["a"] and "c" in w.actor.hold
        w.actor.channels[0].put(AbortReq(rid=w.wire("a")))  # aborted in the group's own queue: no output
        await asyncio.sleep(0.01)
        assert [rid.split("~")[0] for rid in w.requests(0)] == ["a", "c", "d"]

    play(script, KevlarArgs(worker_groups=2))


# ---- aborts


def test_a_refusal_takes_its_siblings_with_it_and_nobody_else():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        batch, others = RequestOutcome(), RequestOutcome()
        for rid, outcome in (("a", batch), ("b", others), ("c", batch), ("d", None)):
            w.submit(rid, outcome=outcome, return_hidden_states=rid == "a")
        group = w.attempt("a").group
        await w.output(group, (w.wire("a"), [1], "x", None))
        w.lose(group)
        await asyncio.sleep(0.01)
        assert w.refusals() == {"a": "not_continuable"}
        asked = {rid for rid, request in w.actor.requests.items() if request.abort_requested}
        assert asked | {abort.rid for abort in w.aborted} == {"a", "c"}
        for rid in list(w.actor.requests):
            await w.output(w.attempt(rid).group, (w.wire(rid), [1], "x", LENGTH))
        assert not w.actor.requests and not batch.rids and not others.rids

    play(script)


def test_abort_of_a_held_request():
    async def script(w: World) -> None:
        w.submit()
        w.actor.abort(AbortReq(rid="a", abort_message="bye"))
        await w.ready(0)
        assert [(abort.rid, abort.abort_message) for abort in w.aborted] == [("a", "bye")]
        assert w.requests(0) == [] and not w.actor.requests
        w.actor.abort(AbortReq(rid="a"))
        w.actor.abort(AbortReq(rid="unknown"))

    play(script)


def test_abort_of_a_running_request_goes_to_its_group():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit()
        group = w.attempt().group
        w.actor.abort(AbortReq(rid="a"))
        assert w.inputs[group][-1].rid == w.wire() and not w.aborted
        w.actor.channels[group].put(AbortReq(rid=w.wire()))
        await asyncio.sleep(0.01)
        assert [abort.rid for abort in w.aborted] == ["a"] and not w.actor.requests

    play(script)


def test_an_aborted_request_is_not_moved():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit()
        group = w.attempt().group
        w.actor.abort(AbortReq(rid="a"))
        w.lose(group)
        await asyncio.sleep(0.01)
        assert [abort.rid for abort in w.aborted] == ["a"] and w.requests(1 - group) == []

    play(script)


def test_abort_all_reaches_groups_that_serve_and_the_hold_queue():
    async def script(w: World) -> None:
        await w.ready(0, capacity=20)
        w.submit("a")
        w.submit("b")
        assert "b" in w.actor.hold
        w.actor.on_event(GroupReady(1, 1, {}))
        await asyncio.sleep(0.05)
        w.actor.channels[1].full = True  # nobody has connected yet: nothing can be sent
        w.actor.abort(AbortReq(abort_all=True))
        w.actor.channels[1].full = False
        await asyncio.sleep(0.01)
        assert w.inputs[0][-1].abort_all and [abort.rid for abort in w.aborted] == ["b"]
        assert not w.killed

    play(script)
