"""How long requests are kept, and what goes when memory is short, over a small endpoint of our own."""

from __future__ import annotations

import asyncio
import random

import pytest
from kept_world import MIB, World, events, play, until

from sglang_kevlar.control.kept_requests import MOST_REQUESTS, REQUEST_OVERHEAD
from sglang_kevlar.frontend.kept import run as run_module


def test_what_nobody_comes_back_for_is_aborted() -> None:
    async def test(world: World) -> None:
        first = world.post(b'{"rid": "r"}')
        world.put("a")
        await first.until(events(1))
        await asyncio.sleep(0.3)
        assert world.aborted == 0  # as long as its client is there
        await first.leave()
        await until(lambda: world.aborted == 1)
        for gone in (world.get("r"), world.get("r/stream"), world.post(b'{"rid": "r"}')):
            await gone.end()
            assert gone.status == 410 and "--stream-retention" in gone.message
        assert world.started == 1 and world.runs.requests.used == 0

    play(test, retention=0.1)


def test_what_has_ended_is_kept_for_the_retention() -> None:
    async def test(world: World) -> None:
        world.put("a", None)
        await world.post(b'{"rid": "r"}').end()
        assert (await world.get("r").end()).status == 200
        world.runs.requests.retention = 0.0
        await until(lambda: len(world.runs.requests) == 0)
        assert (await world.get("r").end()).status == 410
        assert world.aborted == 0 and world.runs.requests.used == 0

    play(test)


def test_a_shutdown_does_not_wait_the_retention_out() -> None:
    async def test(world: World) -> None:
        world.runs.drain()
        assert world.runs.requests.retention == 5.0

    play(test)


def test_a_slow_client_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "PIECE", 1)

    async def test(world: World) -> None:
        slow, fast = world.post(read=1), world.post()
        for i in range(100):
            world.put(i)
        world.put(None)
        await fast.end()
        assert len(slow.events) <= 1 and not slow.task.done()
        slow.read(1000)
        await slow.end()
        assert slow.body == fast.body

    play(test)


def test_a_client_that_stopped_reading_does_not_hold_an_ended_log_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "PIECE", 1)

    async def test(world: World) -> None:
        slow = world.post(b'{"rid": "r"}', read=1)
        world.put("a", "b", None)
        await until(lambda: world.ended == 1 and len(world.runs.requests) == 0)
        assert world.runs.requests.used == 0
        slow.read(10)
        with pytest.raises(Exception, match="r: it was kept"):
            await slow.end()
        assert not slow.complete

    play(test, retention=0.3)


def big(number: int) -> str:
    """20 kB that have nothing in common with others."""
    return random.Random(number).randbytes(10_000).hex()


def test_ended_logs_make_room_oldest_first() -> None:
    async def test(world: World) -> None:
        for key in "abcdefgh":
            world.put(big(ord(key)), None)
            await world.post(b'{"rid": "%s"}' % key.encode(), {"Idempotency-Key": key}).end()
        states = [(await world.get(f"{key}").end()).status for key in "abcdefgh"]
        assert states == sorted(states, reverse=True) and 410 in states and 200 in states
        assert "--stream-memory" in (await world.get("a").end()).message
        assert world.runs.requests.used <= 200_000

    play(test, memory=200_000)


def test_a_running_request_whose_log_does_not_fit_goes_on_and_cannot_be_taken_up() -> None:
    async def test(world: World) -> None:
        fast, slow = world.post(b'{"rid": "r"}'), world.post(b'{"rid": "r"}', read=0)
        for i in range(40):
            world.put(big(i))
        world.put(None)
        await until(world.closed)
        late = await world.post(b'{"rid": "r"}').end()
        assert late.status == 410 and "--stream-memory" in late.message
        new = await world.post(headers={"Idempotency-Key": "new"}).end()
        assert new.status == 503 and new.headers["retry-after"] and "--stream-memory" in new.message
        # It waits for its slowest client, and so holds no more than what is on its way.
        assert world.runs.requests.used < 250_000 and not slow.task.done()
        before = world.taken
        await asyncio.sleep(0.05)
        assert world.taken == before
        slow.read(1000)
        await fast.end()
        await slow.end()
        assert fast.complete and slow.body == fast.body
        # Ids are those of any other stream: one event for odd outputs, two for even ones, and the last.
        expected = [f"r:{n}.{part}" for n in range(1, 41) for part in range(1 + n % 2)] + ["r:40.1"]
        assert fast.ids == expected
        await until(lambda: len(world.runs.requests) == 0)
        assert world.runs.requests.used == 0

    play(test, memory=100_000)


def test_one_that_is_closed_ends_with_its_last_client() -> None:
    async def test(world: World) -> None:
        first = world.post(b'{"rid": "r"}')
        for i in range(10):
            world.put(big(i))
        await until(world.closed)
        await first.leave()
        world.put(*range(10))
        await until(lambda: world.aborted == 1 and len(world.runs.requests) == 0)
        assert world.runs.requests.used == 0

    play(test, memory=100_000)


def test_bodies_are_bounded() -> None:
    async def test(world: World) -> None:
        large = await world.post(b"x" * (100_001 - REQUEST_OVERHEAD)).end()
        assert large.status == 413 and "--stream-memory" in large.message
        assert world.runs.requests.reserve(50_000)  # as of another request that is being read
        full = await world.post(b"x" * 50_000).end()
        assert full.status == 503 and full.headers["retry-after"]
        world.runs.requests.release(50_000)
        assert world.started == 0 and world.runs.requests.used == 0

    play(test, memory=100_000)


def test_their_number_is_bounded() -> None:
    async def test(world: World) -> None:
        world.runs.requests._most = 3
        running = []
        for key in "abc":
            running.append(world.post(headers={"Idempotency-Key": key}))
        await until(lambda: world.started == 3)
        full = await world.post(headers={"Idempotency-Key": "d"}).end()
        assert full.status == 503 and "3 requests" in full.message
        world.put("x", None, "x", None, "x", None)
        await running[0].end()
        world.put("y", None)
        assert (await world.post(headers={"Idempotency-Key": "e"}).end()).status == 200

    assert MOST_REQUESTS * REQUEST_OVERHEAD <= 256 * MIB
    play(test)
