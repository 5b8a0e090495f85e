"""OutcomeMiddleware against small ASGI apps that frame their streams as upstream's endpoints do."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.middleware import HOLD_MESSAGES, OutcomeMiddleware, install
from sglang_kevlar.frontend.outcome import Failure, outcome_of

NO_GROUP = Failure(503, "request r1: no worker group became ready within 60 s", "no_group", retry_after=5)
SSE = b"text/event-stream; charset=utf-8"


class Exchange:
    """One request through the middleware; what a client would get."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []
        self.receive_calls = 0

    async def receive(self) -> dict[str, Any]:
        self.receive_calls += 1
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent[1:])

    @property
    def complete(self) -> bool:
        return not self.sent[-1].get("more_body", False)


def endpoint(name: str) -> Any:
    def function() -> None: ...

    function.__name__ = name
    return function


def run(app: Any, name: str = "openai_v1_completions", exchange: Exchange | None = None) -> Exchange:
    exchange = exchange or Exchange()
    scope = {"type": "http", "path": "/x", "method": "POST", "endpoint": endpoint(name)}
    asyncio.run(OutcomeMiddleware(app)(scope, exchange.receive, exchange.send))
    return exchange


def start(content_type: bytes = SSE, status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"content-type", content_type)]}


def chunk(body: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def stream(*steps: Any, content_type: bytes = SSE) -> Any:
    """An app that streams. A step is a chunk, "token" (the manager hands one over), a Failure, or an exception."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(content_type))
        for step in steps:
            if isinstance(step, bytes):
                await send(chunk(step))
            elif step == "token":
                scope["kevlar"].first_token = True
            elif isinstance(step, Failure):
                scope["kevlar"].fail(step)
            else:
                raise step
        await send(chunk(b"", more=False))

    return app


def test_stream_without_failure_is_untouched() -> None:
    app = stream(b"data: role\n\n", "token", b"data: a\n\n", b"data: [DONE]\n\n")
    exchange, bare = run(app), Exchange()
    asyncio.run(app({"kevlar": type("", (), {})()}, bare.receive, bare.send))
    assert exchange.sent == bare.sent
    assert exchange.receive_calls == 0


def test_chunks_are_passed_on_as_they_come_once_there_is_a_token() -> None:
    exchange = Exchange()
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(chunk(b"role"))
        seen.append(len(exchange.sent))
        scope["kevlar"].first_token = True
        for _ in range(3):
            await send(chunk(b"x"))
            seen.append(len(exchange.sent))
        await send(chunk(b"", more=False))

    run(app, exchange=exchange)
    assert seen == [0, 3, 4, 5]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai_v1_completions", {"object": "error", "type": "503", "param": None, "code": 503}),
        ("generate_request", {"object": "error", "type": "503", "param": None, "code": 503}),
        ("v1_responses_request", {"error": {"type": "Service Unavailable", "param": None, "code": 503}}),
        ("anthropic_v1_messages", {"type": "error", "error": {"type": "overloaded_error"}}),
        ("ollama_chat", {"error": NO_GROUP.message}),
    ],
)
def test_failure_before_the_first_token_is_an_error_response(name: str, expected: dict[str, Any]) -> None:
    exchange = run(stream(b"role chunk", NO_GROUP, b"data: [DONE]\n\n"), name)
    assert exchange.status == 503
    assert exchange.headers[b"retry-after"] == b"5"
    assert exchange.headers[b"content-type"] == b"application/json"
    assert int(exchange.headers[b"content-length"]) == len(exchange.body)
    body = json.loads(exchange.body)
    inner = body["error"] if isinstance(body.get("error"), dict) else body
    assert inner.pop("message", NO_GROUP.message) == NO_GROUP.message
    assert body == expected
    assert exchange.complete and len(exchange.sent) == 2


def test_a_token_that_has_not_left_yet_still_allows_an_error_response() -> None:
    exchange = run(stream("token", NO_GROUP, b"data: error chunk of the endpoint\n\n"))
    assert exchange.status == 503
    assert b"endpoint" not in exchange.body


OPENAI_EVENT = {
    "error": {"object": "error", "message": NO_GROUP.message, "type": "SERVICE_UNAVAILABLE", "code": 503, "param": None}
}
NATIVE_EVENT = {"error": {"message": NO_GROUP.message, "type": "SERVICE_UNAVAILABLE", "code": 503, "retryable": True}}
ANTHROPIC_EVENT = {"type": "error", "error": {"type": "overloaded_error", "message": NO_GROUP.message}}


@pytest.mark.parametrize(
    ("name", "first", "regular_end", "prefix", "expected"),
    [
        ("openai_v1_chat_completions", b"data: {}\n\n", b"data: [DONE]\n\n", b"data: ", OPENAI_EVENT),
        ("generate_request", b"data: {}\n\n", b"data: [DONE]\n\n", b"data: ", NATIVE_EVENT),
        (
            "anthropic_v1_messages",
            b"event: message_start\ndata: {}\n\n",
            b'event: message_stop\ndata: {"type":"message_stop"}\n\n',
            b"event: error\ndata: ",
            ANTHROPIC_EVENT,
        ),
        ("ollama_chat", b'{"done":false}\n', b'{"done":true}\n', b"", {"error": NO_GROUP.message}),
    ],
)
def test_failure_after_the_first_token_is_one_event_and_no_regular_end(
    name: str, first: bytes, regular_end: bytes, prefix: bytes, expected: dict[str, Any]
) -> None:
    content_type = b"application/x-ndjson" if name == "ollama_chat" else SSE
    exchange = run(stream("token", first, NO_GROUP, b"more", regular_end, content_type=content_type), name)
    assert exchange.status == 200
    assert exchange.body.startswith(first)
    event = exchange.body.removeprefix(first)
    assert event.startswith(prefix)
    assert event.endswith(b"\n" if name == "ollama_chat" else b"\n\n")
    assert json.loads(event.removeprefix(prefix)) == expected
    assert exchange.complete and sum(not m.get("more_body", True) for m in exchange.sent) == 1


def test_responses_stream_ends_with_the_response_failed_and_goes_on_counting() -> None:
    created = {"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", "status": "in_progress"}}
    delta = {"type": "response.output_text.delta", "sequence_number": 41, "delta": "a"}
    steps = [f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in (created, delta)]
    exchange = run(stream(steps[0], "token", steps[1], NO_GROUP), "v1_responses_request")
    event, data = exchange.body.removeprefix(b"".join(steps)).decode().strip().split("\n")
    assert event == "event: response.failed"
    assert json.loads(data.removeprefix("data: ")) == {
        "type": "response.failed",
        "sequence_number": 42,
        "response": {
            "id": "resp_1",
            "status": "failed",
            "error": {"code": "server_error", "message": NO_GROUP.message},
        },
    }


def test_responses_stream_of_an_unknown_shape_ends_with_an_error_event() -> None:
    exchange = run(stream("token", b"data: ?\n\n", NO_GROUP), "v1_responses_request")
    assert exchange.body.startswith(b'data: ?\n\nevent: error\ndata: {"type":"error","sequence_number":0,')


@pytest.mark.parametrize("delivered", [False, True])
def test_exception_with_a_failure_is_the_failure(delivered: bool) -> None:
    steps = ["token", b"data: a\n\n"] if delivered else [b"role"]
    exchange = run(stream(*steps, NO_GROUP, RuntimeError("response already started")))
    assert exchange.status == (200 if delivered else 503)
    assert b"no worker group" in exchange.body
    assert exchange.complete


def test_exception_without_a_failure_goes_its_way_with_what_was_sent_before() -> None:
    exchange = Exchange()
    with pytest.raises(KeyError):
        run(stream(b"role", KeyError("bug")), exchange=exchange)
    assert [m["type"] for m in exchange.sent] == ["http.response.start", "http.response.body"]


def test_cancellation_passes_through() -> None:
    with pytest.raises(asyncio.CancelledError):
        run(stream(b"role", NO_GROUP, asyncio.CancelledError()))


@pytest.mark.parametrize("upstream_status", [200, 400, 500, 503])
def test_non_streaming_failure_replaces_whatever_the_endpoint_made_of_it(upstream_status: int) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["kevlar"].fail(Failure(503, "too many requests wait", "queue_full", retry_after=2))
        scope["kevlar"].fail(NO_GROUP)
        await send(start(b"application/json", upstream_status))
        await send(chunk(b'{"message":"Internal server error"}', more=False))

    exchange = run(app)
    assert exchange.status == 503
    assert exchange.headers[b"retry-after"] == b"2"
    assert json.loads(exchange.body)["message"] == "too many requests wait"


def test_failure_that_cannot_be_retried_has_its_own_status_and_no_retry_after() -> None:
    exchange = run(stream(Failure(400, "beam search cannot be continued", "not_continuable")))
    assert exchange.status == 400
    assert b"retry-after" not in exchange.headers


def test_non_streaming_success_is_not_held() -> None:
    exchange = Exchange()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(b"application/json"))
        assert len(exchange.sent) == 1
        scope["kevlar"].fail(NO_GROUP)  # too late: the response is on its way
        await send(chunk(b"{}", more=False))

    run(app, exchange=exchange)
    assert exchange.status == 200 and exchange.body == b"{}"


def test_failure_after_the_end_changes_nothing() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await stream("token", b"data: a\n\n", b"data: [DONE]\n\n")(scope, receive, send)
        scope["kevlar"].fail(NO_GROUP)

    exchange = run(app)
    assert exchange.body == b"data: a\n\ndata: [DONE]\n\n"
    assert len([m for m in exchange.sent if not m.get("more_body", True)]) == 1


def test_endpoint_that_returns_without_a_response_after_a_failure() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["kevlar"].fail(NO_GROUP)

    assert run(app).status == 503


@pytest.mark.parametrize("size", [1, 300_000])
def test_what_is_held_back_is_bounded(size: int) -> None:
    exchange = Exchange()
    held = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        for _ in range(2 * HOLD_MESSAGES):
            await send(chunk(b"x" * size))
            held.append(not exchange.sent)
        await send(chunk(b"", more=False))

    run(app, exchange=exchange)
    assert 0 < held.count(True) <= (HOLD_MESSAGES if size == 1 else 4)
    assert len(exchange.body) == 2 * HOLD_MESSAGES * size


def test_stream_that_ends_without_a_token_is_complete() -> None:
    exchange = run(stream(b'{"done":true}\n', content_type=b"application/x-ndjson"), "ollama_generate")
    assert exchange.body == b'{"done":true}\n' and exchange.complete


def test_the_outcome_is_found_from_the_request_and_receive_is_the_servers_own() -> None:
    exchange = Exchange()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        from starlette.requests import Request

        request = Request(scope, receive)
        outcome = outcome_of(request)
        assert outcome is scope["kevlar"] and not outcome.delivered
        assert await request.is_disconnected()
        assert receive == exchange.receive

    run(app, exchange=exchange)
    assert outcome_of(None) is None


@pytest.mark.parametrize("kind", ["lifespan", "websocket"])
def test_other_protocols_pass(kind: str) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert "kevlar" not in scope
        await send({"type": f"{kind}.x"})

    exchange = Exchange()
    asyncio.run(OutcomeMiddleware(app)({"type": kind}, exchange.receive, exchange.send))
    assert exchange.sent == [{"type": f"{kind}.x"}]


def test_install_names_the_endpoint_that_moved() -> None:
    from fastapi import FastAPI

    with pytest.raises(RuntimeError, match="anthropic_v1_messages"):
        install(FastAPI(), KeptRuns(60, 1 << 20))
