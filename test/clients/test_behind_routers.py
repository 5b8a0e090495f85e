"""A server of ours as a worker of sglang-router and of smg: they find what they ask for, and do not notice a kill.

python3 -m venv VENV && VENV/bin/pip install sglang-router==0.3.2 smg==1.13.0
KEVLAR_ROUTERS=VENV ./scripts/test test/clients/test_behind_routers.py -m slow
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai_programs
import pytest
from kills import Watched, same_through_a_kill
from server import Server, free_port

VENV = os.environ.get("KEVLAR_ROUTERS")
#: not by their commands: `smg` is one of both packages
MODULES = {"sglang-router": "sglang_router.cli", "smg": "smg.cli"}
PROGRAMS = ("chat", "chat_stream", "completions", "many_at_once")

pytestmark = [pytest.mark.slow, pytest.mark.skipif(VENV is None, reason="KEVLAR_ROUTERS names no environment")]


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--served-model-name", "tiny", "--restart-backoff", "0.1", "--restart-backoff-max", "0.5")
    # Without any parser SGLang leaves out log-probabilities of streaming chat, more or less by time (docs/clients.md).
    flags += ("--tool-call-parser", "qwen25")
    server = Server(models / "llama-f32", tmp_path_factory.mktemp("worker") / "log", *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module", params=list(MODULES))
def router(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [f"{VENV}/bin/python", "-m", MODULES[request.param], "launch", "--host", "127.0.0.1"]
    # Without retries of its own: a request that is sent again would hide that it was lost.
    command += ["--port", str(port), "--prometheus-port", str(free_port()), "--disable-retries"]
    command += ["--worker-urls", server.url]
    log = tmp_path_factory.mktemp("router") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--policy", "cache_aware"], stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 60
        while not _serves(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def _serves(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url + "/health", timeout=5).status_code == 200 and bool(_workers(url))
    return False


def _workers(url: str) -> list[dict]:
    return [worker for worker in httpx.get(url + "/workers", timeout=5).json()["workers"] if worker["is_healthy"]]


def test_a_worker_has_what_routers_ask_for(server: Server) -> None:
    answers = {path: server.get(path, timeout=30) for path in ("/health", "/health_generate")}
    assert {path: answer.status_code for path, answer in answers.items()} == dict.fromkeys(answers, 200)
    info = server.get("/get_server_info").json()
    assert info["served_model_name"] == "tiny" and info["tp_size"] == 1
    model = server.get("/get_model_info").json()
    assert model["model_path"] == server.get("/model_info").json()["model_path"] == info["model_path"]
    assert [entry["id"] for entry in server.get("/v1/models").json()["data"]] == ["tiny"]
    loads = server.get("/v1/loads").json()["loads"]
    assert len(loads) == server.groups and all("num_running_reqs" in load for load in loads)


@pytest.mark.parametrize("name", PROGRAMS)
def test_clients_of_the_router_do_not_notice_a_kill(server: Server, router: str, name: str) -> None:
    same_through_a_kill(
        Watched.at(server.url), lambda: openai_programs.PROGRAMS[name](router), zlib.crc32(name.encode())
    )


def test_a_router_keeps_its_worker_through_kills_and_finds_its_cache(server: Server, router: str) -> None:
    watched = Watched.at(server.url)
    prompt = "import os\n" * 60
    body = {"text": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}}

    def ask() -> tuple[list[int], str]:
        with httpx.stream("POST", router + "/generate", json={**body, "stream": True}, timeout=60) as response:
            events = [line for line in response.iter_lines() if line]
        assert events[-1] == "data: [DONE]"
        return len(events), httpx.post(router + "/generate", json=body, timeout=60).json()["output_ids"]

    def tokens() -> list[int]:
        return ask()[1]

    for attempt in range(3):
        same_through_a_kill(watched, tokens, attempt)
        assert len(_workers(router)) == 1
    cached = httpx.post(router + "/generate", json=body, timeout=60).json()["meta_info"]["cached_tokens"]
    assert cached > 100
