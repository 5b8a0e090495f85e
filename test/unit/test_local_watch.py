"""What a node without a gateway sees of its own ranks."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_kevlar.control.detection import Loss
from sglang_kevlar.launcher.process import identify
from sglang_kevlar.protocol.group import ProcessRef
from sglang_kevlar.protocol.launch import KevlarArgs, Paths
from sglang_kevlar.worker.heartbeat import HeartbeatWriter
from sglang_kevlar.worker.local_watch import LocalWatch

ARGS = KevlarArgs(hang_timeout=3.0, hang_per_ktoken=0.0, stop_grace=0.25)


class Rank:
    def __init__(self, directory: Path) -> None:
        paths = Paths(str(directory))
        self.process = subprocess.Popen(["sleep", "100"])
        self.page = HeartbeatWriter(paths.heartbeat(0, 1, "rank1"))
        identity = identify(self.process.pid)
        assert identity is not None
        self.watch = LocalWatch(ARGS, paths, 0, 1, [ProcessRef("rank1", *identity)])
        self.now = time.monotonic()

    def look(self, seconds: float) -> Loss | None:
        for _ in range(round(seconds / 0.1)):
            self.now += 0.1
            if (loss := self.watch.look(self.now)) is not None:
                return loss
        return None


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Rank]:
    rank = Rank(tmp_path)
    yield rank
    rank.watch.close()
    rank.process.kill()
    rank.process.wait()


def test_a_step_that_takes_too_long_is_a_hang_and_before_that_one_for_which_others_wait(rank: Rank) -> None:
    rank.page.forward(7)
    assert rank.look(0.5) is None and not rank.watch.busy
    assert rank.look(2.0) is None and rank.watch.busy
    loss = rank.look(1.0)
    assert loss is not None and loss.kind == "hang" and "rank1 in FORWARD" in loss.cause
    rank.page.idle()
    assert rank.look(0.1) is None and not rank.watch.busy


def test_a_stopped_rank(rank: Rank) -> None:
    rank.process.send_signal(signal.SIGSTOP)
    while Path(f"/proc/{rank.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
    loss = rank.look(0.6)
    assert loss is not None and loss.kind == "stopped"


def test_an_idle_rank_waits_for_the_first_one_which_is_not_here(rank: Rank) -> None:
    rank.page.idle()
    assert rank.look(1000) is None
