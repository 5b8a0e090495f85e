"""--max-queued-requests is for new requests: what some group accepted before is not turned away by another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")

from sglang.srt.managers.scheduler import Scheduler  # noqa: E402

from sglang_kevlar.control.journal import Journal  # noqa: E402
from sglang_kevlar.protocol.launch import KevlarArgs  # noqa: E402
from sglang_kevlar.worker.scheduler import KevlarScheduler  # noqa: E402


def test_only_new_requests_are_turned_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_abort_on_queued_limit", lambda self, req: True)  # the queue is full
    scheduler: Any = KevlarScheduler.__new__(KevlarScheduler)

    def turned_away(rid: str, retracted: bool = False) -> bool:
        return scheduler._abort_on_queued_limit(SimpleNamespace(rid=rid, retracted_stain=retracted))

    journal = Journal(KevlarArgs(), "inc")
    entry = journal.open("a+;", prompt_tokens=3, max_new_tokens=5)
    assert turned_away(journal.begin_attempt(entry, 0, 1).wire_rid)
    journal.fence(0, 1)
    assert not turned_away(journal.begin_attempt(entry, 1, 1).wire_rid)
    assert not turned_away("a stream that has begun", retracted=True)
