"""`python -m sglang.bench_serving` against a server whose groups are killed all the time: it does not notice.

./scripts/test test/clients/test_bench_serving.py -m slow -s
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kills import Kills, Watched
from server import Server

PROMPTS, TOKENS = 150, 64
#: `python -m sglang.bench_serving` in the installation without CUDA: torch and torchvision do not fit each other, and
#: `datasets` is missing, which it imports and needs for data sets that we do not ask for
START = """
import importlib.util, runpy, sys, types
from sglang_kevlar.platform import torchvision_shim
torchvision_shim.install()
if importlib.util.find_spec("datasets") is None:
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None
runpy.run_module("sglang.bench_serving", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--served-model-name", "tiny", "--restart-backoff", "0.1", "--restart-backoff-max", "0.5")
    log = tmp_path_factory.mktemp("bench") / "log"
    server = Server(models / "llama-f32", log, *flags, "--poison-deaths", "5")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def bench(server: Server, models: Path, file: Path, backend: str) -> dict[str, Any]:
    command = [sys.executable, "-c", START, "--backend", backend, "--base-url", server.url, "--seed", "3"]
    command += ["--model", str(models / "llama-f32"), "--served-model-name", "tiny", "--dataset-name", "random-ids"]
    command += ["--num-prompts", str(PROMPTS), "--random-input-len", "100", "--random-output-len", str(TOKENS)]
    command += ["--random-range-ratio", "1.0", "--request-rate", "12", "--max-concurrency", "16"]
    command += ["--output-file", str(file), "--output-details", "--disable-tqdm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(file.read_text().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("backend", ["sglang", "sglang-oai"])
def test_every_request_is_whole(server: Server, models: Path, tmp_path: Path, backend: str) -> None:
    undisturbed = bench(server, models, tmp_path / "undisturbed", backend)
    watched = Watched.at(server.url)
    watched.wait_whole()
    before = watched.redirected()
    with Kills(watched, 1.0, seed=4) as kills:
        killed = bench(server, models, tmp_path / "killed", backend)
    watched.wait_whole()
    moved = watched.redirected() - before
    print(f"{backend}: {killed['completed']} of {PROMPTS}, {kills.count} kills, {moved} requests moved")
    assert kills.count > 2 and moved
    for result in (undisturbed, killed):
        assert result["completed"] == PROMPTS and not any(result["errors"])
        assert result["output_lens"] == [TOKENS] * PROMPTS
    assert killed["generated_texts"] == undisturbed["generated_texts"]
