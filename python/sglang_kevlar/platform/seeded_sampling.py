"""Sampling with a seed, such that a request's tokens do not depend on what it is batched with.

Replaces two functions of upstream's sampler wherever a seed is given. Upstream draws over token ids if no request of
the batch restricts its candidates, and over ranks if any does, so the same seed gives other tokens next to a request
with top_p; and one request with min_p under deterministic inference fails an assertion, which ends the scheduler.
Here every draw is over token ids. Scaling the weights does not move a Gumbel maximum, so min_p needs no
normalisation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def draw(probs: torch.Tensor, seed: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Token ids (n, 1) from weights (n, vocabulary), by upstream's Gumbel trick keyed on (seed, position, token id)."""
    from sglang.srt.layers.sampler import multinomial_with_seed

    result: torch.Tensor = multinomial_with_seed(probs.to(torch.float64).log(), seed, positions)
    return result


def filtered_weights(
    probs: torch.Tensor, top_ks: torch.Tensor, top_ps: torch.Tensor, min_ps: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights by rank with everything cut off set to zero, and the token id of every rank: both (n, vocabulary)."""
    ranked, token_ids = probs.sort(dim=-1, descending=True, stable=True)
    cut = torch.arange(probs.shape[-1], device=probs.device) >= top_ks[:, None]
    cut |= ranked.cumsum(-1) - ranked > top_ps[:, None]
    if min_ps is not None:
        cut |= ranked < ranked[:, :1] * min_ps[:, None]
    return ranked.masked_fill(cut, 0.0), token_ids


def make_unrestricted(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for ``sampler.sampling_from_probs_torch``, which still does what has no seed."""

    def sample(
        probs: torch.Tensor, sampling_seed: torch.Tensor | None = None, positions: torch.Tensor | None = None
    ) -> Any:
        if sampling_seed is None or positions is None:
            return original(probs, sampling_seed, positions)
        return draw(probs, sampling_seed, positions).view(-1).to(torch.int32)

    return sample


def make_restricted(original: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for ``sampler.top_k_top_p_min_p_sampling_from_probs_torch``, which still does what has no seed."""

    def sample(
        probs: torch.Tensor,
        top_ks: torch.Tensor,
        top_ps: torch.Tensor,
        min_ps: torch.Tensor,
        need_min_p_sampling: bool,
        sampling_seed: torch.Tensor | None,
        positions: torch.Tensor,
        *,
        return_filtered_probs: bool = False,
        **more: Any,
    ) -> Any:
        if sampling_seed is None:
            return original(
                probs,
                top_ks,
                top_ps,
                min_ps,
                need_min_p_sampling,
                None,
                positions,
                return_filtered_probs=return_filtered_probs,
                **more,
            )
        ranked, token_ids = filtered_weights(probs, top_ks, top_ps, min_ps if need_min_p_sampling else None)
        weights = torch.zeros_like(probs).scatter_(1, token_ids, ranked)
        tokens = draw(weights, sampling_seed, positions)
        result = tokens.view(-1).to(torch.int32)
        if return_filtered_probs:
            return result, ranked, token_ids.to(torch.int32), weights.gather(1, tokens).view(-1)
        return result

    return sample
