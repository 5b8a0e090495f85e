"""Who keeps whose shadow: told to the groups."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from sglang_kevlar.control.shadow_partners import partners
from sglang_kevlar.frontend.channels import Channel
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.protocol.shadow import ShadowTarget
from sglang_kevlar.worker.resume import ShadowPlanReq


class ShadowPlans:
    """Works out what each group is to be told, and what of it is news. Every plan is a full statement."""

    def __init__(self, plan: LaunchPlan, paths: Paths) -> None:
        self._ranks = plan.tp_size * plan.pp_size
        self._through_files = plan.kevlar.shadow_transport != "tcp"
        self._paths = paths
        self._told: dict[tuple[int, int], ShadowPlanReq] = {}
        #: by source; of the last plan
        self.targets: dict[int, int] = {}

    def news(self, channels: Iterable[Channel], draining: Collection[int]) -> list[tuple[Channel, ShadowPlanReq]]:
        """``channels``: of the groups that are up to date."""
        up = {channel.group: channel for channel in channels}
        # KV of one version of the software, or of one set of weights, has no name that it has in another.
        names = {group: f"{channel.weights} {channel.place.version}".rstrip() for group, channel in up.items()}
        places = {group: replace(channel.place, version=names[group]) for group, channel in up.items()}
        self.targets = partners(places, draining, self.targets)
        wanted: dict[tuple[int, int], ShadowPlanReq] = {}
        news = []
        for group, channel in up.items():
            if not channel.tells_plans():
                continue  # another frontend tells it
            target = up.get(self.targets.get(group, -1))
            named = names[group] if channel.weights else ""
            plan = ShadowPlanReq(content=named, target=target and self._target(channel, target))
            wanted[channel.group, channel.epoch] = plan
            before = self._told.get((channel.group, channel.epoch))
            if before is None or (before.content, before.target) != (named, plan.target):
                news.append((channel, plan))
        self._told = wanted
        return news

    def _target(self, source: Channel, target: Channel) -> ShadowTarget:
        endpoints = list(target.place.endpoints)
        if self._through_files and source.place.local and target.place.local:
            shadow = [f"shadow{rank}" for rank in range(self._ranks)]
            endpoints = [self._paths.channel(target.group, target.epoch, name) for name in shadow]
        return ShadowTarget(target.place.name, target.epoch, endpoints)
