"""What is done with the openai package: each program returns all that its user can see of the answers."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
from collections.abc import Callable
from typing import Annotated, Any

import httpx
import openai
import pydantic

MODEL = "tiny"
CHAT = [{"role": "user", "content": "Write a function that sorts a list."}]
PROMPT = "def parse_arguments(self, argv, namespace=None):\n    for option in"
#: ends at the length, which a model with random weights does not choose by itself
WHOLE = {"temperature": 0, "max_tokens": 160, "extra_body": {"ignore_eos": True}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lookup",
            "parameters": {
                "type": "object",
                "properties": {
                    "words": {
                        "type": "array",
                        "items": {"type": "string", "maxLength": 10},
                        "minItems": 4,
                        "maxItems": 4,
                    },
                    "limit": {"type": "integer", "maximum": 99},
                },
                "required": ["words", "limit"],
                "additionalProperties": False,
            },
        },
    }
]


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=12)
    streets: list[str] = pydantic.Field(min_length=6, max_length=6)
    size: int = pydantic.Field(ge=0, le=999)


# The strings of a list have no bound of their own in pydantic's schema.
_SCHEMA = City.model_json_schema()
_SCHEMA["properties"]["streets"]["items"]["maxLength"] = 8
_SCHEMA["additionalProperties"] = False


class Lookup(pydantic.BaseModel):
    words: list[Annotated[str, pydantic.Field(max_length=10)]] = pydantic.Field(min_length=16, max_length=16)
    limit: int = pydantic.Field(ge=0, le=99)


#: tokens of each tiny model (scripts/make_models.py), and what is one of them: the end of an answer, and of a call
VOCABULARY, END, END_OF_CALL = 2048, "<|im_end|>", "</tool_call>"
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "city", "schema": _SCHEMA, "strict": True}}


@functools.cache  # to make one takes longer than a short answer
def client(url: str) -> openai.OpenAI:
    # No retries: a request that is sent again would hide that it was lost.
    return openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60)


def _usage(usage: Any) -> list[int] | None:
    return usage and [usage.prompt_tokens, usage.completion_tokens]


def chat(url: str) -> Any:
    answer = client(url).chat.completions.create(
        model=MODEL, messages=CHAT, n=2, logprobs=True, top_logprobs=2, **WHOLE
    )
    return [(c.message.content, c.finish_reason, _tokens(c.logprobs)) for c in answer.choices], _usage(answer.usage)


def chat_stream(url: str) -> Any:
    texts, finish, tokens, usage = [], None, [], None
    stream = client(url).chat.completions.create(
        model=MODEL, messages=CHAT, stream=True, logprobs=True, stream_options={"include_usage": True}, **WHOLE
    )
    for event in stream:
        usage = _usage(event.usage) or usage
        for choice in event.choices:
            texts.append(choice.delta.content or "")
            finish = choice.finish_reason or finish
            tokens += _tokens(choice.logprobs)
    # Of a server without any parser they are not all given (docs/clients.md).
    assert len(tokens) == usage[1]
    return "".join(texts), finish, tokens, usage


def _tokens(logprobs: Any) -> list[tuple[str, float]]:
    return [] if logprobs is None else [(entry.token, entry.logprob) for entry in logprobs.content]


def completions(url: str) -> Any:
    answer = client(url).completions.create(model=MODEL, prompt=[PROMPT, "import os"], logprobs=1, echo=True, **WHOLE)
    return [(c.text, c.finish_reason, c.logprobs.tokens) for c in answer.choices], _usage(answer.usage)


def completions_stream(url: str) -> Any:
    texts: dict[int, str] = {}
    finish: dict[int, str] = {}
    for event in client(url).completions.create(model=MODEL, prompt=PROMPT, n=2, stream=True, **WHOLE):
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            finish[choice.index] = choice.finish_reason or finish.get(choice.index)
    return texts, finish


def tools(url: str) -> Any:
    answer = client(url).chat.completions.create(
        model=MODEL,
        messages=CHAT,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=600,
    )
    calls = [(call.function.name, call.function.arguments) for call in answer.choices[0].message.tool_calls]
    # As they were written: a model with random weights makes numbers that are infinite once they are read.
    assert calls and all(json.loads(arguments) for _, arguments in calls)
    return calls, answer.choices[0].finish_reason, _usage(answer.usage)


def tools_stream(url: str) -> Any:
    """The streaming helper, which takes only strict tools, and refuses an answer that does not end by itself."""
    said, done, ids = [], [], []
    with client(url).chat.completions.stream(
        model=MODEL,
        messages=CHAT,
        tools=[openai.pydantic_function_tool(Lookup)],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_tokens=600,
        logit_bias=_ends_calls(url),
        stream_options={"include_usage": True},
    ) as stream:
        for event in stream:
            if event.type == "chunk":
                ids += [call.id for c in event.chunk.choices for call in c.delta.tool_calls or [] if call.id]
            elif event.type == "tool_calls.function.arguments.delta":
                said.append(((event.type, event.index, event.name), event.arguments_delta))
                assert event.arguments == "".join(text for (kind, *_), text in said if kind == event.type)
            elif event.type == "content.delta":
                said.append(((event.type,), event.delta))
            else:
                done.append(event.model_dump())
        answer = stream.get_final_completion()
    # How many tokens are in one event is a matter of time, also without a kill. Each of them is in one, in order.
    said = [(of, "".join(text for _, text in each)) for of, each in itertools.groupby(said, key=lambda one: one[0])]
    (choice,) = answer.choices
    (call,) = choice.message.tool_calls
    assert ids == [call.id] and choice.finish_reason == "tool_calls"
    assert call.function.parsed_arguments == Lookup.model_validate_json(call.function.arguments)
    return said, done, call.function.arguments, choice.message.content, _usage(answer.usage)


@functools.cache
def _ends_calls(url: str) -> dict[str, int]:
    """What brings a model with random weights to the end of a call that it has to make, and that call into form.

    The grammar allows white space without end between the parts of the JSON, control characters and halves of
    surrogates in its strings, which no parser takes, an end tag of which the last token has more than its end, and
    any text behind that.
    """
    body = {"model": MODEL, "tokens": [[token] for token in range(VOCABULARY)], "skip_special_tokens": False}
    texts = httpx.post(url + "/detokenize", json=body, timeout=60).json()["text"]
    bad = [token for token, text in enumerate(texts) if not text.isprintable() or not text.strip() or "\\" in text]
    return {**{str(token): -100 for token in bad}, str(texts.index(END)): 100, str(texts.index(END_OF_CALL)): 50}


def json_schema(url: str) -> Any:
    answer = client(url).chat.completions.create(
        model=MODEL, messages=CHAT, response_format=JSON_SCHEMA, temperature=0, max_tokens=600
    )
    return City.model_validate_json(answer.choices[0].message.content).model_dump(), _usage(answer.usage)


def json_schema_stream(url: str) -> Any:
    stream = client(url).chat.completions.create(
        model=MODEL, messages=CHAT, response_format=JSON_SCHEMA, temperature=0, max_tokens=600, stream=True
    )
    text = "".join(choice.delta.content or "" for event in stream for choice in event.choices)
    return City.model_validate_json(text).model_dump()


def responses(url: str) -> Any:
    answer = client(url).responses.create(model=MODEL, input=PROMPT, temperature=0, max_output_tokens=160)
    return answer.output_text, answer.status, [answer.usage.input_tokens, answer.usage.output_tokens]


def responses_stream(url: str) -> Any:
    texts, last = [], None
    for event in client(url).responses.create(
        model=MODEL, input=PROMPT, temperature=0, max_output_tokens=160, stream=True
    ):
        if event.type == "response.output_text.delta":
            texts.append(event.delta)
        last = event
    assert last is not None and last.response.output_text == "".join(texts)
    return "".join(texts), last.type


def many_at_once(url: str) -> Any:
    async def one(asked: openai.AsyncOpenAI, number: int) -> str:
        messages = [{"role": "user", "content": f"Sort {number} lists."}]
        if number % 2:
            answer = await asked.chat.completions.create(model=MODEL, messages=messages, **WHOLE)
            return answer.choices[0].message.content
        stream = await asked.chat.completions.create(model=MODEL, messages=messages, stream=True, **WHOLE)
        return "".join([choice.delta.content or "" async for event in stream for choice in event.choices])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as asked:
            return await asyncio.gather(*(one(asked, number) for number in range(8)))

    return asyncio.run(all_of_them())


PROGRAMS: dict[str, Callable[[str], Any]] = {
    program.__name__: program
    for program in (
        chat,
        chat_stream,
        completions,
        completions_stream,
        tools,
        tools_stream,
        json_schema,
        json_schema_stream,
        responses,
        responses_stream,
        many_at_once,
    )
}
