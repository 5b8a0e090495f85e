"""Whether the shadow holds what the model computes: for a sample of promotions the KV is computed anyway and compared.

The request that is audited is prefilled as if nothing had been found for it, so its answer is right in any case.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from sglang_kevlar.protocol.shadow import ShadowCounters
from sglang_kevlar.shadow.lookup import PromoteReq
from sglang_kevlar.shadow.pool import PoolRows, Staged, pack
from sglang_kevlar.shadow.shelf import SharedStore
from sglang_kevlar.shadow.store import ShadowStore

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import ScheduleBatch

logger = logging.getLogger(__name__)

#: bytes compared for one request, from the end of what was found
AUDIT_BYTES = 16 << 20
#: seconds after which a request that was to be audited is not waited for any more
AUDIT_LIFE = 600.0
#: how far a block may be from what was computed now, in shares of its norm. Prefill and decode round differently, also
#: from batch to batch; KV of other tokens or weights is at a distance of about 1.
FAR_FLOAT32, FAR = 0.001, 0.2


@dataclass
class _Expected:
    rid: str
    #: tokens from ``begin`` to ``end``, whose KV the store says is ``blocks``: uint8 (blocks, block bytes)
    begin: int
    end: int
    blocks: np.ndarray
    seen: bool = False


class Auditor:
    """Of one rank; one request at a time. What another comes for meanwhile is promoted as usual."""

    def __init__(self, rows: PoolRows, block: int, req_to_token: torch.Tensor, counters: ShadowCounters) -> None:
        """``block``: tokens of one. ``req_to_token``: slots by (row of the request, position)."""
        self._rows = rows
        self._block = block
        self._req_to_token = req_to_token
        self._counters = counters
        self._expected: _Expected | None = None
        #: seconds, monotonic: until then no other is chosen
        self._busy_until = 0.0

    def choose(self, share: float) -> bool:
        """First rank only, which decides for all: whether the next request is to be audited."""
        now = time.monotonic()
        if now < self._busy_until or random.random() >= share:
            return False
        self._busy_until = now + AUDIT_LIFE
        return True

    def expect(self, promote: PromoteReq, store: ShadowStore | SharedStore) -> None:
        assert promote.audited is not None
        count = min(promote.blocks, max(1, AUDIT_BYTES // (self._rows.token_bytes * self._block)))
        end = len(promote.tokens)
        self._expected = _Expected(
            rid=promote.audited,
            begin=end - count * self._block,
            end=end,
            blocks=store.read(promote.ticket, promote.blocks - count, count),
        )

    def before_result(self, batch: ScheduleBatch) -> None:
        """A forward pass is done, and its requests still have their slots."""
        expected = self._expected
        if expected is None or not batch.forward_mode.is_extend():
            return
        for req, prefix, extend in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True):
            if req.rid != expected.rid or not req.kv.holds_kv:
                continue
            if not expected.seen:
                expected.seen = True
                # What it found cached was promoted for another, and would be compared with itself.
                skip = max(0, -(-(prefix - expected.begin) // self._block))
                expected.begin += skip * self._block
                expected.blocks = expected.blocks[skip:]
            if expected.begin >= expected.end:
                self._end()
            elif prefix + extend >= expected.end:
                self._expected = None
                slots = self._req_to_token[req.kv.req_pool_idx, expected.begin : expected.end]
                if (computed := self._rows.read(slots)) is None:
                    self._end()
                    return
                # Waiting for the copy and comparing take longer than the loop has time for.
                arguments = (expected, computed)
                threading.Thread(target=self._compare, args=arguments, name="kevlar-audit", daemon=True).start()
            return

    def _end(self) -> None:
        self._expected = None
        self._busy_until = 0.0

    def _compare(self, expected: _Expected, staged: Staged) -> None:
        computed = np.empty_like(expected.blocks)
        pack(staged.wait(), 0, len(computed), self._block, computed)
        far = FAR_FLOAT32 if self._rows.dtype == "float32" else FAR
        distances = np.array(
            [self._rows.distance(held, now) for held, now in zip(expected.blocks, computed, strict=True)]
        )
        wrong = np.flatnonzero(~(distances <= far))
        self._counters.audited_blocks += len(computed)
        self._counters.wrong_blocks += len(wrong)
        self._busy_until = 0.0
        if len(wrong):
            first = expected.begin + int(wrong[0]) * self._block
            logger.error(
                "audit of the shadow: the KV held for request %s is not what the model computes: %d of %d blocks, the "
                "first at token %d, off by %.3g of its norm. The request was computed and is not affected.",
                *(expected.rid, len(wrong), len(computed), first, distances[wrong[0]]),
            )
        else:
            logger.info(
                "audit of the shadow: %d blocks of request %s are right, at most %.2g of their norm off",
                *(len(computed), expected.rid, distances.max()),
            )
