"""A joined group of several ranks, the only one of its server: requests wait for it when it is lost, and go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from cases import native
from joined import Cluster
from server import Server

CASES = [
    native(f"count {count}", prompt=f"for i in range({count}):", sampling={"max_new_tokens": 300}) for count in range(3)
]


def run_all(server: Server) -> list[Any]:
    with ThreadPoolExecutor(len(CASES)) as pool:
        answers = list(pool.map(lambda case: case.run(server.url), CASES))
    assert all(answer.status == 200 and not answer.error and answer.done for answer in answers), answers
    return [(answer.token_ids, answer.texts, answer.finish) for answer in answers]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_group_of_two_ranks_joins_and_comes_back(models, tmp_path) -> None:
    cluster = Cluster(tmp_path)
    server = Server(models / "llama-f32", tmp_path / "log", *cluster.listen, "--tp-size", "2", groups=0)
    group = cluster.join("two")
    try:
        group.wait_ready(server)
        server.wait_ready(1)
        assert len(group.group(server)["pids"]["ranks"]) == 2
        answers = run_all(server)

        def hit() -> None:
            server.wait(lambda s: any(g["running"] for g in s["groups"]), "running requests", 30)
            time.sleep(0.3)
            os.kill(group.group(server)["pids"]["ranks"][1], signal.SIGKILL)

        thread = threading.Thread(target=hit)
        thread.start()
        assert run_all(server) == answers
        thread.join()
        assert server.status()["failovers"][-1]["cause"].startswith("rank1")
    finally:
        group.stop()
        server.stop()
