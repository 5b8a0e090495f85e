"""Who keeps whose shadow: told to the groups, and what they say of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import msgspec

from sglang_kevlar.control.shadow_partners import partners
from sglang_kevlar.frontend.channels import GroupChannel
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.protocol.shadow import ShadowCounters
from sglang_kevlar.worker.resume import ShadowPlanReq


class ShadowPlans:
    """Works out what each group is to be told, and what of it is news. Every plan is a full statement."""

    def __init__(self, active_groups: int) -> None:
        self._active_groups = active_groups
        self._told: dict[tuple[int, int], ShadowPlanReq] = {}
        #: by source; of the last plan
        self.targets: dict[int, int] = {}

    def news(
        self, channels: Iterable[GroupChannel], draining: Collection[int], content: str
    ) -> list[tuple[GroupChannel, ShadowPlanReq]]:
        """``channels``: of the groups that are up to date. ``content``: see `ShadowPlanReq`."""
        up = {channel.group: channel for channel in channels}
        self.targets = partners(up, draining, self._active_groups)
        wanted: dict[tuple[int, int], ShadowPlanReq] = {}
        news = []
        for group, channel in up.items():
            target = up.get(self.targets.get(group, -1))
            place = None if target is None else (target.group, target.epoch)
            plan = ShadowPlanReq(content=content, target=place)
            wanted[channel.group, channel.epoch] = plan
            before = self._told.get((channel.group, channel.epoch))
            if before is None or (before.content, before.target) != (content, place):
                news.append((channel, plan))
        self._told = wanted
        return news


class ShadowReader:
    """The counters that ranks write into the run directory."""

    def __init__(self, plan: LaunchPlan, paths: Paths) -> None:
        self._ranks = plan.tp_size * plan.pp_size
        self._paths = paths

    def read(self, group: int, epoch: int) -> list[ShadowCounters]:
        """One a rank; empty while there are none."""
        found = []
        for rank in range(self._ranks):
            try:
                with open(self._paths.shadow_counters(group, epoch, rank), "rb") as file:
                    found.append(msgspec.json.decode(file.read(), type=ShadowCounters))
            except (OSError, msgspec.DecodeError):
                continue
        return found

    def status(self, group: int, epoch: int) -> dict[str, Any] | None:
        """``shadow`` of a group in /kevlar/status. Tokens are of the rank furthest behind, bytes of all ranks."""
        ranks = self.read(group, epoch)
        if not ranks:
            return None
        linked = len(ranks) == self._ranks and all(rank.linked for rank in ranks)
        return {
            "to": ranks[0].to[0] if linked and ranks[0].to is not None else None,
            "lag_tokens": max(rank.lag_tokens for rank in ranks),
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
            },
        }
