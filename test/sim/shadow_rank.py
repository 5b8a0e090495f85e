"""One rank: the real `shadow.rank.RankShadow`, and a scheduler that runs requests over a simulated pool and tree."""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from shadow_pool import BLOCK, LAYOUT, Node, Pool, Tree, first_kv, kv_of

import frontend_fakes  # noqa: F401  (before sglang)
from sglang_kevlar.control.shadow_index import Origin
from sglang_kevlar.shadow.lookup import PromoteReq
from sglang_kevlar.shadow.rank import Place, RankShadow
from sglang_kevlar.worker.resume import ShadowPlanReq

if TYPE_CHECKING:
    from shadow_sim import ShadowWorld

LONGEST = 40
#: requests that run at once
ROWS = 3
_EXTEND = SimpleNamespace(is_decode=lambda: False, is_extend=lambda: True)
_DECODE = SimpleNamespace(is_decode=lambda: True, is_extend=lambda: False)


@dataclass(eq=False)
class Request:
    """What the exporter sees of upstream's Req, and what it runs on."""

    rid: str
    origin_input_ids: array[int]
    max_new: int
    extra_key: str | None
    cache_salt: str | None
    weights: int
    output_ids: array[int] = field(default_factory=lambda: array("q"))
    kv: Any = None
    done: bool = False
    is_retracted: bool = False
    input_embeds: None = None
    positional_embed_overrides: None = None
    multimodal_inputs: None = None
    beam_group: None = None
    skip_radix_cache_insert: bool = False
    session: None = None
    sampling_params: Any = field(default_factory=lambda: SimpleNamespace(custom_params=None))
    #: KV of each token as it must be, and the slots it is in; all its own, unlike upstream's
    truth: list[bytes] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    #: its KV is of two weight versions
    mixed: bool = False

    @property
    def origin(self) -> Origin:
        return self.extra_key, self.cache_salt

    @property
    def tokens(self) -> array[int]:
        return self.origin_input_ids + self.output_ids

    def finished(self) -> bool:
        return self.done


class SimRank:
    def __init__(self, world: ShadowWorld, group: int, epoch: int) -> None:
        self.world, self.group, self.epoch = world, group, epoch
        self.weights = world.weights
        self.pool = Pool(40)
        self.tree = Tree(self.pool)
        self.rows = torch.zeros((ROWS, LONGEST), dtype=torch.int64)
        self.running: list[Request] = []
        #: what the frontend sent, in order
        self.inbox: list[Any] = []
        self.hung = self.sender_hung = self.store_hung = 0
        self.sender_wakes_at = 0.0
        scheduler: Any = SimpleNamespace(
            tree_cache=self.tree,
            req_to_token_pool=SimpleNamespace(req_to_token=self.rows),
            token_to_kv_pool_allocator=self.pool,
        )
        place: Any = Place(world.plan, world, group, epoch, 0, self.pool, LAYOUT)  # type: ignore[arg-type]
        self.shadow = RankShadow(scheduler, place)

    @property
    def sender(self) -> Any:
        return self.shadow._sender

    @property
    def store(self) -> Any:
        return self.shadow._store

    def end(self) -> None:
        """The process is dead."""
        os.close(self.sender._wake)
        if self.sender._socket is not None:
            self.sender._socket.close()

    # -- the scheduler's loop

    def step(self) -> None:
        messages, self.inbox = self.inbox, []
        for message in self.shadow.with_promotions(messages):
            if isinstance(message, PromoteReq):
                self.promote(message)
            elif isinstance(message, ShadowPlanReq):
                self.shadow.follow(message)
            elif isinstance(message, tuple):
                self.control(*message)
            else:
                self.start(message)
        if not self.running and not messages:
            for promote in self.shadow.promotions_ahead():
                self.promote(promote)
        if self.running:
            self.decode()
        else:
            self.shadow.exporter.idle()

    def promote(self, promote: PromoteReq) -> None:
        before = self.shadow.counters.promoted_tokens
        self.shadow.promoter.apply(promote)
        if self.shadow.counters.promoted_tokens > before:
            self.world.promotions += 1
            self.judge_cached(promote.tokens, (promote.extra_key, promote.cache_salt))

    def judge_cached(self, tokens: array[int], origin: Origin) -> list[Node]:
        """What the tree has of a sequence is what this rank's weights would make of it."""
        found = self.tree.match(tokens, origin)
        kv = first_kv(origin)
        for i, slot in enumerate(slot for node in found for slot in node.slots):
            kv = kv_of(kv, tokens[i], self.weights)
            assert self.pool.kv[slot].tobytes() == kv, f"group {self.group}: cached KV is not that of its tokens"
        return found

    def control(self, what: str, weights: int) -> None:
        """The cache is flushed, and the weights may change. Upstream does it only while nothing runs."""
        if what == "weights":
            self.weights = weights
            for req in self.running:
                req.mixed = True
        while leaf := next((node for node in self.tree.nodes.values() if not node.children), None):
            self.tree.drop(leaf)
        self.shadow.flushed()

    def start(self, message: Any) -> None:
        tokens = array("q", message.input_ids)
        origin = (message.extra_key, message.cache_salt)
        found = self.judge_cached(tokens[:-1], origin)
        if len(self.running) == ROWS:
            return
        req = Request(message.rid, tokens, message.sampling_params.max_new_tokens, *origin, weights=self.weights)
        row = next(i for i in range(ROWS) if all(other.kv.req_pool_idx != i for other in self.running))
        req.kv = SimpleNamespace(holds_kv=True, req_pool_idx=row)
        if not self.extend(req, len(tokens)):
            return
        self.running.append(req)
        self.shadow.exporter.begin(req)  # type: ignore[arg-type]
        prefix = len(found) * BLOCK
        batch: Any = SimpleNamespace(
            reqs=[req], forward_mode=_EXTEND, prefix_lens=[prefix], extend_lens=[len(tokens) - prefix]
        )
        self.result(batch, [req])

    def extend(self, req: Request, until: int) -> bool:
        """A forward pass: KV of the tokens up to ``until``. False: the pool is full."""
        count = until - len(req.slots)
        self.tree.evict(count)
        slots = self.pool.alloc(count)
        if slots is None:
            return False
        tokens = req.tokens
        for i, slot in enumerate(slots.tolist(), len(req.slots)):
            before = req.truth[-1] if req.truth else first_kv(req.origin)
            req.truth.append(kv_of(before, tokens[i], self.weights))
            self.pool.kv[slot] = np.frombuffer(req.truth[-1], np.uint8)
        self.rows[req.kv.req_pool_idx, len(req.slots) : until] = slots
        req.slots += slots.tolist()
        if not req.mixed:
            self.world.learn(self.weights, req)
        return True

    def decode(self) -> None:
        # As upstream has it when the result of a step comes: all but the token just sampled have KV.
        ready = []
        for req in list(self.running):
            if self.extend(req, len(req.tokens)):
                ready.append(req)
            else:
                self.abort(req)
        if ready:
            batch: Any = SimpleNamespace(reqs=ready, forward_mode=_DECODE)
            self.result(batch, ready)

    def result(self, batch: Any, reqs: list[Request]) -> None:
        exporter = self.shadow.exporter
        exporter.before_result(batch)
        for req in reqs:
            for _ in range(self.world.faults.random.randrange(1, 4)):
                if len(req.output_ids) < req.max_new and len(req.tokens) < LONGEST:
                    req.output_ids.append(self.world.next_token(req))
            if len(req.output_ids) >= req.max_new:
                # Several tokens a step stand for several steps: of all but the last, the KV is there.
                whole = self.extend(req, len(req.tokens) - 1) if len(req.slots) < len(req.tokens) - 1 else True
                req.done = True
                if not whole:
                    self.abort(req)
                    continue
                self.running.remove(req)
                if req.mixed:
                    self.release(req)
                else:
                    self.keep(req)
        exporter.after_result(batch)

    def keep(self, req: Request) -> None:
        self.tree.add(req.tokens[: len(req.slots)], req.origin, req.slots, 0)

    def release(self, req: Request) -> None:
        self.pool.free += req.slots

    def abort(self, req: Request) -> None:
        """It vanishes where no result is processed."""
        if req in self.running:
            self.running.remove(req)
        req.__dict__.pop("kevlar_sequence", None)
        self.release(req)
