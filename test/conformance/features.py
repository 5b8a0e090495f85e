"""What a request can carry, as requests whose answers can be compared: the list that the suite goes through."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import httpx
from client import ask

#: a fault has to hit a request while it generates: long enough for the fault command to be slow
TOKENS = 300
#: all prompts begin with it: a server that looks at prefixes then sends requests that run together to one place
PREFIX = "".join(f"import module_{i}\n\n\ndef value_{i}(self):\n    return module_{i}.call()\n\n\n" for i in range(6))
PROMPT = PREFIX + "def parse_arguments(self, argv, namespace=None):\n    for option in"
LONG_PROMPT = PREFIX + " ".join(
    f"import module_{i % 97} as m{i % 13}; value_{i % 31} = m{i % 13}.call({i % 7})" for i in range(90)
)
CHAT = [{"role": "user", "content": PREFIX + "Write a function that sorts a list."}]


@dataclass(frozen=True)
class Feature:
    name: str
    endpoint: str
    body: dict[str, Any]
    #: the answer under a fault has to equal the undisturbed one; otherwise nothing may be lost, doubled or taken back
    exact: bool = True

    @property
    def stream(self) -> bool:
        return bool(self.body.get("stream"))

    @property
    def id(self) -> str:
        return f"{self.endpoint} {'stream' if self.stream else 'whole'}: {self.name}"


@dataclass(frozen=True)
class Facts:
    """What has to be known of the model, learnt from one answer of it: what it will say of its own accord."""

    #: a piece of text that first appears late in the answer
    stop: str
    #: a long piece that begins soon: a server has to hold it back until it knows
    long_stop: str
    #: a token that first appears late, and one that appears soon
    late_id: int
    early_id: int
    eos_id: int
    lora: str | None
    model: str


def learn(url: str, hang: float, eos_id: int, lora: str | None) -> Facts:
    """Raises RuntimeError when the server does not serve ``/generate``, HTTPError when not ``/v1/models``."""
    model = httpx.get(f"{url}/v1/models", timeout=hang).raise_for_status().json()["data"][0]["id"]
    answer = ask(url, "/generate", _native("probe", stream=False).body, hang)
    if answer.error or answer.broken or not answer.choices:
        raise RuntimeError(f"no answer of {url}/generate to learn from: {answer.error or answer.broken}")
    text, ids = answer.choices[0].text, answer.choices[0].token_ids
    late = range(len(ids) * 6 // 10, len(ids))
    return Facts(
        stop=_first_seen(text, len(text) * 6 // 10, 6),
        long_stop=_first_seen(text, len(text) * 15 // 100, len(text) * 4 // 10),
        late_id=next((ids[i] for i in late if ids[i] not in ids[:i]), ids[-1]),
        early_id=ids[5],
        eos_id=eos_id,
        lora=lora,
        model=model,
    )


def _first_seen(text: str, start: int, length: int) -> str:
    """A piece that is nowhere in ``text`` before ``start``."""
    return next((p for i in range(start, len(text)) if text.find(p := text[i : i + length]) == i), text[-length:])


def _native(name: str, stream: bool = True, exact: bool = True, prompt: Any = PROMPT, **fields: Any) -> Feature:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True, **fields.pop("sampling", {})}
    body = {"text": prompt, "sampling_params": sampling, "stream": stream, **fields}
    return Feature(name, "/generate", body, exact)


def _openai(name: str, endpoint: str, stream: bool = True, **fields: Any) -> Feature:
    body = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "stream": stream, **fields}
    if stream:
        body["stream_options"] = {"include_usage": True}
    return Feature(name, endpoint, body)


def _completions(name: str, stream: bool = True, **fields: Any) -> Feature:
    return _openai(name, "/v1/completions", stream, **{"prompt": PROMPT, **fields})


def _chat(name: str, stream: bool = True, **fields: Any) -> Feature:
    # A grammar would otherwise apply only after the thinking of a model that thinks.
    return _openai(
        name,
        "/v1/chat/completions",
        stream,
        **{"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}, **fields},
    )


def features(facts: Facts) -> list[Feature]:
    """The list: streams first, then answers in one piece."""
    seeded = {"temperature": 0.8, "top_p": 0.9, "top_k": 40, "sampling_seed": 11}
    thought = r"<think>[a-z ]{600,600}</think>[a-z ]{500,500}"
    called = (
        r'<tool_call>\n\{"name": "lookup", "arguments": \{"words": \[("[a-z]{3,8}", ){40,40}"end"\]\}\}\n</tool_call>'
    )
    only_choice = {"tools": TOOLS, "tool_choice": "required"}
    schema = {"type": "json_schema", "json_schema": {"name": "list", "schema": SCHEMA}}
    listed = [
        _native("greedy"),
        _native("greedy, long prompt", prompt=LONG_PROMPT),
        _native("seeded: temperature, top-p, top-k", sampling=seeded),
        _native("seeded: min-p", sampling={"temperature": 1.0, "min_p": 0.02, "sampling_seed": 12}),
        _native("sampled without a seed", exact=False, sampling={"temperature": 1.0}),
        _native("frequency penalty", sampling={"frequency_penalty": 0.7}),
        _native("presence penalty", sampling={"presence_penalty": 0.7}),
        _native("repetition penalty", sampling={"repetition_penalty": 1.3}),
        _native("min new tokens", sampling={"min_new_tokens": 200, "stop_token_ids": [facts.early_id]}),
        _native("max tokens", sampling={"max_new_tokens": TOKENS - 37}),
        _native("logit bias, ignore_eos", sampling={"logit_bias": {str(facts.eos_id): 9.0}}),
        _native("stop string", sampling={"stop": [facts.stop]}),
        _native("stop string, half of it said at the fault", sampling={"stop": [facts.long_stop]}),
        _native("stop token id", sampling={"stop_token_ids": [facts.late_id]}),
        _native("output log-probs", return_logprob=True),
        _native("top log-probs", return_logprob=True, top_logprobs_num=3),
        _native("prompt log-probs", return_logprob=True, logprob_start_len=0, top_logprobs_num=2),
        _native("regex", sampling={"regex": r"([a-z]{1,8} ){200}"}),
        _native("JSON schema", sampling={"json_schema": json.dumps(SCHEMA)}),
        _native("EBNF", sampling={"ebnf": 'root ::= ("red" | "green" | "blue" | " ")+'}),
        _native("n = 2", sampling={"n": 2}),
        _native("batch of 3", prompt=[PROMPT, PREFIX + "class Node:", PREFIX + "import os\n"]),
        _completions("greedy, usage"),
        _completions("log-probs", logprobs=2),
        _completions("stop string", stop=[facts.stop]),
        _completions("n = 2", n=2),
        _completions("batch of 2", prompt=[PROMPT, PREFIX + "class Node:"]),
        _chat("greedy, usage"),
        _chat("log-probs", logprobs=True, top_logprobs=2),
        _chat("JSON schema", response_format=schema),
        _chat("n = 2", n=2),
        _chat("tool call, required", **only_choice),
        _chat("tool call, parsed from text", tools=TOOLS, regex=called),
        _chat("reasoning, parsed from text", regex=thought),
        Feature("greedy, usage", "/v1/messages", _MESSAGES | {"stream": True}),
        Feature("greedy, usage", "/v1/responses", _RESPONSES | {"stream": True}),
        Feature("greedy, usage", "/api/generate", _OLLAMA | {"stream": True}),
        _native("greedy", stream=False),
        _native("frequency penalty, prompt log-probs", False, sampling={"frequency_penalty": 0.7}, **_PROMPT_LOGPROBS),
        _native("seeded: temperature, top-p, top-k", stream=False, sampling=seeded),
        _native("JSON schema", stream=False, sampling={"json_schema": json.dumps(SCHEMA)}),
        _native("n = 2", stream=False, sampling={"n": 2}),
        _completions("greedy, usage", stream=False),
        _chat("tool call, required", stream=False, **only_choice),
        _chat("reasoning, parsed from text", stream=False, regex=thought),
        Feature("greedy, usage", "/v1/messages", _MESSAGES | {"stream": False}),
        Feature("greedy, usage", "/v1/responses", _RESPONSES | {"stream": False}),
        Feature("greedy, usage", "/api/generate", _OLLAMA | {"stream": False}),
    ]
    if facts.lora is not None:
        listed.insert(22, _native("LoRA adapter", lora_path=facts.lora))
    # One place for it: most of the list has nothing to do with the model's name.
    return [replace(f, body=f.body if f.endpoint == "/generate" else f.body | {"model": facts.model}) for f in listed]


def selected(listed: list[Feature], patterns: list[str]) -> list[Feature]:
    """Those of which ``id`` contains one of the patterns; all when there is none."""
    return [one for one in listed if not patterns or any(pattern in one.id for pattern in patterns)]


#: An array of fixed length: a model with random weights would otherwise fill it at will.
_WORDS = {"type": "array", "items": {"type": "string", "minLength": 3, "maxLength": 8}, "minItems": 25, "maxItems": 25}
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 999}, "words": _WORDS},
    "required": ["size", "words"],
    "additionalProperties": False,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Look words up.",
            "parameters": {
                "type": "object",
                "properties": {"words": _WORDS},
                "required": ["words"],
                "additionalProperties": False,
            },
        },
    }
]
_MESSAGES = {"messages": CHAT, "temperature": 0, "max_tokens": TOKENS}
_RESPONSES = {"input": "Sort a list.", "temperature": 0, "max_output_tokens": TOKENS}
_OLLAMA = {"prompt": PROMPT, "options": {"temperature": 0, "num_predict": TOKENS}}
_PROMPT_LOGPROBS = {"return_logprob": True, "logprob_start_len": 0}
