"""Who keeps whose shadow: told to the groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sglang_kevlar.control.shadow_partners import partners
from sglang_kevlar.frontend.channels import Channel
from sglang_kevlar.worker.resume import ShadowPlanReq


class ShadowPlans:
    """Works out what each group is to be told, and what of it is news. Every plan is a full statement."""

    def __init__(self, active_groups: int) -> None:
        self._active_groups = active_groups
        self._told: dict[tuple[int, int], ShadowPlanReq] = {}
        #: by source; of the last plan
        self.targets: dict[int, int] = {}

    def news(
        self, channels: Iterable[Channel], draining: Collection[int], content: str
    ) -> list[tuple[Channel, ShadowPlanReq]]:
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
