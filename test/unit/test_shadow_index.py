"""The store's books against a model that says only what must hold: what is kept, and what goes first."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from sglang_kevlar.control.shadow_index import StoreIndex

CHAINS = 4
DEPTH = 6
TOKENS, ORIGIN = b"", (None, None)
REQUESTS = [b"r0", b"r1", b"r2"]


def key(path: str) -> bytes:
    return path.encode()


@dataclass
class Held:
    parent: str | None
    used: int
    live: set[bytes] = field(default_factory=set)
    pins: int = 0


class IndexMachine(RuleBasedStateMachine):
    """Blocks are named by their path in a small tree, so that chains share prefixes: "a", "ab", "abb", ..."""

    @initialize(capacity=st.integers(1, 8))
    def begin(self, capacity: int) -> None:
        self.index = StoreIndex(capacity)
        self.capacity = capacity
        self.held: dict[str, Held] = {}
        self.leaves: dict[bytes, str] = {}
        self.pinned: list[list[str]] = []
        self.now = 0
        self.evicted = 0

    # -- the model

    def children(self, path: str) -> bool:
        return any(block.parent == path for block in self.held.values())

    def chain(self, path: str) -> list[str]:
        return [path[: end + 1] for end in range(len(path))]

    def use(self, paths: list[str]) -> None:
        self.now += 1
        for path in paths:
            self.held[path].used = self.now

    def set_leaf(self, request: bytes, leaf: str | None) -> None:
        old = self.leaves.pop(request, None)
        for path in self.chain(old) if old else []:
            self.held[path].live.discard(request)
        if leaf is not None:
            self.leaves[request] = leaf
            for path in self.chain(leaf):
                self.held[path].live.add(request)

    def victims(self, parent: str | None, live: bool) -> set[str]:
        """What may be evicted for a child of ``parent``."""
        free = [p for p, block in self.held.items() if not self.children(p) and not block.pins and p != parent]
        idle = [p for p in free if not self.held[p].live]
        if idle:
            oldest = min(self.held[p].used for p in idle)
            return {p for p in idle if self.held[p].used == oldest}
        if not live or not free:
            return set()
        shortest = min(len(p) for p in free)
        return {p for p in free if len(p) == shortest}

    def drop(self, path: str) -> None:
        for request in [request for request, leaf in self.leaves.items() if leaf == path]:
            self.set_leaf(request, path[:-1] or None)
        del self.held[path]

    # -- what happens

    @rule(path=st.text("ab", min_size=1, max_size=DEPTH), request=st.sampled_from([None, *REQUESTS]))
    def put(self, path: str, request: bytes | None) -> None:
        """As the store does: block by block, the request growing with each."""
        for now in self.chain(path):
            parent = now[:-1] or None
            if now not in self.held:
                full = len(self.held) == self.capacity
                allowed = self.victims(parent, request is not None) if full else set()
                slot, evicted = self.index.add(
                    key(now), parent and key(parent), len(now), TOKENS, ORIGIN, request is not None
                )
                gone = [other.decode() for other in evicted]
                assert len(gone) == (1 if full and allowed else 0)
                assert set(gone) <= allowed
                for other in gone:
                    self.evicted += 1
                    self.drop(other)
                assert (slot is not None) == (not full or bool(gone))
                if slot is None:
                    return
                self.now += 1
                self.held[now] = Held(parent, self.now)
            if request is not None:
                old = self.leaves.get(request)
                if old is not None and not now.startswith(old):
                    self.use(self.chain(old))
                self.index.extend_live(request, key(now))
                self.set_leaf(request, now)

    @rule(path=st.text("ab", min_size=2, max_size=DEPTH))
    def put_without_parent(self, path: str) -> None:
        if path[:-1] not in self.held:
            for live in (False, True):
                assert self.index.add(key(path), key(path[:-1]), 0, TOKENS, ORIGIN, live) == (None, [])

    @rule(request=st.sampled_from(REQUESTS))
    def end(self, request: bytes) -> None:
        self.index.end_live(request)
        if (leaf := self.leaves.get(request)) is not None:
            self.set_leaf(request, None)
            self.use(self.chain(leaf))

    @rule(path=st.text("ab", min_size=1, max_size=DEPTH), skip=st.integers(0, 2))
    def pin(self, path: str, skip: int) -> None:
        """From anywhere in a chain: the group that asks has what is before."""
        asked = self.chain(path)[skip:]
        count = self.index.longest([key(p) for p in asked])
        found = asked[:count]
        assert all(p in self.held for p in found) and (count == len(asked) or asked[count] not in self.held)
        self.index.pin([key(p) for p in found])
        if found:
            self.pinned.append(found)
        for p in found:
            self.held[p].pins += 1

    @precondition(lambda self: self.pinned)
    @rule(which=st.integers(0, 100))
    def unpin(self, which: int) -> None:
        paths = self.pinned.pop(which % len(self.pinned))
        self.index.unpin([key(p) for p in paths])
        for p in paths:
            self.held[p].pins -= 1
        self.use(paths)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100))
    def remove(self, which: int) -> None:
        damaged = sorted(self.held)[which % len(self.held)]
        behind = {p for p in self.held if p.startswith(damaged)}
        dropped = [other.decode() for other in self.index.remove(key(damaged))]
        if any(self.held[p].pins for p in behind):
            assert dropped == []
            return
        assert set(dropped) == behind
        for request in [request for request, leaf in self.leaves.items() if leaf in behind]:
            leaf = self.leaves[request]
            self.set_leaf(request, None)
            self.use(self.chain(leaf))
        for p in behind:
            del self.held[p]

    @rule()
    def clear(self) -> None:
        self.index.clear()
        for request in list(self.leaves):
            leaf = self.leaves[request]
            self.set_leaf(request, None)
            self.use(self.chain(leaf))
        kept = {above for p, block in self.held.items() if block.pins for above in self.chain(p)}
        self.held = {p: block for p, block in self.held.items() if p in kept}

    # -- what always holds

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "index"):
            return
        self.index.check()
        assert len(self.index) == len(self.held) <= self.capacity
        assert self.index.evicted == self.evicted
        running = self.index.running()
        assert {request: (leaf.decode(), blocks) for request, leaf, blocks in running} == {
            request: (leaf, len(leaf)) for request, leaf in self.leaves.items()
        }
        assert [blocks for *_, blocks in running] == sorted((blocks for *_, blocks in running), reverse=True)
        assert set(self.index.newest(3)) <= {key(path) for path in self.held}
        for path, block in self.held.items():
            assert self.index.path(key(path)) == [key(above) for above in self.chain(path)]
            ours = self.index.get(key(path))
            assert (ours.depth, ours.live, ours.pins) == (len(path) - 1, len(block.live), block.pins)

    def teardown(self) -> None:
        """Whatever came before: when nothing holds anything any more, all the room can be had again."""
        if not hasattr(self, "index"):
            return
        for paths in self.pinned:
            self.index.unpin([key(p) for p in paths])
        self.index.clear()
        self.index.check()
        assert len(self.index) == 0
        slots = {self.index.add(b"%d" % n, None, 0, TOKENS, ORIGIN, False)[0] for n in range(self.capacity)}
        assert slots == set(range(self.capacity))


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def chain(index: StoreIndex, name: bytes, length: int, request: bytes | None = None) -> list[bytes]:
    """As many of its blocks as there was room for."""
    keys: list[bytes] = []
    for number in range(length):
        block = b"%s%d" % (name, number)
        if index.add(block, keys[-1] if keys else None, 0, TOKENS, ORIGIN, request is not None)[0] is None:
            break
        keys.append(block)
        if request is not None:
            index.extend_live(request, block)
    return keys


def test_a_prefix_in_use_outlives_what_was_once_behind_it():
    """The system prompt of all requests must not go with the oldest of its answers."""
    index = StoreIndex(4)
    prefix = chain(index, b"system", 1)
    index.add(b"answer", prefix[0], 0, TOKENS, ORIGIN, False)
    index.add(b"other", None, 0, TOKENS, ORIGIN, False)
    index.add(b"more", None, 0, TOKENS, ORIGIN, False)
    index.pin(prefix)
    index.unpin(prefix)
    evicted = [index.add(b"new%d" % number, None, 0, TOKENS, ORIGIN, False)[1] for number in range(4)]
    assert evicted == [[b"answer"], [b"other"], [b"more"], [b"system0"]]


def test_finished_sequences_never_cost_a_running_one():
    index = StoreIndex(4)
    assert len(chain(index, b"run", 4, b"request")) == 4
    assert index.add(b"idle", None, 0, TOKENS, ORIGIN, False) == (None, [])
    assert index.longest([b"run0", b"run1", b"run2", b"run3"]) == 4
    index.check()


def test_of_the_running_the_shortest_goes_and_the_longest_stays_whole():
    index = StoreIndex(10)
    long = chain(index, b"long", 5, b"long")
    short = chain(index, b"short", 3, b"short")
    chain(index, b"idle", 2)
    assert len(chain(index, b"grow", 5, b"grow")) == 5
    assert index.longest(long) == 5
    assert index.longest(short) == 0
    assert b"idle0" not in index
    index.check()


def test_books_that_change_a_lot_stay_small():
    index = StoreIndex(8)
    keys = chain(index, b"x", 8)
    for _ in range(5000):
        index.pin(keys)
        index.unpin(keys)
    index.check()
    assert len(index._idle) < 100
