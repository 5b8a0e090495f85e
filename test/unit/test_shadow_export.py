"""What the scheduler's side offers to a shadow, and when: an Exporter over a pool, a link, and requests by hand."""

from __future__ import annotations

import gc
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import frontend_fakes  # noqa: F401  (before sglang)
from sglang_kevlar.control.shadow_keys import KeyChain, belong, root_key
from sglang_kevlar.control.shadow_link import ShadowLink
from sglang_kevlar.protocol.shadow import ShadowCounters
from sglang_kevlar.shadow.export import DECODE_INTERVAL, SENT_AGAIN, Exporter

BLOCK = 16
CONTENT = "weights"
#: name, first token, row
CASES = [("a", 0, 0), ("b", 100, 1)]
#: name, token behind the shared ones and how many, row
PAIR = [("long", 500, 64, 0), ("short", 501, 32, 1)]


class Rows:
    """A pool in which the KV of slot s is s."""

    token_bytes = 8
    capacity_tokens = 4096

    def read(self, slots: torch.Tensor) -> list[int]:
        return slots.tolist()


class Sender:
    def __init__(self) -> None:
        self.link: ShadowLink | None = ShadowLink(1 << 20)
        self.window_bytes = 64 * BLOCK * Rows.token_bytes
        self.piece_blocks = 16
        self.blocks = 1000
        self.waiting_tokens = 0
        #: by key: the slots of the block
        self.sent: dict[bytes, list[int]] = {}
        self.order: list[bytes | None] = []
        self.ended_requests: list[bytes] = []
        self.origin: tuple[str | None, str | None] = (None, None)

    def room(self) -> int:
        return self.blocks if self.link is not None else 0

    def queue(self, piece: Any, link: ShadowLink) -> None:
        assert link is self.link and len(piece.keys) <= self.blocks
        self.blocks -= len(piece.keys)
        link.known.update(piece.keys)
        for i, key in enumerate(piece.keys):
            at = piece.first + i * BLOCK
            assert key not in self.sent, "sent twice"
            self.sent[key] = piece.staged[at : at + BLOCK]
        assert belong(piece.keys, piece.parent, piece.tokens) and piece.origin == self.origin
        self.order.append(piece.request)

    def ended(self, request: bytes, link: ShadowLink) -> None:
        self.ended_requests.append(request)

    def wake(self) -> None:
        pass

    def lose(self, *keys: bytes) -> None:
        assert self.link is not None
        for key in keys:
            self.link.known.discard(key)
            del self.sent[key]


class Tree:
    """Caches what it is told to, in full."""

    def __init__(self) -> None:
        self.cached: dict[tuple[int, ...], list[int]] = {}
        self.tree_core = self

    def match_full_device_prefix(self, key: Any) -> tuple[int, Any, None]:
        slots = self.cached.get(tuple(key.token_ids), [])
        return len(slots), slots, None

    def root_node_handle(self, _: Any) -> None:
        return None

    def collect_full_device_indices(self, slots: Any, _: Any) -> torch.Tensor:
        return torch.tensor(slots)


class World:
    def __init__(self, min_context: int = 32) -> None:
        self.sender = Sender()
        self.tree = Tree()
        self.counters = ShadowCounters()
        self.table = torch.arange(8 * 512).view(8, 512)
        self.exporter = Exporter(Rows(), BLOCK, self.table, self.tree, self.sender, min_context, self.counters)  # type: ignore[arg-type]
        self.exporter.set_content(CONTENT)

    def request(self, name: str, prompt: list[int], row: int, **fields: Any) -> Any:
        plain = dict.fromkeys(
            ("input_embeds", "positional_embed_overrides", "multimodal_inputs", "beam_group", "session")
        )
        req = SimpleNamespace(
            rid=name,
            origin_input_ids=array("q", prompt),
            output_ids=array("q"),
            extra_key=None,
            cache_salt=None,
            skip_radix_cache_insert=False,
            is_retracted=False,
            end=None,
            kv=SimpleNamespace(holds_kv=True, req_pool_idx=row),
            sampling_params=SimpleNamespace(custom_params=None),
            **plain,
        )
        req.finished = lambda: req.end is not None
        for key, value in fields.items():
            setattr(req, key, value)
        self.exporter.begin(req)
        return req

    def prefill(self, *reqs: Any) -> None:
        mode = SimpleNamespace(is_decode=lambda: False, is_extend=lambda: True)
        lengths = [len(req.origin_input_ids) for req in reqs]
        batch: Any = SimpleNamespace(reqs=reqs, forward_mode=mode, prefix_lens=[0] * len(reqs), extend_lens=lengths)
        self.exporter.before_result(batch)
        for req in reqs:
            req.output_ids.append(1)
        self.exporter.after_result(batch)

    def decode(self, steps: int, *reqs: Any, last: bool = False) -> None:
        mode = SimpleNamespace(is_decode=lambda: True, is_extend=lambda: False)
        batch: Any = SimpleNamespace(reqs=reqs, forward_mode=mode)
        for step in range(steps):
            self.exporter.before_result(batch)
            for req in reqs:
                req.output_ids.append(1)
                if last and step == steps - 1:
                    req.end = "length"
            self.exporter.after_result(batch)

    def keys(self, req: Any, content: str = CONTENT) -> list[bytes]:
        tokens = req.origin_input_ids + req.output_ids[:-1]
        chain = KeyChain(root_key(content, req.extra_key, req.cache_salt), BLOCK)
        chain.grow(tokens[: len(tokens) // BLOCK * BLOCK])
        return chain.keys

    def assert_holds(self, req: Any, blocks: int) -> None:
        keys = self.keys(req)[:blocks]
        row = self.table[req.kv.req_pool_idx]
        for i, key in enumerate(keys):
            assert self.sender.sent[key] == row[i * BLOCK : (i + 1) * BLOCK].tolist()
        assert len(keys) == blocks


@pytest.fixture
def world() -> World:
    return World()


def test_prefilled_and_decoded_blocks_are_sent_with_their_own_kv(world: World) -> None:
    req = world.request("a", list(range(100, 140)), row=3)
    world.prefill(req)
    world.assert_holds(req, 2)
    world.decode(DECODE_INTERVAL * 3, req)
    world.assert_holds(req, 63 // BLOCK)
    assert world.sender.order[0] == b"a"


def test_a_shared_prefix_is_sent_once(world: World) -> None:
    one = world.request("a", list(range(64)), row=0)
    other = world.request("b", [*range(48), *range(500, 540)], row=1)
    world.prefill(one, other)  # the sender of this test fails on a key that is sent twice
    assert world.counters.saved_tokens == 48
    assert len(world.sender.sent) == 4 + 2


def test_the_longest_goes_first_and_what_has_no_room_goes_later(world: World) -> None:
    short, long = world.request("s", list(range(48)), row=0), world.request("l", list(range(600, 680)), row=1)
    world.sender.blocks = 6
    world.prefill(short, long)
    assert world.sender.order == [b"l", b"s"]
    world.assert_holds(long, 5)
    assert world.counters.lag_tokens == 2 * BLOCK
    world.sender.blocks = 100
    world.decode(DECODE_INTERVAL, short, long)
    world.assert_holds(short, 3)


@pytest.mark.parametrize(
    "fields",
    [
        {"input_embeds": [0.0]},
        {"multimodal_inputs": object()},
        {"session": object()},
        {"skip_radix_cache_insert": True},
        {"sampling_params": SimpleNamespace(custom_params={"kevlar_shadow": False})},
    ],
)
def test_what_cannot_or_must_not_be_shadowed_is_not(world: World, fields: dict[str, Any]) -> None:
    req = world.request("a", list(range(100)), row=0, **fields)
    world.prefill(req)
    world.decode(DECODE_INTERVAL, req, last=True)
    assert not world.sender.sent


def test_short_contexts_wait_until_they_are_worth_it(world: World) -> None:
    req = world.request("a", list(range(20)), row=0)
    world.prefill(req)
    assert not world.sender.sent
    world.decode(DECODE_INTERVAL * 2, req)
    world.assert_holds(req, 2)


def test_a_finished_request_leaves_the_rest_of_it_from_the_tree(world: World) -> None:
    req = world.request("a", list(range(70)), row=2)
    world.prefill(req)
    slots = [3000 + i for i in range(80)]
    world.tree.cached[tuple([*range(70), *[1] * 10])] = slots
    world.decode(11, req, last=True)
    assert world.sender.ended_requests == [b"a"]
    world.assert_holds(req, 4)
    # The fifth block was completed by the last tokens: it was copied from where the tree has it.
    assert world.sender.sent[world.keys(req)[4]] == slots[64:80]


def test_a_new_target_gets_what_runs_and_what_has_finished(world: World) -> None:
    done, running = world.request("d", list(range(64)), row=0), world.request("r", list(range(700, 760)), row=1)
    world.prefill(done, running)
    world.tree.cached[tuple(range(64))] = list(range(64))
    world.decode(1, done, last=True)
    world.sender.link, world.sender.sent = None, {}
    world.decode(DECODE_INTERVAL, running)
    assert not world.sender.sent
    world.sender.link = ShadowLink(1 << 20)
    world.decode(DECODE_INTERVAL, running)
    world.exporter.idle()
    world.assert_holds(done, 4)
    world.assert_holds(running, 4)


def test_weights_that_change_end_what_mixes_both(world: World) -> None:
    req = world.request("a", list(range(64)), row=0)
    world.prefill(req)
    before = len(world.sender.sent)
    world.exporter.set_content("")
    world.decode(DECODE_INTERVAL * 3, req)
    world.exporter.set_content("other")
    world.decode(DECODE_INTERVAL * 3, req, last=True)
    world.exporter.idle()
    assert len(world.sender.sent) == before
    fresh = world.request("b", list(range(64)), row=1)
    world.prefill(fresh)
    assert set(world.keys(fresh, "other")) <= world.sender.sent.keys()


def test_what_the_target_lost_is_sent_again_but_not_for_ever(world: World) -> None:
    req = world.request("a", list(range(64)), row=0)
    world.prefill(req)
    for _ in range(SENT_AGAIN):
        world.sender.lose(*world.keys(req)[2:])
        world.decode(DECODE_INTERVAL * 2, req)
        world.assert_holds(req, len(world.keys(req)))
    world.sender.lose(*world.keys(req)[2:])
    world.decode(DECODE_INTERVAL * 6, req)
    assert world.keys(req)[2] not in world.sender.sent


def test_the_end_of_a_request_is_told_once_and_only_to_who_knows_of_it(world: World) -> None:
    short = world.request("s", list(range(20)), row=0)
    long = world.request("l", list(range(100, 164)), row=1)
    world.prefill(short, long)
    world.decode(1, short, long, last=True)
    assert world.sender.ended_requests == [b"l"]
    del long
    world.exporter.idle()
    assert world.sender.ended_requests == [b"l"]


def test_a_request_that_vanishes_ends_too(world: World) -> None:
    """Aborted in the queue after a retraction, or between two chunks: no result of it is processed any more."""
    req = world.request("a", list(range(64)), row=0)
    world.prefill(req)
    del req
    gc.collect()
    world.exporter.idle()
    assert world.sender.ended_requests == [b"a"]


def test_who_has_fallen_behind_goes_on_as_soon_as_there_is_room(world: World) -> None:
    """Many that decode make more KV in eight steps than the window has room for."""
    req = world.request("a", list(range(32 * BLOCK)), row=0)
    world.sender.blocks = 4
    world.prefill(req)
    world.assert_holds(req, 4)
    enough = world.exporter._least_room()
    assert 4 < enough < 28
    for room, holds in ((enough - 1, 4), (enough, 4 + enough), (28 - enough, 4 + enough)):
        world.sender.blocks = room
        world.decode(1, req)
        assert len(world.sender.sent) == holds
    world.sender.blocks = 100
    world.decode(1, req)
    world.assert_holds(req, 32)
    world.decode(7, req)
    assert world.exporter._decode_steps == 7, "with nothing missing the next copy is in its time"


def test_what_waits_for_room_is_bounded_by_what_is_remembered(world: World) -> None:
    world.sender.blocks = 0
    count = Rows.capacity_tokens // 64 + 20
    for number in range(count):
        req = world.request(f"r{number}", list(range(number * 100, number * 100 + 64)), row=number % 8)
        world.prefill(req)
        world.decode(1, req, last=True)
    waiting = list(world.exporter._behind.values())
    assert len(waiting) == Rows.capacity_tokens // 64
    assert [sequence.rid for sequence in waiting][-1] == f"r{count - 1}".encode()
    assert world.counters.dropped_tokens == 20 * 64


def test_a_target_that_keeps_nothing_of_a_finished_request_is_not_sent_it_for_ever(world: World) -> None:
    world.sender.blocks = 0
    req = world.request("a", list(range(160)), row=0)
    world.prefill(req)
    world.tree.cached[tuple(range(160))] = list(range(160))
    world.decode(1, req, last=True)
    world.sender.window_bytes = 4 * BLOCK * Rows.token_bytes
    sent = 0
    for _ in range(20):
        world.sender.blocks = 4  # less than it is: it goes in parts
        world.exporter.idle()
        sent += len(world.sender.sent)
        world.sender.lose(*list(world.sender.sent))
    assert sent == 4 * (1 + SENT_AGAIN)
    assert not world.exporter._behind and world.counters.dropped_tokens == 160


def test_a_finished_request_of_which_the_target_lost_the_beginning_is_sent_whole(world: World) -> None:
    req = world.request("a", list(range(64)), row=0)
    world.prefill(req)
    world.sender.lose(*world.keys(req))
    world.tree.cached[tuple(range(64))] = list(range(64))
    world.decode(1, req, last=True)
    world.assert_holds(req, 4)


def test_without_memory_for_copies_it_is_sent_when_there_is(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    running, finished = (world.request(name, list(range(start, start + 64)), row=row) for name, start, row in CASES)
    with monkeypatch.context() as without:
        without.setattr(Rows, "read", lambda *_: None)
        world.prefill(running, finished)
        world.exporter._not_before = 0.0
        world.tree.cached[tuple(range(100, 164))] = world.table[1, :64].tolist()
        world.decode(1, finished, last=True)
    assert world.sender.sent == {} and world.sender.link is not None and not world.sender.link.known
    world.exporter.idle()
    assert world.sender.sent == {}, "it is not tried at every step"
    world.exporter._not_before = 0.0
    world.decode(8, running)
    world.assert_holds(running, 4)
    world.assert_holds(finished, 4)


def test_copies_that_failed_are_nobodys_loss_at_the_target(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two with one prefix the shorter counts on the copy of the longer."""
    shared = list(range(64))
    long, short = (world.request(name, shared + [number] * more, row) for name, number, more, row in PAIR)
    with monkeypatch.context() as without:
        without.setattr(Rows, "read", lambda *_: None)
        for _ in range(2 * SENT_AGAIN):
            world.exporter._not_before = 0.0
            world.decode(8, long, short)
    assert world.counters.saved_tokens == 0
    assert world.counters.lag_tokens == sum(len(world.keys(req)) * BLOCK for req in (long, short))
    world.exporter._not_before = 0.0
    world.decode(8, long, short)
    for req in (long, short):
        assert set(world.keys(req)) <= world.sender.sent.keys()


def test_a_prefill_does_not_make_it_forget_what_others_miss(world: World) -> None:
    behind, new = world.request("a", list(range(32 * BLOCK)), row=0), world.request("b", [7] * 64, row=1)
    world.sender.blocks = 4
    world.prefill(behind)
    world.sender.blocks = 4
    world.prefill(new)
    world.sender.blocks = 100
    world.decode(1, behind)
    world.assert_holds(behind, 32)
