"""All worker groups of this frontend: those of this host, which it watches itself, and those that joined it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zmq.asyncio

from sglang_kevlar import __version__
from sglang_kevlar.control.membership import Event, GroupReady
from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.frontend.channels import Channel, GroupChannel
from sglang_kevlar.frontend.monitor import GroupMonitor
from sglang_kevlar.frontend.sessions import GroupSessions
from sglang_kevlar.frontend.shadow_status import ShadowReader, gauges
from sglang_kevlar.protocol.cluster import Identity
from sglang_kevlar.protocol.launch import LaunchPlan, Paths


class WorkerGroups:
    """``start`` and everything after it is to be called on the event loop's thread."""

    def __init__(
        self, plan: LaunchPlan, paths: Paths, on_event: Callable[[Event], None], identity: Identity | None = None
    ) -> None:
        self._paths = paths
        self._host = plan.kevlar.host_label or ""
        self._local = plan.kevlar.worker_groups
        self._local_active = plan.kevlar.worker_groups - plan.kevlar.standby_groups
        self.monitor = GroupMonitor(paths, plan.kevlar, on_event)
        #: None: nobody can join
        self.sessions = GroupSessions(plan, on_event, identity) if plan.kevlar.listen is not None else None
        self._shadows = ShadowReader(plan, paths)
        self._context = zmq.asyncio.Context()

    def start(self) -> None:
        self.monitor.start()
        if self.sessions is not None:
            self.sessions.start()

    def close(self) -> None:
        """Groups live on."""
        if self.sessions is not None:
            self.sessions.close()
        self.monitor.close()

    # ---- what the actor asks (host.Groups) -----------------------------------------------------------------------

    @property
    def active(self) -> int:
        return self._local_active + (0 if self.sessions is None else self.sessions.table.active())

    def is_standby(self, group: int) -> bool:
        if group < self._local:
            return group >= self._local_active
        joined = self._joined(group)
        return joined is not None and joined.role == "standby"

    def is_draining(self, group: int) -> bool:
        known = self._known(group)
        return known is not None and known.draining

    def open(self, ready: GroupReady, capacity: int) -> Channel:
        group, epoch = ready.group, ready.epoch
        if group >= self._local:
            assert self.sessions is not None
            return self.sessions.open(ready, capacity)
        standby, endpoints = self.is_standby(group), tuple(ready.shadow_endpoints)
        place = Place(str(group), host=self._host, standby=standby, version=__version__, endpoints=endpoints)
        return GroupChannel(self._context, self._paths, group, epoch, capacity, place)

    def kill(self, group: int, epoch: int, cause: str, planned: bool = False) -> None:
        """``planned``: an operator's restart, without back-off."""
        if group < self._local:
            self.monitor.kill(group, epoch, cause, planned)
        elif self.sessions is not None:
            self.sessions.kill(group, epoch, cause, planned)

    def on_internal_error(self, group: int, epoch: int) -> None:
        if group < self._local:
            self.monitor.on_internal_error(group, epoch)
        elif self.sessions is not None:
            self.sessions.on_internal_error(group, epoch)

    # ---- operation -----------------------------------------------------------------------------------------------

    def ids(self) -> list[int]:
        joined = [] if self.sessions is None else sorted(self.sessions.table.groups)
        return [*range(self._local), *joined]

    def drain(self, group: int, draining: bool) -> None:
        """Take no new requests, or take them again. Stays through restarts of the group."""
        known = self._known(group)
        assert known is not None, f"group {group} is not known"
        known.draining = draining

    def cause(self, group: int) -> str:
        known = self._known(group)
        return "" if known is None else known.cause

    def snapshot(self) -> list[dict[str, Any]]:
        """Per group what /kevlar/status says of processes, membership and shadow."""
        groups = self.monitor.snapshot()
        for group in groups:
            group["name"], group["host"], group["link"] = str(group["id"]), self._host, "local"
            group["version"] = __version__
            group["shadow"] = self._shadows.status(group["id"], group["epoch"])
        return groups if self.sessions is None else [*groups, *self.sessions.snapshot()]

    def states(self) -> list[tuple[int, str, int]]:
        """Id, state and epoch of each, of `snapshot`."""
        states: list[tuple[int, str, int]] = [(g.id, g.state, g.epoch) for g in self.monitor.membership.groups]
        if self.sessions is not None:
            states += [(g.id, g.status, g.epoch) for _, g in sorted(self.sessions.table.groups.items())]
        return states

    def shadow_gauges(self) -> dict[int, dict[str, float]]:
        """By group, of those that say something of their shadow: `observability.metrics.SHADOW_GAUGES`."""
        status = {group["id"]: group["shadow"] for group in self.snapshot()}
        return {group: gauges(shadow) for group, shadow in status.items() if shadow is not None}

    def _joined(self, group: int) -> Any:
        return None if self.sessions is None else self.sessions.table.groups.get(group)

    def _known(self, group: int) -> Any:
        if 0 <= group < self._local:
            return self.monitor.membership.group(group)
        return self._joined(group)
