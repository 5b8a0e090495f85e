"""Where our code does one thing with one supported SGLang and another with the next.

No other place asks for the version. What differs in declarations and flags is in the ``v...`` modules and ``flags_...``
files beside this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_kevlar.upstream.contract import installed_version

if TYPE_CHECKING:
    import torch

#: Whether a request and a match carry the slots of their prefix, or only its length. An unknown version has no entry,
#: and is not taken for its neighbour.
CARRIES_PREFIX_SLOTS = {"0.5.21": True, "0.5.23": False}
_CARRIES_PREFIX_SLOTS = CARRIES_PREFIX_SLOTS[installed_version()]


def cached_prefix(req: Any) -> int:
    """How many tokens of a request that is about to run are in the pool already."""
    return len(req.prefix_indices) if _CARRIES_PREFIX_SLOTS else int(req.prefix_len)


def matched_slots(tree: Any, match: Any) -> torch.Tensor:
    """The slots of the pool that a ``match_prefix`` of ``tree`` found; good until the next allocation or eviction."""
    slots: torch.Tensor
    if _CARRIES_PREFIX_SLOTS:
        slots = match.device_indices
    else:
        slots = tree.path_device_indices(match.last_device_node)[: match.device_prefix_len]
    return slots
