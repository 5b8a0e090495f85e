"""What a rank's shadow needs of SGLang: the KV pool, its allocator and the radix tree, in a few lines each.

The KV of a token is a hash over everything it depends on, so that any of it that is found can be judged.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from hashlib import blake2b
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from sglang_kevlar.control.shadow_index import Origin
from sglang_kevlar.control.shadow_keys import KeyChain, root_key
from sglang_kevlar.protocol.shadow import SHADOW_VERSION, Layout

BLOCK = 4
ROW = 8
LAYOUT = Layout(
    version=SHADOW_VERSION, upstream="0", model="m", shard="tp0/1 pp0/1", kv_dtype="float32", page_size=1,
    block_tokens=BLOCK, rows=[ROW, ROW],
)  # fmt: skip


def kv_of(before: bytes, token: int, weights: int) -> bytes:
    """KV of one token, behind the token whose KV is ``before``."""
    return blake2b(b"%b %d %d" % (before, token, weights), digest_size=2 * ROW).digest()


def first_kv(origin: Origin) -> bytes:
    return repr(origin).encode()


def as_block(kv: list[bytes]) -> bytes:
    """A block as the store has it: what is in one buffer behind what is in the other."""
    return b"".join(row[:ROW] for row in kv) + b"".join(row[ROW:] for row in kv)


class Copied:
    def __init__(self, rows: np.ndarray) -> None:
        self._rows = rows

    def wait(self) -> list[np.ndarray]:
        return [np.stack([self._rows[:, :ROW], self._rows[:, ROW:]])]


class Pool:
    """As `shadow.pool.PoolRows`, and the allocator of its slots."""

    token_bytes = 2 * ROW
    replicated = False

    def __init__(self, blocks: int) -> None:
        self.capacity_tokens = blocks * BLOCK
        self.kv = np.zeros((self.capacity_tokens, 2 * ROW), np.uint8)
        self.free = list(range(self.capacity_tokens))

    def read(self, slots: torch.Tensor) -> Copied:
        return Copied(self.kv[slots.numpy()])

    def write(self, slots: torch.Tensor, blocks: np.ndarray, skip: int) -> None:
        half = BLOCK * ROW
        rows = [blocks[:, :half].reshape(-1, ROW), blocks[:, half:].reshape(-1, ROW)]
        self.kv[slots.numpy()] = np.concatenate(rows, axis=1)[skip:]

    def available_size(self) -> int:
        return len(self.free)

    def alloc(self, count: int) -> torch.Tensor | None:
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return torch.tensor(taken, dtype=torch.int64)


@dataclass(eq=False)
class Node:
    key: bytes
    slots: list[int]
    parent: Node | None
    children: int = 0
    locks: int = 0


class Tree:
    """The radix tree, in blocks. Like upstream's it knows tokens and tenants, and nothing of weights."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.nodes: dict[bytes, Node] = {}
        self.tree_core = self

    def match(self, tokens: array[int], origin: Origin) -> list[Node]:
        chain = KeyChain(root_key("", *origin), BLOCK)
        chain.grow(tokens[: len(tokens) // BLOCK * BLOCK])
        found = []
        for key in chain.keys:
            if (node := self.nodes.get(key)) is None:
                break
            found.append(node)
        return found

    def add(self, tokens: array[int], origin: Origin, slots: list[int], own_from: int) -> None:
        """Keep whole blocks; of ``slots`` those from token ``own_from`` on are the caller's, and not any more."""
        chain = KeyChain(root_key("", *origin), BLOCK)
        chain.grow(tokens[: len(tokens) // BLOCK * BLOCK])
        parent = None
        for i, key in enumerate(chain.keys):
            own = slots[i * BLOCK : (i + 1) * BLOCK]
            node = self.nodes.get(key)
            if node is None:
                node = self.nodes[key] = Node(key, own, parent)
                if parent is not None:
                    parent.children += 1
            elif i * BLOCK >= own_from:
                self._pool.free += own
            parent = node
        self._pool.free += slots[max(own_from, len(chain.keys) * BLOCK) :]

    def lock(self, node: Node | None, change: int) -> None:
        while node is not None:
            node.locks += change
            assert node.locks >= 0
            node = node.parent

    def evict(self, tokens: int) -> None:
        while len(self._pool.free) < tokens:
            leaf = next((node for node in self.nodes.values() if not node.children and not node.locks), None)
            if leaf is None:
                return
            self.drop(leaf)

    def drop(self, leaf: Node) -> None:
        del self.nodes[leaf.key]
        if leaf.parent is not None:
            leaf.parent.children -= 1
        self._pool.free += leaf.slots

    # -- upstream's calls, as far as the shadow uses them

    def match_full_device_prefix(self, key: Any) -> tuple[int, list[Node], None]:
        found = self.match(key.token_ids, (key.extra_key, key.cache_salt))
        return len(found) * BLOCK, found, None

    def root_node_handle(self, extra_key: str | None) -> None:
        return None

    def collect_full_device_indices(self, node: list[Node], root: None) -> torch.Tensor:
        return torch.tensor([slot for each in node for slot in each.slots], dtype=torch.int64)

    def path_device_indices(self, last: Node | None) -> torch.Tensor:
        path = []
        while last is not None:
            path.append(last)
            last = last.parent
        return self.collect_full_device_indices(path[::-1], None)

    def match_prefix(self, params: Any) -> Any:
        found = self.match(params.key.token_ids, (params.key.extra_key, params.key.cache_salt))
        last = found[-1] if found else None
        slots = self.collect_full_device_indices(found, None)
        # What holds the slots depends on the version.
        return SimpleNamespace(
            device_indices=slots, device_prefix_len=len(slots), last_device_node=last, host_hit_length=0
        )

    def inc_lock_ref(self, node: Node | None) -> Any:
        self.lock(node, 1)
        return SimpleNamespace(to_dec_params=lambda: None)

    def dec_lock_ref(self, node: Node | None, params: None) -> None:
        self.lock(node, -1)

    def insert(self, params: Any) -> None:
        key = params.key
        self.add(key.token_ids, (key.extra_key, key.cache_salt), params.value.tolist(), params.prev_prefix_len)

    def evictable_size(self) -> int:
        return sum(BLOCK for node in self.nodes.values() if not node.locks)
