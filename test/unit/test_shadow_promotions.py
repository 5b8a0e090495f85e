"""What is promoted for which message of a step, before the step's messages are acted on."""

from __future__ import annotations

from array import array
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import frontend_fakes  # noqa: F401  (before sglang)
from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.protocol.shadow import ShadowCounters
from sglang_kevlar.shadow.promote import Lookups, PromoteReq
from sglang_kevlar.shadow.rank import RankShadow
from sglang_kevlar.shadow.store import ShadowStore
from sglang_kevlar.worker.resume import ShadowPlanReq

from frontend_fakes import AbortReq, tokenized  # isort: skip
from sglang.srt.managers.io_struct import FlushCacheReqInput  # isort: skip

BLOCK = 16
PROMPT = list(range(40))


class World:
    """The first rank of a group with one block of KV of ``PROMPT`` in its store, and nothing in its tree."""

    def __init__(self) -> None:
        self.counters = ShadowCounters()
        self.store = ShadowStore(8, 4)
        tree = SimpleNamespace(tree_core=SimpleNamespace(match_full_device_prefix=lambda key: (0, None, None)))
        self.rank = RankShadow.__new__(RankShadow)
        self.rank._lookups = Lookups(self.store, BLOCK, tree, [], self.counters)
        self.rank.exporter = SimpleNamespace(content="old")  # type: ignore[assignment]
        chain = KeyChain(root_key("old", None, None), BLOCK)
        chain.grow(array("q", PROMPT[:BLOCK]))
        assert not self.store.put(chain.keys, None, [0x2144DF1C], np.zeros((1, 4), np.uint8), None)

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


@pytest.mark.parametrize("forgetting", [ShadowPlanReq(rid="p", content=""), FlushCacheReqInput()])
def test_nothing_is_promoted_behind_what_makes_it_wrong(world: World, forgetting: Any) -> None:
    """A request that came with a weight update or a flush, in one step: the store still has what was before it."""
    kind = type(tokenized("a", PROMPT)).__name__
    got = world.step(tokenized("a", PROMPT), forgetting, tokenized("b", PROMPT))
    assert got == ["PromoteReq", kind, type(forgetting).__name__, kind]
