"""Weights of a weight cache daemon: a rank ends with the daemon, and nobody writes to them."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

from fastapi import HTTPException  # noqa: E402
from sglang.srt.managers import io_struct  # noqa: E402

from sglang_kevlar.frontend import cached_weights  # noqa: E402
from sglang_kevlar.worker import weight_cache  # noqa: E402
from sglang_kevlar.worker.weights import rank as rank_module  # noqa: E402
from sglang_kevlar.worker.weights.messages import FetchWeightsReq  # noqa: E402

#: a rank that maps the weights of the daemon whose pid it is given
RANK = """
import sys, time
from sglang_kevlar.platform import torchvision_shim
torchvision_shim.install()
from sglang.srt.weight_cache.ipc_loader import IpcModelLoader
from sglang_kevlar.worker import weight_cache
weight_cache.prepare()
IpcModelLoader.__new__(IpcModelLoader)._start_daemon_liveness_watchdog(int(sys.argv[1]))
print("mapped", flush=True)
time.sleep(60)
"""


def test_a_rank_ends_with_its_daemon_at_once() -> None:
    with subprocess.Popen(["sleep", "60"]) as daemon:
        command = [sys.executable, "-c", RANK, str(daemon.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as rank:
            try:
                assert rank.stdout is not None and rank.stdout.readline() == "mapped\n"
                assert rank.poll() is None
                daemon.kill()
                # Upstream would look after up to five seconds, and not see one that nobody has waited for.
                assert rank.wait(4) == -signal.SIGKILL
                assert rank.stderr is not None and f"daemon (pid {daemon.pid}) died" in rank.stderr.read()
            finally:
                for process in (rank, daemon):
                    process.kill()


def test_weights_of_a_daemon_that_cannot_be_watched_are_not_taken() -> None:
    loader: Any = None
    gone = subprocess.Popen(["true"])
    gone.wait()
    with pytest.raises(RuntimeError, match=f"pid {gone.pid}.*cannot be watched"):
        weight_cache._end_with(loader, gone.pid)
    with pytest.raises(RuntimeError, match="did not say which process"):
        weight_cache._end_with(loader, None)


WRITERS = [
    io_struct.UpdateWeightFromDiskReqInput(model_path="other"),
    io_struct.UpdateWeightsFromIPCReqInput(zmq_handles={}),
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
