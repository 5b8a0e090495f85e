"""How each endpoint of upstream's HTTP app says that a request failed: as a response, and inside a stream.

The shapes are those of upstream 0.5.21: `http_server.validation_exception_handler` and
`OpenAIServingBase.create_error_response` (responses), `create_streaming_error_response`, `/generate`,
`AnthropicServing` and `OpenAIServingResponses` (streams), and Ollama's own `{"error": ...}`.
"""

from __future__ import annotations

import json
from enum import Enum
from http import HTTPStatus
from typing import Any

from sglang_kevlar.frontend.outcome import Failure


class Framing(Enum):
    OPENAI = "openai"
    NATIVE = "native"
    RESPONSES = "responses"
    ANTHROPIC = "anthropic"
    OLLAMA = "ollama"


#: by the name of the endpoint function: paths can be moved by environment variables and --fastapi-root-path.
#: Everything else that upstream serves (completions, chat, embeddings, score, rerank, ...) is OPENAI.
FRAMING_OF_ENDPOINT = {
    "generate_request": Framing.NATIVE,
    "vertex_generate": Framing.NATIVE,
    "v1_responses_request": Framing.RESPONSES,
    "anthropic_v1_messages": Framing.ANTHROPIC,
    "ollama_chat": Framing.OLLAMA,
    "ollama_generate": Framing.OLLAMA,
}

#: endpoints with an OPENAI frame that generate: named so that a start-up check sees them move
OPENAI_ENDPOINTS = ("openai_v1_completions", "openai_v1_chat_completions", "sagemaker_chat_completions")


def framing_of(scope: Any) -> Framing:
    """``scope`` after routing; before it, or on an unknown path, OPENAI."""
    name = getattr(scope.get("endpoint"), "__name__", "")
    return FRAMING_OF_ENDPOINT.get(name, Framing.OPENAI)


def error_body(framing: Framing, failure: Failure) -> bytes:
    """The JSON body of an error response."""
    code, message = failure.status, failure.message
    if framing is Framing.ANTHROPIC:
        return _json(_anthropic(failure))
    if framing is Framing.OLLAMA:
        return _json({"error": message})
    if framing is Framing.RESPONSES:
        return _json({"error": {"message": message, "type": HTTPStatus(code).phrase, "param": None, "code": code}})
    return _json({"object": "error", "message": message, "type": str(code), "param": None, "code": code})


def error_event(framing: Framing, failure: Failure, first: bytes, last: bytes) -> bytes:
    """The event that ends a stream in place of its regular end.

    ``first`` and ``last``: the first and the last chunk the client got. The Responses API numbers its events and
    repeats the response object in the terminal one; both are taken from there.
    """
    code, message = failure.status, failure.message
    if framing is Framing.OLLAMA:
        return _json({"error": message}) + b"\n"
    if framing is Framing.ANTHROPIC:
        return b"event: error\ndata: " + _json(_anthropic(failure)) + b"\n\n"
    if framing is Framing.RESPONSES:
        return _responses_failed(failure, first, last)
    error: dict[str, Any] = {"message": message, "type": HTTPStatus(code).name, "code": code}
    if framing is Framing.NATIVE:
        error["retryable"] = failure.retry_after is not None
    else:
        error = {"object": "error", **error, "param": None}
    return b"data: " + _json({"error": error}) + b"\n\n"


def _anthropic(failure: Failure) -> dict[str, Any]:
    if failure.status == HTTPStatus.SERVICE_UNAVAILABLE:
        kind = "overloaded_error"
    elif failure.status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    else:
        kind = "invalid_request_error" if failure.status < 500 else "api_error"
    return {"type": "error", "error": {"type": kind, "message": failure.message}}


def _responses_failed(failure: Failure, first: bytes, last: bytes) -> bytes:
    number = _sse_data(last).get("sequence_number", -1) + 1
    response = _sse_data(first).get("response")
    error = {"code": "server_error", "message": failure.message}
    if isinstance(response, dict):
        response = {**response, "status": "failed", "error": error}
        event = {"type": "response.failed", "sequence_number": number, "response": response}
    else:
        event = {"type": "error", "sequence_number": number, **error, "param": None}
    return f"event: {event['type']}\n".encode() + b"data: " + _json(event) + b"\n\n"


def _sse_data(chunk: bytes) -> dict[str, Any]:
    """The JSON object of the last event in ``chunk``; empty when there is none."""
    try:
        data = json.loads(chunk.rpartition(b"data: ")[2])
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
