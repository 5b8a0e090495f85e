"""The KV pool of a rank as rows of bytes: reading rows of given slots, and writing them.

A block is its tokens' rows of the first buffer, one behind the other, then those of the second, and so on.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool


class Staged:
    """KV rows on the host, or on their way there: one array of (tokens, row bytes) for each buffer of the pool."""

    def __init__(self, rows: list[torch.Tensor], arrived: Any = None) -> None:
        self._rows = rows
        self._arrived = arrived

    def wait(self) -> list[np.ndarray]:
        """The rows, once they are on the host. Not to be called on the scheduler's thread."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return [part.view(part.shape[0], -1).view(torch.uint8).numpy() for part in self._rows]


class PoolRows:
    """Raises ValueError with the reason for a pool whose KV cannot be shadowed."""

    def __init__(self, pool: Any, forward_stream: Any = None) -> None:
        """``forward_stream``: the CUDA stream that forward passes run in; None on a CPU."""
        #: whether all tensor-parallel ranks have the same KV
        self.replicated = type(pool) is MLATokenToKVPool
        if type(pool) is MHATokenToKVPool:
            if pool.kv_cache_layout != "nhd":
                raise ValueError(f"the KV layout {pool.kv_cache_layout!r} is not supported")
            self._buffers: list[torch.Tensor] = [*pool.k_buffer, *pool.v_buffer]
        elif type(pool) is MLATokenToKVPool:
            self._buffers = list(pool.kv_buffer)
        else:
            # Recurrent states, sliding windows, sparse indices, scales: what they hold besides rows of slots is lost.
            raise ValueError(f"KV in a {type(pool).__name__} is not supported")
        self._stream = forward_stream
        self.capacity_tokens = int(pool.size)
        self._kind: torch.dtype = pool.dtype  # the buffers of fp8 pools are of bytes
        self.dtype = str(pool.dtype).removeprefix("torch.")
        self.row_bytes = [buffer[0].numel() * buffer.element_size() for buffer in self._buffers]

    @property
    def token_bytes(self) -> int:
        return sum(self.row_bytes)

    def read(self, slots: torch.Tensor) -> Staged:
        """Copy the rows of ``slots`` (n,). Ordered behind the forward passes already launched and before the next."""
        slots = slots.long()
        with self._in_forward_order():
            rows = [buffer.index_select(0, slots) for buffer in self._buffers]
            if self._stream is None:
                return Staged(rows)
            host = [torch.empty(part.shape, dtype=part.dtype, pin_memory=True) for part in rows]
            for target, part in zip(host, rows, strict=True):
                target.copy_(part, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return Staged(host, arrived)

    def write(self, slots: torch.Tensor, blocks: np.ndarray, skip: int) -> None:
        """Write the rows of consecutive blocks, less their first ``skip`` tokens, to ``slots``.

        ``blocks``: uint8 (blocks, block bytes).
        """
        block_tokens = blocks.shape[1] // self.token_bytes
        column = 0
        with self._in_forward_order():
            for buffer, row in zip(self._buffers, self.row_bytes, strict=True):
                width = block_tokens * row
                part = np.ascontiguousarray(blocks[:, column : column + width]).reshape(-1, row)[skip:]
                values = torch.from_numpy(part).view(buffer.dtype).view(len(part), *buffer.shape[1:])
                buffer.index_copy_(0, slots, values.to(buffer.device))
                column += width

    def distance(self, one: np.ndarray, other: np.ndarray) -> float:
        """How far two blocks (uint8) are apart, as a share of the first's norm. NaN where a value is not a number."""
        first, second = (torch.from_numpy(block).view(self._kind).float() for block in (one, other))
        norm = torch.linalg.vector_norm(first)
        return float(torch.linalg.vector_norm(first - second) / norm.clamp_min(1e-30))

    def _in_forward_order(self) -> AbstractContextManager[Any]:
        # In the forward passes' own stream: a slot that one of them still writes, for a request that ended meanwhile,
        # is not used by us before it has, and what we read is not overwritten by the next.
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        return torch.cuda.stream(self._stream)


def pack(rows: Sequence[np.ndarray], first: int, blocks: int, block_tokens: int, out: np.ndarray) -> None:
    """Lay tokens ``first`` to ``first + blocks * block_tokens`` of ``rows`` out as blocks.

    ``out``: uint8 (blocks, block bytes).
    """
    column = 0
    for part in rows:
        width = block_tokens * part.shape[1]
        tokens = part[first : first + blocks * block_tokens]
        out[:, column : column + width] = tokens.reshape(blocks, width)
        column += width
