"""The fault injector against a real server: every kind of fault bites, and no client notices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Server
from test_shadow import wait_linked

SCENARIO = """
description: one fault of each kind that is quick
duration: 20
load:
  clients: 4
  prompts: 6
  prompt_tokens: [20, 200, 600]
  output_tokens: [20, 120]
  stream: 0.8
  leave: 0.1
faults:
  - {at: 0.5, do: slow, group: random, seconds: 3}
  - {at: 1, do: frames, group: 0, count: 3}
  - {at: 1, do: frames, group: 1, count: 3}
  - {at: 5, do: kill, group: busiest, wait_ready: true}
  - {at: 6, do: error, group: busiest, wait_ready: true}
checks:
  answers: exact
  refused: 0
  ready_within: 120
  redirects_marked: true
  stale_shm: 0
  failovers_at_least: 2
"""


@pytest.fixture
def server(models: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(models / "llama-f32", tmp_path / "log", "--allow-chaos", "--chunked-prefill-size", "512")
    try:
        wait_linked(server)
        yield server
    finally:
        server.stop()


def run_chaos(server: Server, scenario: str, out: Path, *arguments: str, timeout: float) -> dict[str, Any]:
    """The verdict; fails, with what was said, when it is not that all held."""
    command = [sys.executable, "-m", "sglang_kevlar.chaos", scenario, "--url", server.url, "--out", str(out)]
    ended = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=timeout)
    said = "\n".join([*ended.stdout.splitlines()[-60:], ended.stderr])
    assert ended.returncode == 0, f"{said}\n{server.log_end()}"
    return json.loads((out / "verdict.json").read_text())


@pytest.mark.timeout(600)
def test_every_fault_bites_and_no_client_notices(server: Server, tmp_path: Path) -> None:
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(SCENARIO)
    verdict = run_chaos(server, str(scenario), tmp_path / "out", timeout=300)
    assert verdict["faults"] == {"error rank": 1, "frames rank": 2, "kill rank": 1, "slow rank": 1}
    assert verdict["groups_lost"] == 2 and verdict["faults_missed"] == 0
    assert verdict["moved"] > 0 and verdict["requests"]["complete"] > 10
    events = [json.loads(line) for line in (tmp_path / "out" / "timeline.jsonl").read_text().splitlines()]
    assert sum(verdict["shadow"]["frames_harmed"].values()) > 0
    assert verdict["shadow"]["rejected_frames"] + verdict["shadow"]["resyncs"] > 0
    causes = " ".join(event["cause"] for event in events if event["event"] == "failover")
    assert "SIGKILL" in causes or "exited" in causes, causes
    assert "CHAOS: ordered" in server.log.read_text(errors="replace")
