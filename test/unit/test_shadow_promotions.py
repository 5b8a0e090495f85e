"""What is promoted for which message of a step, before the step's messages are acted on."""

from __future__ import annotations

import threading
import time
import zlib
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import frontend_fakes  # noqa: F401  (before sglang)
from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.protocol.shadow import Held, ShadowCounters
from sglang_kevlar.shadow import lookup
from sglang_kevlar.shadow.lookup import AHEAD_LEAST, Lookups, PromoteReq
from sglang_kevlar.shadow.rank import RankShadow
from sglang_kevlar.shadow.sockets import dial, frame, listen
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
        self.rank._lookups = Lookups(
            self.store, BLOCK, BLOCK_BYTES, tree, lambda: [], dial, lambda: self.audit, self.counters
        )
        self.rank.exporter = SimpleNamespace(content="old")  # type: ignore[assignment]
        self.spare = 1000
        self.audit = False
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


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is worth being promoted ahead."""
    monkeypatch.setattr(lookup, "AHEAD_LEAST", 1)


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


def test_what_was_found_may_be_audited(world: World) -> None:
    world.audit = True
    promote = world.rank.with_promotions([tokenized("a", PROMPT)])[0]
    assert promote.audited == "a"


@pytest.mark.parametrize("forgetting", [ShadowPlanReq(rid="p", content=""), FlushCacheReqInput()])
def test_nothing_is_promoted_behind_what_makes_it_wrong(world: World, forgetting: Any) -> None:
    """A request that came with a weight update or a flush, in one step: the store still has what was before it."""
    kind = type(tokenized("a", PROMPT)).__name__
    got = world.step(tokenized("a", PROMPT), forgetting, tokenized("b", PROMPT))
    assert got == ["PromoteReq", kind, type(forgetting).__name__, kind]


LONG, SHORT = list(range(100, 164)), list(range(200, 232))


def test_what_runs_elsewhere_is_promoted_ahead_the_longest_first_and_once(world: World, least: None) -> None:
    world.put(SHORT, b"short")
    world.put(LONG, b"long")
    world.put(list(range(300, 348)))  # of a finished request
    assert world.ahead() == [(LONG, 0, 4), (SHORT, 0, 2)]
    assert (world.counters.lookups, world.counters.hits) == (0, 0)
    world.cached = {tuple(LONG): 64, tuple(SHORT): 32}
    assert world.ahead() == []
    grown = LONG + SHORT
    world.put(grown, b"long")
    world.cached[tuple(grown)] = 64
    assert world.ahead() == [(grown, 4, 2)]
    world.store.end(b"long")
    assert world.ahead() == []


def test_what_was_declined_or_evicted_is_not_offered_again_until_there_is_more(world: World, least: None) -> None:
    world.put(LONG, b"long")
    assert world.ahead() == [(LONG, 0, 4)]
    assert world.ahead() == [], "it was looked at, and is not in the tree"
    assert world.ahead() == []
    for turn, offered in enumerate((False, True, False, True)):
        grown = LONG + SHORT * (turn + 1)
        world.put(grown, b"long")
        assert world.ahead() == ([(grown, 0, 6 + 2 * turn)] if offered else [])
        assert world.ahead() == []


def test_a_few_tokens_are_not_worth_a_step_of_all_ranks(world: World) -> None:
    long = list(range(1000, 1000 + AHEAD_LEAST))
    world.put(long[:-BLOCK], b"long")
    assert world.ahead() == []
    world.put(long, b"long")
    assert world.ahead() == [(long, 0, AHEAD_LEAST // BLOCK)]


def test_only_so_much_is_promoted_ahead_as_there_is_room_and_time_for(world: World, least: None) -> None:
    world.put(SHORT, b"short")
    world.put(LONG, b"long")
    world.spare = 5 * BLOCK + 3
    assert world.ahead() == [(LONG, 0, 4), (SHORT[:BLOCK], 0, 1)]
    world.store.end(b"short")
    world.store.end(b"long")
    world.put(LONG, b"long again")
    world.rank._lookups._most_ahead = 2 * BLOCK
    assert world.ahead() == [(LONG[: 2 * BLOCK], 0, 2)]
    world.cached = {tuple(LONG): 2 * BLOCK}
    assert world.ahead() == [(LONG, 2, 2)]
    world.rank._ahead_at = time.monotonic() + 60
    world.put(SHORT, b"short again")
    assert world.rank.promotions_ahead() == []
    world.spare = BLOCK - 1
    assert world.ahead() == []


def test_nothing_of_other_weights_is_promoted_ahead(world: World, least: None) -> None:
    world.put(LONG, b"long", content="older")
    assert world.ahead() == []
    world.rank.exporter.content = ""
    world.put(SHORT, b"short")
    assert world.ahead() == []
    world.rank.exporter.content = "old"
    assert world.ahead() == [(SHORT, 0, 2)]


def test_work_for_ranks_that_have_nothing_or_say_nothing_is_bounded(
    world: World, least: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another rank has no store: no pass looks at more than one request, and soon at none."""
    monkeypatch.setattr(lookup, "LOOKUP_TIMEOUT", 0.05)
    lookups = world.rank._lookups
    lookups._sockets = [dial(f"ipc://{tmp_path}/nobody")]
    for number in range(3):
        start = 1000 * number
        world.put(list(range(start, start + 64)), b"%d" % number)
    assert [blocks for *_, blocks in world.ahead()] == [0]
    assert world.rank.with_promotions([tokenized("a", PROMPT)])[0].blocks == 0
    started = time.monotonic()
    for turn in range(3000):
        assert world.ahead() == []
        assert len(world.rank.with_promotions([tokenized(f"b{turn}", PROMPT)])) == 1
    assert time.monotonic() - started < 20, "nobody is waited for any more"
    for turn in range(1200):  # more than a socket takes in
        lookups._not_before = lookups._unanswered = 0
        lookups._ask_peers(str(turn), [b"k"])


def test_what_another_rank_answers_and_nobody_can_read_is_no_answer(
    world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(lookup, "LOOKUP_TIMEOUT", 0.2)
    peer = f"ipc://{tmp_path}/peer"
    world.rank._lookups._sockets = [dial(peer)]
    other = listen(peer)

    def answer_nonsense() -> None:
        name, _ = other.recv_multipart()
        other.send_multipart([name, b"nonsense"])
        other.send_multipart([name, frame(Held(ticket="a", blocks=4))[:-1]])

    answering = threading.Thread(target=answer_nonsense)
    answering.start()
    world.put(PROMPT[: 2 * BLOCK])
    try:
        assert world.rank.with_promotions([tokenized("a", PROMPT)])[0].blocks == 0
    finally:
        answering.join()
        other.close(linger=0)
