"""OutcomeMiddleware on upstream's own HTTP app and endpoint code, with a stub in place of the tokenizer manager.

What upstream makes of an aborted request differs per endpoint (error chunk and [DONE], HTTPException in the middle of
a stream, 500 "Internal server error", ...); what the client gets must not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx
import pytest

from sglang_kevlar.frontend import middleware
from sglang_kevlar.frontend.outcome import Failure, outcome_of
from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")

FAILURE = Failure(503, "request r: no worker group became ready within 60 s", "no_group", retry_after=5)
WORDS = ("Hello", " big", " world")


class StubManager:
    """Generates WORDS for every sub-request; fails the HTTP request after ``fail_after`` of them."""

    served_model_name = model_path = "m"
    server_args = None
    request_logger = SimpleNamespace(log_requests=False)
    is_generation = True

    def __init__(self) -> None:
        self.fail_after: int | None = None
        self.tokenizer = MagicMock()
        self.tokenizer.encode.return_value = [1, 2]
        self.tokenizer.apply_chat_template.return_value = [1, 2]
        self.tokenizer.chat_template = None
        self.model_config = MagicMock(is_multimodal=False, context_len=1000)
        self.model_config.get_default_sampling_params.return_value = {}
        self.model_config.hf_config = SimpleNamespace(model_type="llama", architectures=["LlamaForCausalLM"])
        self.num_reserved_tokens = 0

    def config_value(self, name: str) -> Any:
        return None

    def create_abort_task(self, obj: Any) -> None:
        return None

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        outcome = outcome_of(request)
        assert outcome is not None
        for i in range(len(WORDS) + 1):
            await asyncio.sleep(0)
            if i == self.fail_after:
                outcome.fail(FAILURE)
                if not obj.stream:
                    from fastapi import HTTPException

                    raise HTTPException(503, FAILURE.message)
                reason = {"type": "abort", "message": FAILURE.message, "status_code": HTTPStatus.SERVICE_UNAVAILABLE}
                yield self._output(i, reason)
                return
            if i:
                outcome.first_token = True
                if obj.stream or i == len(WORDS):
                    yield self._output(i, {"type": "stop", "matched": None} if i == len(WORDS) else None)

    def _output(self, words: int, finish_reason: dict[str, Any] | None) -> dict[str, Any]:
        meta = {"id": "r", "finish_reason": finish_reason, "prompt_tokens": 2, "completion_tokens": words}
        meta |= {"cached_tokens": 0, "weight_version": "default", "reasoning_tokens": 0}
        return {"text": "".join(WORDS[:words]), "output_ids": list(range(words)), "meta_info": meta, "index": 0}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Any, StubManager]]:
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
    from sglang.srt.entrypoints.ollama.serving import OllamaServing
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
    from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="none", device="cpu"), role="tokenizer")
    manager = StubManager()
    templates = MagicMock(chat_template_name=None, completion_template_name=None, reasoning_config=None)
    templates.jinja_template_content_format = "string"
    app = http_server.app
    before = list(app.user_middleware)
    middleware.install(app)
    http_server.set_global_state(SimpleNamespace(tokenizer_manager=manager, template_manager=templates))
    app.state.openai_serving_completion = OpenAIServingCompletion(manager, templates)
    app.state.openai_serving_chat = OpenAIServingChat(manager, templates)
    app.state.openai_serving_responses = OpenAIServingResponses(manager, templates)
    app.state.anthropic_serving = AnthropicServing(app.state.openai_serving_chat)
    app.state.ollama_serving = OllamaServing(manager)
    yield app, manager
    app.user_middleware[:] = before
    app.middleware_stack = None


MESSAGES = [{"role": "user", "content": "hi"}]
REQUESTS = {
    "/generate": {"input_ids": [1, 2]},
    "/v1/completions": {"model": "m", "prompt": "hi"},
    "/v1/chat/completions": {"model": "m", "messages": MESSAGES},
    "/v1/messages": {"model": "m", "messages": MESSAGES, "max_tokens": 9},
    "/v1/responses": {"model": "m", "input": "hi"},
    "/api/chat": {"model": "m", "messages": MESSAGES},
    "/api/generate": {"model": "m", "prompt": "hi"},
}
#: what ends a complete stream
REGULAR_END = {"/v1/messages": "message_stop", "/v1/responses": "response.completed", "/api": '"done":true'}


def post(served: tuple[Any, StubManager], path: str, stream: bool, fail_after: int | None) -> httpx.Response:
    app, manager = served
    manager.fail_after = fail_after

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(path, json={**REQUESTS[path], "stream": stream})

    return asyncio.run(request())


def regular_end(path: str) -> str:
    return next((end for prefix, end in REGULAR_END.items() if path.startswith(prefix)), "[DONE]")


def message_of(body: Any) -> str:
    error = body.get("error", body)
    return str(error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
def test_success_is_complete(served: Any, path: str, stream: bool) -> None:
    response = post(served, path, stream, fail_after=None)
    assert response.status_code == 200, response.text
    assert "world" in response.text or path.startswith("/api")
    assert not stream or regular_end(path) in response.text


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(("stream", "fail_after"), [(False, 0), (False, 2), (True, 0)])
def test_failure_before_anything_was_delivered(served: Any, path: str, stream: bool, fail_after: int) -> None:
    response = post(served, path, stream, fail_after)
    assert response.status_code == 503, response.text
    assert response.headers["retry-after"] == "5"
    assert response.headers["content-type"] == "application/json"
    assert message_of(response.json()) == FAILURE.message
    assert regular_end(path) not in response.text


@pytest.mark.parametrize("path", REQUESTS)
def test_failure_in_the_middle_of_a_stream(served: Any, path: str) -> None:
    response = post(served, path, stream=True, fail_after=2)
    assert response.status_code == 200
    assert "Hello" in response.text
    assert response.text.count(FAILURE.message) == 1
    assert regular_end(path) not in response.text and "[DONE]" not in response.text
    last = response.text.strip().rpartition("\n")[2].removeprefix("data: ")
    event = json.loads(last)
    if path == "/v1/responses":
        numbers = [
            json.loads(line[6:])["sequence_number"] for line in response.text.splitlines() if line.startswith("data: ")
        ]
        assert event["type"] == "response.failed" and event["response"]["status"] == "failed"
        assert event["response"]["id"].startswith("resp_")
        assert numbers == list(range(len(numbers)))
        event = event["response"]
    assert message_of(event) == FAILURE.message


def test_error_response_has_cors_headers(served: Any) -> None:
    app, manager = served
    manager.fail_after = 0

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/generate", json=REQUESTS["/generate"], headers={"origin": "http://site"})

    response = asyncio.run(request())
    assert response.status_code == 503
    assert response.headers["access-control-allow-origin"]


def test_other_errors_of_upstream_are_untouched(served: Any) -> None:
    app, _ = served

    async def request() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/v1/chat/completions", json={"model": 1}), await client.get("/nothing")

    malformed, missing = asyncio.run(request())
    assert malformed.status_code == 400 and "retry-after" not in malformed.headers
    assert missing.status_code == 404
