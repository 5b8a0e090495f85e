"""One store for several ranks: where all tensor-parallel ranks have the same KV, one of them keeps the shadow for all.

The others read what a promotion is to use in the memory of that rank, and tell it when they have.
"""

from __future__ import annotations

import mmap
import os

import numpy as np
import zmq

from sglang_kevlar.protocol.shadow import Release, Shelf
from sglang_kevlar.shadow.sockets import dial, frame


def check() -> None:
    """Raises ValueError where a process may not open the files of others of its user: no store can be shared then."""
    try:
        os.listdir(f"/proc/{os.getppid()}/fd")
    except OSError as error:
        raise ValueError(f"ranks cannot share memory here: {error}") from error


class MappableMemory:
    """Memory that other ranks of this host map by ``file``. It has no name, so nothing can be left behind."""

    def __init__(self, blocks: int, block_bytes: int) -> None:
        descriptor = self._descriptor = os.memfd_create("kevlar-shadow")
        os.ftruncate(descriptor, blocks * block_bytes)
        memory = mmap.mmap(descriptor, blocks * block_bytes)
        self.bytes = np.frombuffer(memory, dtype=np.uint8).reshape(blocks, block_bytes)
        # Of this process: it ends with the rank's part in this epoch, at the latest.
        self.file = f"/proc/{os.getpid()}/fd/{descriptor}"

    def close(self) -> None:
        """The memory goes when nobody has it mapped any more."""
        os.close(self._descriptor)


class SharedStore:
    """The store of another rank, as `shadow.promote` uses it. On the scheduler's thread."""

    def __init__(self, keeper: str, block_bytes: int) -> None:
        """``keeper``: endpoint of the store."""
        self._keeper = keeper
        self._block_bytes = block_bytes
        self._socket: zmq.Socket[bytes] | None = None
        self._memory: np.ndarray | None = None
        self._slots: dict[str, list[int]] = {}

    def expect(self, ticket: str, shelf: Shelf) -> None:
        """What ``ticket`` pins, until it is returned."""
        if self._memory is None:
            flat = np.memmap(shelf.memory, dtype=np.uint8, mode="r")
            self._memory = flat.reshape(-1, self._block_bytes)
        self._slots[ticket] = shelf.slots

    def read(self, ticket: str, first: int, blocks: int) -> np.ndarray:
        """A copy of pinned blocks: uint8 (blocks, block bytes)."""
        assert self._memory is not None
        slots = self._slots[ticket][first : first + blocks]
        assert len(slots) == blocks
        return np.asarray(self._memory[slots])

    def release(self, ticket: str) -> None:
        self._slots.pop(ticket, None)
        if self._socket is None:
            self._socket = dial(self._keeper)
        try:
            self._socket.send(frame(Release(ticket=ticket)), zmq.NOBLOCK)
        except zmq.Again:
            pass  # it does not read: the ticket ends by itself
