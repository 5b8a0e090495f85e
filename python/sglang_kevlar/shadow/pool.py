"""The KV pool of a rank as rows of bytes: reading rows of given slots, and writing them.

A block is its tokens' rows of the first buffer, one behind the other, then those of the second, and so on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool

logger = logging.getLogger(__name__)


class Staged:
    """KV rows on the host, or on their way there: those of the first buffer of the pool, then those of the second."""

    def __init__(self, rows: torch.Tensor, row_bytes: Sequence[int], arrived: Any = None) -> None:
        """``rows``: uint8, all of them. ``row_bytes``: of a token, by buffer. ``arrived``: an event of CUDA."""
        self._rows = rows
        self._row_bytes = row_bytes
        self._arrived = arrived

    def wait(self) -> list[np.ndarray]:
        """The rows, once they are on the host: uint8 (buffers, tokens, row bytes), for each run of buffers whose rows
        are of one size. Not to be called on the scheduler's thread."""
        if self._arrived is not None:
            # A thread begins on the first device of all, where CUDA would make a context for it to wait in.
            torch.cuda.set_device(self._arrived.device)
            self._arrived.synchronize()
            self._arrived = None
        memory = self._rows.numpy()
        tokens = len(memory) // sum(self._row_bytes)
        runs, at = [], 0
        for size, run in groupby(self._row_bytes):
            buffers = len(list(run))
            end = at + buffers * tokens * size
            runs.append(memory[at:end].reshape(buffers, tokens, size))
            at = end
        return runs


class PoolRows:
    """Raises ValueError with the reason for a pool whose KV cannot be shadowed."""

    def __init__(self, pool: Any, stream: Any = None) -> None:
        """``stream``: the CUDA stream that forward passes run in; None on a CPU."""
        #: whether all tensor-parallel ranks have the same KV
        self.replicated = type(pool) is MLATokenToKVPool
        if type(pool) is MHATokenToKVPool:
            if pool.kv_cache_layout != "nhd":
                raise ValueError(f"the KV layout {pool.kv_cache_layout!r} is not supported")
            if pool.is_quantized_kv_cache:
                raise ValueError(f"KV that is quantised ({pool.quant_method.name}) is not supported")
            self._buffers: list[torch.Tensor] = [*pool.k_buffer, *pool.v_buffer]
        elif type(pool) is MLATokenToKVPool:
            self._buffers = list(pool.kv_buffer)
        else:
            # Recurrent states, sliding windows, sparse indices, scales: what they hold besides rows of slots is lost.
            raise ValueError(f"KV in a {type(pool).__name__} is not supported")
        self._stream = stream
        self.capacity_tokens = int(pool.size)
        self._kind: torch.dtype = pool.dtype  # the buffers of fp8 pools are of bytes
        self.dtype = str(pool.dtype).removeprefix("torch.")
        self.row_bytes = [buffer[0].numel() * buffer.element_size() for buffer in self._buffers]

    @property
    def token_bytes(self) -> int:
        return sum(self.row_bytes)

    def read(self, slots: torch.Tensor) -> Staged | None:
        """Copy the rows of ``slots`` (n,). Ordered behind the forward passes already launched and before the next.

        None: there is no memory for that, on the device or pinned on the host.
        """
        try:
            return self._read(slots)
        except RuntimeError as error:
            if "out of memory" not in str(error):
                raise
            logger.warning("no memory to copy %d tokens of KV for the shadow: %s", len(slots), error)
            return None

    def _read(self, slots: torch.Tensor) -> Staged:
        slots = slots.long()
        with self._in_forward_order(slots):
            rows = torch.empty(len(slots) * self.token_bytes, dtype=torch.uint8, device=slots.device)
            at = 0
            for buffer, row in zip(self._buffers, self.row_bytes, strict=True):
                part = rows[at : at + len(slots) * row].view(buffer.dtype).view(len(slots), *buffer.shape[1:])
                torch.index_select(buffer, 0, slots, out=part)
                at += len(slots) * row
            if self._stream is None:
                return Staged(rows, self.row_bytes)
            host = torch.empty(len(rows), dtype=torch.uint8, pin_memory=True)
            host.copy_(rows, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        return Staged(host, self.row_bytes, arrived)

    def write(self, slots: torch.Tensor, blocks: np.ndarray, skip: int) -> None:
        """Write the rows of consecutive blocks, less their first ``skip`` tokens, to ``slots`` (n,), int64.

        ``blocks``: uint8 (blocks, block bytes).
        """
        block_tokens = blocks.shape[1] // self.token_bytes
        host = torch.from_numpy(np.require(blocks, requirements=["C", "W"]))
        column = 0
        with self._in_forward_order(slots):
            data = host if self._stream is None else host.pin_memory().to(slots.device, non_blocking=True)
            for buffer, row in zip(self._buffers, self.row_bytes, strict=True):
                width = block_tokens * row
                part = data[:, column : column + width].reshape(-1, row)[skip:]
                buffer.index_copy_(0, slots, part.view(buffer.dtype).view(len(part), *buffer.shape[1:]))
                column += width
        if self._stream is not None:
            # What else may use these slots, in the scheduler's own stream, finds them written.
            torch.cuda.current_stream().wait_stream(self._stream)

    def distance(self, one: np.ndarray, other: np.ndarray) -> float:
        """How far two blocks (uint8) are apart, as a share of the first's norm. NaN where a value is not a number."""
        first, second = (torch.from_numpy(block).view(self._kind).float() for block in (one, other))
        norm = torch.linalg.vector_norm(first)
        return float(torch.linalg.vector_norm(first - second) / norm.clamp_min(1e-30))

    def _in_forward_order(self, slots: torch.Tensor) -> AbstractContextManager[Any]:
        # In the forward passes' own stream: a slot that one of them still writes, for a request that ended meanwhile,
        # is not used by us before it has, and what we read is not overwritten by the next.
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream())
        # They are the scheduler's stream's, which would use their memory again before this one has come to them.
        slots.record_stream(self._stream)
        return torch.cuda.stream(self._stream)


def pack(rows: Sequence[np.ndarray], first: int, blocks: int, block_tokens: int, out: np.ndarray) -> None:
    """Lay tokens ``first`` to ``first + blocks * block_tokens`` of ``rows`` (`Staged.wait`) out as blocks.

    ``out``: uint8 (blocks, block bytes).
    """
    column = 0
    for run in rows:
        buffers, _, row = run.shape
        width = buffers * block_tokens * row
        tokens = run[:, first : first + blocks * block_tokens].reshape(buffers, blocks, block_tokens, row)
        out[:, column : column + width].reshape(blocks, buffers, block_tokens, row)[...] = tokens.swapaxes(0, 1)
        column += width
