"""The shadow store of a rank: blocks of KV of other groups' requests, in host memory, found by key.

Filled by the server's thread (`shadow.server`), read by the scheduler's. What is pinned is neither evicted nor moved,
so its bytes are read without the lock.
"""

from __future__ import annotations

import threading
import time
import zlib
from array import array
from collections.abc import Sequence

import numpy as np

from sglang_kevlar.control.shadow_index import Origin, StoreIndex

#: seconds after which a ticket that was never returned ends: its request did not reach the scheduler
TICKET_LIFE = 600.0


class DamagedBlock(Exception):
    """The bytes of a block do not have the checksum that they were sent with."""


class ShadowStore:
    def __init__(self, capacity: int, block_bytes: int) -> None:
        """``capacity`` in blocks. The memory is only taken as it is first written to."""
        self._index = StoreIndex(capacity)
        self._memory = np.empty((capacity, block_bytes), dtype=np.uint8)
        self._lock = threading.Lock()
        #: keys pinned by each ticket, and when it ends by itself
        self._tickets: dict[str, tuple[list[bytes], float]] = {}
        #: evicted or damaged, for the sources to know
        self._dropped: list[bytes] = []
        #: how often everything was forgotten
        self.clears = 0

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
    ) -> list[bytes]:
        """Keep blocks that follow each other; ``data``: uint8 (blocks, block bytes).

        ``tokens`` are int64, the same number for each block. ``request``: the running one they are for. Returns the
        keys of those that there was no room for. Raises DamagedBlock; what came before it is kept.
        """
        width = len(tokens) // len(keys)
        for position, (key, crc) in enumerate(zip(keys, crcs, strict=True)):
            with self._lock:
                if key not in self._index:
                    own = tokens[position * width : (position + 1) * width]
                    slot, evicted = self._index.add(key, parent, crc, own, origin, request is not None)
                    self._dropped += evicted
                    if slot is None:
                        return list(keys[position:])
                    self._memory[slot] = data[position]
                    # After copying: what the source does to the window later changes nothing.
                    if zlib.crc32(self._memory[slot].data) != crc:
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

    def running(self) -> list[bytes]:
        """The last block of each running request of the sources, the longest context first."""
        with self._lock:
            return self._index.live_leaves()

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
        """How many of ``keys``, which follow each other, are held intact. They stay until the ticket is returned.

        Raises ValueError for a ticket that is out already.
        """
        with self._lock:
            if ticket in self._tickets:
                raise ValueError(f"{ticket} pins something already")
            count = self._index.longest(keys)
            self._index.pin(keys[:count])
            blocks = [self._index.get(key) for key in keys[:count]]
        intact = next(
            (i for i, block in enumerate(blocks) if zlib.crc32(self._memory[block.slot].data) != block.crc), count
        )
        with self._lock:
            self._index.unpin(keys[intact:count])
            if intact < count:
                self._dropped += self._index.remove(keys[intact])
            if intact:
                self._tickets[ticket] = (list(keys[:intact]), time.monotonic() + TICKET_LIFE)
        return intact

    def read(self, ticket: str, first: int, blocks: int) -> np.ndarray:
        """A copy of pinned blocks: uint8 (blocks, block bytes). Raises KeyError when ``ticket`` does not cover them."""
        pinned, _ = self._tickets[ticket]
        keys = pinned[first : first + blocks]
        if len(keys) != blocks:
            raise KeyError(f"{ticket} pins {len(pinned)} blocks, {first + blocks} were asked for")
        return self._memory[[self._index.get(key).slot for key in keys]]

    def release(self, ticket: str) -> None:
        """The pins of ``ticket`` end; of one that pins nothing, nothing does."""
        with self._lock:
            keys, _ = self._tickets.pop(ticket, ([], 0.0))
            self._index.unpin(keys)

    def expire(self) -> None:
        now = time.monotonic()
        with self._lock:
            ended = [ticket for ticket, (_, end) in self._tickets.items() if end < now]
        for ticket in ended:
            self.release(ticket)

    def check(self) -> None:
        with self._lock:
            self._index.check()
