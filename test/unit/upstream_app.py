"""Upstream's own HTTP app and endpoint code, with a stub in place of the tokenizer manager."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from sglang_kevlar.frontend import middleware
from sglang_kevlar.frontend.kept import endpoints as kept_endpoints
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.outcome import Failure, RequestOutcome, outcome_of
from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

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
        self.config: dict[str, Any] = {}
        self.tokenizer = MagicMock(is_fast=False)
        self.tokenizer.encode.return_value = [1, 2]
        self.tokenizer.apply_chat_template.return_value = [1, 2]
        self.tokenizer.chat_template = None
        self.model_config = MagicMock(is_multimodal=False, context_len=1000)
        self.model_config.get_default_sampling_params.return_value = {}
        self.model_config.hf_config = SimpleNamespace(model_type="llama", architectures=["LlamaForCausalLM"])
        self.num_reserved_tokens = 0

    def config_value(self, name: str) -> Any:
        return self.config.get(name)

    def create_abort_task(self, obj: Any) -> None:
        return None

    async def generate_request(self, obj: Any, request: Any = None) -> AsyncIterator[Any]:
        outcome = outcome_of(request)
        assert outcome is not None
        outputs = self.outputs(obj, outcome)
        if outcome.kept is not None:
            outcome.kept.name(obj)
            outputs = outcome.kept.watch(outputs)
        async for output in outputs:
            yield output

    async def outputs(self, obj: Any, outcome: RequestOutcome) -> AsyncGenerator[Any]:
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


@contextlib.contextmanager
def serving(manager: StubManager, runs: KeptRuns) -> Iterator[Any]:
    """The app with our middleware in it. There is one per process: it is as it was afterwards."""
    from sglang.srt.entrypoints import http_server
    from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
    from sglang.srt.entrypoints.ollama.serving import OllamaServing
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
    from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
    from sglang.srt.runtime_context import publish
    from sglang.srt.server_args import ServerArgs

    publish(ServerArgs(model_path="none", device="cpu"), role="tokenizer")
    templates = MagicMock(chat_template_name=None, completion_template_name=None, reasoning_config=None)
    templates.jinja_template_content_format = "string"
    app = http_server.app
    middlewares, routes = list(app.user_middleware), list(app.router.routes)
    middleware.install(app, runs)
    kept_endpoints.install(app, runs)
    http_server.set_global_state(SimpleNamespace(tokenizer_manager=manager, template_manager=templates))
    app.state.openai_serving_completion = OpenAIServingCompletion(manager, templates)
    app.state.openai_serving_chat = OpenAIServingChat(manager, templates)
    app.state.openai_serving_responses = OpenAIServingResponses(manager, templates)
    app.state.anthropic_serving = AnthropicServing(app.state.openai_serving_chat)
    app.state.ollama_serving = OllamaServing(manager)
    try:
        yield app
    finally:
        app.user_middleware[:] = middlewares
        app.router.routes[:] = routes
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
