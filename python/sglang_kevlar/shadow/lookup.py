"""Finding shadowed KV that is worth putting into the device pool.

The first rank looks a request's prefix up in its own store. If it is there, it asks the other ranks' stores, which pin
what they hold, and sends what all of them have along with the request, in the same broadcast: so every rank puts the
same blocks into its tree in the same step (`shadow.promote`), and the request then finds them as any cached prefix.

While the group has nothing to do, it does the same for requests that still run on the group that they came from: when
that is lost, they find most of their KV in the pool already.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import zmq
from sglang.srt.managers.io_struct import TokenizedEmbeddingReqInput, TokenizedGenerateReqInput
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_kevlar.control.shadow_index import Origin
from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.protocol.shadow import Held, Lookup, ShadowCounters, Shelf
from sglang_kevlar.shadow.sockets import frame, unframe
from sglang_kevlar.shadow.store import ShadowStore
from sglang_kevlar.worker.resume import ResumedGenerateReqInput

logger = logging.getLogger(__name__)

#: seconds for which a request waits for the other ranks' stores, beside the time that they need to check what they hold
#: at so many bytes a second; then it is computed
LOOKUP_TIMEOUT, CHECK_RATE = 0.5, 5e8
#: seconds for which nothing is asked after no answer came, twice
SILENT = 10.0
_ANSWERS = msgspec.msgpack.Decoder(Held)
#: bytes of KV that each rank promotes ahead in one step
AHEAD_BYTES = 64 << 20
#: tokens that a running request lacks in the pool before it is worth a step of all ranks
AHEAD_LEAST = 256


@dataclasses.dataclass(frozen=True)
class PromoteReq:
    """In the requests' broadcast, before the request it may be for: put these blocks into the tree."""

    ticket: str
    #: up to the end of the last block
    tokens: array[int]
    extra_key: str | None
    cache_salt: str | None
    #: the ticket is for ``blocks`` blocks from block ``first`` on; the tree had what is before
    first: int
    blocks: int
    #: of each pipeline stage, where its tensor-parallel ranks share one store; None where each has its own
    shelves: list[Shelf | None]
    #: not for a request of this group: only where there is room to spare
    ahead: bool
    #: the request, if it is to be computed and compared instead
    audited: str | None = None

    @property
    def key(self) -> RadixKey:
        return RadixKey(self.tokens, self.extra_key, cache_salt=self.cache_salt)


class Lookups:
    """The first rank's search for what can be promoted."""

    def __init__(
        self,
        store: ShadowStore,
        block: int,
        block_bytes: int,
        tree: Any,
        peers: Callable[[], Sequence[str] | None],
        dial: Callable[[str], zmq.Socket[bytes]],
        audit: Callable[[], bool],
        counters: ShadowCounters,
    ) -> None:
        """``block``: tokens of one, ``block_bytes`` bytes of KV.

        ``peers``: endpoints of the other stores of the group, by rank; None while they are not known. ``dial``: a way
        to one. ``audit``: whether to audit what was found.
        """
        self._store = store
        self._counters = counters
        self._tree = tree
        self._block = block
        self._block_bytes = block_bytes
        self._find_peers = peers
        self._dial = dial
        #: a way to each of the other stores; None: not known yet
        self._sockets: list[zmq.Socket[bytes]] | None = None
        self._audit = audit
        #: questions in a row without an answer; when the next one may be asked after two of them
        self._unanswered = 0
        self._not_before = 0.0
        #: tokens promoted ahead in one step: a request that arrives waits for that
        self._most_ahead = max(1, AHEAD_BYTES // block_bytes) * block
        #: by running request: the blocks that need no look, because they are in the pool or cannot get there
        self._reached: dict[bytes, int] = {}
        self._declined: set[bytes] = set()
        self._tickets = itertools.count()

    def close(self) -> None:
        for socket in self._sockets or ():
            socket.close()
        self._sockets = []

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
        origin = (extra_key, message.cache_salt)
        # The last token is computed in any case, for its logits.
        usable = (len(tokens) - 1) // self._block
        first = self._cached_blocks(tokens, origin)
        if first >= usable:
            return None
        self._counters.lookups += 1
        chain = KeyChain(root_key(content, *origin), self._block)
        chain.grow(tokens[: (first + 1) * self._block])
        if chain.keys[first] not in self._store or self._peers_are_silent():
            return None
        chain.grow(tokens[(first + 1) * self._block : usable * self._block])
        promote = self._promotion(str(message.rid), tokens, origin, first, chain.keys[first:], ahead=False)
        self._counters.hits += promote.blocks > 0
        if promote.blocks and self._audit():
            return dataclasses.replace(promote, audited=message.rid)
        return promote

    def ahead(self, content: str, spare_tokens: int) -> list[PromoteReq]:
        """For running requests, the longest first: what of their KV is not in the pool yet, a part at a time."""
        if not content or self._peers_are_silent():
            return []
        promotions: list[PromoteReq] = []
        running = self._store.running()
        self._reached = {request: self._reached.get(request, 0) for request, *_ in running}
        self._declined.intersection_update(self._reached)
        least = max(1, AHEAD_LEAST // self._block)
        room = min(spare_tokens, self._most_ahead) // self._block
        for request, leaf, blocks in running:
            if room == 0:
                break
            if blocks - self._reached[request] < least or (sequence := self._store.sequence(leaf)) is None:
                continue
            keys, tokens, origin = sequence
            beginning = KeyChain(root_key(content, *origin), self._block)
            beginning.grow(tokens[: self._block])
            first = self._cached_blocks(tokens, origin)
            if beginning.keys[0] != keys[0]:  # of other weights
                self._reached[request] = blocks
                continue
            if first < self._reached[request] and request not in self._declined:
                # No rank had room for what was offered, or it was evicted: not again before the request has grown.
                self._declined.add(request)
                self._reached[request] = blocks
                continue
            self._declined.discard(request)
            part = keys[first : first + room] if blocks - first >= least else []
            self._reached[request] = first + len(part)
            if part:
                promotions.append(self._promotion("ahead", tokens, origin, first, part, ahead=True))
                room -= len(part)
                if not promotions[-1].blocks:
                    break  # the other ranks have it not, or do not say
        return promotions

    def _cached_blocks(self, tokens: array[int], origin: Origin) -> int:
        extra_key, cache_salt = origin
        # Changes nothing in the tree: only this rank asks.
        cached, _, _ = self._tree.tree_core.match_full_device_prefix(RadixKey(tokens, extra_key, cache_salt=cache_salt))
        return int(cached) // self._block

    def _promotion(
        self, name: str, tokens: array[int], origin: Origin, first: int, keys: list[bytes], ahead: bool
    ) -> PromoteReq:
        ticket = f"{name}#{next(self._tickets)}"
        asked = self._ask_peers(ticket, keys)
        blocks = self._store.pin(keys, ticket)
        shelves = [self._store.shelf(ticket)]
        answers = self._peers_say(ticket, len(keys)) if asked else None
        if answers is None:
            blocks = 0
        else:
            blocks = min([blocks, *(held.blocks for held in answers)])
            shelves += [held.shelf for held in answers]
        # Also when it is 0: what some ranks have pinned is released by it.
        end = (first + blocks) * self._block
        return PromoteReq(ticket, tokens[:end], *origin, first, blocks, shelves, ahead)

    def _peers_are_silent(self) -> bool:
        return time.monotonic() < self._not_before

    def _ask_peers(self, ticket: str, keys: list[bytes]) -> bool:
        """Whether the other stores, if there are any, look while ours does."""
        if self._peers_are_silent():
            return False
        if self._sockets is None:
            peers = self._find_peers()
            if peers is None:
                return False
            self._sockets = [self._dial(peer) for peer in peers]
        if not self._sockets:
            return True
        question = frame(Lookup(ticket=ticket, keys=keys))
        try:
            for socket in self._sockets:
                socket.send(question, zmq.NOBLOCK)
        except zmq.Again:
            self._not_before = time.monotonic() + SILENT
            return False
        return True

    def _peers_say(self, ticket: str, blocks: int) -> list[Held] | None:
        """What the other stores answer, in their order; None when one does not in time."""
        deadline = time.monotonic() + LOOKUP_TIMEOUT + blocks * self._block_bytes / CHECK_RATE
        answers: list[Held] = []
        for socket in self._sockets or ():
            while True:
                if not socket.poll(max(0, int((deadline - time.monotonic()) * 1000))):
                    logger.warning("a rank's shadow store does not answer; %s is computed again", ticket)
                    self._unanswered += 1
                    if self._unanswered > 1:
                        self._not_before = time.monotonic() + SILENT
                    return None
                try:
                    answer = unframe(socket.recv(), _ANSWERS)
                except ValueError as error:
                    logger.warning("a rank's shadow store answers what cannot be read: %s", error)
                    continue
                if answer.ticket == ticket:  # not a late one
                    answers.append(answer)
                    break
        self._unanswered = 0
        return answers
