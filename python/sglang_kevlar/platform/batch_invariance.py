"""The torch counterparts of what upstream's deterministic inference does with Triton."""

from __future__ import annotations

import torch

#: rows of one matrix product; small enough to keep a decode step cheap
BLOCK_ROWS = 16

_MASK = 0xFFFFFFFF
_library: torch.library.Library | None = None


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """Hash of (seed, position, column) in 0..2**32-1: (n,), (n,), (m,) -> (n, m) int64.

    MurmurHash3 x86-32 over the four little-endian words seed low, seed high, position, column, as
    ``sglang.kernels.ops.sampling.murmur_hash``, so a seed means the same tokens as on a GPU.
    """
    # uint64 has no shifts on CPU; the bits are the same, and every use of them is masked.
    seed = seed.view(torch.int64) if seed.dtype == torch.uint64 else seed.to(torch.int64)
    state = torch.zeros_like(seed)
    for word in (seed & _MASK, (seed >> 32) & _MASK, positions.to(torch.int64) & _MASK):
        state = _mix(state, word)
    state = _mix(state[:, None], col_indices.to(torch.int64)[None, :] & _MASK) ^ 16
    for multiplier, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        state = ((state ^ (state >> shift)) * multiplier) & _MASK
    return state ^ (state >> 16)


def _mix(state: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    # int64 products wrap; their low 32 bits are right.
    word = (_rotate((word * 0xCC9E2D51) & _MASK, 15) * 0x1B873593) & _MASK
    return (_rotate(state ^ word, 13) * 5 + 0xE6546B64) & _MASK


def _rotate(value: torch.Tensor, by: int) -> torch.Tensor:
    return ((value << by) | (value >> (32 - by))) & _MASK


def enable(enable_bmm: bool = True) -> None:
    """Make matrix products give a row the same bits whatever other rows are in the batch. Idempotent.

    Products with fewer than 4 rows round differently from larger ones (measured, MKL, float32), so every product is
    done in blocks of exactly ``BLOCK_ROWS`` rows. The rest of a step works row by row or request by request already
    in torch_native. Not covered: the all-reduce of more than two tensor-parallel ranks (gloo's ring adds in an order
    that depends on the place in the buffer). Same signature as upstream's ``enable_batch_invariant_mode``.
    """
    global _library
    if _library is None:
        _library = torch.library.Library("aten", "IMPL")
        _library.impl("mm", mm, "CPU")
        _library.impl("addmm", addmm, "CPU")
        # The absorbed form of latent attention has one product per head over the whole batch, some with `out`.
        _library.impl("bmm", bmm, "CPU")
        _library.impl("bmm.out", bmm_out, "CPU")


def enabled() -> bool:
    return _library is not None


def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out = a.new_empty(a.shape[0], b.shape[1])
    whole = a.shape[0] // BLOCK_ROWS * BLOCK_ROWS
    for start in range(0, whole, BLOCK_ROWS):
        # The overload with `out` is not the one replaced here.
        torch.mm(a[start : start + BLOCK_ROWS], b, out=out[start : start + BLOCK_ROWS])
    if whole < a.shape[0]:
        rest = a.shape[0] - whole
        padded = a.new_zeros(BLOCK_ROWS, a.shape[1])
        padded[:rest] = a[whole:]
        product = a.new_empty(BLOCK_ROWS, b.shape[1])
        out[whole:] = torch.mm(padded, b, out=product)[:rest]
    return out


def addmm(bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1) -> torch.Tensor:
    product = mm(a, b)
    if alpha != 1:
        product *= alpha
    return product + (bias if beta == 1 else bias * beta)


def bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return bmm_out(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))


def bmm_out(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    for index in range(a.shape[0]):
        out[index] = mm(a[index], b[index])
    return out
