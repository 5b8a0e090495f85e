"""Two groups on one device: what `test/e2e/test_shadow.py` and `test_live_weights.py` do on CPUs, by the same code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_live_weights
import test_shadow
from on_devices import KERNELS, NO_ASSERTIONS, POOL
from server import Server
from test_shadow import request, tokens, wait_linked

#: With deterministic inference upstream cuts prompts at multiples of 4096 tokens: with smaller chunks it never begins
#: one that is longer than a chunk, and none behind it (sgl-project/sglang#36344).
FLAGS = [*KERNELS, *POOL, "--gpu-id-step", "0", "--chunked-prefill-size", "4096"]
FLAGS += ["--restart-backoff", "0.1", "--max-redirects", "50"]


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("devices") / "log"
    server = Server(models / "llama-f32", log, *FLAGS, env=dict([NO_ASSERTIONS]))
    server.tp_size = 1
    server.hidden_size = json.loads((models / "llama-f32" / "config.json").read_text())["hidden_size"]
    try:
        wait_linked(server)
        yield server
    finally:
        server.stop()


@pytest.mark.gpu(1)
@pytest.mark.timeout(600)
def test_little_is_recomputed_and_nothing_changes(server: Server) -> None:
    """What is copied from a device's pool beside the forward passes goes into another pool, and is what was there."""
    cases = [request(tokens(length, seed), 400) for length in (512, 2048, 8192) for seed in (length, length + 1)]
    test_shadow.check_little_is_recomputed(server, cases, rounds=2, generated=100, moved=4)


@pytest.mark.gpu(1)
@pytest.mark.timeout(600)
def test_weights_come_from_a_live_group(server: Server) -> None:
    wait_linked(server)
    test_live_weights.test_a_restarted_group_serves_what_only_live_processes_received(server)


@pytest.mark.gpu(1)
@pytest.mark.timeout(600)
def test_weights_go_from_group_to_group(server: Server, other_weights: Path) -> None:
    wait_linked(server)
    test_live_weights.roll(server, other_weights, "other")
    server.wait(lambda status: status["weights"]["state"] == "done", "the update", 90)
    assert [group["weight_version"] for group in server.status()["groups"]] == ["other", "other"]
