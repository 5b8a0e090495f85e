"""The channel of a joined group: in order, bounded, and silent once it is fenced."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from frontend_fakes import AbortReq, str_batch, tokenized
from sglang_kevlar.cluster import wire
from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.frontend import session_channel
from sglang_kevlar.frontend.channels import CannotSend
from sglang_kevlar.frontend.session_channel import SessionChannel

# isort: split
from sglang.srt.managers.io_struct import FlushCacheReqInput, GetInternalStateReq, UpdateWeightsFromIPCReqInput


def channel(sent: list[bytes] | None = None, **fields: Any) -> SessionChannel:
    send = (lambda payload: None) if sent is None else sent.append
    return SessionChannel(2, 1, 100, Place("a", local=False), send, lambda: None, **fields)


def test_what_arrived_is_taken_in_order_and_nothing_after_the_fence() -> None:
    async def main() -> None:
        sent: list[bytes] = []
        c = channel(sent)
        waiting = asyncio.ensure_future(c.arrival())
        await asyncio.sleep(0)
        assert not waiting.done()
        outputs = [str_batch((str(i), [i], "", None)) for i in range(3)]
        assert all(c.put(output) for output in outputs)
        await waiting
        assert c.take() is outputs[0] and c.drain() == outputs[1:]
        c.send(tokenized("r", [1]))
        assert [wire.decode_request(payload).rid for payload in sent] == ["r"]
        last = asyncio.ensure_future(c.arrival())
        await asyncio.sleep(0)
        c.close()
        await asyncio.wait_for(last, 1)
        assert not c.put(outputs[0]) and c.drain() == [] and not await c.connected()
        c.send(tokenized("s", [1]))
        assert len(sent) == 1

    asyncio.run(main())


def test_outputs_that_nobody_takes_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(session_channel, "MAX_WAITING", 2)

    async def main() -> None:
        c = channel()
        assert [c.put(AbortReq(rid=str(i))) for i in range(3)] == [True, True, False]

    asyncio.run(main())


def test_what_it_cannot_be_asked_for_is_said_by_name() -> None:
    async def main() -> None:
        primary = channel(is_primary=lambda: True)
        assert primary.refusal(FlushCacheReqInput()) is None
        assert "UpdateWeightsFromIPCReqInput" in (primary.refusal(UpdateWeightsFromIPCReqInput(zmq_handles={})) or "")
        for c in (channel(), channel(is_primary=lambda: True, may_change=False)):
            assert "FlushCacheReqInput only from the first" in (c.refusal(FlushCacheReqInput()) or "")
            assert c.refusal(GetInternalStateReq()) is None
        with pytest.raises(CannotSend, match="UpdateWeightsFromIPCReqInput"):
            primary.send(UpdateWeightsFromIPCReqInput(zmq_handles={}))

    asyncio.run(main())
