"""No stranger is signalled, whatever a status says."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from chaos_world import FakeServer

from sglang_kevlar.chaos.processes import NotHere, Processes, send
from sglang_kevlar.launcher.process import ProcessId, identify, record


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with FakeServer(tmp_path) as server:
        yield server


def test_the_servers_own_are_found(server: FakeServer) -> None:
    processes = Processes(server.pid("g0.supervisor"))
    rank = processes.find("g1.rank0", server.pid("g1.rank0"))
    assert send(rank, signal.SIGKILL)
    assert server._children["g1.rank0"].wait(10) == -signal.SIGKILL
    assert not send(rank, signal.SIGKILL)
    with pytest.raises(NotHere, match="has ended"):
        processes.find("g1.rank0", rank.pid)


def test_a_pid_that_is_no_supervisor_here() -> None:
    with pytest.raises(NotHere, match="server's own host"):
        Processes(os.getpid())
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(NotHere, match="server's own host"):
        Processes(gone.pid)


def test_a_pid_that_is_not_on_record(server: FakeServer) -> None:
    processes = Processes(server.pid("g0.supervisor"))
    with pytest.raises(NotHere, match="the status says"):
        processes.find("g0.rank0", os.getpid())
    with pytest.raises(NotHere, match="not on record"):
        processes.find("g0.rank7", os.getpid())


def test_a_pid_that_was_given_to_another(server: FakeServer) -> None:
    processes = Processes(server.pid("g0.supervisor"))
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        now = identify(bystander.pid)
        assert now is not None
        before = ProcessId(now.pid, now.start_ticks - 1)
        record(server.paths.processes, "g0.rank0", before)
        with pytest.raises(NotHere, match="another's"):
            processes.find("g0.rank0", bystander.pid)
        assert not send(before, signal.SIGKILL)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
