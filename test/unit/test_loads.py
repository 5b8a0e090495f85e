"""Reading a group's load never waits for the group."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from frontend_fakes import plan
from sglang_kevlar.frontend.loads import GroupLoadReader
from sglang_kevlar.protocol.launch import KevlarArgs, instance_id

# isort: split
from sglang.srt.managers.load_snapshot import LoadSnapshot, ShmLoadSnapshotWriter, shm_path_for

PLAN = plan(KevlarArgs())


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A scheduler's side of the file of group 0, epoch 1."""
    monkeypatch.setattr("sglang_kevlar.frontend.loads.instance_id", lambda *key: f"{os.getpid()}{instance_id(*key)}")
    path = shm_path_for(f"{os.getpid()}{instance_id(PLAN.launch_id, 0, 1)}")
    writer = ShmLoadSnapshotWriter(path, dp_size=1, dp_rank=0)
    yield writer
    writer.close()
    os.unlink(path)


def reader() -> tuple[GroupLoadReader, Any]:
    failover = SimpleNamespace(channels={0: SimpleNamespace(group=0, epoch=1)})
    return GroupLoadReader(PLAN, failover), failover  # type: ignore[arg-type]


def test_the_load_of_the_incarnation_that_serves(group: Any) -> None:
    loads, failover = reader()
    group.write(LoadSnapshot(num_waiting_reqs=3))
    assert loads.read(0).num_waiting_reqs == 3 and loads.read(1) is None
    assert [load.num_waiting_reqs for load in loads.read_all()] == [3]
    failover.channels[0].epoch = 2
    assert loads.read(0) is None and loads.read_all() == []


def test_a_scheduler_that_stopped_while_it_wrote_stops_nobody_else(group: Any) -> None:
    loads, _ = reader()
    fcntl.flock(group.fd, fcntl.LOCK_EX)
    assert loads.read(0) is None
    fcntl.flock(group.fd, fcntl.LOCK_UN)
    group.write(LoadSnapshot(num_waiting_reqs=3))
    assert loads.read(0).num_waiting_reqs == 3
    fcntl.flock(group.fd, fcntl.LOCK_EX)
    assert loads.read(0).num_waiting_reqs == 3
