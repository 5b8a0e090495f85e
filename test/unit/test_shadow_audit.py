"""An audit says of KV in the store whether it is what the model computes."""

from __future__ import annotations

import threading
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import frontend_fakes  # noqa: F401  (before sglang)
from sglang_kevlar.protocol.shadow import ShadowCounters
from sglang_kevlar.shadow import audit
from sglang_kevlar.shadow.audit import Auditor
from sglang_kevlar.shadow.lookup import PromoteReq
from sglang_kevlar.shadow.pool import PoolRows, pack

from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, UnquantizedKVCacheMethod  # isort: skip

BLOCK = 4
SLOTS = 64


class World:
    """A pool full of KV, a request whose tokens lie in its slots backwards, and a store that holds blocks of it."""

    def __init__(self, dtype: torch.dtype) -> None:
        pool = MHATokenToKVPool.__new__(MHATokenToKVPool)
        generator = torch.Generator().manual_seed(1)
        pool.k_buffer, pool.v_buffer = (
            [torch.randn(SLOTS, 2, 8, generator=generator).to(dtype) for _ in range(2)] for _ in range(2)
        )
        pool.kv_cache_layout, pool.size, pool.dtype = "nhd", SLOTS, dtype
        pool.quant_method = UnquantizedKVCacheMethod()
        self.rows = PoolRows(pool)
        self.counters = ShadowCounters()
        self.table = torch.arange(SLOTS - 1, -1, -1).view(1, SLOTS)
        self.auditor = Auditor(self.rows, BLOCK, self.table, self.counters)
        self.store: Any = self
        self.held = np.zeros((8, self.rows.token_bytes * BLOCK), dtype=np.uint8)
        pack(self.rows.read(self.table[0, : 8 * BLOCK]).wait(), 0, 8, BLOCK, self.held)

    def read(self, ticket: str, first: int, blocks: int) -> np.ndarray:
        """As a store: the ticket is for blocks 2 to 8."""
        return self.held[2 + first : 2 + first + blocks].copy()

    def expect(self, rid: str = "a") -> None:
        tokens = array("q", range(8 * BLOCK))
        promote = PromoteReq("t", tokens, None, None, 2, 6, [], ahead=False, audited=rid)
        self.auditor.expect(promote, self.store)

    def prefill(self, prefix: int, extend: int, rid: str = "a", decode: bool = False) -> None:
        req = SimpleNamespace(rid=rid, kv=SimpleNamespace(holds_kv=True, req_pool_idx=0))
        mode = SimpleNamespace(is_extend=lambda: not decode)
        batch: Any = SimpleNamespace(reqs=[req], prefix_lens=[prefix], extend_lens=[extend], forward_mode=mode)
        self.auditor.before_result(batch)
        for thread in threading.enumerate():
            if thread.name == "kevlar-audit":
                thread.join()

    @property
    def found(self) -> tuple[int, int]:
        return self.counters.audited_blocks, self.counters.wrong_blocks


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def world(request: pytest.FixtureRequest) -> World:
    return World(request.param)


def test_what_is_right_is_found_right_once_it_is_computed(world: World) -> None:
    world.expect()
    world.prefill(0, 20)
    world.prefill(20, 12, rid="another")
    world.prefill(20, 12, decode=True)
    assert world.found == (0, 0)
    world.prefill(20, 12)
    assert world.found == (6, 0)
    world.prefill(20, 12)
    assert world.found == (6, 0), "once"


@pytest.mark.parametrize("wrong", ["other tokens", "zeros", "not a number"])
def test_what_is_wrong_is_found_wrong(world: World, wrong: str) -> None:
    if wrong == "other tokens":
        world.held[3:5] = world.held[5:7].copy()
    elif wrong == "zeros":
        world.held[3:5] = 0
    else:
        world.held[3:5] = 255
    world.expect()
    world.prefill(0, 32)
    assert world.found == (6, 2)


def test_rounding_is_not_taken_for_an_error() -> None:
    world = World(torch.bfloat16)
    values = torch.from_numpy(world.held).view(torch.bfloat16)
    values *= 1 + 0.02 * torch.randn(values.shape, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    world.expect()
    world.prefill(0, 32)
    assert world.found == (6, 0)


def test_long_contexts_are_compared_from_their_end_and_lost_requests_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "AUDIT_BYTES", 2 * world.rows.token_bytes * BLOCK)
    world.held[:6] = 0
    world.expect()
    world.prefill(0, 32)
    assert world.found == (2, 0)
    assert world.auditor.choose(1.0) and not world.auditor.choose(1.0)
    monkeypatch.setattr(audit, "AUDIT_LIFE", -1.0)
    world.auditor._busy_until = 0.0
    assert world.auditor.choose(1.0) and world.auditor.choose(1.0)


def test_a_share_of_requests_one_at_a_time(world: World) -> None:
    assert not any(world.auditor.choose(0.0) for _ in range(100))
    chosen = 0
    for _ in range(100):
        if world.auditor.choose(0.5):
            chosen += 1
            assert not any(world.auditor.choose(1.0) for _ in range(5))
            world.expect()
            world.prefill(0, 32)
    assert 20 < chosen < 80 and world.found == (6 * chosen, 0)


def test_what_another_request_had_promoted_is_not_compared_with_itself(world: World) -> None:
    world.held[:5] = 0
    assert world.auditor.choose(1.0)
    world.expect()
    world.prefill(5 * BLOCK - 1, 4)  # of a first chunk: the prefix is what was cached
    world.prefill(5 * BLOCK + 3, 9)
    assert world.found == (3, 0)
    assert world.auditor.choose(1.0)
    world.expect()
    world.prefill(32, 1)
    assert world.found == (3, 0) and world.auditor.choose(1.0)


def test_without_memory_for_a_copy_nothing_is_compared_and_the_next_may_be(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert world.auditor.choose(1.0) and not world.auditor.choose(1.0)
    world.expect()
    with monkeypatch.context() as without:
        without.setattr(world.rows, "read", lambda _: None)
        world.prefill(0, 32)
    assert world.found == (0, 0) and world.auditor.choose(1.0)
    world.expect()
    world.prefill(0, 32)
    assert world.found == (6, 0)
