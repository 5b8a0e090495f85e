"""The heartbeat of a pipeline stage: what it does itself has a deadline, what it waits for has not."""

from __future__ import annotations

from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest
from beats import Beats

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")

from sglang.srt.managers.scheduler import Scheduler  # noqa: E402

from sglang_kevlar.worker.forced_decode import ForcedDecode  # noqa: E402
from sglang_kevlar.worker.scheduler import KevlarScheduler  # noqa: E402


def decode(requests: int) -> Any:
    return SimpleNamespace(forward_mode=SimpleNamespace(is_extend=lambda: False), reqs=[None] * requests)


@pytest.mark.parametrize(
    ("later", "seen"),
    [
        # With a microbatch in flight, what follows the wait for requests is work again.
        (True, ["wait", "wait", 3, "wait", 3, "wait", "idle", "wait"]),
        (False, [3, "idle"]),
    ],
)
def test_a_later_stage_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch, later: bool, seen: list[Any]) -> None:
    for name in ("process_input_requests", "_pp_recv_proxy_tensors", "run_batch", "on_idle"):
        monkeypatch.setattr(Scheduler, name, lambda self, *_: None)
    monkeypatch.setattr(Scheduler, "ingest_requests", lambda self: self.process_input_requests([]) or [])
    stage: Any = KevlarScheduler.__new__(KevlarScheduler)
    beats = Beats()
    monkeypatch.setattr(KevlarScheduler, "heartbeat", beats)
    stage._later_stage, stage._in_flight, stage.shadow, stage.weights = later, deque(maxlen=2), None, None
    stage._forced = ForcedDecode(SimpleNamespace(forward_batch_generation=None))

    stage.ingest_requests()
    stage._pp_recv_proxy_tensors()
    stage.run_batch(decode(3))
    stage.ingest_requests()
    stage._pp_recv_proxy_tensors()
    stage.on_idle()
    stage.ingest_requests()
    assert beats.seen == seen
