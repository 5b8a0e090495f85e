"""What the groups say of their shadows: for the status and for the metrics."""

from __future__ import annotations

from typing import Any

import msgspec

from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.protocol.shadow import ShadowCounters


class ShadowReader:
    """The counters that ranks write into the run directory."""

    def __init__(self, plan: LaunchPlan, paths: Paths) -> None:
        self._ranks = plan.tp_size * plan.pp_size
        self._paths = paths

    def read(self, group: int, epoch: int) -> list[ShadowCounters]:
        """One a rank that keeps a shadow; empty while there are none."""
        return list(self.by_rank(group, epoch).values())

    def by_rank(self, group: int, epoch: int) -> dict[int, ShadowCounters]:
        found = {}
        for rank in range(self._ranks):
            try:
                with open(self._paths.shadow_counters(group, epoch, rank), "rb") as file:
                    found[rank] = msgspec.json.decode(file.read(), type=ShadowCounters)
            except (OSError, msgspec.DecodeError):
                continue
        return found

    def status(self, group: int, epoch: int) -> dict[str, Any] | None:
        return summary(self.read(group, epoch), self._ranks)


def summary(ranks: list[ShadowCounters], count: int) -> dict[str, Any] | None:
    """``shadow`` of a group with ``count`` ranks in /kevlar/status. Tokens are of the rank furthest behind, bytes of
    all ranks."""
    if not ranks:
        return None
    linked = sum(rank.ranks for rank in ranks) == count and all(rank.linked for rank in ranks)
    return {
        "to": _shown(ranks[0].to) if linked else None,
        "lag_tokens": max(rank.lag_tokens for rank in ranks),
        "lag_ms": max(rank.lag_ms for rank in ranks),
        "lag_bytes": sum(rank.lag_tokens * rank.token_bytes for rank in ranks),
        "shadowed_tokens": min(rank.shadowed_tokens for rank in ranks),
        "sent_tokens": min(rank.sent_tokens for rank in ranks),
        "sent_bytes": sum(rank.sent_bytes for rank in ranks),
        "saved_tokens": min(rank.saved_tokens for rank in ranks),
        "dropped_tokens": max(rank.dropped_tokens for rank in ranks),
        "resyncs": sum(rank.resyncs for rank in ranks),
        "scheduler_cpu_s": round(max(rank.scheduler_cpu_s for rank in ranks), 3),
        "store": {
            "tokens": min(rank.store_tokens for rank in ranks),
            "capacity_tokens": min(rank.store_capacity_tokens for rank in ranks),
            "evicted_tokens": max(rank.evicted_tokens for rank in ranks),
            "rejected_frames": sum(rank.rejected_frames for rank in ranks),
            "lookups": ranks[0].lookups,
            "hits": ranks[0].hits,
            "promoted_tokens": ranks[0].promoted_tokens,
            "audited_blocks": sum(rank.audited_blocks for rank in ranks),
            "wrong_blocks": sum(rank.wrong_blocks for rank in ranks),
            "promoted_ahead_tokens": ranks[0].promoted_ahead_tokens,
        },
    }


def _shown(to: tuple[str, int] | None) -> int | str | None:
    """A group of this launch by its number, another by its name."""
    return None if to is None else int(to[0]) if to[0].isdecimal() else to[0]


def gauges(status: dict[str, Any]) -> dict[str, float]:
    """The values of `observability.metrics.SHADOW_GAUGES`, of a `summary`."""
    store = status["store"]
    return {
        "linked": float(status["to"] is not None),
        "lag_tokens": status["lag_tokens"],
        "lag_seconds": status["lag_ms"] / 1e3,
        "sent_bytes": status["sent_bytes"],
        "saved_tokens": status["saved_tokens"],
        "dropped_tokens": status["dropped_tokens"],
        "store_tokens": store["tokens"],
        "store_capacity_tokens": store["capacity_tokens"],
        "store_lookups": store["lookups"],
        "store_hits": store["hits"],
        "promoted_tokens": store["promoted_tokens"],
        "promoted_ahead_tokens": store["promoted_ahead_tokens"],
        "audited_blocks": store["audited_blocks"],
        "wrong_blocks": store["wrong_blocks"],
        "rejected_frames": store["rejected_frames"],
    }
