"""What is done with the anthropic package: each program returns all that its user can see of the answers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import anthropic

MESSAGES = [{"role": "user", "content": "Write a function that sorts a list."}]
ASKED = {"model": "tiny", "messages": MESSAGES, "max_tokens": 160, "system": "You write Python."}
#: not a parameter of this package any more
ASKED["extra_body"] = {"temperature": 0}
TOOL = {
    "name": "lookup",
    "input_schema": {
        "type": "object",
        "properties": {
            "words": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 4, "maxItems": 4}
        },
        "required": ["words"],
        "additionalProperties": False,
    },
}


@functools.cache  # to make one takes longer than a short answer
def client(url: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60)


def _seen(message: Any) -> Any:
    blocks = [block.model_dump(exclude={"id"}) for block in message.content]
    return blocks, message.stop_reason, message.usage.output_tokens


def messages(url: str) -> Any:
    return _seen(client(url).messages.create(**ASKED))


def messages_stream(url: str) -> Any:
    with client(url).messages.stream(**ASKED) as stream:
        text = "".join(stream.text_stream)
        message = stream.get_final_message()
    assert text == "".join(block.text for block in message.content if block.type == "text")
    return _seen(message)


def tools(url: str) -> Any:
    return _seen(client(url).messages.create(**{**ASKED, "max_tokens": 600}, tools=[TOOL], tool_choice={"type": "any"}))


PROGRAMS: dict[str, Callable[[str], Any]] = {
    program.__name__: program for program in (messages, messages_stream, tools)
}
