"""Putting shadowed KV into the device pool, as a cached prefix of a request that is about to be queued.

The first rank looks a request's prefix up in its own store. If it is there, it asks the other ranks' stores, which pin
what they hold, and sends what all of them have along with the request, in the same broadcast: so every rank puts the
same blocks into its tree in the same step, and the request then finds them as it finds any cached prefix.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import zmq
from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput, TokenizedGenerateReqInput
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.common import evict_from_tree_cache
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.protocol.shadow import Held, Lookup, ShadowCounters
from sglang_kevlar.shadow.pool import PoolRows
from sglang_kevlar.shadow.store import ShadowStore
from sglang_kevlar.worker.resume import ResumedGenerateReqInput

logger = logging.getLogger(__name__)

#: seconds for which a request waits for the other ranks' stores; then it is computed
LOOKUP_TIMEOUT = 0.5
#: bytes written to the pool in one go
WRITE_BYTES = 64 << 20


@dataclass(frozen=True)
class PromoteReq:
    """In the requests' broadcast, before the request it is for: put these blocks into the tree."""

    ticket: str
    #: up to the end of the last block
    tokens: array[int]
    extra_key: str | None
    cache_salt: str | None
    #: the ticket is for ``blocks`` blocks from block ``first`` on; the tree had what is before
    first: int
    blocks: int

    @property
    def key(self) -> RadixKey:
        return RadixKey(self.tokens, self.extra_key, cache_salt=self.cache_salt)


class Lookups:
    """The first rank's search for what can be promoted."""

    def __init__(
        self, store: ShadowStore, block: int, tree: Any, peers: Sequence[str], counters: ShadowCounters
    ) -> None:
        """``peers``: endpoints of the other ranks' stores."""
        self._store = store
        self._counters = counters
        self._tree = tree
        self._block = block
        self._peers = peers
        self._sockets: list[zmq.Socket[bytes]] = []
        self._tickets = itertools.count()

    def find(self, message: Any, content: str) -> PromoteReq | None:
        """What to promote for a request that has just arrived; None for most."""
        if not len(self._store) or not content or isinstance(message, TokenizedEmbeddingReqInput):
            return None
        if not isinstance(message, TokenizedGenerateReqInput) or message.input_ids is None:
            return None
        if message.input_embeds is not None or message.positional_embed_overrides is not None:
            return None
        tokens = array("q", message.input_ids)
        if isinstance(message, ResumedGenerateReqInput) and message.resume is not None:
            tokens.extend(message.resume.output_ids)
        extra_key = message.extra_key
        if message.lora_id is not None:
            extra_key = (extra_key or "") + message.lora_id  # as Req does
        # Changes nothing in the tree: only this rank asks. The last token is computed in any case, for its logits.
        usable = (len(tokens) - 1) // self._block
        cached, _, _ = self._tree.tree_core.match_full_device_prefix(
            RadixKey(tokens, extra_key, cache_salt=message.cache_salt)
        )
        first = cached // self._block
        if first >= usable:
            return None
        self._counters.lookups += 1
        chain = KeyChain(root_key(content, extra_key, message.cache_salt), self._block)
        chain.grow(tokens[: (first + 1) * self._block])
        if chain.keys[first] not in self._store:
            return None
        chain.grow(tokens[(first + 1) * self._block : usable * self._block])
        keys = chain.keys[first:]
        ticket = f"{message.rid}#{next(self._tickets)}"
        blocks = self._store.pin(keys, ticket)
        if blocks and self._peers:
            blocks = min(blocks, self._ask_peers(ticket, keys[:blocks]))
        self._counters.hits += blocks > 0
        # Also when it is 0: what some ranks have pinned is released by it.
        end = (first + blocks) * self._block
        return PromoteReq(ticket, tokens[:end], extra_key, message.cache_salt, first, blocks)

    def _ask_peers(self, ticket: str, keys: list[bytes]) -> int:
        """The fewest blocks that any of the other ranks holds; 0 when one does not answer in time."""
        if not self._sockets:
            for peer in self._peers:
                socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
                socket.setsockopt(zmq.LINGER, 0)
                socket.connect(peer)
                self._sockets.append(socket)
        question = msgspec.msgpack.encode(Lookup(ticket=ticket, keys=keys))
        for socket in self._sockets:
            socket.send(question)
        deadline = time.monotonic() + LOOKUP_TIMEOUT
        fewest = len(keys)
        for socket in self._sockets:
            while True:
                if not socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                    logger.warning("a rank's shadow store does not answer; %s is computed again", ticket)
                    return 0
                answer = msgspec.msgpack.decode(socket.recv(), type=Held)
                if answer.ticket == ticket:  # not a late one
                    fewest = min(fewest, answer.blocks)
                    break
        return fewest


class Promoter:
    """Every rank's part: the same for all of them, in the same step."""

    def __init__(
        self, store: ShadowStore, rows: PoolRows, block: int, tree: Any, allocator: Any, counters: ShadowCounters
    ) -> None:
        self._store = store
        self._rows = rows
        self._block = block
        self._tree = tree
        self._allocator = allocator
        self._counters = counters

    def apply(self, promote: PromoteReq) -> None:
        try:
            if promote.blocks:
                self._promote(promote)
        finally:
            self._store.release(promote.ticket)

    def _promote(self, promote: PromoteReq) -> None:
        match = self._tree.match_prefix(MatchPrefixParams(key=promote.key))
        have = len(match.device_indices)
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
            value = torch.cat([match.device_indices.to(slots.dtype), slots])
            self._tree.insert(InsertParams(key=promote.key, value=value, prev_prefix_len=have))
            self._counters.promoted_tokens += wanted
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
