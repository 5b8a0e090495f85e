"""Kept requests on upstream's own endpoints: ids, taking up again, and an endpoint that runs again over what it saw.

The last is what a frontend rests on that takes a request over from another: the same request and the same outputs make
the same events.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import random
import re
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from upstream_app import REGULAR_END, REQUESTS, StubManager, serving

from asgi_exchange import Exchange, id_of
from sglang_kevlar.control.lineage import Lineage
from sglang_kevlar.frontend.kept import registry
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.protocol.records import HttpRequest

KEY = {"Idempotency-Key": "k"}
SSE = [path for path in REQUESTS if not path.startswith("/api")]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
    }
]
ANTHROPIC_TOOLS = [{"name": "add", "input_schema": TOOLS[0]["function"]["parameters"]}]
TOOL_TEXT = (
    "<think>one and one</think>I add.\n"
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
)
#: name -> path, body, the text of each choice
CASES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    **{path: (path, REQUESTS[path], ["Hello big world"]) for path in REQUESTS},
    "native logprobs": ("/generate", {**REQUESTS["/generate"], "return_logprob": True}, ["Hello big world"]),
    "completions n, logprobs, usage": (
        "/v1/completions",
        {
            **REQUESTS["/v1/completions"],
            "n": 3,
            "logprobs": 2,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
        ["one choice", "another", "and a third"],
    ),
    "chat n, logprobs, usage": (
        "/v1/chat/completions",
        {
            **REQUESTS["/v1/chat/completions"],
            "n": 2,
            "logprobs": True,
            "top_logprobs": 2,
            "stream_options": {"include_usage": True},
        },
        ["<think>so</think>one choice", "another"],
    ),
    "chat tools, reasoning": (
        "/v1/chat/completions",
        {**REQUESTS["/v1/chat/completions"], "tools": TOOLS},
        [TOOL_TEXT],
    ),
    "anthropic tools, reasoning": (
        "/v1/messages",
        {
            **REQUESTS["/v1/messages"],
            "tools": ANTHROPIC_TOOLS,
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "max_tokens": 2048,
        },
        [TOOL_TEXT],
    ),
    "responses tools": (
        "/v1/responses",
        {**REQUESTS["/v1/responses"], "tools": [{"type": "function", **TOOLS[0]["function"]}]},
        [TOOL_TEXT],
    ),
}


class Speaker(StubManager):
    """Says given texts, a few characters a token and a few tokens an output, choices in turn at random."""

    def __init__(self, texts: list[str], seed: int) -> None:
        super().__init__()
        self.texts = texts
        self.chance = random.Random(seed)
        self.rids: list[Any] = []

    async def outputs(self, obj: Any, outcome: Any) -> AsyncGenerator[Any]:
        self.rids.append(obj.rid)
        said = [0] * len(self.texts)
        tokens: list[list[Any]] = [[] for _ in self.texts]
        while any(done < len(text) for done, text in zip(said, self.texts, strict=True)):
            await asyncio.sleep(0)
            index = self.chance.choice([i for i, text in enumerate(self.texts) if said[i] < len(text)])
            text = self.texts[index]
            for _ in range(self.chance.randrange(1, 4)):
                if said[index] < len(text):
                    step = self.chance.randrange(1, 6)
                    tokens[index].append((-0.5 - len(tokens[index]), 7, text[said[index] : said[index] + step]))
                    said[index] = min(len(text), said[index] + step)
            outcome.first_token = True
            if obj.stream:
                yield self._told(
                    outcome, self._say(obj, index, text[: said[index]], tokens[index], said[index] == len(text))
                )
        if not obj.stream:
            answers = [self._say(obj, i, text, tokens[i], True) for i, text in enumerate(self.texts)]
            yield self._told(outcome, answers if len(answers) > 1 else answers[0])

    @staticmethod
    def _told(outcome: Any, output: Any) -> Any:
        if outcome.kept is not None:
            outcome.kept.messages.append(pickle.dumps(output))
        return output

    def _say(self, obj: Any, index: int, text: str, tokens: list[Any], finished: bool) -> dict[str, Any]:
        output = self._output(len(tokens), {"type": "stop", "matched": None} if finished else None)
        output["text"], output["index"] = text, index
        output["output_ids"] = [token for _, token, _ in tokens]
        output["meta_info"] |= {
            "id": obj.rid,
            "output_token_logprobs": list(tokens),
            "output_token_logprobs_length": len(tokens),
            "output_top_logprobs": [[(p, t, s), (p - 1, 8, "x")] for p, t, s in tokens],
            "input_token_logprobs": [],
            "input_top_logprobs": [],
        }
        return output


class Replayer(StubManager):
    """Gives an endpoint what another one had."""

    def __init__(self, recorded: list[bytes]) -> None:
        super().__init__()
        self.recorded = recorded

    async def outputs(self, obj: Any, outcome: Any) -> AsyncGenerator[Any]:
        for output in self.recorded:
            outcome.first_token = True
            yield pickle.loads(output)


class Recording:
    """Recorder and record of one run. The messages of this manager are whole outputs."""

    def __init__(self) -> None:
        self.request: HttpRequest | None = None
        self.outputs: list[bytes] = []
        self.ends = 0
        self.lineage = Lineage("t")

    def begin(self, rid: str, identity: Any, lineage: Any, request: HttpRequest) -> Recording:
        assert self.request is None and lineage is None
        self.request = request
        return self

    async def output(self, messages: list[bytes], offset: int) -> None:
        self.outputs += messages
        await asyncio.sleep(0)

    def end(self, failure: Any) -> None:
        assert failure is None
        self.ends += 1

    def read(self) -> None:
        pass

    def drop(self, why: str) -> None:
        pass


def body_of(case: str, stream: bool) -> bytes:
    return json.dumps({**CASES[case][1], "rid": "r", "stream": stream}).encode()


def serve(manager: StubManager, requests: Any, recorder: Any = None, retention: float = 60.0) -> Any:
    """Runs ``requests(app, runs)`` on upstream's app."""

    async def run(app: Any, runs: KeptRuns) -> Any:
        try:
            return await asyncio.wait_for(requests(app, runs), 60)
        finally:
            for left in list(runs._runs.values()):
                left.abandon()

    runs = KeptRuns(retention, 1 << 24, recorder)
    manager.config = {"tool_call_parser": "qwen25", "reasoning_parser": "qwen3"}
    with serving(manager, runs) as app:
        return asyncio.run(run(app, runs))


def post(app: Any, case: str, stream: bool = True, **headers: str) -> Exchange:
    extra = {name.replace("_", "-"): value for name, value in headers.items()}
    return Exchange(app, "POST", CASES[case][0], body_of(case, stream), {**KEY, **extra})


#: what says when it was made, and what endpoints draw at random: all that differs when they run again
TIMES = re.compile(rb'"(created|created_at|total_duration)":\s*("[^"]*"|[\d.]+)')
DRAWN = re.compile(rb"\b(msg|resp|call|toolu|rs|fc)_[0-9a-f]{8,32}\b")


def timeless(body: bytes) -> bytes:
    """With the drawn ids numbered as they come."""
    numbers: dict[bytes, int] = {}
    body = TIMES.sub(rb'"\1":0', body)
    return DRAWN.sub(lambda m: m[1] + b"_%d" % numbers.setdefault(m[0], len(numbers)), body)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stream", [True, False])
def test_an_endpoint_run_again_over_the_same_outputs_sends_the_same_events(case: str, stream: bool) -> None:
    async def once(app: Any, runs: KeptRuns) -> Exchange:
        return await post(app, case, stream).end()

    record = Recording()
    first = serve(Speaker(CASES[case][2], 1), once, record)
    assert first.status == 200 and first.complete, first.body
    assert record.request is not None and record.request.body == body_of(case, stream)
    assert record.ends == 1 and record.outputs
    again = serve(Replayer(record.outputs), once, Recording())
    assert timeless(again.body) == timeless(first.body)
    if stream and case not in ("/api/chat", "/api/generate"):
        assert len(first.ids) == len(set(first.ids)) > 2
        positions = [tuple(map(int, each.removeprefix("r:").removesuffix("~t").split("."))) for each in first.ids]
        assert positions == sorted(positions)


@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case][0].startswith("/api")])
@pytest.mark.parametrize("seed", range(3))
def test_cut_anywhere_each_endpoint_gives_every_event_once(case: str, seed: int) -> None:
    chance = random.Random(seed)

    async def cuts(app: Any, runs: KeptRuns) -> tuple[list[bytes], Exchange]:
        witness, got = post(app, case), []
        while True:
            exchange = post(app, case, **({"Last_Event_ID": id_of(got[-1])} if got else {}))
            wanted = chance.randrange(1, 5)
            await exchange.until(lambda e, w=wanted: len(e.events) >= w or e.complete)
            done = exchange.complete
            await exchange.leave()
            got += exchange.events
            if done:
                await witness.end()
                return got, witness

    manager = Speaker(CASES[case][2], seed)
    got, witness = serve(manager, cuts)
    assert got == witness.events
    end = REGULAR_END.get(CASES[case][0], "[DONE]")
    assert end.encode() in got[-1]
    assert len(manager.rids) == 1


class Silent(StubManager):
    """Says a word, and then nothing any more."""

    closed = 0

    async def outputs(self, obj: Any, outcome: Any) -> AsyncGenerator[Any]:
        try:
            outcome.first_token = True
            if obj.stream:
                yield self._output(1, None)
            await asyncio.Event().wait()
        finally:
            self.closed += 1


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [True, False])
def test_an_endpoint_that_nobody_comes_back_for_is_ended(
    path: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each by the way it deals with a client that leaves; or, where the stub has no such way, in the end by force."""
    monkeypatch.setattr(registry, "ABORT_GRACE", 0.2)

    async def leave(app: Any, runs: KeptRuns) -> None:
        exchange = post(app, path, stream)
        if stream:
            await exchange.until(lambda e: b"Hello" in e.body)
        else:
            await asyncio.sleep(0.1)
        await exchange.leave()
        async with asyncio.timeout(20):
            while not manager.closed or runs._runs:
                await asyncio.sleep(0.05)
        assert runs.requests.used == 0
        assert (await post(app, path, stream).end()).status == 410

    manager = Silent()
    serve(manager, leave, retention=0.1)
    assert manager.closed == 1


class Broken(Recording):
    """A record that does not take what it is given, from the ``fails``-th on."""

    def __init__(self, fails: int) -> None:
        super().__init__()
        self.fails = fails

    async def output(self, messages: list[bytes], offset: int) -> None:
        await super().output(messages, offset)
        if len(self.outputs) == self.fails:
            raise OSError("no peer")


@pytest.mark.parametrize("fails", [1, 3])
def test_what_is_not_recorded_does_not_go_out(fails: int) -> None:
    async def requests(app: Any, runs: KeptRuns) -> Exchange:
        exchange = post(app, "/v1/chat/completions")
        await asyncio.wait([exchange.task])
        return exchange

    record = Broken(fails)
    exchange = serve(Speaker(["Hello" + " so" * 20 + " end"], 1), requests, record)
    if fails < 2:
        assert exchange.status == 500 and b"Hello" not in exchange.body
    else:
        assert exchange.task.exception() is not None and not exchange.complete and b"end" not in exchange.body
    assert record.ends == 1


def test_the_engines_request_has_the_id_of_the_http_request() -> None:
    async def requests(app: Any, runs: KeptRuns) -> list[str]:
        body = json.dumps(REQUESTS["/v1/chat/completions"] | {"stream": True}).encode()
        one = await Exchange(app, "POST", "/v1/chat/completions", body, {"Idempotency-Key": "a"}).end()
        body = json.dumps({"text": ["a", "b"], "rid": ["x", "y"], "stream": True}).encode()
        batch = await Exchange(app, "POST", "/generate", body, {"Idempotency-Key": "b"}).end()
        return [one.rid, batch.rid]

    manager = Speaker(["Hello"], 1)
    one, batch = serve(manager, requests)
    assert manager.rids == [one, ["x", "y"]]
    assert batch not in ("x", "y")


def test_a_frontend_without_a_key_in_the_request_is_as_before() -> None:
    async def requests(app: Any, runs: KeptRuns) -> Exchange:
        return await Exchange(app, "POST", "/v1/chat/completions", body_of("/v1/chat/completions", True)).end()

    manager = Speaker(["Hello"], 1)
    response = serve(manager, requests)
    assert b"id: " not in response.body and "x-kevlar-request-id" not in response.headers
    assert manager.rids == ["r"]


def test_failures_end_as_each_endpoints_clients_expect() -> None:
    async def each(app: Any, runs: KeptRuns) -> None:
        for path in SSE:
            body, key = json.dumps({**REQUESTS[path], "stream": True}).encode(), {"Idempotency-Key": path}
            first = await Exchange(app, "POST", path, body, key).end()
            assert first.status == 200 and b"no worker group" in first.events[-1]
            again = Exchange(app, "POST", path, body, {**key, "Last-Event-ID": first.ids[-2]})
            assert (await again.end()).events == first.events[-1:]

    manager = StubManager()
    manager.fail_after = 2
    serve(manager, each)
