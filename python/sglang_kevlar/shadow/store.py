"""The shadow store of a rank: blocks of KV of other groups' requests, in host memory, found by key.

Filled by the server's thread (`shadow.server`), read by the scheduler's. What is pinned is neither evicted nor moved,
so its bytes are read without the lock.
"""

from __future__ import annotations

import os
import threading
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from sglang_kevlar.control.shadow_index import Block, Origin, StoreIndex
from sglang_kevlar.protocol.shadow import Shelf
from sglang_kevlar.shadow.shelf import MappableMemory
from sglang_kevlar.transport import digest

#: seconds after which a ticket that was never returned ends: its request did not reach the scheduler
TICKET_LIFE = 600.0
RETURNED_KEPT = 1024
#: threads that compute checksums of what is to be promoted, and the least bytes that are worth one
CHECKERS = min(4, os.cpu_count() or 1)
CHECK_BYTES = 4 << 20


class DamagedBlock(Exception):
    """The bytes of a block do not have the checksum or digest that they were sent with."""


@dataclass
class _Ticket:
    keys: list[bytes]
    #: ranks that have not returned it
    readers: int
    #: when it ends by itself, monotonic seconds
    end: float
    #: until then the thread that pins them is at work on them
    checked: bool = False


class ShadowStore:
    def __init__(self, capacity: int, block_bytes: int, readers: int = 1) -> None:
        """``capacity`` in blocks. The memory is only taken as it is first written to.

        ``readers``: how many ranks read what a ticket pins; more than one do so through `shelf`.
        """
        self._index = StoreIndex(capacity)
        self._readers = readers
        self._shared = MappableMemory(capacity, block_bytes) if readers > 1 else None
        self._memory = self._shared.bytes if self._shared else np.empty((capacity, block_bytes), dtype=np.uint8)
        self._lock = threading.Lock()
        self._tickets: dict[str, _Ticket] = {}
        #: tickets that were returned and pin nothing, the last few: some are yet to come
        self._returned: OrderedDict[str, bool] = OrderedDict()
        self._checkers = ThreadPoolExecutor(CHECKERS, "kevlar-shadow-check")
        #: evicted or damaged, for the sources to know
        self._dropped: list[bytes] = []
        #: how often everything was forgotten
        self.clears = 0

    def close(self) -> None:
        """Nobody uses it any more."""
        self._checkers.shutdown(wait=False)
        if self._shared is not None:
            self._shared.close()

    @property
    def evicted(self) -> int:
        return self._index.evicted

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, key: bytes) -> bool:
        # Without the lock: one dictionary lookup, which is atomic, and only a hint by the time it is used.
        return key in self._index

    def put(
        self,
        keys: Sequence[bytes],
        parent: bytes | None,
        crcs: Sequence[int],
        tokens: bytes,
        origin: Origin,
        data: np.ndarray,
        request: bytes | None,
        digests: Sequence[bytes] = (),
    ) -> list[bytes]:
        """Keep blocks that follow each other; ``data``: uint8 (blocks, block bytes).

        ``tokens`` are int64, the same number for each block. ``request``: the running one they are for. ``digests``: of
        each, where somebody may have written other bytes with the same ``crcs``. Returns the keys of those that there
        was no room for, or no block before. Raises DamagedBlock; what came before it is kept.
        """
        width = len(tokens) // len(keys)
        for position, (key, crc) in enumerate(zip(keys, crcs, strict=True)):
            with self._lock:
                if key not in self._index:
                    own = tokens[position * width : (position + 1) * width]
                    slot, evicted = self._index.add(key, parent, crc, own, origin, request is not None)
                    self._dropped += evicted
                    if slot is None:
                        # The source believes the block before to be here.
                        lost = [parent] if parent is not None and parent not in self._index else []
                        return [*lost, *keys[position:]]
                    self._memory[slot] = data[position]
                    # After copying: what the source does to the window later changes nothing.
                    block = self._memory[slot].data
                    if zlib.crc32(block) != crc or (digests and digest(block) != digests[position]):
                        self._index.remove(key)
                        raise DamagedBlock
                if request is not None:
                    self._index.extend_live(request, key)
            parent = key
        return []

    def newest(self, count: int) -> list[bytes]:
        """Keys of at most ``count`` blocks, those that came last."""
        with self._lock:
            return self._index.newest(count)

    def running(self) -> list[tuple[bytes, bytes, int]]:
        """The sources' running requests, each with its last block and how many it has, the longest first."""
        with self._lock:
            return self._index.running()

    def sequence(self, key: bytes) -> tuple[list[bytes], array[int], Origin] | None:
        """Keys and tokens of all blocks up to ``key``; None when it is not held any more."""
        with self._lock:
            if key not in self._index:
                return None
            keys = self._index.path(key)
            blocks = [self._index.get(each) for each in keys]
        return keys, array("q", b"".join(block.tokens for block in blocks)), blocks[-1].origin

    def take_dropped(self) -> list[bytes]:
        """Keys that were held and are not any more, since this was last asked; less what was forgotten by `clear`."""
        with self._lock:
            dropped, self._dropped = self._dropped, []
        return dropped

    def end(self, request: bytes) -> None:
        with self._lock:
            self._index.end_live(request)

    def clear(self) -> None:
        with self._lock:
            self._index.clear()
            self.clears += 1

    def pin(self, keys: Sequence[bytes], ticket: str) -> int:
        """How many of ``keys``, which follow each other, are held intact.

        They stay until every reader has returned the ticket; none do when one has already, because it did not want to
        wait for the answer. Raises ValueError for a ticket that is out already.
        """
        with self._lock:
            if ticket in self._tickets:
                raise ValueError(f"{ticket} pins something already")
            if self._returned.pop(ticket, False):
                return 0
            count = self._index.longest(keys)
            self._index.pin(keys[:count])
            blocks = [self._index.get(key) for key in keys[:count]]
            pinned = _Ticket(list(keys[:count]), self._readers, time.monotonic() + TICKET_LIFE)
            self._tickets[ticket] = pinned
        intact = self._intact(blocks)
        with self._lock:
            self._index.unpin(keys[intact:count])
            if intact < count:
                self._dropped += self._index.remove(keys[intact])
            pinned.keys = pinned.keys[:intact]
            pinned.checked = True
            if pinned.readers <= 0 or not intact:
                self._end(ticket)
        return intact

    def _intact(self, blocks: Sequence[Block]) -> int:
        """How many of them, from the first on, have the bytes that they came with."""

        def check(part: Sequence[Block]) -> int:
            intact = (zlib.crc32(self._memory[block.slot].data) == block.crc for block in part)
            return next((i for i, good in enumerate(intact) if not good), len(part))

        # A request waits for this, and a long context is gigabytes. The checksum does not hold the interpreter's lock.
        size = max(-(-len(blocks) // CHECKERS), CHECK_BYTES // self._memory.shape[1], 1)
        if len(blocks) <= size:
            return check(blocks)
        count = 0
        for good in self._checkers.map(check, [blocks[i : i + size] for i in range(0, len(blocks), size)]):
            count += good
            if good < size:
                break
        return count

    def read(self, ticket: str, first: int, blocks: int) -> np.ndarray:
        """A copy of pinned blocks: uint8 (blocks, block bytes). Raises KeyError when ``ticket`` does not cover them."""
        pinned = self._tickets[ticket].keys
        keys = pinned[first : first + blocks]
        if len(keys) != blocks:
            raise KeyError(f"{ticket} pins {len(pinned)} blocks, {first + blocks} were asked for")
        return self._memory[[self._index.get(key).slot for key in keys]]

    def shelf(self, ticket: str) -> Shelf | None:
        """Where other readers find what ``ticket`` pins; None when there are none, or it pins nothing."""
        with self._lock:
            if self._shared is None or ticket not in self._tickets:
                return None
            slots = [self._index.get(key).slot for key in self._tickets[ticket].keys]
        return Shelf(memory=self._shared.file, slots=slots)

    def release(self, ticket: str) -> None:
        """One reader needs ``ticket`` no more; with the last, its pins end."""
        with self._lock:
            if (returned := self._tickets.get(ticket)) is None:
                self._returned[ticket] = True
                if len(self._returned) > RETURNED_KEPT:
                    self._returned.popitem(last=False)
                return
            returned.readers -= 1
            if returned.readers <= 0 and returned.checked:
                self._end(ticket)

    def expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            for ticket in [name for name, pinned in self._tickets.items() if pinned.end < now and pinned.checked]:
                self._end(ticket)

    def _end(self, ticket: str) -> None:
        self._index.unpin(self._tickets.pop(ticket).keys)

    def check(self) -> None:
        with self._lock:
            self._index.check()
