"""The source's side in the scheduler: which KV has become valid and is missing at the target, and copying it.

All of it runs on the scheduler's thread, between the steps. It never waits: when the sender has no room, a request's
KV stays where it is, in the pool, and is copied when there is; that of a finished request as long as the tree keeps it.
"""

from __future__ import annotations

import time
import weakref
from array import array
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.mem_cache.radix_cache import RadixKey

from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.control.shadow_link import ShadowLink
from sglang_kevlar.protocol.shadow import ShadowCounters
from sglang_kevlar.shadow.pool import PoolRows
from sglang_kevlar.shadow.sender import Piece, ShadowSender

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

#: decode steps between two copies: one copy of many tokens costs the loop less than many of a few
DECODE_INTERVAL = 8
#: finished sequences remembered, to be sent to a new target
FINISHED_KEPT = 1024
#: how often a sequence's KV is sent again after the target has lost some of it: a full store loses it anew
SENT_AGAIN = 2
#: seconds without copies when there was no memory for one
NO_MEMORY_PAUSE = 5.0
#: the least room worth a copy before its time, or one of finished sequences' KV, as a share of the window
CATCH_UP_SHARE = 0.25


class _Sequence:
    """A request's tokens and the keys of their blocks."""

    __slots__ = (
        "__weakref__",
        "announced",
        "cache_salt",
        "chain",
        "content",
        "extra_key",
        "link",
        "rid",
        "sent",
        "sent_again",
        "tokens",
    )

    def __init__(self, req: Req, content: str, block: int) -> None:
        self.content = content
        self.chain = KeyChain(root_key(content, req.extra_key, req.cache_salt), block)
        self.extra_key = req.extra_key
        self.cache_salt = req.cache_salt
        self.rid = req.rid.encode()
        #: the first so many blocks are at the target of this link, or on their way
        self.link: ShadowLink | None = None
        self.sent = 0
        #: times that the target had lost some of them
        self.sent_again = 0
        #: runs when the request is gone without an end, so that the target hears of one; None before it knows of it
        self.announced: weakref.finalize[Any, _Sequence] | None = None
        #: all tokens with KV; once the request has finished
        self.tokens: array[int] = array("q")

    def follow(self, link: ShadowLink) -> None:
        if self.link is not link:
            self.link, self.sent, self.sent_again = link, 0, 0
            self.end()

    def end(self) -> bool:
        """Whether the target has to be told that the request is over."""
        announced, self.announced = self.announced, None
        return announced is not None and announced.detach() is not None

    def is_whole_at_target(self) -> bool:
        """False when nothing more can be added there: the target has lost what was sent, and did so before."""
        assert self.link is not None
        if self.sent == 0 or self.chain.keys[self.sent - 1] in self.link.known:
            return True
        if self.sent_again == SENT_AGAIN:
            return False
        self.sent_again += 1
        self.sent = self.link.missing(self.chain.keys, 0)
        return True


@dataclass(frozen=True)
class _Copy:
    """Blocks ``first`` to ``last`` of a sequence, to be copied from ``slots``, which hold the KV of ``tokens``."""

    sequence: _Sequence
    first: int
    last: int
    slots: torch.Tensor
    tokens: array[int]
    #: the running request that they are for
    request: bytes | None


class Exporter:
    def __init__(
        self,
        rows: PoolRows,
        block: int,
        req_to_token: torch.Tensor,
        tree: Any,
        sender: ShadowSender,
        min_context: int,
        counters: ShadowCounters,
    ) -> None:
        """``block``: tokens of a block. ``req_to_token``: slots by (row of the request, position)."""
        self._rows = rows
        self._block = block
        self._req_to_token = req_to_token
        self._tree = tree
        self._sender = sender
        self._min_context = max(min_context, block)
        self._counters = counters
        #: names the weights; empty while they change
        self.content = ""
        #: decode passes since the last copies of all that runs
        self._decode_steps = 0
        #: something that runs had no room
        self._short_of_room = False
        #: no copies before, monotonic seconds
        self._not_before = 0.0
        #: announced requests that vanished: aborted where no result is processed (in the queue, between two chunks)
        self._vanished: deque[bytes] = deque()
        #: finished sequences, oldest first
        self._finished: OrderedDict[int, _Sequence] = OrderedDict()
        self._finished_tokens = 0
        self._finished_limit = rows.capacity_tokens
        self._link: ShadowLink | None = None
        #: those of them that may miss something at the target, most valuable last
        self._behind: dict[int, _Sequence] = {}

    # -- called by the scheduler

    def begin(self, req: Req) -> None:
        """The request runs for the first time. Its KV is of these weights, and of others once they change."""
        if self.content and _shadowable(req):
            req.kevlar_sequence = _Sequence(req, self.content, self._block)

    def set_content(self, content: str) -> None:
        """The weights have another name. What runs now mixes the KV of both and is not sent any more."""
        if content != self.content:
            self.content = content
            self.forget()

    def forget(self) -> None:
        """What was cached is not any more, or not to be found under its old name."""
        self._finished.clear()
        self._finished_tokens = 0
        self._behind.clear()

    def before_result(self, batch: ScheduleBatch) -> None:
        """A forward pass is done, and upstream has not processed its result: no slot of it is freed yet."""
        started = time.thread_time()
        link = self._current_link()
        if link is not None:
            if batch.forward_mode.is_decode():
                self._decode_steps += 1
                behind = self._short_of_room and self._room() >= self._least_room()
                if behind or self._decode_steps >= DECODE_INTERVAL:
                    self._decode_steps = 0
                    self._short_of_room = self._export(self._decoded(batch), link)
                    self._catch_up(link)
            elif batch.forward_mode.is_extend():
                self._short_of_room |= self._export(self._extended(batch), link)
        self._counters.scheduler_cpu_s += time.thread_time() - started

    def after_result(self, batch: ScheduleBatch) -> None:
        """What finished is in the tree now, and what of it was not sent yet is copied from there."""
        started = time.thread_time()
        for req in batch.reqs:
            if req.finished() and (sequence := req.__dict__.pop("kevlar_sequence", None)) is not None:
                self._finish(req, sequence)
        self._counters.scheduler_cpu_s += time.thread_time() - started

    def idle(self) -> None:
        started = time.thread_time()
        link = self._current_link()
        if link is not None:
            self._catch_up(link)
            self._counters.lag_tokens = self._sender.waiting_tokens
        self._counters.scheduler_cpu_s += time.thread_time() - started

    # -- running requests

    def _decoded(self, batch: ScheduleBatch) -> list[tuple[Req, int]]:
        """Requests and how many tokens of each have KV: all but the one just sampled, which is not appended yet."""
        return [
            (req, len(req.origin_input_ids) + len(req.output_ids))
            for req in batch.reqs
            if not (req.finished() or req.is_retracted)
        ]

    def _extended(self, batch: ScheduleBatch) -> list[tuple[Req, int]]:
        return [
            (req, prefix + extend)
            for req, prefix, extend in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)
            if not (req.finished() or req.is_retracted)
        ]

    def _export(self, valid: list[tuple[Req, int]], link: ShadowLink) -> bool:
        """Whether something is left over."""
        wanted = []
        lag = 0
        for req, tokens in valid:
            sequence = req.__dict__.get("kevlar_sequence")
            if sequence is None or tokens < self._min_context or not req.kv.holds_kv:
                continue
            if sequence.content != self.content:
                continue
            blocks = tokens // self._block
            others_sent_it = sequence.link in (None, link)  # and not this source, in a session before
            sequence.follow(link)
            if blocks > len(sequence.chain.keys):
                done = len(sequence.chain.keys) * self._block
                sequence.chain.grow(_tokens(req, done, blocks * self._block))
            if not sequence.is_whole_at_target():
                continue
            first = link.missing(sequence.chain.keys[:blocks], sequence.sent)
            if others_sent_it:
                self._counters.saved_tokens += (first - sequence.sent) * self._block
            sequence.sent = first
            if first < blocks:
                wanted.append((blocks, first, req, sequence))
                lag += (blocks - first) * self._block
        if wanted:
            # The longest would cost most to compute again.
            wanted.sort(key=lambda item: item[0], reverse=True)
            room = self._room()
            copies, new, left, saved = [], [], lag, 0
            for blocks, missing, req, sequence in wanted:
                # What a request before it in this batch shares with it is on its way.
                first = link.missing(sequence.chain.keys[:blocks], missing)
                saved += (first - missing) * self._block
                left -= (first - missing) * self._block
                sequence.sent = first
                if first == blocks:
                    continue
                last = min(blocks, first + room)
                if last == first:
                    break
                room -= last - first
                left -= (last - first) * self._block
                begin, end = first * self._block, last * self._block
                slots = self._req_to_token[req.kv.req_pool_idx, begin:end]
                copies.append(_Copy(sequence, first, last, slots, _tokens(req, begin, end), sequence.rid))
                keys = [key for key in sequence.chain.keys[first:last] if key not in link.known]
                link.known.update(keys)
                new += keys
            if self._copy(copies, link):
                lag = left
                self._counters.saved_tokens += saved
            else:
                link.known.difference_update(new)
                for _, missing, _, sequence in wanted:
                    sequence.sent = missing
        self._counters.lag_tokens = lag + self._sender.waiting_tokens
        return lag > 0

    def _room(self) -> int:
        """Blocks that may be copied now."""
        return 0 if time.monotonic() < self._not_before else self._sender.room()

    def _copy(self, copies: list[_Copy], link: ShadowLink) -> bool:
        """All of them in one go. False: not now, for want of memory."""
        if not copies:
            return True
        staged = self._rows.read(torch.cat([copy.slots for copy in copies]))
        if staged is None:
            self._not_before = time.monotonic() + NO_MEMORY_PAUSE
            return False
        limit = self._sender.piece_blocks
        at = 0
        for copy in copies:
            sequence, first, last, request = copy.sequence, copy.first, copy.last, copy.request
            if request is not None and sequence.announced is None:
                sequence.announced = weakref.finalize(sequence, self._vanished.append, request)
                sequence.announced.atexit = False
            for start in range(first, last, limit):
                end = min(last, start + limit)
                piece = Piece(
                    keys=sequence.chain.keys[start:end],
                    parent=sequence.chain.parent_of(start),
                    staged=staged,
                    first=at,
                    tokens=copy.tokens[(start - first) * self._block : (end - first) * self._block].tobytes(),
                    origin=(sequence.extra_key, sequence.cache_salt),
                    request=request,
                )
                self._sender.queue(piece, link)
                at += (end - start) * self._block
            sequence.sent = last
        self._sender.wake()
        return True

    # -- finished requests

    def _finish(self, req: Req, sequence: _Sequence) -> None:
        if sequence.end():
            assert sequence.link is not None
            self._sender.ended(sequence.rid, sequence.link)
        # The last token was sampled and never an input: it has no KV.
        total = len(req.origin_input_ids) + len(req.output_ids) - 1
        blocks = total // self._block
        if total < self._min_context or sequence.content != self.content:
            return
        sequence.tokens = _tokens(req, 0, blocks * self._block)
        self._finished[id(sequence)] = sequence
        self._finished_tokens += len(sequence.tokens)
        while len(self._finished) > FINISHED_KEPT or self._finished_tokens > self._finished_limit:
            name, oldest = self._finished.popitem(last=False)
            self._finished_tokens -= len(oldest.tokens)
            if self._behind.pop(name, None) is not None:
                self._counters.dropped_tokens += len(oldest.tokens)
        if self._link is not None and id(sequence) in self._finished:
            self._behind[id(sequence)] = sequence
            self._catch_up(self._link)

    def _current_link(self) -> ShadowLink | None:
        link = self._sender.link
        if link is not self._link:
            self._link = link
            self._behind = dict(self._finished) if link is not None else {}
        while self._vanished:
            rid = self._vanished.popleft()
            if link is not None:
                self._sender.ended(rid, link)
        return link

    def _catch_up(self, link: ShadowLink) -> None:
        """Send what finished requests left in the tree, the most recent first, as far as there is room."""
        while self._behind:
            room = self._room()
            name, sequence = next(reversed(self._behind.items()))
            done = len(sequence.chain.keys) * self._block
            sequence.chain.grow(sequence.tokens[done:])
            keys = sequence.chain.keys
            first = link.missing(keys, 0)
            if first == len(keys):
                del self._behind[name]
                continue
            sequence.follow(link)
            if not sequence.is_whole_at_target():
                # A store full of what runs would be sent it for ever.
                self._counters.dropped_tokens += (len(keys) - first) * self._block
                del self._behind[name]
                continue
            if room < min(len(keys) - first, self._least_room()):
                return
            slots = self._cached(sequence)
            cached = len(slots) // self._block
            if cached <= first:
                self._counters.dropped_tokens += (len(keys) - first) * self._block
                del self._behind[name]
                continue
            last = min(cached, first + room)
            part = slice(first * self._block, last * self._block)
            if not self._copy([_Copy(sequence, first, last, slots[part], sequence.tokens[part], None)], link):
                return
            if last == cached:
                self._counters.dropped_tokens += (len(keys) - cached) * self._block
                del self._behind[name]

    def _least_room(self) -> int:
        return int(self._sender.window_bytes * CATCH_UP_SHARE) // (self._rows.token_bytes * self._block)

    def _cached(self, sequence: _Sequence) -> torch.Tensor:
        """Slots of as many of its tokens as the tree has. Changes nothing: ranks do not do this in the same step."""
        core = self._tree.tree_core
        key = RadixKey(sequence.tokens, sequence.extra_key, cache_salt=sequence.cache_salt)
        matched, node, _ = core.match_full_device_prefix(key)
        if not matched:
            return torch.empty(0, dtype=torch.int64)
        root = self._tree.root_node_handle(sequence.extra_key)
        slots: torch.Tensor = core.collect_full_device_indices(node, root)
        return slots[:matched]


def _shadowable(req: Req) -> bool:
    """Whether tokens say what the KV is, and the client did not ask to be left out."""
    if req.input_embeds is not None or req.positional_embed_overrides is not None or req.multimodal_inputs is not None:
        return False
    if req.beam_group is not None or req.skip_radix_cache_insert or req.session is not None:
        return False
    custom = req.sampling_params.custom_params
    return not (isinstance(custom, dict) and custom.get("kevlar_shadow") is False)


def _tokens(req: Req, start: int, end: int) -> array[int]:
    """Tokens ``start`` to ``end`` of prompt and output."""
    prompt = req.origin_input_ids
    if end <= len(prompt):
        return array("q", prompt[start:end])
    output = req.output_ids
    head = array("q", prompt[start:])
    return head + array("q", output[max(0, start - len(prompt)) : end - len(prompt)])
