"""Kept requests over a small endpoint of our own: runs, readers, keys, ids, and failures."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import StreamingResponse
from hypothesis import given, settings
from hypothesis import strategies as st
from kept_world import KEY, World, events, play, until

from asgi_exchange import id_of
from sglang_kevlar.frontend.outcome import Failure, outcome_of
from sglang_kevlar.platform import torchvision_shim


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


@pytest.mark.parametrize("body", [b"", b"\xff", b"[1]", b'{"rid": 1}', b"[" * 100_000])
def test_what_is_no_request_is_the_endpoints_to_refuse(body: bytes) -> None:
    async def test(world: World) -> None:
        exchange = world.post(body)
        world.put("a", None)
        await asyncio.wait([exchange.task])
        assert world.started == 1 and exchange.status in (200, 500)

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
