"""The actor and requests of a frontend that was lost: gone through as their endpoint takes them, then gone on with."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from actor_world import LENGTH, World, play

from frontend_fakes import AbortReq, str_batch
from sglang_kevlar.cluster import wire
from sglang_kevlar.frontend.kept.progress import Progress, Recorded
from sglang_kevlar.frontend.outcome import RequestOutcome
from sglang_kevlar.protocol.launch import KevlarArgs
from sglang_kevlar.worker.resume import ResumedGenerateReqInput

NO_GROUP = (503, "it waited", "no_group", 5)


def message(tokens: list[int], text: str, finished: Any = None, cached: int = 0, rid: str = "of another") -> bytes:
    batch = str_batch((rid, tokens, text, finished))
    batch.cached_tokens = [cached]
    return wire.encode(batch)


class Record:
    """What this frontend records of its run."""

    lineage: Any = None

    def __init__(self) -> None:
        self.outputs: list[list[bytes]] = []
        self.why_alone: str | None = None

    def read(self) -> None:
        pass

    async def output(self, messages: list[bytes], offset: int) -> None:
        self.outputs.append(messages)

    async def alone(self, why: str) -> None:
        self.why_alone = why

    def end(self, failure: Any) -> None: ...

    def drop(self, why: str) -> None: ...


class Endpoint:
    """Of a run with these recorded outputs: takes one output when it is told to."""

    def __init__(self, *outputs: list[bytes], ended: bool = False, failure: Any = None) -> None:
        self.recorded = Recorded(outputs, ended or failure is not None, failure)
        self.record = Record()
        self.progress = Progress("a", self.record, self.recorded)
        self.outcome = RequestOutcome(kept=self.progress)

    async def take(self) -> None:
        """It asks for the next output; whoever makes it has time to."""
        self.recorded.want()
        await asyncio.sleep(0.05)


def tokens_of(w: World, rid: str = "a") -> list[int]:
    return [token for batch in w.batches if rid in batch.rids for token in batch.output_ids[batch.rids.index(rid)]]


def test_it_is_gone_through_as_it_is_taken_and_gone_on_with_behind_that():
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint([message([5], "x", cached=7)], [message([6], "y"), message([7], "z")])
        w.submit(outcome=e.outcome)
        await asyncio.sleep(0.1)
        assert not w.batches, "nobody wants it yet"
        await e.take()
        assert tokens_of(w) == [5] and e.outcome.first_token
        await e.take()
        assert tokens_of(w) == [5, 6, 7] and w.text["a"] == "xyz"
        assert not w.requests(0), "what is recorded is taken first"
        await e.take()
        (sent,) = [each for each in w.inputs[0] if not isinstance(each, AbortReq)]
        assert isinstance(sent, ResumedGenerateReqInput)
        assert sent.resume.output_ids.tolist() == [5, 6, 7]
        assert sent.resume.cached_tokens == 7 and sent.resume.input_logprobs_sent
        # Recorded here again, message by message, under its own id.
        again = [wire.decode_answer(each) for each in e.progress.messages]
        assert [(each.rids, each.output_ids[0].tolist()) for each in again] == [(["a"], [n]) for n in (5, 6, 7)]
        # The detokenizer says its text from the start.
        await w.output(0, (w.wire(), [8], "xyz!", LENGTH))
        assert w.text["a"] == "xyz!" and tokens_of(w) == [5, 6, 7, 8] and not w.actor.requests

    play(script)


@pytest.mark.parametrize("groups", [0, 1])
def test_one_of_which_nothing_was_recorded_begins_anew_and_before_new_ones(groups: int):
    async def script(w: World) -> None:
        if groups:
            await w.ready(0)
        for number in range(3):
            w.submit(f"new{number}")  # the hold queue takes two
        e = Endpoint()
        w.submit(outcome=e.outcome)
        await asyncio.sleep(0.1)
        if not groups:
            assert w.refusals() == {"new2": "queue_full"} and "a" in w.actor.requests
            await w.ready(0)
            assert w.requests(0)[0].startswith("a~")
        assert w.actor.requests["a"].entry.redirects == 0
        await w.output(0, (w.wire(), [1], "x", LENGTH))
        assert w.text["a"] == "x"

    play(script)


def test_one_that_had_ended_is_gone_through_to_its_end():
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint([message([5], "x")], [message([6], "y", LENGTH)], ended=True)
        w.submit(outcome=e.outcome)
        await e.take()
        await e.take()
        assert w.text["a"] == "xy" and not w.actor.requests and not w.requests(0) and not w.aborted

    play(script)


def test_one_that_was_aborted_ends_so_again():
    async def script(w: World) -> None:
        await w.ready(0)
        for outputs in ([], [[message([5], "x")]]):
            e = Endpoint(*outputs, ended=True)
            w.submit(outcome=e.outcome)
            await e.take()
            await e.take()
            assert [abort.rid for abort in w.aborted] == ["a"] and not w.actor.requests
            w.aborted.clear()

    play(script)


@pytest.mark.parametrize("outputs", [[], [[message([5], "x")]]])
def test_a_failure_is_told_behind_what_came_before_it(outputs: list[list[bytes]]):
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint(*outputs, failure=NO_GROUP)
        w.submit(outcome=e.outcome)
        for _ in outputs:
            assert e.outcome.failure is None
            await e.take()
        await e.take()
        assert e.outcome.failure is not None and e.outcome.failure.status == 503
        assert tokens_of(w) == [5] * len(outputs) and w.refusals() == {"a": "no_group"} and not w.actor.requests

    play(script)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_an_abort_meanwhile_ends_it(taken: int):
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint([message([5], "x")], [message([6], "y")])
        w.submit(outcome=e.outcome)
        for _ in range(taken):
            await e.take()
        w.actor.abort(AbortReq(rid="a"))
        await asyncio.sleep(0.01)
        assert [abort.rid for abort in w.aborted] == ["a"] and not w.actor.requests
        e.recorded.leave()
        await asyncio.sleep(0.01)
        assert not w.requests(0) and len(w.aborted) == 1 and len(w.batches) == taken
        assert not [task for task in w.actor._tasks if "_go_through" in repr(task)]

    play(script)


def test_an_endpoint_that_leaves_without_a_word_ends_it():
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint([message([5], "x")], [message([6], "y")])
        w.submit(outcome=e.outcome)
        await e.take()
        e.recorded.leave()
        await asyncio.sleep(0.01)
        assert not w.actor.requests and not w.requests(0)
        assert not [task for task in w.actor._tasks if "_go_through" in repr(task)]

    play(script)


def test_losing_groups_meanwhile_is_nothing_to_it():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        e = Endpoint([message([5], "x")], [message([6], "y")])
        w.submit(outcome=e.outcome)
        await e.take()
        w.lose(0)
        w.lose(1)
        await e.take()
        await e.take()
        assert w.text["a"] == "xy" and "a" in w.actor.requests and not w.aborted
        await w.ready(0, epoch=2)
        assert w.inputs[0][-1].resume.output_ids.tolist() == [5, 6]

    play(script)


def test_and_losing_the_one_that_goes_on_with_it_moves_it_again():
    async def script(w: World) -> None:
        await w.ready(0, 1)
        e = Endpoint([message([5], "x")])
        w.submit(outcome=e.outcome)
        await e.take()
        await e.take()
        group = w.attempt().group
        await w.output(group, (w.wire(), [6], "xy", None))
        w.lose(group)
        await asyncio.sleep(0.01)
        assert w.inputs[1 - group][-1].resume.output_ids.tolist() == [5, 6]
        assert w.actor.requests["a"].entry.redirects == 2

    play(script)


def test_without_a_group_in_time_it_is_refused_by_name():
    async def script(w: World) -> None:
        e = Endpoint([message([5], "x")])
        w.submit(outcome=e.outcome)
        await e.take()
        await e.take()
        await asyncio.sleep(11)
        assert w.refusals() == {"a": "no_group"}

    play(script)


def test_one_that_cannot_be_continued_is_refused_by_name():
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint([message([5], "x")])
        w.submit(outcome=e.outcome, return_hidden_states=True)
        await e.take()
        await e.take()
        assert w.refusals() == {"a": "not_continuable"} and not w.requests(0)

    play(script)


def test_more_redirects_than_allowed_are_not_made():
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint([message([5], "x")])
        w.submit(outcome=e.outcome)
        await e.take()
        await e.take()
        assert w.refusals() == {"a": "redirect_limit"}

    play(script, KevlarArgs(worker_groups=2, max_redirects=0))


@pytest.mark.parametrize(
    "recorded",
    [
        b"",
        b"\xc1",
        wire.encode(AbortReq(rid="a")),
        wire.encode(str_batch(("a", [1], "x", None), ("b", [1], "x", None))),
    ],
)
def test_a_record_that_is_none_refuses_the_request_and_nothing_else(recorded: bytes):
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint([message([5], "x")], [recorded])
        w.submit(outcome=e.outcome)
        w.submit("other")
        await e.take()
        await e.take()
        assert w.refusals() == {"a": "not_continuable"}
        await w.output(0, (w.wire("other"), [1], "x", LENGTH))
        assert w.text["other"] == "x"

    play(script)


# ---- what is recorded here


def test_of_several_requests_nothing_is_recorded_and_all_run_anew():
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint()
        for rid in ("a", "b"):
            w.submit(rid, outcome=e.outcome)
        await w.output(0, (w.wire("a"), [1], "x", None), (w.wire("b"), [2], "y", LENGTH))
        assert tokens_of(w) == [1] and tokens_of(w, "b") == [2] and not e.progress.messages
        assert e.progress.unrecordable is not None and "batch" in e.progress.unrecordable

    play(script)


def test_a_batch_that_cannot_be_cut_costs_the_record_and_not_the_frontend():
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint()
        e.progress.recorded = None
        w.submit(outcome=e.outcome)
        w.submit("b")
        batch = str_batch((w.wire(), [1], "x", None), (w.wire("b"), [2], "y", None))
        batch.dp_ranks = [0]
        w.actor.channels[0].put(batch)
        await asyncio.sleep(0.01)
        assert w.text["a"] == "x" and w.text["b"] == "y"
        assert e.progress.unrecordable is not None and "dp_ranks" in e.progress.unrecordable

    play(script)


def test_an_output_that_cannot_travel_costs_its_record_and_not_the_frontend():
    async def script(w: World) -> None:
        await w.ready(0)
        e = Endpoint()
        e.progress.recorded = None
        w.submit(outcome=e.outcome)
        batch = str_batch((w.wire(), [1], "x", None))
        batch.customized_info = {"extra": [1]}
        w.actor.channels[0].put(batch)
        await asyncio.sleep(0.01)
        assert w.text["a"] == "x" and e.progress.unrecordable is not None
        assert "customized_info" in e.progress.unrecordable
        await w.output(0, (w.wire(), [2], "y", LENGTH))
        assert w.text["a"] == "xy" and not e.progress.messages

    play(script)


# ---- the endpoint's side of it


def output(tokens: int, index: int = 0) -> dict[str, Any]:
    return {"index": index, "meta_info": {"completion_tokens": tokens}, "output_ids": list(range(tokens))}


def test_the_endpoint_has_an_output_when_it_is_recorded():
    record = Record()
    progress = Progress("a", record)
    order: list[str] = []

    async def outputs() -> AsyncGenerator[Any]:
        for number in (1, 2):
            progress.messages.append(b"m%d" % number)
            yield output(number)

    async def note(messages: list[bytes], offset: int) -> None:
        order.append(f"recorded {messages} {offset}")
        await asyncio.sleep(0)

    record.output = note  # type: ignore[method-assign]

    async def run() -> None:
        async for each in progress.watch(outputs()):
            order.append(f"given {each['meta_info']['completion_tokens']}")

    asyncio.run(run())
    assert order == ["recorded [b'm1'] 1", "given 1", "recorded [b'm2'] 2", "given 2"]


def test_of_a_batch_the_peers_know_that_it_is_one_before_anything_of_it_is_given():
    record = Record()
    progress = Progress("a", record)

    async def outputs() -> AsyncGenerator[Any]:
        progress.made_a_request()
        progress.messages.append(b"of the first")
        progress.made_a_request()
        yield output(1)

    async def run() -> None:
        async for _ in progress.watch(outputs()):
            assert record.why_alone is not None and "batch" in record.why_alone

    asyncio.run(run())
    assert record.outputs == [] and progress.messages == []
