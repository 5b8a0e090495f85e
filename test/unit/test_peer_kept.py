"""Kept requests of several frontends over HTTP: read at another, taken up by another, refused by name."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from cluster_world import eventually
from peer_nodes import Cluster, Events, ids, play

from sglang_kevlar.frontend.peers import forward, kept
from sglang_kevlar.frontend.peers import records as records_module
from sglang_kevlar.frontend.peers.forward import FORWARDED

WORDS = ["one", "two", "three", "four"]
#: of the events that are made of them
POSITIONS = ["1.0", "2.0", "3.0", "4.0", "4.1"]


def say(cluster: Cluster, name: str, *words: str | None, prompt: str = "p") -> None:
    for word in words:
        cluster[name].say[prompt].put_nowait(word)


# ---- read at another


def test_a_request_is_answered_from_where_it_runs():
    async def script(c: Cluster) -> None:
        say(c, "a", *WORDS, None)
        first = await c.answer("a")
        second = await c.answer("b")
        assert first.status_code == second.status_code == 200 and second.content == first.content
        rid = first.headers["x-kevlar-request-id"]
        assert (
            second.headers["x-kevlar-request-id"] == rid
            and second.headers["content-type"] == "text/event-stream; charset=utf-8"
        )
        events = first.content.split(b"\n\n")[:-1]
        rest = await c.answer("b", last_event_id=ids(events)[1])
        assert rest.content.split(b"\n\n")[:-1] == events[2:]
        url = f"{c['b'].url}/kevlar/requests/{rid}"
        assert (await c.client.get(url)).json()["state"] == "ended"
        assert (await c.client.get(f"{url}/stream")).content == first.content
        assert (await c.client.get(f"{url}/stream?from=2")).content.split(b"\n\n")[:-1] == events[1:]
        assert c["a"].started == ["p"] and not c["b"].started

    play(script)


def test_it_comes_as_it_is_made():
    # A response's headers come with its first token.
    async def script(c: Cluster) -> None:
        say(c, "a", "zero")
        async with c.post("a") as first, c.post("b") as second:
            assert first.status_code == second.status_code == 200
            one, other = Events(first), Events(second)
            for word in WORDS:
                say(c, "a", word)
                await one.next()
                await other.next()
            say(c, "a", None)
            assert await other.all() == await one.all()
            assert [b'"zero' in event for event in one.got] == [True] * 5 + [False]

    play(script)


def test_one_without_a_stream_too():
    async def script(c: Cluster) -> None:
        say(c, "a", *WORDS, None)
        answers = await asyncio.gather(
            c.answer("a", body={"stream": False}), _later(c.answer("b", body={"stream": False}))
        )
        assert {answer.content for answer in answers} == {b'{"text":"one two three four"}'}
        assert c["a"].started == ["p"] and not c["b"].started

    play(script)


async def _later(coroutine):
    await asyncio.sleep(0.2)
    return await coroutine


def test_another_request_under_the_key_is_refused_from_anywhere():
    async def script(c: Cluster) -> None:
        say(c, "a", *WORDS, None)
        await c.answer("a")
        other = await c.answer("b", prompt="another")
        assert other.status_code == 422 and "another request" in other.text
        wanted = await c.answer("b", x_kevlar_request_id="x")
        assert wanted.status_code == 409

    play(script)


def test_whose_it_is_is_asked_everywhere():
    async def script(c: Cluster) -> None:
        say(c, "a", *WORDS, None)
        first = await c.answer("a", authorization="Bearer one")
        rid = first.headers["x-kevlar-request-id"]
        for name in "ab":
            url = f"{c[name].url}/kevlar/requests/{rid}"
            assert (await c.client.get(url, headers={"authorization": "Bearer one"})).status_code == 200
            for other in ({}, {"authorization": "Bearer two"}):
                assert (await c.client.get(url, headers=other)).status_code == 404
        say(c, "b", "mine", None)
        mine = await c.answer("b", authorization="Bearer two")
        assert b"mine" in mine.content and mine.headers["x-kevlar-request-id"] != rid
        await c.lose("a")
        assert (await c.answer("b", authorization="Bearer two")).content == mine.content
        assert (await c.answer("b", authorization="Bearer one")).content == first.content

    play(script)


def test_what_nobody_has_is_not_found():
    async def script(c: Cluster) -> None:
        for name in "ab":
            missing = await c.client.get(f"{c[name].url}/kevlar/requests/unknown")
            assert missing.status_code == 404 and "no frontend keeps" in missing.text
            begun = await c.answer(name, key="new", last_event_id="r:1.0~a1")
            assert begun.status_code == 404
            begun = await c.answer(name, key="new", x_kevlar_request_id="r")
            assert begun.status_code == 404
        assert not c["a"].started and not c["b"].started

    play(script, "abc")


def test_passing_on_ends():
    """Whoever gets what was passed on answers it itself, also when it knows of somebody else."""

    async def script(c: Cluster) -> None:
        say(c, "a", *WORDS, None)
        await c.answer("a")
        there = await c.answer("b", **{FORWARDED: "c"})
        assert there.status_code == 503 and "frontend a has this request" in there.text
        new = await c.answer("b", key="new", **{FORWARDED: "c"})
        assert new.status_code == 404 and not c["b"].started
        # Of two that each take the other for the one that has it.
        source = c["a"].records.directory.peer("b")
        record = next(iter(c["b"].records.directory.peer("a").records.values()))
        c["a"].runs.abandon("", record.opened.rid, "a test")
        source.records["", record.opened.rid] = record
        source.by_key["", "k"] = ("", record.opened.rid)
        answer = await c.answer("a", x_kevlar_request_id=record.opened.rid)
        assert answer.status_code in (404, 409, 503)

    play(script)


def test_what_is_in_a_path_stays_what_it_is():
    async def script(c: Cluster) -> None:
        for path in ("a%20b", "a%0d%0aX-Evil:%20yes", "a%3Fb=c", "..%2F..%2Fgenerate", "%C3%A9"):
            answer = await c.client.get(f"{c['b'].url}/kevlar/requests/{path}")
            assert answer.status_code == 404, (path, answer.text)

    play(script)


def test_where_an_application_is_mounted_is_said_once():
    def path(raw: str, root: str) -> str:
        return forward._path({"raw_path": raw.encode(), "root_path": root})

    assert path("/root/generate", "/root") == path("/generate", "/root") == path("/generate", "") == "/generate"
    assert path("/rooted/generate", "/root") == "/rooted/generate"


# ---- taken up by another


@pytest.mark.parametrize("dies", ["a", "b"])
def test_a_client_comes_back_to_another_frontend(dies: str):
    async def script(c: Cluster) -> None:
        other = "b" if dies == "a" else "a"
        say(c, dies, *WORDS[:2])
        async with c.post(dies) as response:
            events = Events(response)
            await events.some(2)
            await c.lose(dies)
            say(c, other, *WORDS[2:], None)
            rid = response.headers["x-kevlar-request-id"]
            with pytest.raises(httpx.TransportError):
                await events.all()
        rest = await c.answer(other, last_event_id=events.last_id, x_kevlar_request_id=rid)
        assert rest.status_code == 200 and rest.headers["x-kevlar-request-id"] == rid
        whole = await c.answer(other)
        got = events.got + rest.content.split(b"\n\n")[:-1]
        assert whole.content.split(b"\n\n")[:-1] == got
        assert [json.loads(event.split(b"data: ")[1]) for event in got[:-1]] == [
            " ".join(WORDS[: n + 1]) for n in range(4)
        ]
        tags = [f"{rid}:{position}~{name}1" for name, position in zip([dies] * 2 + [other] * 3, POSITIONS, strict=True)]
        assert ids(got) == tags

    play(script)


def test_it_goes_on_before_its_client_is_back():
    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a") as response:
            await Events(response).next()
            await c.lose("a")
        say(c, "b", "two", None)
        await eventually(lambda: c["b"].runs.status() == {**c["b"].runs.status(), "ended": 1})

    play(script)


def test_it_is_taken_up_by_one_and_again_by_another():
    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a") as response:
            events = Events(response)
            await events.next()
            rid = response.headers["x-kevlar-request-id"]
            await c.lose("a")
        say(c, "b", "two")
        async with c.post("c", last_event_id=events.last_id) as response:
            more = Events(response)
            await more.next()
            await c.lose("b")
        say(c, "c", "three", None)
        rest = await c.answer("c", last_event_id=more.last_id)
        got = events.got + more.got + rest.content.split(b"\n\n")[:-1]
        assert ids(got) == [f"{rid}:1.0~a1", f"{rid}:2.0~b1", f"{rid}:3.0~c1", f"{rid}:3.1~c1"]
        assert (await c.answer("c")).content.split(b"\n\n")[:-1] == got

    play(script, "abc")


def test_of_which_nothing_was_given_it_runs_anew_also_a_batch():
    async def script(c: Cluster) -> None:
        for key, body in (("k1", {}), ("k2", {"n": 3}), ("k3", {"stream": False})):
            task = asyncio.ensure_future(c.answer("a", prompt=key, key=key, body=body))
            await eventually(lambda key=key: key in c["a"].started)
            task.cancel()
        await c.whole()
        await asyncio.sleep(0.1)
        await c.lose("a")
        for key, body in (("k1", {}), ("k2", {"n": 3}), ("k3", {"stream": False})):
            say(c, "b", *WORDS, None, prompt=key)
            answer = await c.answer("b", prompt=key, key=key, body=body)
            assert answer.status_code == 200 and b"one two three four" in answer.content
        assert sorted(c["b"].started) == ["k1", "k2", "k3"]

    play(script)


def test_a_batch_is_refused_by_name_once_something_of_it_was_given():
    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a", body={"n": 2}) as response:
            events = Events(response)
            await events.next()
            await c.lose("a")
        answer = await c.answer("b", body={"n": 2})
        assert answer.status_code == 409 and "a batch, or several choices" in answer.text
        assert response.headers["x-kevlar-request-id"] in answer.text and not c["b"].started

    play(script)


def test_the_responses_api_is_refused_by_name_after_its_first_token():
    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a", path="/v1/responses") as response:
            events = Events(response)
            await events.next()
            await c.lose("a")
        answer = await c.answer("b", path="/v1/responses", last_event_id=events.last_id)
        assert "cannot be continued" in answer.text and b'data: "' not in answer.content

    play(script)


def test_what_the_client_has_and_no_peer_knows_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records_module, "PATIENCE", 0.5)

    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a") as response:
            await Events(response).next()
            rid = response.headers["x-kevlar-request-id"]
            await c.lose("a")
        unsure = await c.answer("b", last_event_id=f"{rid}:7.0~a1")
        assert unsure.status_code == 503 and unsure.headers["retry-after"] and "frontend a" in unsure.text
        await asyncio.sleep(0.6)
        refused = await c.answer("b", last_event_id=f"{rid}:7.0~a1")
        assert refused.status_code == 409

    play(script)


def test_what_only_a_lost_frontend_may_have(monkeypatch: pytest.MonkeyPatch):
    """A client that has had something of it waits for that one; one that has had nothing is served."""
    monkeypatch.setattr(records_module, "PATIENCE", 0.5)

    async def script(c: Cluster) -> None:
        await c.lose("a")
        begun = await c.answer("b", key="begun", last_event_id="r:3.0~zz")
        assert begun.status_code == 503 and begun.headers["retry-after"] == "1"
        say(c, "b", "one", None)
        assert (await c.answer("b", key="new")).status_code == 200
        await asyncio.sleep(0.6)
        assert (await c.answer("b", key="begun", last_event_id="r:3.0~zz")).status_code == 404

    play(script)


def test_without_room_it_is_said_and_tried_again(monkeypatch: pytest.MonkeyPatch):
    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a") as response:
            events = Events(response)
            await events.next()
            c["b"].runs.requests._most = 0
            await c.lose("a")
        full = await c.answer("b", last_event_id=events.last_id)
        assert full.status_code == 503, full.text
        c["b"].runs.requests._most = 10
        say(c, "b", "two", None)
        rest = await c.answer("b", last_event_id=events.last_id)
        assert rest.status_code == 200 and b"one two" in rest.content

    play(script)


# ---- peers that are not well


def test_a_peer_that_dies_while_its_answer_is_passed_on():
    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a") as first:
            await Events(first).next()
            async with c.post("b") as response:
                events = Events(response)
                await events.next()
                await c.lose("a")
                with pytest.raises(httpx.TransportError):
                    await events.next()
        say(c, "b", "two", None)
        rest = await c.answer("b", last_event_id=events.last_id)
        assert rest.status_code == 200 and b"one two" in rest.content and b'"one"' not in rest.content

    play(script)


@pytest.mark.parametrize("begun", [True, False])
def test_a_peer_that_hangs_holds_nobody(begun: bool):
    """Its session ends, with the lease; its connections stay open."""

    async def script(c: Cluster) -> None:
        if begun:
            say(c, "a", "one")
        first = asyncio.ensure_future(c.answer("a"))
        await eventually(lambda: c["a"].started)
        async with asyncio.timeout(20):
            if begun:
                async with c.post("b") as response:
                    events = Events(response)
                    await events.next()
                    c["a"].hangs()
                    with pytest.raises(httpx.TransportError):
                        await events.next()
            else:
                second = asyncio.ensure_future(c.answer("b"))
                await asyncio.sleep(0.3)
                assert not second.done()
                c["a"].hangs()
                answer = await second
                assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
            say(c, "b", "two", None)
            rest = await c.answer("b", **({"last_event_id": events.last_id} if begun else {}))
        assert rest.status_code == 200 and b"two" in rest.content
        first.cancel()

    play(script)


def test_a_peer_whose_http_is_out_of_reach():
    async def script(c: Cluster) -> None:
        say(c, "a", "one", None)
        await c.answer("a")
        c["b"].records.urls["a"] = "http://127.0.0.1:1"
        answer = await c.answer("b")
        assert answer.status_code == 503 and "does not answer" in answer.text and answer.headers["retry-after"] == "1"

    play(script)


def test_a_client_that_leaves_ends_what_is_passed_on():
    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a") as first, c.post("b") as second:
            await Events(first).next()
            await Events(second).next()
            (run,) = c["a"].runs._runs.values()
            assert run.kept.clients == 2
        await eventually(lambda: run.kept.clients == 0)

    play(script)


# ---- begun twice, and ends


def test_one_that_was_begun_at_two_at_once_is_answered_by_one():
    """Neither has heard of the other's: what b has begun is given up before its client has anything of it."""

    async def script(c: Cluster) -> None:
        a, b = c["a"], c["b"]
        # Held back: what is sent to the other.
        sends = {}
        for node in (a, b):
            sends[node.name], node.frontend.links.send = node.frontend.links.send, lambda *_: None
            node.held = []
            node.frontend.links.send = lambda name, messages, node=node: node.held.append((name, messages))
        tasks = [asyncio.ensure_future(c.answer(name)) for name in "ab"]
        await eventually(lambda: a.started and b.started)
        say(c, "b", "of b")
        await asyncio.sleep(0.1)
        for node in (a, b):
            node.frontend.links.send = sends[node.name]
            for name, messages in node.held:
                node.frontend.links.send(name, messages)
        await eventually(lambda: b.records.directory.find(("", "k"), None, "", None, 1e9).__class__.__name__ == "There")
        say(c, "a", *WORDS, None)
        answers = await asyncio.gather(*tasks)
        assert [answer.status_code for answer in answers] == [200, 200]
        assert answers[0].content == answers[1].content and b"of b" not in answers[0].content
        assert len({answer.headers["x-kevlar-request-id"] for answer in answers}) == 1

    play(script)


def test_a_key_may_be_used_at_once_when_its_request_was_refused():
    async def script(c: Cluster) -> None:
        c["a"].runs._sweep = lambda: None  # it may be long until the next look
        for _ in range(3):
            bad = await c.client.post(f"{c['a'].url}/generate", content=b"[]", headers={"Idempotency-Key": "k"})
            assert bad.status_code == 500
        say(c, "a", "one", None)
        assert (await c.answer("a")).status_code == 200

    play(script)


def test_ends_in_order():
    """One that ends goes on with nobody's requests, and the others go on with what it had."""

    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        say(c, "b", "one", prompt="of b")
        async with c.post("a") as first, c.post("b", prompt="of b", key="kb") as second:
            await Events(first).next()
            await Events(second).next()
            node = c.nodes.pop("a")
            await node.close()
            await eventually(lambda: "p" in c["b"].started)
            await asyncio.sleep(0.1)
            assert node.started == ["p"]

    play(script)


def test_what_was_to_be_taken_up_and_is_not(caplog: pytest.LogCaptureFixture):
    """Its client was back first, or its frontend."""

    async def script(c: Cluster) -> None:
        say(c, "a", "one")
        async with c.post("a") as first:
            events = Events(first)
            await events.next()
            node = c["b"]
            taken = []
            node.records.take_up = taken.extend
            await c.lose("a")
        (found,) = taken
        say(c, "b", "two", None)
        rest = await c.answer("b", last_event_id=events.last_id)
        assert rest.status_code == 200
        await node.peers._take_up_all(taken)
        assert node.peers.take_up(found) is node.runs.find("", "k")
        assert node.started == ["p"]

    play(script)


def test_positions_in_last_ids():
    event = kept._event("r:x:7.2~a1")
    assert event is not None and (event.rid, event.tag) == ("r:x", "a1")
    assert (event.point.offset, event.point.k) == (7, 2)
    whole = kept._event("r:7~a1")
    assert whole is not None and whole.point.k == kept.LAST_K
    assert kept._event("r:7.2") is None and kept._event("r~a1") is None and kept._event("") is None
    assert kept._event(None) is None
