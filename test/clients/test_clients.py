"""Clients as they are, through the death of the group that works for them: what they see is what they would have seen.

Each program is run undisturbed and again through a SIGKILL of a rank at a random moment; docs/clients.md lists them.

    ./scripts/test test/clients/test_clients.py -m "slow or not slow"
"""

from __future__ import annotations

import json
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic_programs
import language_programs
import openai_programs
import pytest
from kills import Watched, same_through_a_kill
from server import Server

FLAGS = ("--served-model-name", "tiny", "--tool-call-parser", "qwen25", "--restart-backoff", "0.1")
FLAGS += ("--restart-backoff-max", "0.5")
#: a model with random weights would otherwise pad its JSON with white space for ever
FLAGS += ("--constrained-json-disable-any-whitespace",)


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(models / "llama-f32", tmp_path_factory.mktemp("clients") / "log", *FLAGS)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def watched(server: Server) -> Watched:
    return Watched.at(server.url)


def seed(name: str) -> int:
    return zlib.crc32(name.encode())


#: of each client those that differ most are in the short run
LONGER = {"completions", "tools", "json_schema", "responses", "choices"}


def names(programs: dict[str, Any]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in LONGER else []) for name in programs]


@pytest.mark.parametrize("name", names(openai_programs.PROGRAMS))
def test_openai(server: Server, watched: Watched, name: str) -> None:
    same_through_a_kill(watched, lambda: openai_programs.PROGRAMS[name](server.url), seed(name))


@pytest.mark.parametrize("name", names(anthropic_programs.PROGRAMS))
def test_anthropic(server: Server, watched: Watched, name: str) -> None:
    same_through_a_kill(watched, lambda: anthropic_programs.PROGRAMS[name](server.url), seed(name))


@pytest.mark.parametrize("name", names(language_programs.PROGRAMS))
def test_the_frontend_language(server: Server, watched: Watched, name: str) -> None:
    language_programs.sgl.set_default_backend(language_programs.sgl.RuntimeEndpoint(server.url))
    try:
        same_through_a_kill(watched, language_programs.PROGRAMS[name], seed(name))
    finally:
        language_programs.sgl.set_default_backend(None)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("stream", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["stream", "whole"])
def test_curl(server: Server, watched: Watched, stream: bool) -> None:
    body = {"text": "def main():", "stream": stream}
    body["sampling_params"] = {"temperature": 0, "max_new_tokens": 300, "ignore_eos": True}

    def curl() -> Any:
        command = ["curl", "-sSN", "--fail", "--max-time", "60", "-H", "Content-Type: application/json"]
        command += ["-d", json.dumps(body), server.url + "/generate"]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if stream:
            *events, last = [line.removeprefix("data: ") for line in said.splitlines() if line]
            assert last == "[DONE]"
            counts = [len(json.loads(event)["output_ids"]) for event in events]
            assert counts == sorted(set(counts)) and counts[-1] == 300, events[-1][-600:]
            said = events[-1]
        answer = json.loads(said)
        return answer["text"], answer["output_ids"], answer["meta_info"]["finish_reason"]

    same_through_a_kill(watched, curl, seed(f"curl {stream}"))
