"""Multi-head latent attention (DeepSeek V2 and later) in plain torch.

All heads attend over one latent per token, in the absorbed form: queries come multiplied into the latent space, and
the values are the first part of the keys. Prefill and decode, with and without a prefix, go the same way, so what was
cached does not show in the result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool, MLATokenToKVPool
from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

#: positions in a block of queries: the scores have a row for each head of each, and a column for each token before
QUERIES = 64


_NO_SPARSE = "sparse attention (DSA) is not served on CPU"


class NoSparsePool(DSATokenToKVPool):  # type: ignore[misc]  # mypy does not follow sglang
    """Stands where upstream wants a class for sparse attention's pool, and refuses to be one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(_NO_SPARSE)


def build_pool(*args: Any, index_head_dim: int | None = None, **kwargs: Any) -> MLATokenToKVPool:
    """The latent KV pool: upstream's own, which the shadow copies.

    Upstream hands an out-of-tree class the width of the keys of sparse attention too.

    Raises:
        NotImplementedError: the model has sparse attention.
    """
    if index_head_dim is not None:
        raise NotImplementedError(_NO_SPARSE)
    return MLATokenToKVPool(*args, **kwargs)


def absorb_always(attention: Any, forward_batch: Any) -> Any:
    """How a layer computes a batch, as upstream's ``AttentionBackendRegistry`` asks for each backend.

    Upstream has no entry for torch_native and takes Triton's: a prefill without a prefix then gives keys and values
    of every head to a backend that reads latents from the pool.
    """
    return AttnForwardMethod.MLA


def attend(query: torch.Tensor, latent: torch.Tensor, rank: int, first: int, scaling: float) -> torch.Tensor:
    """Causal attention of some positions of one request: (queries, heads, width) -> (queries, heads, rank).

    ``query`` is of positions ``first`` and on, ``latent`` (tokens, width) of all up to the last of them and perhaps
    more; its first ``rank`` columns are the values. Computed in the dtype of ``latent``.
    """
    count, heads, width = query.shape
    scores = query.reshape(count * heads, width).to(latent.dtype) @ latent.t() * scaling
    unseen = torch.arange(len(latent)) > torch.arange(first, first + count).unsqueeze(1)
    scores.view(count, heads, -1).masked_fill_(unseen.unsqueeze(1), float("-inf"))
    return (torch.softmax(scores, dim=-1) @ latent[:, :rank]).view(count, heads, rank)


def attend_batch(
    query: torch.Tensor,
    output: torch.Tensor,
    key_buffer: torch.Tensor,
    rank: int,
    req_to_token: torch.Tensor,
    requests: Iterable[tuple[int, int, int]],
    scaling: float,
) -> None:
    """Attention of a batch, one request after the other, into ``output`` (tokens, heads, rank).

    ``query`` (tokens, heads, width); ``key_buffer`` (slots, 1, width); ``requests``: row in ``req_to_token``, tokens
    before the queries, number of queries. The latents of the queries' own tokens are in the pool already.
    """
    start = 0
    for row, prefix, count in requests:
        end = prefix + count
        # In float32 whatever the model's type, as fused kernels accumulate. Blocks begin at multiples of QUERIES and
        # reach up to the next: a position's sums are of the same length however a prompt is cut, which batch
        # invariance needs.
        latent = torch.zeros(-(-end // QUERIES) * QUERIES, query.shape[2])
        latent[:end] = key_buffer[req_to_token[row, :end], 0]
        position = prefix
        while position < end:
            block_end = (position // QUERIES + 1) * QUERIES
            last = min(block_end, end)
            rows = slice(start + position - prefix, start + last - prefix)
            output[rows] = attend(query[rows], latent[:block_end], rank, position, scaling)
            position = last
        start += count


def _holds_latents(k_cache: torch.Tensor, v_cache: torch.Tensor) -> bool:
    return k_cache.data_ptr() == v_cache.data_ptr()


def make_extend(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Stands in for ``TorchNativeAttnBackend._run_sdpa_forward_extend``; ``original`` does what is not MLA."""

    def extend(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        extend_prefix_lens: torch.Tensor,
        extend_seq_lens: torch.Tensor,
        *rest: Any,
        **options: Any,
    ) -> torch.Tensor:
        if not _holds_latents(k_cache, v_cache):
            return original(
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens,
                extend_seq_lens, *rest, **options,
            )  # fmt: skip
        requests = zip(req_pool_indices.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True)
        attend_batch(query, output, k_cache, v_cache.shape[-1], req_to_token, requests, options["scaling"])
        return output

    return extend


def make_decode(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Stands in for ``TorchNativeAttnBackend._run_sdpa_forward_decode``, likewise."""

    def decode(
        self: Any,
        query: torch.Tensor,
        output: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        req_to_token: torch.Tensor,
        req_pool_indices: torch.Tensor,
        seq_lens: torch.Tensor,
        *rest: Any,
        **options: Any,
    ) -> torch.Tensor:
        if not _holds_latents(k_cache, v_cache):
            return original(
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, *rest, **options
            )
        requests = (
            (row, length - 1, 1) for row, length in zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)
        )
        attend_batch(query, output, k_cache, v_cache.shape[-1], req_to_token, requests, options["scaling"])
        return output

    return decode
