"""Our patches in the installed SGLang: in effect in every process of ours, and never silently missing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")

SHIM = "from sglang_kevlar.platform import torchvision_shim\ntorchvision_shim.install()\n"

#: the events that a client of Ollama's streams gets, of outputs that upstream's tokenizer manager could make
EVENTS = """
import asyncio, json
from types import SimpleNamespace
from sglang.srt.entrypoints.ollama.serving import OllamaServing

async def generate_request(*_):
    for text, reason in (("one", None), ("one two", {"type": "stop"})):
        yield {"text": text, "meta_info": {"finish_reason": reason}}

async def events(endpoint, content):
    serving = OllamaServing(SimpleNamespace(generate_request=generate_request))
    response = await getattr(serving, endpoint)(None, None, "model")
    return [content(json.loads(event)) async for event in response.body_iterator]

async def main():
    chat = await events("_stream_chat_response", lambda event: event["message"]["content"])
    generate = await events("_stream_generate_response", lambda event: event["response"])
    print(json.dumps([chat, generate]))
asyncio.run(main())
"""


def run(code: str) -> str:
    """Output of ``code`` in a process of its own: a module is patched at its first import or never."""
    env = os.environ | {"SGLANG_KEVLAR": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def test_the_last_event_of_an_ollama_stream_has_its_text() -> None:
    install = "from sglang_kevlar.upstream import patches\npatches.install()\n"
    assert json.loads(run(install + SHIM + EVENTS)) == [["one", " two"]] * 2


def test_a_process_that_sglang_starts_is_patched_by_its_plugin() -> None:
    plugins = "from sglang.srt.plugins import load_plugins\nload_plugins()\n"
    assert json.loads(run(SHIM + plugins + EVENTS)) == [["one", " two"]] * 2


#: what each parser has streamed at the end, of one call as its model writes it, that came in one piece
TOOL_CALLS = """
import json
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.function_call_parser import FunctionCallParser
from sglang.srt.function_call.json_array_parser import JsonArrayParser

parameters = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
tools = [Tool(type="function", function=Function(name=name, parameters=parameters)) for name in ("one", "two")]
arguments = json.dumps({"city": "Paris, France", "days": 3})

def joined(items):
    calls = {}
    for item in items:
        call = calls.setdefault(item.tool_index, ["", ""])
        call[0] += item.name or ""
        call[1] += item.parameters or ""
    return [[name, json.loads(text) if text else None] for name, text in calls.values()]

def streamed(pieces):
    parser = FunctionCallParser(tools=tools, tool_call_parser=name)
    calls = [call for piece in pieces for call in parser.parse_stream_chunk(piece)[1]]
    return joined(calls + parser.parse_stream_end()[1])

found = {}
for name in FunctionCallParser.ToolCallParserEnum:
    try:
        parser = FunctionCallParser(tools=tools, tool_call_parser=name)
        form = parser.detector.structure_info()("one")
        text = form.begin + arguments + form.end
        whole = joined(parser.parse_non_stream(text)[1])
    except Exception:
        continue  # it needs a server, or its form is not made of a beginning, JSON and an end
    if whole == [["one", json.loads(arguments)]]:
        found[name] = streamed([text])
text = "[" + ", ".join(f'{{"name": "{name}", "parameters": {arguments}}}' for name in ("one", "two")) + "]"
for pieces in ([text], list(text)):
    array = JsonArrayParser()
    calls = [call for piece in pieces for call in array.parse_streaming_increment(piece, tools).calls]
    calls += array.finish(tools).calls
    found[f"array in {len(pieces)}"] = joined(calls)
print(json.dumps(found))
"""


def test_a_tool_call_that_comes_in_one_step_keeps_its_arguments() -> None:
    install = "from sglang_kevlar.upstream import patches\npatches.install()\n"
    found = json.loads(run(install + SHIM + TOOL_CALLS))
    arguments = {"city": "Paris, France", "days": 3}
    arrays = [found.pop(name) for name in list(found) if name.startswith("array")]
    assert arrays == [[["one", arguments], ["two", arguments]]] * 2
    assert {"qwen25", "llama3", "mistral", "hermes", "deepseekv3"} <= found.keys() and len(found) > 12
    assert {name: calls for name, calls in found.items() if calls != [["one", arguments]]} == {}


NO_END = """
from sglang.srt.entrypoints.openai.protocol import Function, Tool
from sglang.srt.function_call.core_types import StreamingParseResult, ToolCallItem
from sglang.srt.function_call.function_call_parser import FunctionCallParser

tools = [Tool(type="function", function=Function(name="one"))]
parser = FunctionCallParser(tools=tools, tool_call_parser="qwen25")
again = StreamingParseResult(calls=[ToolCallItem(tool_index=0, name="one", parameters="")])
parser.detector.parse_streaming_increment = lambda *_: again
try:
    parser.parse_stream_end()
except ValueError as error:
    print(error)
"""


def test_a_parser_that_always_has_more_to_say_is_an_error() -> None:
    install = "from sglang_kevlar.upstream import patches\npatches.install()\n"
    assert run(install + SHIM + NO_END) == "the parser of tool calls comes to no end"


VERIFY = """
from sglang_kevlar.upstream import plugin
try:
    plugin.verify_applied()
except plugin.UpstreamMismatch as error:
    print("refused:", error)
"""


def test_a_patch_that_came_too_late_is_named() -> None:
    late = "import sglang.srt.entrypoints.ollama.serving\nfrom sglang.srt.plugins import load_plugins\nload_plugins()\n"
    said = run(SHIM + late + VERIFY)
    assert said.startswith("refused:") and "0001-ollama-last-text.patch (sglang.srt.entrypoints.ollama.serving)" in said


def test_a_start_without_the_patches_is_refused() -> None:
    """As `frontend.main.load_upstream` would be with `install` left out, and the plug-in restricted to others."""
    forgotten = "from sglang_kevlar.upstream import patches\npatches.install = lambda: None\n"
    forgotten += "from sglang.srt.plugins import load_plugins\nload_plugins()\n"
    assert "0001-ollama-last-text.patch" in run(SHIM + forgotten + VERIFY)
