"""What a shadow store holds: a radix tree of blocks, of bounded size.

A pure bookkeeper: slots are numbers, whoever owns the memory fills them. A block is kept as long as a child of it is,
so a lookup never meets a hole. When room is needed, leaves go: first those no running request needs, least recently
used first; then, for a running request only, those of running requests, shortest context first, because the longest
cost most to compute again. Pinned blocks never go.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

#: ``extra_key`` and ``cache_salt`` of a sequence
Origin = tuple[str | None, str | None]


@dataclass(slots=True)
class Block:
    slot: int
    #: None: the first block of a sequence
    parent: bytes | None
    depth: int
    crc: int
    #: its own tokens, and what separates their tree from others: only kept here, for whoever promotes it
    tokens: bytes
    origin: Origin
    children: int = 0
    #: running requests of the source whose context includes this block
    live: int = 0
    pins: int = 0
    #: when it was last used, itself or with what is behind it
    used: int = 0

    @property
    def idle(self) -> bool:
        return self.children == 0 and self.live == 0 and self.pins == 0


class StoreIndex:
    """Blocks by key, in ``capacity`` slots."""

    def __init__(self, capacity: int) -> None:
        assert capacity > 0
        self.capacity = capacity
        self._blocks: dict[bytes, Block] = {}
        self._free = list(range(capacity - 1, -1, -1))
        #: heap of leaves that nobody needs, by when they were used, among entries that are out of date
        self._idle: list[tuple[int, bytes]] = []
        self._uses = 0
        #: deepest block of each running request
        self._leaves: dict[bytes, bytes] = {}
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        return key in self._blocks

    def get(self, key: bytes) -> Block:
        return self._blocks[key]

    def newest(self, count: int) -> list[bytes]:
        """Keys of the ``count`` blocks added last, children before their parents."""
        return list(itertools.islice(reversed(self._blocks), count))

    def add(
        self, key: bytes, parent: bytes | None, crc: int, tokens: bytes, origin: Origin, live: bool
    ) -> tuple[int | None, list[bytes]]:
        """A slot for a block that is not there yet, and the keys evicted for it. ``live``: for a running request.

        The slot is None when the parent is not held, or everything is pinned or an ancestor of this block; and, if it
        is not live, when everything else is.
        """
        assert key not in self._blocks
        holder = None
        if parent is not None:
            holder = self._blocks.get(parent)
            if holder is None:
                return None, []
            holder.pins += 1  # it must not be evicted for its own child
        evicted = self._make_room(live)
        if holder is not None:
            holder.pins -= 1
        if not self._free:
            self._park(parent)
            return None, evicted
        slot = self._free.pop()
        depth = 0
        if holder is not None:
            holder.children += 1
            depth = holder.depth + 1
        self._blocks[key] = Block(slot, parent, depth, crc, tokens, origin)
        self._use([key])
        return slot, evicted

    def extend_live(self, request: bytes, leaf: bytes) -> None:
        """The running ``request`` has grown to ``leaf``, which is held. Its old leaf is an ancestor of it, or gone."""
        before = self._leaves.get(request)
        if before == leaf:
            return
        key: bytes | None = leaf
        while key is not None and key != before:
            block = self._blocks[key]
            block.live += 1
            key = block.parent
        if before is not None and key is None:
            self._count_down(before)
        self._leaves[request] = leaf

    def end_live(self, request: bytes) -> None:
        leaf = self._leaves.pop(request, None)
        if leaf is not None:
            self._count_down(leaf)

    def running(self) -> list[tuple[bytes, bytes, int]]:
        """Each running request with its last block and how many it has, the longest first."""
        found = [(request, leaf, self._blocks[leaf].depth + 1) for request, leaf in self._leaves.items()]
        return sorted(found, key=lambda each: each[2], reverse=True)

    def path(self, key: bytes) -> list[bytes]:
        """The keys from a first block to ``key``, which is held."""
        keys = []
        above: bytes | None = key
        while above is not None:
            keys.append(above)
            above = self._blocks[above].parent
        return keys[::-1]

    def end_all_live(self) -> None:
        """The source is gone: its requests run nowhere, and are about to be moved here, or are over."""
        for request in list(self._leaves):
            self.end_live(request)

    def longest(self, keys: Sequence[bytes]) -> int:
        """How many of ``keys``, which follow each other, are held."""
        for count, key in enumerate(keys):
            if key not in self._blocks:
                return count
        return len(keys)

    def pin(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            self._blocks[key].pins += 1

    def unpin(self, keys: Sequence[bytes]) -> None:
        """The end of a pin. Counts as a use: the whole chain becomes the most recent."""
        for key in keys:
            block = self._blocks[key]
            assert block.pins > 0
            block.pins -= 1
        self._use(keys)

    def remove(self, key: bytes) -> list[bytes]:
        """Drop a block found damaged, with everything behind it, unless pinned. Returns the keys dropped."""
        behind = {key}
        # Children are always added after their parents, so one pass in that order finds them all.
        for other, block in self._blocks.items():
            if block.parent in behind:
                behind.add(other)
        if any(self._blocks[other].pins for other in behind):
            return []
        for request, leaf in list(self._leaves.items()):
            if leaf in behind:
                self.end_live(request)
        dropped = sorted(behind, key=lambda other: self._blocks[other].depth, reverse=True)
        for other in dropped:
            self._drop(other)
        return dropped

    def clear(self) -> None:
        """Forget everything that is not pinned or an ancestor of what is."""
        self.end_all_live()
        while (key := self._oldest_idle()) is not None:
            self._drop(key)

    def _make_room(self, live: bool) -> list[bytes]:
        if self._free:
            return []
        victim = self._oldest_idle()
        if victim is None and live:
            victim = self._shortest_live()
        if victim is None:
            return []
        self._drop(victim)
        self.evicted += 1
        return [victim]

    def _shortest_live(self) -> bytes | None:
        """Takes the last block of the running request with the shortest context from it."""
        candidates = [
            (self._blocks[leaf].depth, request, leaf)
            for request, leaf in self._leaves.items()
            if self._blocks[leaf].children == 0 and self._blocks[leaf].pins == 0
        ]
        if not candidates:
            return None
        _, _, leaf = min(candidates)
        parent = self._blocks[leaf].parent
        for request in [request for request, other in self._leaves.items() if other == leaf]:
            self._blocks[leaf].live -= 1
            if parent is None:
                del self._leaves[request]
            else:
                self._leaves[request] = parent
        return leaf

    def _count_down(self, leaf: bytes) -> None:
        chain = []
        key: bytes | None = leaf
        while key is not None:
            chain.append(key)
            block = self._blocks[key]
            block.live -= 1
            assert block.live >= 0
            key = block.parent
        self._use(chain)

    def _use(self, keys: Sequence[bytes]) -> None:
        self._uses += 1
        for key in keys:
            self._blocks[key].used = self._uses
            self._park(key)

    def _park(self, key: bytes | None) -> None:
        """Make a block evictable if nothing holds it any more."""
        if key is None or not self._blocks[key].idle:
            return
        if len(self._idle) > 2 * self.capacity:
            self._idle = [entry for entry in set(self._idle) if self._in_force(entry)]
            heapq.heapify(self._idle)
        heapq.heappush(self._idle, (self._blocks[key].used, key))

    def _in_force(self, entry: tuple[int, bytes]) -> bool:
        used, key = entry
        block = self._blocks.get(key)
        return block is not None and block.idle and block.used == used

    def _oldest_idle(self) -> bytes | None:
        while self._idle and not self._in_force(self._idle[0]):
            heapq.heappop(self._idle)
        return self._idle[0][1] if self._idle else None

    def _drop(self, key: bytes) -> None:
        block = self._blocks.pop(key)
        assert block.idle
        self._free.append(block.slot)
        if block.parent is not None:
            self._blocks[block.parent].children -= 1
            self._park(block.parent)

    def check(self) -> None:
        """Assert what holds between any two calls."""
        assert len(self._free) + len(self._blocks) == self.capacity
        slots = [block.slot for block in self._blocks.values()] + self._free
        assert sorted(slots) == list(range(self.capacity))
        children: dict[bytes, int] = {}
        for block in self._blocks.values():
            if block.parent is not None:
                assert block.parent in self._blocks
                children[block.parent] = children.get(block.parent, 0) + 1
        live: dict[bytes, int] = {}
        for leaf in self._leaves.values():
            key: bytes | None = leaf
            while key is not None:
                live[key] = live.get(key, 0) + 1
                key = self._blocks[key].parent
        for key, block in self._blocks.items():
            assert block.children == children.get(key, 0)
            assert block.live == live.get(key, 0)
            assert not block.idle or (block.used, key) in self._idle, (key, block)
