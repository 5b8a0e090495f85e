"""The actor: outputs, losses, attaching (many groups and faults at once: test/sim)."""

from __future__ import annotations

import asyncio
from array import array
from typing import Any

import pytest
from actor_world import ARGS, LENGTH, World, play

from frontend_fakes import (
    AbortReq,
    VirtualLoop,
    run_virtual,
    str_batch,
    tokenized,
)
from sglang_kevlar.control.journal import Journal
from sglang_kevlar.control.membership import GroupReady, GroupSuspect, GroupTrusted
from sglang_kevlar.frontend import in_flight as in_flight_module
from sglang_kevlar.frontend.failover import FENCED_RID
from sglang_kevlar.frontend.in_flight import InFlight, TextMismatch
from sglang_kevlar.frontend.outcome import RequestOutcome
from sglang_kevlar.protocol.launch import KevlarArgs
from sglang_kevlar.worker.resume import ResumedGenerateReqInput, StartedReqOutput

# ---- outputs


def test_outputs_reach_the_client_under_its_id():
    async def script(w: World) -> None:
        await w.ready(0)
        outcome = RequestOutcome()
        w.submit(outcome=outcome)
        await w.output(0, (w.wire(), [5, 6], "xy", None))
        assert w.batches[0].rids == ["a"] and outcome.first_token
        await w.output(0, (w.wire(), [7], "z", LENGTH))
        assert w.text == {"a": "xyz"} and not w.actor.requests and w.actor.journal.get("a") is None
        assert w.actor.router.groups[0].requests == 0

    play(script)


def test_what_is_not_of_a_current_attempt_is_blanked():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit("a")
        w.submit("b")
        old, group = w.wire("a"), w.attempt("a").group
        other = 1 - group
        await w.output(
            other, (old, [1], "stolen", None), (w.wire("b"), [2], "mine", None), ("x~i.9", [3], "no", LENGTH)
        )
        assert w.batches[0].rids == [FENCED_RID, "b", FENCED_RID]
        w.lose(group)
        await asyncio.sleep(0.01)
        await w.output(other, (old, [1], "late", LENGTH))
        assert w.batches[1].rids == [FENCED_RID]
        assert w.actor.journal.get("a").delivered.tolist() == []
        w.actor.channels[other].put(AbortReq(rid=old))
        w.actor.channels[other].put(StartedReqOutput(rid=old, recomputed_tokens=9))
        await asyncio.sleep(0.01)
        assert not w.aborted and w.actor.journal.get("a").recomputed_tokens == 0

    play(script)


def test_an_internal_error_of_the_group_is_counted_and_a_client_error_is_not():
    async def script(w: World) -> None:
        await w.ready(0)
        for status in (400, 500):
            w.submit(f"r{status}")
            await w.output(0, (w.wire(f"r{status}"), [], "", {"type": "abort", "status_code": status}))
        assert w.errors == [(0, 1)]

    play(script)


def test_a_client_may_use_its_id_again_while_the_rest_of_the_batch_is_delivered():
    async def script(w: World) -> None:
        await w.ready(0)
        w.submit("a")
        first = w.wire("a")
        w.hook = lambda: w.submit("a")
        await w.output(0, (first, [1], "x", LENGTH))
        w.hook = None
        assert w.wire("a") != first
        await w.output(0, (w.wire("a"), [2], "y", LENGTH))
        assert w.text["a"] == "xy" and not w.actor.requests

    play(script)


def test_other_messages_are_control_replies():
    async def script(w: World) -> None:
        await w.ready(1)
        w.actor.channels[1].put("reply")
        await asyncio.sleep(0.01)
        assert w.replies == [(1, 1, "reply")]

    play(script)


# ---- losses


def test_a_lost_group_s_requests_go_on_elsewhere_behind_their_last_token():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit("a")
        group = w.attempt().group
        await w.output(group, (w.wire(), [5, 6], "xy", None))
        w.lose(group)
        await asyncio.sleep(0.01)
        message = w.inputs[1 - group][-1]
        assert isinstance(message, ResumedGenerateReqInput) and message.resume.output_ids.tolist() == [5, 6]
        assert w.attempt().group == 1 - group and group not in w.actor.router.groups and w.serving[group] is False
        w.actor.channels[1 - group].put(StartedReqOutput(rid=w.wire(), recomputed_tokens=5))
        await w.output(1 - group, (w.wire(), [7], "xyz", LENGTH))
        assert w.text["a"] == "xyz" and w.batches[-1].output_ids[0].tolist() == [7]
        (record,) = w.actor.events.history()
        assert (record["group"], record["redirected"], record["recomputed_tokens"]) == (group, 1, 5)

    play(script)


def test_what_arrived_before_the_fence_is_delivered_in_order():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit("a")
        wire, group = w.wire(), w.attempt().group
        channel = w.actor.channels[group]
        # All in one go: the receiving task has been woken for the first message when the loss is acted on.
        channel.put(str_batch((wire, [1], "1", None)))
        await asyncio.sleep(0)
        channel.put(str_batch((wire, [2], "2", None)))
        w.lose(group)
        channel.put(str_batch((wire, [3], "3", None)))
        await asyncio.sleep(0.01)
        assert w.text["a"] == "123" and channel.closed
        assert w.inputs[1 - group][-1].resume.output_ids.tolist() == [1, 2, 3]

    play(script)


def test_a_request_that_came_between_the_loss_and_its_turn_goes_to_a_survivor():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.lose(0)
        w.submit("a")
        w.submit("b")
        assert w.requests(0) == [] and len(w.requests(1)) == 2
        await asyncio.sleep(0.01)
        assert w.actor.journal.get("a").redirects == 0

    play(script)


def test_requests_and_aborts_while_a_loss_is_being_handled():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit("a")
        group = w.attempt().group

        def meanwhile() -> None:
            w.hook = None
            w.submit("b")
            w.actor.abort(AbortReq(rid="a"))

        w.hook = meanwhile
        w.actor.channels[group].put(str_batch((w.wire(), [1], "1", None)))
        w.lose(group)
        await asyncio.sleep(0.1)
        assert [abort.rid for abort in w.aborted] == ["a"]
        assert w.attempt("b").group == 1 - group

    play(script)


def test_what_must_not_run_again_is_refused_by_name():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        outcome = RequestOutcome()
        w.submit("special", outcome=outcome, return_hidden_states=True)
        w.submit("sibling", outcome=outcome)
        group = w.attempt("special").group
        await w.output(group, (w.wire("special"), [1], "x", None))
        w.lose(group)
        await asyncio.sleep(0.1)
        assert w.refusals() == {"special": "not_continuable"}
        assert outcome.failure.kind == "not_continuable" and outcome.failure.status == 500
        assert "special" in w.aborted[0].finished_reason["message"]
        sibling = w.actor.requests.get("sibling")
        assert sibling is None or sibling.abort_requested

    play(script)


def test_weights_that_change_while_a_request_waits_end_it():
    async def script(w: World) -> None:
        await w.ready(0)
        w.submit("a")
        await w.output(0, (w.wire(), [1], "x", None))
        w.lose(0)
        await asyncio.sleep(0.01)
        w.actor.journal.weights = "other"
        await w.ready(1)
        assert w.refusals() == {"a": "weights"} and w.requests(1) == []

    play(script)


def test_a_group_that_does_not_read_is_given_up():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.actor.channels[0].full = True
        for rid in "abc":
            w.submit(rid)
        assert [(g, e) for g, e, _ in w.killed] == [(0, 1)] and "does not read" in w.killed[0][2]
        assert len(w.requests(1)) == 2  # it got no second one
        w.lose(0, kind="unfit")
        await asyncio.sleep(0.01)
        assert len(w.requests(1)) == 3

    play(script)


# ---- attaching


def test_a_group_serves_only_once_it_is_connected_cleared_and_up_to_date():
    async def script(w: World) -> None:
        w.submit("a")
        w.actor.on_event(GroupReady(0, 1, {}))
        await asyncio.sleep(0.15)
        assert isinstance(w.inputs[0][0], AbortReq) and w.inputs[0][0].abort_all
        assert w.requests(0) == [] and not w.actor.router.groups
        await asyncio.sleep(0.1)
        assert w.requests(0) == [w.wire()] and w.serving == {0: True}

    play(script)


@pytest.mark.parametrize("after", [0.05, 0.15])
def test_a_loss_while_it_is_being_attached(after):
    async def script(w: World) -> None:
        w.submit("a")
        w.actor.on_event(GroupReady(0, 1, {}))
        await asyncio.sleep(after)
        w.lose(0)
        await w.ready(0, epoch=2)
        assert (w.attempt().group, w.attempt().epoch) == (0, 2) and not w.killed

    play(script)


def test_a_group_that_cannot_be_used_is_killed_with_the_reason():
    async def script(w: World) -> None:
        w.connects = False
        await w.ready(0)
        w.connects, w.unprepared = True, "weights differ"
        await w.ready(1)
        assert [(g, e) for g, e, _ in w.killed] == [(0, 1), (1, 1)]
        assert "connect" in w.killed[0][2] and w.killed[1][2] == "weights differ"
        assert not w.actor.router.groups

    play(script)


def test_a_group_is_told_of_changes_from_the_moment_it_was_brought_up_to_date():
    async def script(w: World) -> None:
        w.actor.on_event(GroupReady(0, 1, {}))
        await w.actor._turn.acquire()  # for instance a long batch of another group
        w.actor._turn.release()
        await asyncio.sleep(0.15)
        await w.actor._turn.acquire()
        await asyncio.sleep(0.2)
        assert w.actor.channels[0].up_to_date and not w.actor.router.groups
        w.actor._turn.release()
        await asyncio.sleep(0.01)
        assert set(w.actor.router.groups) == {0}

    play(script)


def test_a_suspect_gets_nothing_while_another_serves():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.actor.on_event(GroupSuspect(0, 1, "why"))
        await asyncio.sleep(0.01)
        w.submit("a")
        w.submit("b")
        assert w.requests(0) == [] and len(w.requests(1)) == 2
        w.actor.on_event(GroupSuspect(1, 1, "why"))
        await asyncio.sleep(0.01)
        assert set(w.actor.router.groups) == {0, 1}  # nobody else is left
        assert w.actor.router.groups[1].requests == 2
        w.actor.on_event(GroupTrusted(0, 1))
        await asyncio.sleep(0.01)
        assert set(w.actor.router.groups) == {0}

    play(script)


def test_a_draining_group_finishes_what_it_has():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit("a")
        group = w.attempt().group
        w.draining.add(group)
        w.actor.route()
        w.submit("b")
        assert w.attempt("b").group == 1 - group
        await w.output(group, (w.wire("a"), [1], "x", LENGTH))
        assert w.text == {"a": "x"}

    play(script)


def test_a_standby_serves_only_for_a_group_that_cannot():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        assert set(w.actor.router.groups) == {0}
        w.lose(0)
        await asyncio.sleep(0.01)
        assert set(w.actor.router.groups) == {1}
        await w.ready(0, epoch=2)
        assert set(w.actor.router.groups) == {0}

    play(script, KevlarArgs(worker_groups=2, standby_groups=1))


def test_an_exception_in_any_task_ends_the_actor():
    loop = VirtualLoop()

    async def main() -> None:
        world = World(loop, ARGS)
        running = loop.create_task(world.actor.run())
        await world.ready(0)
        world.submit("a")
        world.hook = lambda: 1 / 0  # type: ignore[assignment, return-value]
        await world.output(0, (world.wire(), [1], "x", None))
        with pytest.raises(ZeroDivisionError):
            await running

    run_virtual(loop, main())


# ---- prefixes


def test_what_keeps_radix_trees_apart_keeps_prefixes_apart():
    def blocks(**fields: Any) -> array[int]:
        message = tokenized("a", [1] * 200, **fields)
        return InFlight(Journal(ARGS, "i").open("a", 200, 10), message, None, 4).blocks

    named = [blocks(**{name: "x"}) for name in ("lora_id", "extra_key", "cache_salt")]
    assert len({each.tobytes() for each in [blocks(), *named]}) == 4 and blocks() == blocks()


def test_a_prompt_is_hashed_once_however_often_it_moves(monkeypatch):
    hashed = []
    real = in_flight_module.block_hashes
    monkeypatch.setattr(in_flight_module, "block_hashes", lambda *args: hashed.append(args) or real(*args))

    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit(prompt=200)
        for epoch in (1, 2, 3):
            group = w.attempt().group
            w.lose(group, epoch=w.attempt().epoch)
            await w.ready(group, epoch=epoch + 1)
        assert w.actor.journal.get("a").redirects == 3 and len(hashed) == 1

    play(script)


# ---- text


def in_flight() -> InFlight:
    journal = Journal(ARGS, "i")
    entry = journal.open("a", 3, 10)
    request = InFlight(entry, tokenized("a", [1]), None, 4)
    journal.begin_attempt(entry, 0, 1)
    journal.deliver(entry, [1, 2])
    journal.fence(0, 1)
    request.for_attempt(journal.begin_attempt(entry, 1, 1))
    return request


@pytest.mark.parametrize(
    ("chunks", "delivered", "new"),
    [
        (["hello world"], "hello", [" world"]),
        (["hello", "!"], "hello", ["", "!"]),
        (["he", "llo w", "x"], "hello", ["", " w", "x"]),
        (["", "hel", "lo"], "hello", ["", "", ""]),
        (["naïve 日", "本"], "naïve ", ["日", "本"]),  # the first character was not complete when it was lost
        (["x", "y"], "", ["x", "y"]),
    ],
)
def test_text_that_comes_again_is_stripped(chunks, delivered, new):
    request = in_flight()
    assert request.replaying
    assert [request.new_text(chunk, delivered) for chunk in chunks] == new


@pytest.mark.parametrize("chunks", [["help"], ["he", "y you"], ["hello".upper()], ["world hello"]])
def test_other_text_is_a_mismatch(chunks):
    request = in_flight()
    with pytest.raises(TextMismatch):
        for chunk in chunks:
            request.new_text(chunk, "hello")


def test_a_mismatch_ends_the_request_by_name_and_on_the_group():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        w.submit("a")
        group = w.attempt().group
        await w.output(group, (w.wire(), [1], "hello", None))
        w.lose(group)
        await asyncio.sleep(0.01)
        wire = w.wire()
        await w.output(1 - group, (wire, [2], "jello", None))
        assert w.text["a"] == "hello" and w.batches[-1].rids == [FENCED_RID]
        assert w.refusals() == {"a": "not_continuable"} and "request a" in w.aborted[0].finished_reason["message"]
        assert w.inputs[1 - group][-1].rid == wire and not w.actor.requests

    play(script)


def test_a_moved_request_goes_to_the_group_that_has_its_shadow() -> None:
    """Also when something was routed anew between the loss and its turn."""

    async def script(world: World) -> None:
        await world.ready(0, 1, 2)
        world.submit("b", prompt=50)  # makes group 0 the busiest, so that its heir is not the least loaded
        for rid in ("c", "d", "e", "f"):
            world.submit(rid, prompt=3)
        lost = world.attempt("b").group
        heir = (lost + 1) % 3
        target = world.plans[lost][-1].target
        assert target is not None and (target.name, target.epoch) == (str(heir), 1)
        world.lose(lost)
        world.actor.route()
        await asyncio.sleep(0.1)
        assert world.attempt("b").group == heir

    play(script, KevlarArgs(worker_groups=3))
