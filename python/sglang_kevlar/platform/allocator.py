"""KV slot allocation for page sizes above 1 without Triton."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.mem_cache.allocator import (
    BaseTokenToKVPoolAllocator,
    PagedTokenToKVPoolAllocator,
    TokenToKVPoolAllocator,
)


def build_allocator(size: int, *, page_size: int, **kwargs: Any) -> BaseTokenToKVPoolAllocator:
    """The allocator of a pool of ``size`` slots.

    Upstream asks an out-of-tree platform for one class whatever the page size; page size 1 is to get the plain one.
    """
    if page_size == 1:
        return TokenToKVPoolAllocator(size, **kwargs)
    return TorchPagedAllocator(size, page_size=page_size, **kwargs)


class TorchPagedAllocator(PagedTokenToKVPoolAllocator):  # type: ignore[misc]  # mypy does not follow sglang
    """Upstream's paged allocator with its two Triton kernels in torch.

    Unlike those, a call that returns None (pool exhausted) reads nothing outside the free list.
    """

    free_pages: torch.Tensor

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots of positions ``prefix_lens[i]..seq_lens[i]`` of every request in turn: (extend_num_tokens,) int64.

        ``last_loc`` (batch,) is the slot of position ``prefix_lens[i] - 1``, -1 for none. None when pages run out.
        """
        if self.debug_mode:
            assert torch.all((last_loc + 1) % self.page_size == prefix_lens % self.page_size)
        return self._extend(prefix_lens, seq_lens, last_loc, extend_num_tokens)

    def alloc_decode(
        self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor
    ) -> torch.Tensor | None:
        """One slot per request, for position ``seq_lens[i] - 1``: (batch,) int64. None when pages run out."""
        if self.debug_mode:
            assert torch.all((last_loc + 2) % self.page_size == seq_lens % self.page_size)
        return self._extend(seq_lens - 1, seq_lens, last_loc, len(seq_lens))

    def _extend(
        self, prefix_lens: torch.Tensor, seq_lens: torch.Tensor, last_loc: torch.Tensor, num_tokens: int
    ) -> torch.Tensor | None:
        page_size = self.page_size
        # Pages that requests own, and pages they need. The open page of a prefix is filled up first.
        owned = (prefix_lens + page_size - 1) // page_size
        new_pages = (seq_lens + page_size - 1) // page_size - owned
        total_new = int(new_pages.sum())
        if total_new > len(self.free_pages):
            self.merge_and_sort_free()
        if total_new > len(self.free_pages):
            return None

        lens = seq_lens - prefix_lens
        request = torch.repeat_interleave(lens, output_size=num_tokens)
        position = torch.arange(num_tokens) - (lens.cumsum(0) - lens - prefix_lens)[request]
        ordinal = position // page_size - owned[request]
        slots = last_loc[request] + 1 + position - prefix_lens[request]
        in_new = ordinal >= 0
        pages = self.free_pages[(new_pages.cumsum(0) - new_pages)[request[in_new]] + ordinal[in_new]]
        slots[in_new] = pages * page_size + position[in_new] % page_size

        if self.debug_mode:
            assert len(torch.unique(slots)) == len(slots)
        self.free_pages = self.free_pages[total_new:]
        return slots
