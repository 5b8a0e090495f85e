"""Kept requests over a small endpoint of our own: runs, readers, keys, ids, bounds, and the end of all that."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.middleware import Middleware

from asgi_exchange import Exchange, id_of
from sglang_kevlar.control.kept_requests import MOST_REQUESTS, REQUEST_OVERHEAD
from sglang_kevlar.frontend.kept import endpoints
from sglang_kevlar.frontend.kept import run as run_module
from sglang_kevlar.frontend.kept.middleware import KeptMiddleware
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.kept.run import Run
from sglang_kevlar.frontend.middleware import OutcomeMiddleware
from sglang_kevlar.frontend.outcome import Failure, outcome_of
from sglang_kevlar.platform import torchvision_shim

KEY = {"Idempotency-Key": "k"}
MIB = 1 << 20


class World:
    """An endpoint ``/generate`` that streams what it is given with `put`, and the app around it."""

    def __init__(self, retention: float = 60.0, memory: int = MIB) -> None:
        self.runs = KeptRuns(retention, memory)
        self.started = 0
        self.aborted = 0
        self.ended = 0
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        #: events that the endpoint got rid of
        self.taken = 0
        self.app = FastAPI()
        self.app.user_middleware.append(
            Middleware(KeptMiddleware, runs=self.runs, routes=[self._route("/generate", self._generate)])
        )
        self.app.user_middleware.append(Middleware(OutcomeMiddleware))
        endpoints.install(self.app, self.runs)

    def _route(self, path: str, endpoint: Any) -> Any:
        self.app.add_api_route(path, endpoint, methods=["POST"])
        return self.app.router.routes[-1]

    async def _generate(self, request: Request) -> Any:
        self.started += 1
        body = await request.json()
        outcome = outcome_of(request)
        assert outcome is not None
        if not body.get("stream", True):
            output = await self.queue.get()
            outcome.first_token = True
            return JSONResponse({"text": output}, headers={"x-own": "1"})
        return StreamingResponse(self._events(request, outcome), media_type=body.get("type", "text/event-stream"))

    async def _outputs(self) -> Any:
        while (item := await self.queue.get()) is not None:
            yield item

    async def _events(self, request: Request, outcome: Any) -> Any:
        try:
            outputs = self._outputs()
            tokens = 0
            async for item in outcome.kept.watch(self._counted(outputs)) if outcome.kept else self._counted(outputs):
                outcome.first_token = True
                if isinstance(item["value"], Failure):
                    outcome.fail(item["value"])
                elif isinstance(item["value"], Exception):
                    raise item["value"]
                tokens += 1
                for part in range(1 + tokens % 2):
                    yield f"data: {item['value']} {part}\n\n"
                    self.taken += 1
            yield "data: [DONE]\n\n"
            self.ended += 1
        except BaseException:
            self.aborted += 1
            raise

    async def _counted(self, outputs: Any) -> Any:
        tokens = 0
        async for value in outputs:
            tokens += 1
            yield {"value": value, "meta_info": {"completion_tokens": tokens}}

    def put(self, *items: Any) -> None:
        for item in items:
            self.queue.put_nowait(item)

    def post(self, body: bytes = b"{}", headers: dict[str, str] = KEY, read: int | None = None) -> Exchange:
        return Exchange(self.app, "POST", "/generate", body, headers, read)

    def closed(self) -> bool:
        """Whether request r runs and cannot be taken up."""
        run = self.runs.find_rid("", "r")
        return isinstance(run, Run) and run.kept.closed is not None

    def get(self, path: str, **headers: str) -> Exchange:
        return Exchange(
            self.app, "GET", f"/kevlar/requests/{path}", b"", {k.replace("_", "-"): v for k, v in headers.items()}
        )


def play(test: Callable[[World], Coroutine[Any, Any, None]], **bounds: Any) -> None:
    async def run() -> None:
        world = World(**bounds)
        try:
            await asyncio.wait_for(test(world), 30)
        finally:
            for run in list(world.runs._runs.values()):
                run.abandon()

    asyncio.run(run())


def events(count: int) -> Callable[[Exchange], bool]:
    return lambda exchange: len(exchange.events) >= count


def test_without_the_header_nothing_is_kept() -> None:
    async def test(world: World) -> None:
        world.put("a", "b", None)
        response = await world.post(headers={}).end()
        assert b"id:" not in response.body and "x-kevlar-request-id" not in response.headers
        assert len(world.runs.requests) == 0
        cut = await world.post(headers={}).leave()
        assert not cut.complete
        await until(lambda: world.aborted == 1)

    play(test)


def test_ids_count_tokens_and_events_of_each() -> None:
    async def test(world: World) -> None:
        world.put("a", "b", "c", None)
        response = await world.post(b'{"rid": "mine"}').end()
        assert response.rid == "mine" and response.status == 200
        assert response.ids == ["mine:1.0", "mine:1.1", "mine:2.0", "mine:3.0", "mine:3.1", "mine:3.2"]
        assert response.events[-1] == b"id: mine:3.2\ndata: [DONE]\n\n"

    play(test)


def test_a_client_that_left_takes_up_again_behind_its_last_event() -> None:
    async def test(world: World) -> None:
        first = world.post()
        world.put("a", "b")
        await first.until(events(3))
        await first.leave()
        world.put("c")
        second = world.post(headers={**KEY, "Last-Event-ID": first.ids[1]})
        await second.until(events(3))
        await second.leave()
        third = world.post(headers={**KEY, "Last-Event-ID": second.ids[-1], "X-Kevlar-Request-Id": first.rid})
        world.put("d", None)
        await third.end()
        assert third.complete and third.rid == first.rid
        whole = await world.get(f"{first.rid}/stream").end()
        assert whole.headers == first.headers
        assert first.events[:2] + second.events + third.events == whole.events
        assert (world.started, world.ended, world.aborted) == (1, 1, 0)
        # Behind its very end there is nothing.
        assert (await world.post(headers={**KEY, "Last-Event-ID": whole.ids[-1]}).end()).events == []

    play(test)


def test_the_same_request_sent_at_once_runs_once() -> None:
    async def test(world: World) -> None:
        exchanges = [world.post() for _ in range(5)]
        world.put("a", "b", None)
        answers = [await exchange.end() for exchange in exchanges]
        assert world.started == 1
        assert len({answer.body for answer in answers}) == 1 and answers[0].events
        assert (await world.post().end()).body == answers[0].body

    play(test)


def test_one_that_does_not_stream_gives_the_same_response() -> None:
    async def test(world: World) -> None:
        first = world.post(b'{"stream": false}')
        await until(lambda: world.started == 1)
        await first.leave()
        second, third = world.post(b'{"stream": false}'), world.post(b'{"stream": false}')
        world.put("x")
        await second.end()
        await third.end()
        assert second.json() == {"text": "x"} and second.headers["x-own"] == "1"
        assert (second.status, second.headers, second.body) == (third.status, third.headers, third.body)
        assert world.started == 1
        later = await world.post(b'{"stream": false}', {**KEY, "Last-Event-ID": f"{second.rid}:0.0"}).end()
        assert later.status == 400 and "no events" in later.message

    play(test)


def test_json_lines_have_no_ids_and_are_given_whole() -> None:
    async def test(world: World) -> None:
        body = b'{"type": "application/x-ndjson"}'
        first = world.post(body)
        world.put("a")
        await first.until(lambda e: e.body)
        await first.leave()
        world.put(None)
        second = await world.post(body).end()
        assert second.body.startswith(first.body) and b"id:" not in second.body

    play(test)


def test_a_key_belongs_to_one_request() -> None:
    async def test(world: World) -> None:
        world.put("a", None)
        rid = (await world.post().end()).rid
        other = await world.post(b'{"x": 1}').end()
        assert other.status == 422 and "another request" in other.message
        wrong = await world.post(headers={**KEY, "X-Kevlar-Request-Id": "other"}).end()
        assert wrong.status == 409 and rid in wrong.message
        assert world.started == 1

    play(test)


@pytest.mark.parametrize("key", ["", " ", "a b", "\u00e4", "x" * 256])
def test_keys_that_are_none(key: str) -> None:
    async def test(world: World) -> None:
        response = await world.post(headers={"Idempotency-Key": key}).end()
        assert response.status == 400 and "Idempotency-Key" in response.message
        assert world.started == 0

    play(test)


@pytest.mark.parametrize("rid", ["", "a b", "a/b", "a\\n", "x" * 129])
def test_rids_that_cannot_name_a_kept_request(rid: str) -> None:
    async def test(world: World) -> None:
        response = await world.post(b'{"rid": "%s"}' % rid.encode()).end()
        assert response.status == 400 and "rid" in response.message
        assert world.started == 0

    play(test)


def test_a_rid_is_one_request() -> None:
    async def test(world: World) -> None:
        first = world.post(b'{"rid": "r"}')
        world.put("a")
        await first.until(events(1))
        second = await world.post(b'{"rid": "r"}', {"Idempotency-Key": "other"}).end()
        assert second.status == 409 and "another Idempotency-Key" in second.message
        world.put(None)
        await first.end()

    play(test)


def test_taking_up_what_is_not_there_never_starts_it() -> None:
    async def test(world: World) -> None:
        for headers in ({"Last-Event-ID": "r:1.0"}, {"X-Kevlar-Request-Id": "r"}):
            response = await world.post(headers={**KEY, **headers}).end()
            assert response.status == 404
        assert world.started == 0
        assert (await world.get("r").end()).status == 404
        assert (await world.get("r/stream").end()).status == 404

    play(test)


@pytest.mark.parametrize(
    ("last_id", "status"),
    [
        ("r:1.0", 200),
        ("r:2.0", 200),
        ("r:2.1", 409),
        ("r:1.7", 409),
        ("r:9", 409),
        ("other:1.0", 400),
        ("r:x", 400),
        ("r:1.-1", 400),
        ("r", 400),
        ("r:" + "9" * 500, 400),
    ],
)
def test_ids_of_events(last_id: str, status: int) -> None:
    async def test(world: World) -> None:
        first = world.post(b'{"rid": "r"}')
        world.put("a", "b")
        await first.until(events(3))
        for again in (
            world.post(b'{"rid": "r"}', {**KEY, "Last-Event-ID": last_id}),
            world.get("r/stream", Last_Event_ID=last_id),
        ):
            if status == 200:
                await again.until(lambda e: e.sent)
                assert again.status == 200
                await again.leave()
            else:
                await again.end()
                assert again.status == status and len(again.body) < 600
        await first.leave()

    play(test)


@pytest.mark.parametrize(
    ("start", "expected"),
    [("0", 0), ("1", 0), ("1.1", 1), ("2", 2), ("2.5", 3), ("3.2", 5), ("3.3", 409), ("x", 400), ("-1", 400)],
)
def test_from_a_position(start: str, expected: int) -> None:
    async def test(world: World) -> None:
        world.put("a", "b", "c", None)
        whole = await world.post(b'{"rid": "r"}').end()
        part = await world.get(f"r/stream?from={start}").end()
        if expected >= 400:
            assert part.status == expected
        else:
            assert part.events == whole.events[expected:] and part.events

    play(test)


def test_state() -> None:
    async def test(world: World) -> None:
        first = world.post(b'{"rid": "r"}')
        world.put("a", "b")
        await first.until(events(3))
        running = (await world.get("r").end()).json()
        assert running == {
            "rid": "r",
            "state": "running",
            "clients": 1,
            "tokens": 2,
            "last_event": "r:2.0",
            "expires_in_s": None,
        }
        await first.leave()
        left = (await world.get("r").end()).json()
        assert left["clients"] == 0 and 0 < left["expires_in_s"] <= 60
        world.put(None)
        await until(lambda: world.ended == 1)
        assert (await world.get("r").end()).json()["state"] == "ended"
        assert world.runs.status() == {"running": 0, "ended": 1, "bytes": world.runs.requests.used}

    play(test)


def test_requests_are_their_principals() -> None:
    async def test(world: World) -> None:
        one, other = {"Authorization": "Bearer one"}, {"Authorization": "Bearer other"}
        world.put("a", None)
        first = await world.post(b'{"rid": "r"}', {**KEY, **one}).end()
        for authorization in ("Bearer other", "", "Basic one"):
            for path in ("r", "r/stream"):
                assert (await world.get(path, Authorization=authorization).end()).status == 404
        assert (await world.get("r/stream", Authorization="bearer one").end()).body == first.body
        world.put("b", None)
        second = await world.post(b'{"rid": "r"}', {**KEY, **other}).end()
        assert world.started == 2 and second.body != first.body

    play(test)


def test_servers_keys_are_asked_for_first() -> None:
    async def test(world: World) -> None:
        torchvision_shim.install()
        from sglang.srt.utils.auth import add_api_key_middleware

        add_api_key_middleware(world.app, api_key="user", admin_api_key=None)
        world.put("a", None)
        right, wrong = {"Authorization": "Bearer user"}, {"Authorization": "Bearer other"}
        first = await world.post(b'{"rid": "r"}', {**KEY, **right}).end()
        assert first.status == 200
        for headers in ({}, wrong):
            for path in ("r", "r/stream"):
                assert (await world.get(path, **headers).end()).status == 401
            assert (await world.post(b'{"rid": "r"}', {**KEY, **headers}).end()).status == 401
        assert (await world.get("r/stream", **right).end()).body == first.body
        assert world.started == 1

    play(test)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


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
        await until(lambda: len(world.runs.requests) == 0)
        assert (await world.get("r").end()).status == 410
        assert world.aborted == 0 and world.runs.requests.used == 0

    play(test, retention=0.6)


def test_a_shutdown_does_not_wait_the_retention_out() -> None:
    async def test(world: World) -> None:
        world.runs.drain()
        assert world.runs.requests.retention == 5.0

    play(test)


def test_refusals_are_not_kept() -> None:
    failure = Failure(503, "no worker group", "no_group", retry_after=5)

    async def test(world: World) -> None:
        world.queue.put_nowait("unused")
        app = world.app

        async def refuse(request: Request) -> Any:
            world.started += 1
            outcome = outcome_of(request)
            assert outcome is not None
            outcome.fail(failure)
            return StreamingResponse(iter(["data: x\n\n"]), media_type="text/event-stream")

        app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", "") != "/generate"]
        app.add_api_route("/generate", refuse, methods=["POST"])
        for number in range(1, 4):
            response = await world.post().end()
            assert response.status == 503 and response.headers["retry-after"] == "5"
            assert world.started == number
        assert len(world.runs.requests) == 0

    play(test)


def test_a_failure_in_the_stream_is_an_event_with_an_id() -> None:
    async def test(world: World) -> None:
        world.put("a", Failure(500, "request r cannot be continued", "not_continuable"), None)
        response = await world.post(b'{"rid": "r"}').end()
        assert b"cannot be continued" in response.events[-1] and b"[DONE]" not in response.body
        assert response.ids[-1] == "r:2.0"
        again = await world.post(b'{"rid": "r"}', {**KEY, "Last-Event-ID": "r:1.1"}).end()
        assert again.events == response.events[-1:]

    play(test)


def test_an_endpoint_that_breaks_off_breaks_its_clients_responses_off() -> None:
    async def test(world: World) -> None:
        first = world.post(b'{"rid": "r"}')
        world.put("a")
        await first.until(events(2))
        world.put(ValueError("bug"))
        with pytest.raises(Exception, match=r"bug|broke off"):
            await first.end()
        assert not first.complete
        gone = await world.post(b'{"rid": "r"}').end()
        assert gone.status == 410 and "broke off" in gone.message

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
        large = await world.post(b"x" * 100_001).end()
        assert large.status == 413 and "--stream-memory" in large.message
        full = await world.post(b"x" * 99_000).end()
        assert full.status == 503
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


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1 << 30), outputs=st.integers(0, 30))
def test_wherever_a_client_is_cut_it_gets_every_event_once(seed: int, outputs: int) -> None:
    """Any number of cuts, at any event, while it runs or afterwards, by one endpoint or the other."""
    chance = random.Random(seed)

    async def test(world: World) -> None:
        witness = world.post()

        async def feed() -> None:
            for i in range(outputs):
                world.put(i)
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
            world.put(None)

        feeder = asyncio.create_task(feed())
        got: list[bytes] = []
        while True:
            if not got:
                exchange = world.post()
            elif chance.random() < 0.5:
                exchange = world.post(headers={**KEY, "Last-Event-ID": id_of(got[-1])})
            else:
                exchange = world.get(f"{exchange.rid}/stream", Last_Event_ID=id_of(got[-1]))
            if chance.random() < 0.8:
                wanted = chance.randrange(1, 6)
                await exchange.until(lambda e, w=wanted: len(e.events) >= w or e.complete)
                done = exchange.complete
                if not done:
                    await exchange.leave()
            else:
                await exchange.end()
                done = True
            got += exchange.events
            if done:
                break
        await feeder
        await witness.end()
        assert exchange.complete and got == witness.events
        assert world.started == 1 and world.aborted == 0

    play(test)
