"""Records here and at the peers: what waits, what wakes it, and what goes alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import uvloop
from peer_messages import P, alone, ended, http, opened, yielded

from sglang_kevlar.control import replication
from sglang_kevlar.control.directory import Here, Nowhere, Refused, TakeUp, There
from sglang_kevlar.frontend.peers import records as records_module
from sglang_kevlar.frontend.peers.records import PeerRecords
from sglang_kevlar.protocol.cluster import Identity
from sglang_kevlar.protocol.records import MAX_HEADERS, Alone, Complete, Dropped, Ended, Opened, Taken, Yielded

K = (P, "k")


class World:
    """One frontend; what it sends to its peers, and what is done with runs."""

    def __init__(self, name: str = "a", retention: float = 60.0, memory: int = 1 << 20) -> None:
        self.records = PeerRecords(name, f"{name}1", (), memory, retention)
        self.records.links = self  # type: ignore[assignment]
        self.records.take_up = lambda taken: self.taken.extend(taken)
        self.records.abandon = lambda *gone: self.abandoned.append(gone)
        self.sent: dict[str, list[Any]] = {}
        self.taken: list[TakeUp] = []
        self.abandoned: list[tuple[str, str, str]] = []
        self.rejected: list[tuple[str, str]] = []

    # links.PeerLinks

    def send(self, name: str, messages: list[Any]) -> None:
        self.sent.setdefault(name, []).extend(messages)

    def reject(self, name: str, problem: str) -> None:
        """As of a session that this frontend dialled: it is over at once."""
        self.rejected.append((name, problem))
        self.records.left(name)

    # what tests do

    async def join(self, name: str = "b", tag: str | None = None, *records: Any) -> None:
        """With everything taken in that there was."""
        self.sent[name] = []
        self.records.joined(
            Identity(kind="frontend", name=name, host="h", instance=tag or f"{name}1", url=f"http://{name}")
        )
        await asyncio.sleep(0)
        self.records.arrived(name, [*records, Complete()])
        self.take(name)

    def take(self, name: str = "b") -> None:
        count = sum(not isinstance(message, Taken) for message in self.sent[name])
        self.records.arrived(name, [Taken(count=count)])

    def begin(self, rid: str = "r", key: tuple[str, str] = K, **request: Any) -> Any:
        return self.records.begin(rid, key, None, http(**request))

    def find(self, key: tuple[str, str] = K) -> Any:
        return self.records.directory.find(key, None, key[0], None, 1e9)


def play(script: Callable[[World], Awaitable[None]], **bounds: Any) -> None:
    """On the event loop that a frontend runs on."""

    async def main() -> None:
        async with asyncio.timeout(30):
            await script(World(**bounds))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def waits(task: asyncio.Task[None]) -> bool:
    await asyncio.sleep(0.01)
    return not task.done()


def test_an_output_waits_for_every_peer_that_is_current():
    async def script(w: World) -> None:
        record = w.begin()
        await record.output([b"alone here"], 1)
        await w.join("b")
        await w.join("c")
        assert [type(m) for m in w.sent["b"]] == [Opened, Yielded, Complete, Taken]
        assert [each["state"] for each in w.records.status()] == ["current", "current"]
        task = asyncio.create_task(record.output([b"x"], 2))
        assert await waits(task) and w.sent["b"][-1] == Yielded(
            rid="r", principal=P, number=1, offset=2, messages=[b"x"]
        )
        w.take("b")
        assert await waits(task)
        w.take("c")
        await task

    play(script)


@pytest.mark.parametrize("how", ["left", "another session"])
def test_who_leaves_is_waited_for_no_longer(how: str):
    async def script(w: World) -> None:
        record = w.begin()
        await w.join()
        tasks = [asyncio.create_task(record.output([b"x"], n)) for n in (1, 2)]
        assert await waits(tasks[0])
        w.records.left("b")
        if how == "another session":
            w.records.joined(Identity(kind="frontend", name="b", host="h", instance="b1", url=""))
        await asyncio.gather(*tasks)

    play(script)


def test_one_that_waits_may_be_cancelled():
    async def script(w: World) -> None:
        record = w.begin()
        await w.join()
        first, second = (asyncio.create_task(record.output([b"x"], n)) for n in (1, 2))
        assert await waits(first)
        first.cancel()
        w.take()
        await second
        assert not w.records._waiting

    play(script)


@pytest.mark.parametrize(
    "messages",
    [
        [yielded("r", 0, 1)],
        [opened("r"), opened("r")],
        [opened("r"), yielded("r", 3, 1)],
        [Taken(count=99)],
    ],
)
def test_a_contradiction_ends_the_session_and_nothing_waits_for_it(messages: list[Any]):
    async def script(w: World) -> None:
        record = w.begin()
        await w.join()
        task = asyncio.create_task(record.output([b"x"], 1))
        assert await waits(task)
        w.records.arrived("b", messages)
        assert [name for name, _ in w.rejected] == ["b"]
        await task
        await w.join()  # and it begins anew

    play(script)


def test_what_is_taken_in_is_said_behind_what_was_published_before():
    async def script(w: World) -> None:
        await w.join()
        w.begin()
        w.records.arrived("b", [opened("s"), yielded("s", 0, 1)])
        await asyncio.sleep(0)
        assert [type(m) for m in w.sent["b"]] == [Complete, Taken, Opened, Taken]
        assert w.sent["b"][-1] == Taken(count=3)

    play(script)


def test_a_peer_that_has_it_too_and_comes_first():
    async def script(w: World) -> None:
        w.begin("r")
        await w.join("a")
        w.records.arrived("a", [opened("s", key="k")])
        assert w.abandoned == [(P, "r", "frontend a has it, too")]
        w.abandoned.clear()
        record = w.begin("t", (P, "other"))
        record.read()
        w.records.arrived("a", [opened("u", key="other")])
        assert not w.abandoned, "a client was given something of it"

    play(script, name="b")


async def forgotten(w: World) -> None:
    for _ in range(1000):
        if w.find() == Nowhere():
            return
        await asyncio.sleep(0.0097)  # never twice at the same part of a millisecond
    raise AssertionError("not forgotten")


def test_what_a_lost_peer_had_is_taken_up_and_forgotten_in_the_end():
    async def script(w: World) -> None:
        await w.join("b", None, opened("r", key="k"), yielded("r", 0, 4))
        assert w.find() == There("b")
        leaving = w.records.leaving("b")
        w.records.left("b")
        assert leaving.done() and [found.record.offset for found in w.taken] == [4]
        assert isinstance(w.find(), TakeUp) and w.records.status() == []
        await forgotten(w)

    play(script, retention=0.5)


def test_it_is_forgotten_also_when_the_loop_calls_too_early():
    """uvloop counts in whole milliseconds: a third of its calls comes before their time."""

    async def script(w: World) -> None:
        for n in range(30):
            await w.join("b", f"b{n}", opened("r", key="k"))
            w.records.left("b")
            assert isinstance(w.find(), TakeUp)
            await forgotten(w)

    play(script, retention=0.03)


def test_a_frontend_that_ends_takes_nothing_up():
    async def script(w: World) -> None:
        await w.join("b", None, opened("r", key="k"))
        w.records.close()
        w.records.left("b")
        assert not w.taken

    play(script)


def test_a_key_that_is_used_again_before_the_old_run_was_swept():
    async def script(w: World) -> None:
        await w.join()
        first = w.begin("r")
        second = w.begin("s")
        assert w.find() == Here("s")
        first.drop("it was refused")  # the sweep
        first.end(None)
        await first.output([b"late"], 1)
        await first.alone("late")
        w.begin("s", (P, "another"))
        assert w.find() == Nowhere() and w.find((P, "another")) == Here("s")
        second.drop("")
        w.records.directory.check()
        await asyncio.sleep(0)
        assert [type(m) for m in w.sent["b"][2:]] == [Opened, Dropped, Opened, Dropped, Opened]

    play(script)


def test_an_end_is_said_once_and_a_drop_after_it():
    async def script(w: World) -> None:
        await w.join()
        record = w.begin()
        failure = (500, "no", "poison", None)
        record.end(failure)
        record.end(None)
        record.drop("its time is over")
        await asyncio.sleep(0)
        assert [type(m) for m in w.sent["b"][2:]] == [Opened, Ended, Dropped] and w.sent["b"][3].failure == failure

    play(script)


# ---- what goes on here alone


@pytest.mark.parametrize(
    "request_", [{"headers": [(b"x", b"y")] * (MAX_HEADERS + 1)}, {"body": b"x" * (33 << 20)}], ids=["headers", "body"]
)
def test_a_request_that_no_peer_would_take_is_known_to_them_by_name(request_: dict[str, Any]):
    async def script(w: World) -> None:
        await w.join()
        record = w.begin(**request_)
        task = asyncio.create_task(record.output([b"x"], 1))
        assert await waits(task), "the peers are to know first that it cannot be taken up"
        assert [type(m) for m in w.sent["b"][2:]] == [Opened, Alone] and w.sent["b"][2].request.body == b""
        w.take()
        await task
        assert len(w.sent["b"]) == 4

    play(script, memory=1 << 30)


def test_an_output_that_no_peer_would_take():
    async def script(w: World) -> None:
        await w.join()
        record = w.begin()
        task = asyncio.create_task(record.output([b"x" * (33 << 20)], 1))
        assert await waits(task) and "32 MiB" in w.sent["b"][-1].why
        w.take()
        await task

    play(script, memory=1 << 30)


def test_a_batch_goes_on_alone_when_something_of_it_is_given():
    async def script(w: World) -> None:
        await w.join()
        record = w.begin()
        task = asyncio.create_task(record.alone("it is a batch"))
        assert await waits(task) and w.sent["b"][-1] == alone("r")
        w.take()
        await task
        await record.alone("it is a batch")
        assert w.sent["b"][-1] == alone("r")

    play(script)


def test_of_what_takes_too_much_memory_the_largest_goes_on_alone():
    async def script(w: World) -> None:
        small, large = w.begin("small", (P, "1")), w.begin("large", (P, "2"))
        await small.output([b"x" * 1_000], 1)
        for number in range(6):
            await large.output([b"x" * 2_000], number)
        await w.join()
        assert [type(m) for m in w.sent["b"] if not isinstance(m, Taken)] == [Opened, Yielded, Opened, Alone, Complete]
        assert "--stream-memory" in w.sent["b"][3].why
        await large.output([b"x" * 2_000], 7)
        assert w.records._replication.bytes <= 10_000

    play(script, memory=10_000)


def test_and_is_bounded_by_what_a_session_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records_module, "MAX_RECORDS", 5_000)

    async def script(w: World) -> None:
        record = w.begin()
        for number in range(5):
            await record.output([b"x" * 2_000], number)
        assert w.records._replication.bytes < 5_000

    play(script)


def test_peers_records_are_bounded_too_and_refused_by_name():
    async def script(w: World) -> None:
        await w.join("b", None, opened("r", key="k"))
        w.records.arrived("b", [yielded("r", number, number, b"x" * 2_000) for number in range(6)])
        assert w.find() == There("b")
        w.records.left("b")
        found = w.find()
        assert isinstance(found, Refused) and "--stream-memory" in found.why and not w.taken

    play(script, memory=10_000)


def test_a_peer_that_does_not_keep_up_is_let_go(monkeypatch: pytest.MonkeyPatch):
    async def script(w: World) -> None:
        w.records._replication = replication.Replication(max_behind=10_000)
        await w.join()
        record = w.begin()
        tasks = [asyncio.create_task(record.output([b"x" * 2_000], n)) for n in range(6)]
        await asyncio.gather(*tasks)
        assert w.rejected == [("b", "it does not keep up with what this frontend records")]

    play(script)


def test_ended_ones_are_no_burden_to_whoever_takes_up():
    async def script(w: World) -> None:
        await w.join("b", None, opened("r", key="k"), ended("r"))
        w.records.left("b")
        assert not w.taken and isinstance(w.find(), TakeUp)

    play(script)
