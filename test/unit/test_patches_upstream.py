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
