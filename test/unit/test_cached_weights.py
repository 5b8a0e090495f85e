"""Weights of a weight cache daemon: a rank ends with the daemon, and nobody writes to them."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

from fastapi import HTTPException  # noqa: E402
from sglang.srt.managers import io_struct  # noqa: E402

from sglang_kevlar.frontend import cached_weights  # noqa: E402
from sglang_kevlar.protocol.launch import EXIT_WEIGHTS_GONE  # noqa: E402
from sglang_kevlar.worker import weight_cache  # noqa: E402
from sglang_kevlar.worker.weights import rank as rank_module  # noqa: E402
from sglang_kevlar.worker.weights.messages import FetchWeightsReq  # noqa: E402

SHIM = "from sglang_kevlar.platform import torchvision_shim\ntorchvision_shim.install()\n"

DAEMON = """
import socket, sys
from sglang.srt.weight_cache.protocol import recv_msg, send_msg
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
while True:
    line, _ = listener.accept()
    with line:
        recv_msg(line)
        send_msg(line, {"status": "ok"})
"""

#: a rank that has mapped the weights of a daemon
RANK = """
import sys, time
from sglang_kevlar.worker import weight_cache
weight_cache._end_with(sys.argv[1], int(sys.argv[2]))
print("mapped", flush=True)
time.sleep(60)
"""


@contextmanager
def process(code: str, *arguments: str) -> Iterator[Any]:
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


@contextmanager
def daemon_at(path: Path) -> Iterator[Any]:
    """One that answers, and has no weights."""
    with process(SHIM + DAEMON, str(path)) as started:
        while not path.exists():
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.05)
        yield started


def test_a_rank_ends_with_its_daemon_at_once(tmp_path: Path) -> None:
    with (
        daemon_at(tmp_path / "socket") as daemon,
        process(SHIM + RANK, str(tmp_path / "socket"), str(daemon.pid)) as rank,
    ):
        assert rank.stdout.readline() == "mapped\n"
        assert rank.poll() is None
        daemon.kill()
        # Upstream would look after up to five seconds, and not see one that nobody has waited for.
        assert rank.wait(4) == EXIT_WEIGHTS_GONE
        assert f"daemon (pid {daemon.pid}) died" in rank.stderr.read()


def test_a_log_that_is_held_up_does_not_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    held_up = threading.Event()
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(weight_cache.logger, "critical", lambda why: held_up.wait())
    with subprocess.Popen(["true"]) as gone:
        watched = os.pidfd_open(gone.pid)
        weight_cache._watch(watched, gone.pid)
        os.close(watched)
    held_up.set()
    assert ended == [EXIT_WEIGHTS_GONE]


def test_weights_of_a_daemon_that_cannot_be_watched_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with pytest.raises(RuntimeError, match="does not answer"):
        weight_cache._end_with(str(path), 7)
    with daemon_at(path) as daemon, pytest.raises(RuntimeError, match=f"process 7, and from here it is {daemon.pid}"):
        weight_cache._end_with(str(path), 7)  # as it would be in a PID namespace of its own


class Loader:
    """Upstream's, with a daemon or without."""

    def __init__(self, path: Path) -> None:
        self.socket_path = str(path)
        self.asked = 0

    def _fetch_from_cache(self, model_config: Any, device_config: Any) -> Any:
        self.asked += 1
        return {"entries": {}} if Path(self.socket_path).exists() else None

    def _start_daemon_liveness_watchdog(self, daemon: int) -> None:
        raise AssertionError("upstream's watchdog looks every five seconds")


def test_who_had_a_daemon_waits_for_it_to_be_there_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A daemon that is started again removes its socket, loads, and only then listens."""
    path, mapped_once = tmp_path / "socket", tmp_path / "mapped"
    monkeypatch.setattr(weight_cache, "IpcModelLoader", Loader)
    for name in ("_fetch_from_cache", "_start_daemon_liveness_watchdog"):
        monkeypatch.setattr(Loader, name, getattr(Loader, name))  # to be as before, in the end
    monkeypatch.setattr(weight_cache, "_end_with", lambda path, daemon: None)
    weight_cache.prepare(mapped_once)
    loader = Loader(path)
    device: Any = SimpleNamespace(gpu_id=0)
    assert loader._fetch_from_cache(None, device) is None  # never had one: from disk, as upstream
    loader._start_daemon_liveness_watchdog(7)
    assert mapped_once.exists()
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(loader._fetch_from_cache(None, device)))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and loader.asked == 1
    with daemon_at(path):
        waiting.join(30)
    assert found == [{"entries": {}}]
    assert caplog.text.count("Waiting for the weight cache daemon") == 1


WRITERS = [
    io_struct.UpdateWeightFromDiskReqInput(model_path="other"),
    io_struct.UpdateWeightsFromIPCReqInput(zmq_handles={}),
    io_struct.UpdateWeightsFromDistributedReqInput(names=[], dtypes=[], shapes=[]),
    io_struct.UpdateWeightsFromTensorReqInput(serialized_named_tensors=[]),
    io_struct.BeginWeightUpdateReqInput(),
    io_struct.EndWeightUpdateReqInput(),
    io_struct.CheckWeightsReqInput(action="reset_tensors"),
    io_struct.ReleaseMemoryOccupationReqInput(),
    io_struct.ResumeMemoryOccupationReqInput(tags=["weights"]),
]
READERS = [
    io_struct.CheckWeightsReqInput(action="checksum"),
    io_struct.ReleaseMemoryOccupationReqInput(tags=["kv_cache"]),
    io_struct.FlushCacheReqInput(),
    io_struct.PauseGenerationReqInput(),
]


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    model = SimpleNamespace(weight_cache_mode="client")
    for module in (cached_weights, rank_module):
        monkeypatch.setattr(module, "get_model", lambda: model)
    return model


@pytest.mark.parametrize("request_", WRITERS, ids=lambda request: type(request).__name__)
def test_what_writes_to_a_daemons_weights_is_refused(request_: Any, mode: SimpleNamespace) -> None:
    with pytest.raises(HTTPException, match="weight cache daemons") as refused:
        cached_weights.refuse_writing(request_)
    assert refused.value.status_code == 400
    mode.weight_cache_mode = "off"
    cached_weights.refuse_writing(request_)


@pytest.mark.parametrize("request_", READERS, ids=lambda request: type(request).__name__)
@pytest.mark.usefixtures("mode")
def test_what_leaves_them_as_they_are_is_not(request_: Any) -> None:
    cached_weights.refuse_writing(request_)


def test_weights_of_another_group_are_not_written_into_a_daemons(
    mode: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan: Any = SimpleNamespace(tp_size=1, pp_size=1, kevlar=SimpleNamespace(cluster_key_file=None))
    scheduler: Any = SimpleNamespace(weight_updater=None, flush_cache=lambda: True)
    paths: Any = None
    rank = rank_module.RankWeights(scheduler, plan, paths, group=0, epoch=1, rank=0)
    stated: list[Any] = []
    monkeypatch.setattr(rank, "_state", stated.append)
    rank.fetch(FetchWeightsReq(ticket="t", endpoints=["ipc:///nowhere"], timeout=1.0))
    assert "weight cache daemon" in stated[0].reason
    assert not stated[0].busy  # it is no better later
