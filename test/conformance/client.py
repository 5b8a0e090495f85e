"""One request over HTTP, whatever the endpoint and its framing, read into one kind of record: an `Answer`.

Knows the wire formats and nothing of the system behind them. Nothing a server sends or fails to send raises here: what
went wrong is part of the answer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

Event = dict[str, Any]
#: making one takes long; a connection of it is used once only, for the last fault may have broken it
_CLIENT = httpx.Client(limits=httpx.Limits(max_keepalive_connections=0))


@dataclass
class Choice:
    """One of the generated sequences of an answer: several with n > 1 or a batch of prompts."""

    text: str = ""
    #: only where the endpoint gives them
    token_ids: list[int] = field(default_factory=list)
    finish: Any = None
    #: parsed parts of a chat message (reasoning, tool calls), by name
    parts: dict[str, str] = field(default_factory=dict)
    #: by the endpoint's name for them: lists with one entry per token
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    #: (prompt tokens, completion tokens), where the endpoint counts per sequence
    usage: list[int] | None = None


@dataclass
class Answer:
    """What a client got, and how it ended."""

    status: int = 0
    choices: list[Choice] = field(default_factory=list)
    #: of the whole request, where the endpoint gives it
    usage: list[int] | None = None
    #: the end was said in the way of the endpoint: `[DONE]`, `message_stop`, ...; a whole body when not streaming
    done: bool = False
    #: what the server said went wrong
    error: str = ""
    #: how the connection failed
    broken: str = ""
    hung: bool = False
    #: something that had been delivered was taken back or changed
    retracted: str = ""
    #: something came after the end
    after_end: str = ""
    events: int = 0
    #: time.monotonic()
    started: float = 0.0
    first_event: float = 0.0
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.started

    def choice(self, index: int) -> Choice:
        while len(self.choices) <= index:
            self.choices.append(Choice())
        return self.choices[index]


def ask(url: str, path: str, body: Event, hang: float, on_event: Callable[[int], None] = lambda events: None) -> Answer:
    """Send a request and read its whole answer.

    ``hang``: seconds of silence after which it counts as hung; ten times as long with nothing but noise does too.
    ``on_event`` is told how many events of a stream have arrived, per sequence: about the number of its tokens.
    """
    answer = Answer(started=time.monotonic())
    try:
        with _CLIENT.stream("POST", url + path, json=body, timeout=hang) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = response.read().decode(errors="replace")[:2000] or f"status {response.status_code}"
            elif body.get("stream"):
                _read_stream(answer, response, path, answer.started + 10 * hang, on_event)
            else:
                response.read()
                _read_whole(answer, response, path)
    except httpx.TimeoutException as error:
        answer.hung, answer.broken = True, repr(error)
    except httpx.HTTPError as error:
        answer.broken = repr(error)
    answer.ended = time.monotonic()
    return answer


def _read_stream(
    answer: Answer, response: httpx.Response, path: str, deadline: float, on_event: Callable[[int], None]
) -> None:
    """Server-sent events, or the JSON lines of Ollama."""
    for line in response.iter_lines():
        line = line.strip()
        if time.monotonic() > deadline:
            answer.hung = True
            return
        if not line or line.startswith((":", "event:", "id:", "retry:")):
            continue
        if answer.done:
            # The Responses API says `response.completed`, and some servers then `[DONE]` too.
            answer.after_end += "" if line == "data: [DONE]" else line[:200]
            continue
        if line == "data: [DONE]":
            answer.done = True
            continue
        answer.first_event = answer.first_event or time.monotonic()
        try:
            event = json.loads(line.removeprefix("data:"))
        except ValueError:
            answer.error = answer.error or f"not JSON: {line[:500]}"
            continue
        answer.events += 1
        _read_event(answer, event, path, True)
        on_event(answer.events // max(1, len(answer.choices)))


def _read_whole(answer: Answer, response: httpx.Response, path: str) -> None:
    try:
        body = response.json()
    except ValueError:
        answer.error = f"not JSON: {response.text[:500]}"
        return
    # A batch of the native API is a list.
    for index, event in enumerate(body if isinstance(body, list) else [body]):
        _read_event(answer, {"index": index, **event}, path, False)
    answer.done = not answer.error


def _read_event(answer: Answer, event: Event, path: str, stream: bool) -> None:
    if error := _error_of(event):
        answer.error = answer.error or error
        return
    try:
        _READERS[path](answer, event, stream)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        answer.error = answer.error or f"not the endpoint's format ({error!r}): {str(event)[:300]}"


def _error_of(event: Event) -> str:
    failed = event.get("response", {}).get("error") if event.get("type") == "response.failed" else None
    error = event.get("error") or failed or (event if event.get("type") == "error" else None)
    return json.dumps(error)[:2000] if error else ""


# ---- one reader for each endpoint: (answer, event, whether it is one event of a stream)


def _generate(answer: Answer, event: Event, stream: bool) -> None:
    """SGLang's native API. Every event of a stream repeats everything so far."""
    choice, meta = answer.choice(event.get("index", 0)), event["meta_info"]
    choice.text = _extended(answer, choice.text, event["text"], "text")
    choice.token_ids = _extended(answer, choice.token_ids, event.get("output_ids", []), "token ids")
    for name in ("output_token_logprobs", "output_top_logprobs", "input_token_logprobs", "input_top_logprobs"):
        if name in meta:
            choice.logprobs[name] = _extended(answer, choice.logprobs.get(name, []), meta[name] or [], name)
    choice.finish = meta["finish_reason"]
    choice.usage = [meta["prompt_tokens"], meta["completion_tokens"]]


def _extended(answer: Answer, before: Any, now: Any, what: str) -> Any:
    if now[: len(before)] != before:
        answer.retracted = answer.retracted or f"{what}: {str(before)[-80:]!r} became {str(now)[-80:]!r}"
    return now


def _completions(answer: Answer, event: Event, stream: bool) -> None:
    answer.usage = _openai_usage(event) or answer.usage
    for part in event["choices"]:
        choice = answer.choice(part["index"])
        choice.text += part["text"]
        choice.finish = part["finish_reason"] or choice.finish
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            _append_logprobs(choice, name, (part.get("logprobs") or {}).get(name))


def _chat(answer: Answer, event: Event, stream: bool) -> None:
    answer.usage = _openai_usage(event) or answer.usage
    for part in event["choices"]:
        choice = answer.choice(part["index"])
        message = part["delta"] if stream else part["message"]
        choice.text += message.get("content") or ""
        _append_part(choice, "reasoning", message.get("reasoning_content"))
        for position, call in enumerate(message.get("tool_calls") or []):
            name = f"tool call {call.get('index') if stream else position}"
            _append_part(choice, name + " function", call["function"].get("name"))
            _append_part(choice, name + " arguments", call["function"].get("arguments"))
        choice.finish = part["finish_reason"] or choice.finish
        _append_logprobs(choice, "content", (part.get("logprobs") or {}).get("content"))


def _openai_usage(event: Event) -> list[int] | None:
    usage = event.get("usage")
    return [usage["prompt_tokens"], usage["completion_tokens"]] if usage else None


def _append_part(choice: Choice, name: str, text: str | None) -> None:
    if text:
        choice.parts[name] = choice.parts.get(name, "") + text


def _append_logprobs(choice: Choice, name: str, entries: list[Any] | None) -> None:
    if entries:
        choice.logprobs.setdefault(name, []).extend(entries)


def _messages(answer: Answer, event: Event, stream: bool) -> None:
    """Anthropic's API."""
    choice = answer.choice(0)
    if not stream:
        choice.text = "".join(block.get("text", "") for block in event["content"])
        choice.finish = event["stop_reason"]
    elif event["type"] == "content_block_delta":
        choice.text += event["delta"].get("text", "")
    elif event["type"] == "message_delta":
        choice.finish = event["delta"]["stop_reason"]
    elif event["type"] == "message_stop":
        answer.done = True
    usage = event.get("usage") or {}
    if "output_tokens" in usage:
        answer.usage = [usage.get("input_tokens", 0), usage["output_tokens"]]


def _ollama(answer: Answer, event: Event, stream: bool) -> None:
    choice = answer.choice(0)
    choice.text += event.get("response", "")
    if event.get("done"):
        answer.done, choice.finish = True, event.get("done_reason")
        answer.usage = [event.get("prompt_eval_count", 0), event.get("eval_count", 0)]


def _responses(answer: Answer, event: Event, stream: bool) -> None:
    """OpenAI's Responses API."""
    choice = answer.choice(0)
    kind = event.get("type", "")
    if kind == "response.output_text.delta":
        choice.text += event["delta"]
    elif kind.startswith("response.reasoning") and kind.endswith(".delta"):
        _append_part(choice, "reasoning", event["delta"])
    elif not stream or kind in ("response.completed", "response.incomplete"):
        response = event["response"] if stream else event
        whole = _output_texts(response)
        if stream and choice.text and whole != choice.text:
            answer.retracted = f"text: the last event has {whole[-80:]!r}, the deltas {choice.text[-80:]!r}"
        choice.text, choice.finish, answer.done = whole, response["status"], True
        if usage := response.get("usage"):
            answer.usage = [usage["input_tokens"], usage["output_tokens"]]


def _output_texts(response: Event) -> str:
    contents = [part for item in response["output"] for part in item.get("content") or []]
    return "".join(part.get("text", "") for part in contents if part.get("type") == "output_text")


_READERS: dict[str, Callable[[Answer, Event, bool], None]] = {
    "/generate": _generate,
    "/v1/completions": _completions,
    "/v1/chat/completions": _chat,
    "/v1/messages": _messages,
    "/api/generate": _ollama,
    "/v1/responses": _responses,
}
ENDPOINTS = tuple(_READERS)
