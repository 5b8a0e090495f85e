"""Hours in small: constant churn and faults of all kinds, and afterwards nothing has grown and nothing is left.

KEVLAR_SOAK_MINUTES=30 ./scripts/test test/e2e/test_soak.py -m slow
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from server import Server
from test_chaos import run_chaos
from test_shadow import CHECKS, flush, wait_linked

MINUTES = float(os.environ.get("KEVLAR_SOAK_MINUTES", "30"))


def shared_memory(launch: str) -> set[str]:
    return {name for name in os.listdir("/dev/shm") if launch in name}


@pytest.mark.slow
@pytest.mark.timeout(MINUTES * 60 + 900)
def test_nothing_grows_and_nothing_is_left(models: Path, tmp_path: Path) -> None:
    flags = ("--chunked-prefill-size", "512", "--max-total-tokens", "30000", "--max-running-requests", "4")
    server = Server(models / "llama-f32", tmp_path / "log", *flags, "--allow-chaos", env=CHECKS)
    try:
        wait_linked(server)
        launch = server.launch_id()
        length = ("--minutes", str(MINUTES), "--seed", "1")
        verdict = run_chaos(server, "mixed", tmp_path / "out", *length, timeout=MINUTES * 60 + 700)
        assert verdict["requests"]["complete"] > 10 * verdict["kills"]
        # Idle now: upstream's own check of pool, tree and locks runs then, and ends the rank that fails it.
        wait_linked(server)
        epochs = [group["epoch"] for group in server.status()["groups"]]
        flush(server)
        time.sleep(5)
        assert [group["epoch"] for group in server.status()["groups"]] == epochs
        # Windows lose their names once both sides have them.
        assert not {name for name in shared_memory(launch) if ".window" in name}
    finally:
        server.stop()
    assert not shared_memory(launch)
    assert not server.descendants()
