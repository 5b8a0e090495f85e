"""Attention of a prefill behind a cached prefix, at the cost of its own tokens.

``torch_native`` pads the queries of an extend with those of its prefix and throws their results away, so that a few
tokens behind a long prefix (a cache hit, a later chunk, a resumed request) cost as much as the whole context. Here
only the queries that are wanted are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_kevlar.platform import batch_invariance

#: queries at a time: the mask has a row for each and a column for each token of the context
QUERIES = 256


def make_extend(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Stands in for ``TorchNativeAttnBackend._run_sdpa_forward_extend``; ``original`` does what is not plain."""

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
        encoder_lens: torch.Tensor | None = None,
        scaling: float | None = None,
        enable_gqa: bool = False,
        causal: bool = False,
        is_cross_attn: bool = False,
        sliding_window_size: int | None = None,
    ) -> torch.Tensor:
        windowed = sliding_window_size is not None and sliding_window_size > -1
        plain = causal and not is_cross_attn and encoder_lens is None and not windowed
        # With batch invariance every token is to be computed as it was the first time, among the same others.
        if not plain or batch_invariance.enabled() or not bool((extend_prefix_lens > 0).any()):
            return original(
                self, query, output, k_cache, v_cache, req_to_token, req_pool_indices, seq_lens, extend_prefix_lens,
                extend_seq_lens, encoder_lens, scaling, enable_gqa, causal, is_cross_attn, sliding_window_size,
            )  # fmt: skip
        start = 0
        for row, prefix, count in zip(
            req_pool_indices.tolist(), extend_prefix_lens.tolist(), extend_seq_lens.tolist(), strict=True
        ):
            slots = req_to_token[row, : prefix + count]
            key = k_cache[slots].transpose(0, 1).to(query.dtype)
            value = v_cache[slots].transpose(0, 1).to(query.dtype)
            for first in range(0, count, QUERIES):
                last = min(first + QUERIES, count)
                seen = prefix + last
                positions = torch.arange(prefix + first, seen).unsqueeze(1)
                attended = scaled_dot_product_attention(
                    query[start + first : start + last].transpose(0, 1).unsqueeze(0),
                    key[:, :seen].unsqueeze(0),
                    value[:, :seen].unsqueeze(0),
                    attn_mask=torch.arange(seen).unsqueeze(0) <= positions,
                    enable_gqa=enable_gqa,
                    scale=scaling,
                )
                output[start + first : start + last] = attended.squeeze(0).transpose(0, 1)
            start += count
        return output

    return extend
