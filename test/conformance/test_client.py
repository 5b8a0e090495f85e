"""The framing of every endpoint, whole and streamed, and every way a server can break it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from client import Answer, Choice, ask

DONE = "data: [DONE]"


class Canned(BaseHTTPRequestHandler):
    """Answers with what the request asks it to."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(body["status"])
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in body["lines"]:
            self._chunk(line.encode() + b"\n\n")
        if body["end"] == "silence":
            time.sleep(1.5)
        if body["end"] == "noise":
            for _ in range(60):
                self._chunk(b": still here\n\n")
                time.sleep(0.05)
        if body["end"] == "proper":
            self._chunk(b"")
        else:
            self.close_connection = True

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def streamed(url: str, path: str, *events: Any, end: str = "proper", hang: float = 10.0) -> Answer:
    lines = [event if isinstance(event, str) else f"data: {json.dumps(event)}" for event in events]
    return ask(url, path, {"stream": True, "status": 200, "lines": lines, "end": end}, hang)


def at_once(url: str, path: str, content: Any, status: int = 200, end: str = "proper") -> Answer:
    lines = [content if isinstance(content, str) else json.dumps(content)]
    return ask(url, path, {"status": status, "lines": lines, "end": end}, 10.0)


def native(text: str, ids: list[int], finish: Any = None, **meta: Any) -> dict[str, Any]:
    meta = {"finish_reason": finish, "prompt_tokens": 5, "completion_tokens": len(ids), **meta}
    return {"text": text, "output_ids": ids, "meta_info": meta}


def test_generate(url: str) -> None:
    logprobs = [[-1.0, 1, None]]
    first, second = native("a", [1], output_token_logprobs=logprobs), native("ab", [1, 2], "length")
    answer = streamed(url, "/generate", first, second | {"index": 0}, native("x", [7], "stop") | {"index": 1}, DONE)
    assert answer.choices == [
        Choice("ab", [1, 2], "length", {}, {"output_token_logprobs": logprobs}, [5, 2]),
        Choice("x", [7], "stop", {}, {}, [5, 1]),
    ]
    assert answer.done and not (answer.error or answer.broken or answer.retracted or answer.hung)
    assert answer.events == 3 and answer.started < answer.first_event <= answer.ended
    assert at_once(url, "/generate", [second, native("x", [7], "stop")]).choices[1].text == "x"


@pytest.mark.parametrize(
    "later",
    [
        native("b", [1, 2]),
        native("ab", [2, 2]),
        native("ab", [1, 2], input_token_logprobs=[[-3.0, 1, None]]),
    ],
)
def test_what_a_stream_takes_back_is_noticed(url: str, later: dict[str, Any]) -> None:
    first = native("a", [1], input_token_logprobs=[[-2.0, 1, None]])
    assert streamed(url, "/generate", first, later, DONE).retracted


def test_completions(url: str) -> None:
    def event(text: str, finish: str | None, **more: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "text": text, "finish_reason": finish, **more}]}

    logprobs = {"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0}]}
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    answer = streamed(url, "/v1/completions", event("a", None, logprobs=logprobs), event("b", "stop"), usage, DONE)
    assert answer.choices == [Choice("ab", [], "stop", {}, logprobs)]
    assert answer.usage == [3, 2] and answer.done
    whole = at_once(url, "/v1/completions", event("ab", "stop", logprobs=logprobs) | {"usage": usage["usage"]})
    assert (whole.choices, whole.usage, whole.done) == (answer.choices, answer.usage, True)


def test_chat(url: str) -> None:
    def event(finish: str | None, **delta: Any) -> dict[str, Any]:
        return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}

    def call(index: int, **function: str) -> dict[str, Any]:
        return {"index": index, "function": function}

    answer = streamed(
        url,
        "/v1/chat/completions",
        event(None, role="assistant", content=""),
        event(None, reasoning_content="I "),
        event(None, reasoning_content="think"),
        event(None, content="so"),
        event(None, tool_calls=[call(0, name="look", arguments="")]),
        event(None, tool_calls=[call(0, arguments='{"a":')]),
        event("tool_calls", tool_calls=[call(0, arguments=" 1}"), call(1, name="other", arguments="{}")]),
        DONE,
    )
    parts = {
        "reasoning": "I think",
        "tool call 0 function": "look",
        "tool call 0 arguments": '{"a": 1}',
        "tool call 1 function": "other",
        "tool call 1 arguments": "{}",
    }
    assert answer.choices == [Choice("so", [], "tool_calls", parts)]
    calls = [
        {"function": {"name": "look", "arguments": '{"a": 1}'}},
        {"function": {"name": "other", "arguments": "{}"}},
    ]
    message = {"content": "so", "reasoning_content": "I think", "tool_calls": calls}
    body = {"choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}
    assert at_once(url, "/v1/chat/completions", body).choices == answer.choices


def test_messages(url: str) -> None:
    answer = streamed(
        url,
        "/v1/messages",
        "event: message_start",
        {"type": "message_start", "message": {}},
        {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "ab"}},
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 2}},
        {"type": "message_stop"},
    )
    assert answer.choices == [Choice("ab", finish="max_tokens")] and answer.usage == [0, 2] and answer.done
    body = {"content": [{"text": "ab"}], "stop_reason": "max_tokens", "usage": {"output_tokens": 2}}
    assert at_once(url, "/v1/messages", body).choices == answer.choices


def test_ollama(url: str) -> None:
    lines = [json.dumps({"response": "a", "done": False})]
    lines.append(json.dumps({"response": "", "done": True, "done_reason": "length", "eval_count": 1}))
    answer = streamed(url, "/api/generate", *lines)
    assert answer.choices == [Choice("a", finish="length")] and answer.usage == [0, 1] and answer.done


def test_responses(url: str) -> None:
    content = [{"type": "output_text", "text": "ab"}]
    response = {"status": "completed", "output": [{"content": content}], "usage": None}
    deltas = [{"type": "response.output_text.delta", "delta": text} for text in "ab"]
    completed = {"type": "response.completed", "response": response}
    answer = streamed(url, "/v1/responses", *deltas, completed, DONE)
    assert answer.choices == [Choice("ab", finish="completed")]
    assert answer.done and not answer.after_end and not answer.retracted
    assert at_once(url, "/v1/responses", response).choices == answer.choices
    assert streamed(url, "/v1/responses", deltas[0], completed).retracted
    failed = {"type": "response.failed", "response": {"error": {"message": "lost"}}}
    assert "lost" in streamed(url, "/v1/responses", deltas[0], failed).error


ERROR = {"error": {"message": "lost"}}


def test_errors(url: str) -> None:
    assert at_once(url, "/generate", "gone", status=503).error.strip() == "gone"
    assert at_once(url, "/generate", "gone", status=503).status == 503
    whole = at_once(url, "/generate", ERROR)
    assert "lost" in whole.error and not whole.done
    assert "not JSON" in at_once(url, "/generate", "<html>").error
    assert "format" in at_once(url, "/generate", {"strange": 1}).error
    event = streamed(url, "/generate", native("a", [1]), ERROR)
    assert "lost" in event.error and not event.done and event.choices[0].text == "a"
    assert streamed(url, "/generate", native("a", [1]), ERROR, DONE).done
    assert "lost" in streamed(url, "/v1/messages", {"type": "error", **ERROR}).error
    assert "not JSON" in streamed(url, "/generate", "data: {half").error


def test_cuts(url: str) -> None:
    cut = streamed(url, "/generate", native("a", [1]), end="abrupt")
    assert cut.broken and not cut.done and not cut.hung and cut.choices[0].text == "a"
    ended = streamed(url, "/generate", native("a", [1]))
    assert not ended.broken and not ended.done
    assert "more" in streamed(url, "/generate", DONE, 'data: {"more": 1}').after_end
    assert ask("http://127.0.0.1:9", "/generate", {}, 5.0).broken


def test_hangs(url: str) -> None:
    assert streamed(url, "/generate", native("a", [1]), end="silence", hang=0.2).hung
    assert streamed(url, "/generate", native("a", [1]), end="noise", hang=0.2).hung


def test_events_are_counted_per_sequence(url: str) -> None:
    seen: list[int] = []
    lines = [f"data: {json.dumps(native('a', [1]) | {'index': i % 2})}" for i in range(6)]
    ask(url, "/generate", {"stream": True, "status": 200, "lines": [*lines, DONE], "end": "proper"}, 5.0, seen.append)
    assert seen == [1, 1, 1, 2, 2, 3]
