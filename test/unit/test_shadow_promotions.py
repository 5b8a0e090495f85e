"""What is promoted for which message of a step, before the step's messages are acted on."""

from __future__ import annotations

import time
import zlib
from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import frontend_fakes  # noqa: F401  (before sglang)
from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.protocol.shadow import ShadowCounters
from sglang_kevlar.shadow.lookup import Lookups, PromoteReq
from sglang_kevlar.shadow.rank import RankShadow
from sglang_kevlar.shadow.store import ShadowStore
from sglang_kevlar.worker.resume import ShadowPlanReq

from frontend_fakes import AbortReq, tokenized  # isort: skip
from sglang.srt.managers.io_struct import FlushCacheReqInput  # isort: skip

BLOCK = 16
BLOCK_BYTES = 4
PROMPT = list(range(40))


class World:
    """The first rank of a group with one block of KV of ``PROMPT`` in its store, and nothing in its tree."""

    def __init__(self) -> None:
        self.counters = ShadowCounters()
        self.store = ShadowStore(16, BLOCK_BYTES)
        #: by tokens: how many of them the tree has
        self.cached: dict[tuple[int, ...], int] = {}
        core = SimpleNamespace(match_full_device_prefix=lambda key: (self.cached.get(tuple(key.token_ids), 0), 0, 0))
        tree = SimpleNamespace(tree_core=core)
        self.rank = RankShadow.__new__(RankShadow)
        self.rank._store = self.store
        self.rank._ahead_at = 0.0
        self.rank._lookups = Lookups(self.store, BLOCK, BLOCK_BYTES, tree, [], 0.0, self.counters)
        self.rank.exporter = SimpleNamespace(content="old")  # type: ignore[assignment]
        self.spare = 1000
        self.rank.promoter = SimpleNamespace(spare_tokens=lambda: self.spare)  # type: ignore[assignment]
        self.put(PROMPT[:BLOCK])

    def put(self, tokens: list[int], request: bytes | None = None, content: str = "old") -> list[bytes]:
        chain = KeyChain(root_key(content, None, None), BLOCK)
        chain.grow(array("q", tokens))
        data = np.zeros((len(chain.keys), BLOCK_BYTES), np.uint8)
        crcs = [zlib.crc32(block.data) for block in data]
        words = array("q", tokens).tobytes()
        assert not self.store.put(chain.keys, None, crcs, words, (None, None), data, request)
        return chain.keys

    def ahead(self) -> list[tuple[list[int], int, int]]:
        """Tokens, first block and blocks of each promotion."""
        self.rank._ahead_at = 0.0
        found = self.rank.promotions_ahead()
        assert all(promote.ahead for promote in found)
        for promote in found:
            self.store.release(promote.ticket)
        return [(list(promote.tokens), promote.first, promote.blocks) for promote in found]

    def step(self, *messages: Any) -> list[str]:
        return [type(message).__name__ for message in self.rank.with_promotions(list(messages))]


@pytest.fixture
def world() -> World:
    return World()


def test_a_prefix_in_the_store_is_promoted_right_before_its_request(world: World) -> None:
    request = tokenized("a", PROMPT)
    assert world.step(AbortReq(rid="x"), request) == ["AbortReq", "PromoteReq", type(request).__name__]
    assert (world.counters.lookups, world.counters.hits) == (1, 1)
    assert world.step(tokenized("b", PROMPT[::-1])) == [type(request).__name__]
    assert (world.counters.lookups, world.counters.hits) == (2, 1)


def test_what_was_promoted_covers_whole_blocks_and_leaves_the_last_token(world: World) -> None:
    promote = world.rank.with_promotions([tokenized("a", PROMPT[:BLOCK])])[0]
    assert not isinstance(promote, PromoteReq)  # of 16 tokens the last has to be computed, so there is no whole block
    promote = world.rank.with_promotions([tokenized("a", PROMPT)])[0]
    assert isinstance(promote, PromoteReq) and (promote.first, promote.blocks, len(promote.tokens)) == (0, 1, BLOCK)


def test_a_plan_with_another_target_only_does_not_keep_moved_requests_from_their_kv(world: World) -> None:
    """It comes with them, when the group that they were on was also the target."""
    kind = type(tokenized("a", PROMPT)).__name__
    got = world.step(ShadowPlanReq(rid="p", content="old", target=None), tokenized("a", PROMPT))
    assert got == ["ShadowPlanReq", "PromoteReq", kind]


def test_a_share_of_requests_is_audited(world: World) -> None:
    world.rank._lookups._audit = 0.5
    promotions = [world.rank.with_promotions([tokenized(str(turn), PROMPT)])[0] for turn in range(60)]
    audited = [promote.audited for promote in promotions]
    assert any(audited) and not all(audited)
    assert all(rid in (None, str(turn)) for turn, rid in enumerate(audited))


@pytest.mark.parametrize("forgetting", [ShadowPlanReq(rid="p", content=""), FlushCacheReqInput()])
def test_nothing_is_promoted_behind_what_makes_it_wrong(world: World, forgetting: Any) -> None:
    """A request that came with a weight update or a flush, in one step: the store still has what was before it."""
    kind = type(tokenized("a", PROMPT)).__name__
    got = world.step(tokenized("a", PROMPT), forgetting, tokenized("b", PROMPT))
    assert got == ["PromoteReq", kind, type(forgetting).__name__, kind]


LONG, SHORT = list(range(100, 164)), list(range(200, 232))


def test_what_runs_elsewhere_is_promoted_ahead_the_longest_first_and_once(world: World) -> None:
    world.put(SHORT, b"short")
    world.put(LONG, b"long")
    world.put(list(range(300, 348)))  # of a finished request
    assert world.ahead() == [(LONG, 0, 4), (SHORT, 0, 2)]
    assert (world.counters.lookups, world.counters.hits) == (0, 0)
    world.cached = {tuple(LONG): 64, tuple(SHORT): 20}
    assert world.ahead() == [(SHORT, 1, 1)]
    world.cached[tuple(SHORT)] = 32
    assert world.ahead() == []
    world.cached.clear()  # evicted: not a reason to begin again
    assert world.ahead() == []
    world.put(LONG + SHORT, b"long")
    assert world.ahead() == [(LONG + SHORT, 0, 6)]
    world.store.end(b"long")
    assert world.ahead() == []


def test_only_so_much_is_promoted_ahead_as_there_is_room_and_time_for(world: World) -> None:
    world.put(SHORT, b"short")
    world.put(LONG, b"long")
    world.spare = 5 * BLOCK + 3
    assert world.ahead() == [(LONG, 0, 4), (SHORT[:BLOCK], 0, 1)]
    world.rank._lookups._most_ahead = 2 * BLOCK
    assert world.ahead() == [(LONG[: 2 * BLOCK], 0, 2)]
    world.cached = {tuple(LONG): 2 * BLOCK}
    assert world.ahead() == [(LONG, 2, 2)]
    world.spare = BLOCK - 1
    assert world.ahead() == []
    world.rank._ahead_at = time.monotonic() + 60
    world.spare = 1000
    assert world.rank.promotions_ahead() == []


def test_nothing_of_other_weights_is_promoted_ahead(world: World) -> None:
    world.put(LONG, b"long", content="older")
    assert world.ahead() == []
    world.rank.exporter.content = ""
    world.put(SHORT, b"short")
    assert world.ahead() == []
    world.rank.exporter.content = "old"
    assert world.ahead() == [(SHORT, 0, 2)]
