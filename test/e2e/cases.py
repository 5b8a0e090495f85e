"""The catalogue of what a request can carry, as HTTP requests whose answers can be compared.

A case is run undisturbed and again while its group dies; `Answer.difference` says in which way the two differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPT = "def parse_arguments(self, argv, namespace=None):\n    for option in"
LONG_PROMPT = " ".join(
    f"import module_{i % 97} as m{i % 13}; value_{i % 31} = m{i % 13}.call({i % 7})" for i in range(90)
)
LOGPROB_TOLERANCE = 1e-3


@dataclass
class Answer:
    """What a client got."""

    status: int = 0
    texts: list[str] = field(default_factory=list)
    token_ids: list[list[int]] = field(default_factory=list)
    finish: list[Any] = field(default_factory=list)
    usage: Any = None
    logprobs: list[Any] = field(default_factory=list)
    #: parsed parts of a chat message: tool calls, reasoning
    parts: list[Any] = field(default_factory=list)
    done: bool = True
    redirects: int = 0
    #: tokens that the last group computed again, and prompt tokens that it found in its cache; native API only
    recomputed: int = 0
    cached: int = 0
    error: str = ""

    def difference(self, other: Answer) -> str | None:
        """None when ``other`` is the same answer, token for token; log-probs within float tolerance."""
        for name in ("status", "error", "token_ids", "texts", "finish", "usage", "parts", "done"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name}: {str(mine)[:300]} != {str(theirs)[:300]}"
        return _logprob_difference(self.logprobs, other.logprobs, "logprobs")


def _logprob_difference(mine: Any, theirs: Any, where: str) -> str | None:
    if isinstance(mine, float) and isinstance(theirs, float | int):
        return None if abs(mine - theirs) <= LOGPROB_TOLERANCE else f"{where}: {mine} != {theirs}"
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        if len(mine) != len(theirs):
            return f"{where}: {len(mine)} entries != {len(theirs)}"
        for i, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if difference := _logprob_difference(a, b, f"{where}[{i}]"):
                return difference
        return None
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return _logprob_difference(sorted(mine.items()), sorted(theirs.items()), where)
    return None if mine == theirs else f"{where}: {mine!r} != {theirs!r}"


@dataclass(frozen=True)
class Case:
    name: str
    path: str
    body: dict[str, Any]
    #: answers of two undisturbed runs are equal
    exact: bool = True

    def run(self, url: str, timeout: float = 180.0, client: httpx.Client | None = None) -> Answer:
        reader = _READERS[self.path]
        answer = Answer()
        with (client or httpx).stream("POST", url + self.path, json=self.body, timeout=timeout) as response:
            answer.status = response.status_code
            if response.status_code != 200:
                answer.error = response.read().decode(errors="replace")
            elif self.body.get("stream"):
                events, answer.done = _events(response)
                for event in events:
                    if "error" in event:
                        answer.error = json.dumps(event["error"])
                    else:
                        reader(answer, event, True)
            else:
                response.read()
                for event in response.json() if isinstance(response.json(), list) else [response.json()]:
                    reader(answer, event, False)
        return answer


def _events(response: httpx.Response) -> tuple[list[dict[str, Any]], bool]:
    """Server-sent events, or JSON lines (Ollama); whether the stream said it was complete."""
    events, done = [], False
    for line in response.iter_lines():
        assert not (done and line.strip()), f"something came after the end: {line}"
        if line == "data: [DONE]":
            done = True
        elif line.startswith(("data: ", "{")):
            event = json.loads(line.removeprefix("data: "))
            events.append(event)
            done = event.get("type") == "message_stop" or event.get("done") is True
    return events, done


def _at(values: list[Any], index: int, empty: Callable[[], Any]) -> None:
    while len(values) <= index:
        values.append(empty())


def _native(answer: Answer, event: dict[str, Any], stream: bool) -> None:
    index = event.get("index", 0) if stream else len(answer.texts)
    meta = event["meta_info"]
    for values, empty in (
        (answer.texts, str),
        (answer.token_ids, list),
        (answer.finish, dict),
        (answer.logprobs, list),
    ):
        _at(values, index, empty)
    # Streams repeat everything so far: whatever was said before must still stand.
    assert event["text"].startswith(answer.texts[index]), f"{event['text']!r} after {answer.texts[index]!r}"
    assert event["output_ids"][: len(answer.token_ids[index])] == answer.token_ids[index]
    answer.texts[index], answer.token_ids[index] = event["text"], event["output_ids"]
    answer.finish[index] = meta["finish_reason"]
    answer.usage = {**(answer.usage or {}), index: (meta["prompt_tokens"], meta["completion_tokens"])}
    names = ("output_token_logprobs", "output_top_logprobs", "input_token_logprobs", "input_top_logprobs")
    answer.logprobs[index] = [meta[name] for name in names if name in meta]
    answer.redirects = max(answer.redirects, meta.get("kevlar", {}).get("redirects", 0))
    answer.recomputed = max(answer.recomputed, meta.get("kevlar", {}).get("recomputed_tokens", 0))
    answer.cached = meta["cached_tokens"]


def _completions(answer: Answer, event: dict[str, Any], stream: bool) -> None:
    answer.usage = _usage(event) or answer.usage
    for choice in event["choices"]:
        index = choice["index"]
        for values, empty in ((answer.texts, str), (answer.finish, str), (answer.logprobs, list)):
            _at(values, index, empty)
        answer.texts[index] += choice["text"]
        answer.finish[index] = choice["finish_reason"] or answer.finish[index]
        if choice.get("logprobs"):
            answer.logprobs[index] += choice["logprobs"]["token_logprobs"]


def _chat(answer: Answer, event: dict[str, Any], stream: bool) -> None:
    answer.usage = _usage(event) or answer.usage
    for choice in event["choices"]:
        index = choice["index"]
        for values, empty in ((answer.texts, str), (answer.finish, str), (answer.parts, dict), (answer.logprobs, list)):
            _at(values, index, empty)
        message = choice["delta"] if stream else choice["message"]
        answer.texts[index] += message.get("content") or ""
        parts = answer.parts[index]
        parts["reasoning"] = parts.get("reasoning", "") + (message.get("reasoning_content") or "")
        for call in message.get("tool_calls") or []:
            name = f"tool {call.get('index', 0)}"
            function = call["function"]
            parts[name] = parts.get(name, "") + (function.get("name") or "") + "|" + (function.get("arguments") or "")
        answer.finish[index] = choice["finish_reason"] or answer.finish[index]
        if choice.get("logprobs"):
            answer.logprobs[index] += [entry["logprob"] for entry in choice["logprobs"]["content"]]


def _messages(answer: Answer, event: dict[str, Any], stream: bool) -> None:
    """Anthropic's /v1/messages."""
    _at(answer.texts, 0, str)
    if not stream:
        answer.texts[0] = "".join(block.get("text", "") for block in event["content"])
        answer.finish, answer.usage = [event["stop_reason"]], event["usage"]["output_tokens"]
    elif event["type"] == "content_block_delta":
        answer.texts[0] += event["delta"].get("text", "")
    elif event["type"] == "message_delta":
        answer.finish, answer.usage = [event["delta"]["stop_reason"]], event["usage"]["output_tokens"]


def _ollama(answer: Answer, event: dict[str, Any], stream: bool) -> None:
    _at(answer.texts, 0, str)
    answer.texts[0] += event.get("response", "")
    if event.get("done"):
        answer.finish, answer.usage = [event.get("done_reason")], event.get("eval_count")


def _score(answer: Answer, event: dict[str, Any], stream: bool) -> None:
    answer.logprobs = event["scores"]


_READERS: dict[str, Callable[[Answer, dict[str, Any], bool], None]] = {
    "/generate": _native,
    "/v1/completions": _completions,
    "/v1/chat/completions": _chat,
    "/v1/messages": _messages,
    "/api/generate": _ollama,
    "/v1/score": _score,
}


def _usage(event: dict[str, Any]) -> Any:
    usage = event.get("usage")
    return None if not usage else (usage["prompt_tokens"], usage["completion_tokens"])


def native(name: str, stream: bool = True, prompt: str | list[str] = PROMPT, **fields: Any) -> Case:
    sampling = {"temperature": 0, "max_new_tokens": 64, "ignore_eos": True, **fields.pop("sampling", {})}
    body = {"text": prompt, "sampling_params": sampling, "stream": stream, **fields}
    return Case(name, "/generate", body)


def catalogue(url: str, seeded: bool, lora: str | None = None) -> list[Case]:
    """Every feature of the continuity list. Stop strings and ids are taken from what the model really says."""
    probe = native("probe", stream=False, sampling={"max_new_tokens": 60}).run(url)
    text, ids = probe.texts[0], probe.token_ids[0]
    stop_text = text[len(text) // 2 : len(text) // 2 + 5]
    stop_id = next(token for token in reversed(ids[30:]) if token not in ids[:25])
    cases = []
    for stream in (True, False):
        how = "stream" if stream else "whole"

        def add(name: str, stream: bool = stream, how: str = how, **fields: Any) -> None:
            cases.append(native(f"{name}, {how}", stream, **fields))

        add("greedy")
        add("long prompt, chunked prefill", prompt=LONG_PROMPT)
        add("frequency penalty", sampling={"frequency_penalty": 0.7})
        add("presence penalty", sampling={"presence_penalty": 0.7})
        add("repetition penalty", sampling={"repetition_penalty": 1.3})
        add("min new tokens", sampling={"min_new_tokens": 40, "stop_token_ids": [stop_id], "ignore_eos": False})
        add("stop string", sampling={"stop": [stop_text]})
        add("stop token id", sampling={"stop_token_ids": [stop_id], "ignore_eos": False})
        add("log-probs", return_logprob=True)
        add("top log-probs", return_logprob=True, top_logprobs_num=3)
        add("prompt log-probs", return_logprob=True, logprob_start_len=0)
        add("regex", sampling={"regex": r"([a-z]{1,8} ){30}", "max_new_tokens": 90})
        add("json schema", sampling={"json_schema": json.dumps(_SCHEMA), "max_new_tokens": 120})
        add("ebnf", sampling={"ebnf": 'root ::= ("red" | "green" | "blue" | " ")+', "max_new_tokens": 60})
        add("n=2", sampling={"n": 2, "max_new_tokens": 40})
        add("batch", prompt=[PROMPT, "class Node:", "import os\n"], sampling={"max_new_tokens": 40})
        if seeded:
            add("seeded", sampling={"temperature": 0.8, "top_p": 0.9, "top_k": 40, "sampling_seed": 11})
            add("seeded min-p", sampling={"temperature": 1.0, "min_p": 0.02, "sampling_seed": 12})
        if lora is not None:
            add("LoRA", lora_path=lora)
        cases.append(_openai(f"completions, {how}", stream, "/v1/completions", prompt=PROMPT, logprobs=2))
        chat = [{"role": "user", "content": "Write a function that sorts a list."}]
        cases.append(_openai(f"chat, {how}", stream, "/v1/chat/completions", messages=chat))
        cases.append(
            _openai(
                f"chat with tool, {how}",
                stream,
                "/v1/chat/completions",
                messages=chat,
                tools=_TOOLS,
                tool_choice="required",
                max_tokens=160,
            )
        )
        greedy = {"temperature": 0, "num_predict": 48}
        # Not Ollama's chat: upstream's endpoint fails with this transformers, failover or not.
        cases.append(
            Case(
                f"Ollama generate, {how}",
                "/api/generate",
                {"model": "m", "prompt": PROMPT, "options": greedy, "stream": stream},
            )
        )
        cases.append(
            Case(
                f"Anthropic messages, {how}",
                "/v1/messages",
                {"model": "m", "messages": chat, "temperature": 0, "max_tokens": 48, "stream": stream},
            )
        )
    score = {"model": "m", "query": PROMPT, "items": [" a", " option", " x"], "label_token_ids": [20, 30, 40]}
    cases.append(Case("score", "/v1/score", score))
    return cases


def _openai(name: str, stream: bool, path: str, **fields: Any) -> Case:
    body = {"model": "default", "temperature": 0, "max_tokens": 64, "ignore_eos": True, "stream": stream, **fields}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return Case(name, path, body)


_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 6}, "minItems": 2, "maxItems": 3},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Look a word up.",
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "maxLength": 10},
                    "limit": {"type": "integer", "maximum": 99},
                },
                "required": ["word", "limit"],
                "additionalProperties": False,
            },
        },
    }
]
