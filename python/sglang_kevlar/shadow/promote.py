"""Putting shadowed KV into the device pool, as a cached prefix."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache

from sglang_kevlar.protocol.shadow import ShadowCounters
from sglang_kevlar.shadow.audit import Auditor
from sglang_kevlar.shadow.lookup import PromoteReq
from sglang_kevlar.shadow.pool import PoolRows
from sglang_kevlar.shadow.shelf import SharedStore
from sglang_kevlar.shadow.store import ShadowStore
from sglang_kevlar.upstream.differences import matched_slots

#: bytes written to the pool in one go
WRITE_BYTES = 16 << 20
#: share of an active group's pool that stays free for its own requests when KV is promoted ahead
RESERVE = 0.5


class Promoter:
    """Every rank's part: the same for all of them, in the same step."""

    def __init__(
        self,
        store: ShadowStore | SharedStore,
        stage: int,
        rows: PoolRows,
        block: int,
        req_to_token: torch.Tensor,
        tree: Any,
        allocator: Any,
        standby: bool,
        counters: ShadowCounters,
    ) -> None:
        """``store``: of this rank, or the one it shares with others of its pipeline ``stage``.

        ``standby``: the group serves only after another was lost; what it has cached may go for promotions ahead.
        """
        self.auditor = Auditor(rows, block, req_to_token, counters)
        self._store = store
        self._stage = stage
        self._rows = rows
        self._block = block
        self._tree = tree
        self._allocator = allocator
        self._standby = standby
        self._counters = counters

    def spare_tokens(self) -> int:
        """How many tokens may be promoted ahead."""
        available = int(self._allocator.available_size())
        if self._standby:
            return available + int(self._tree.evictable_size())
        return max(0, available - int(self._rows.capacity_tokens * RESERVE))

    def apply(self, promote: PromoteReq) -> None:
        try:
            if promote.blocks:
                if isinstance(self._store, SharedStore):
                    shelf = promote.shelves[self._stage]
                    assert shelf is not None
                    self._store.expect(promote.ticket, shelf)
                if promote.audited is None:
                    self._promote(promote)
                else:
                    self.auditor.expect(promote, self._store)
        finally:
            self._store.release(promote.ticket)

    def _promote(self, promote: PromoteReq) -> None:
        match = self._tree.match_prefix(MatchPrefixParams(key=promote.key))
        matched = matched_slots(self._tree, match)
        have = len(matched)
        wanted = len(promote.tokens) - have
        # Room for an earlier promotion of this step may have cost what was there before ``first``. A prefix that a
        # host tier has is loaded by that.
        if wanted < self._block or have < promote.first * self._block or match.host_hit_length:
            return
        # Upstream's idle check counts slots: from here to the insertion nothing may come between.
        lock = self._tree.inc_lock_ref(match.last_device_node)
        try:
            evict_from_tree_cache(self._tree, wanted)
            slots = self._allocator.alloc(wanted)
            if slots is None:
                return  # the group's own requests need the room
            self._write(promote, have, slots)
            value = torch.cat([matched.to(slots.dtype), slots])
            self._tree.insert(InsertParams(key=promote.key, value=value, prev_prefix_len=have))
            self._counters.promoted_tokens += wanted
            self._counters.promoted_ahead_tokens += wanted if promote.ahead else 0
        finally:
            self._tree.dec_lock_ref(match.last_device_node, lock.to_dec_params())

    def _write(self, promote: PromoteReq, have: int, slots: torch.Tensor) -> None:
        begin = have // self._block - promote.first
        skip = have % self._block
        step = max(1, WRITE_BYTES // (self._rows.token_bytes * self._block))
        at = 0
        for start in range(begin, promote.blocks, step):
            blocks = min(step, promote.blocks - start)
            count = blocks * self._block - skip
            self._rows.write(slots[at : at + count], self._store.read(promote.ticket, start, blocks), skip)
            at += count
            skip = 0
        assert at == len(slots)
