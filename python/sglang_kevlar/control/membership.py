"""Which groups there are, which incarnation of each is in service, and when one is given up.

A pure state machine: reports, exits, observations and errors go in, each with a monotonic time; events come out,
in the order in which they have to be acted on. An incarnation is (group, epoch). Once lost it stays lost: what it
says afterwards is answered with another request to kill it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from sglang_kevlar.control.detection import SUPERVISOR, EpochWatch, Loss, Observation
from sglang_kevlar.protocol.group import GroupFormed, GroupReport, LossKind
from sglang_kevlar.protocol.launch import KevlarArgs

Role = Literal["active", "standby"]
State = Literal["starting", "ready", "suspect", "down", "draining"]


class GroupReady(msgspec.Struct, frozen=True):
    group: int
    epoch: int
    #: upstream's Scheduler.get_init_info of rank 0
    init_info: dict[str, object]
    #: see `GroupReport`
    shadow_endpoints: list[str] = []
    formed: GroupFormed | None = None
    formed_s: float = 0.0


class GroupLost(msgspec.Struct, frozen=True):
    """Exactly one for every incarnation that was ready and is no more."""

    group: int
    epoch: int
    cause: str
    kind: LossKind
    #: seconds from the earliest evidence to this event; 0 where the evidence is the event
    detect_s: float


class GroupSuspect(msgspec.Struct, frozen=True):
    """Something is wrong, and not yet proven: better no new requests; what runs is left alone."""

    group: int
    epoch: int
    why: str


class GroupTrusted(msgspec.Struct, frozen=True):
    group: int
    epoch: int


class GroupChanged(msgspec.Struct, frozen=True):
    """What it may be told by this frontend is other than before."""

    group: int
    epoch: int


class GroupKill(msgspec.Struct, frozen=True):
    """The epoch is fenced but may have live processes. Repeated as long as it keeps reporting."""

    group: int
    epoch: int
    cause: str
    kind: LossKind
    #: asked for by the operator: no back-off before the next start
    planned: bool = False


Event = GroupReady | GroupLost | GroupSuspect | GroupTrusted | GroupChanged | GroupKill


class Group:
    """What is known of one group. Read by others, changed by ``Membership`` only."""

    def __init__(self, group: int, role: Role, args: KevlarArgs) -> None:
        self.id = group
        self.role: Role = role
        #: 0 until the first report
        self.epoch = 0
        self.stage: Literal["starting", "ready", "down"] = "starting"
        #: takes no new requests; stays through restarts. Set by the frontend
        self.draining = False
        #: why the last epoch ended; empty while ready
        self.cause = ""
        self.failed_starts = 0
        #: what to answer an epoch that is down and still reports
        self.kill: GroupKill | None = None
        self.watch = EpochWatch(args, 0.0)
        self._retry_at = 0.0

    @property
    def state(self) -> State:
        if self.stage != "ready":
            return self.stage
        if self.draining:
            return "draining"
        return "suspect" if self.watch.suspicions else "ready"

    def retry_in(self, now: float) -> float:
        """Seconds until the supervisor starts the next epoch, as far as it said; 0 when it does not wait."""
        return max(0.0, self._retry_at - now) if self.stage == "down" else 0.0


class Membership:
    """All groups of this server, ``0 .. worker_groups - 1``; the last ``standby_groups`` of them are standbys."""

    def __init__(self, args: KevlarArgs) -> None:
        self._args = args
        active = args.worker_groups - args.standby_groups
        self.groups = [Group(i, "active" if i < active else "standby", args) for i in range(args.worker_groups)]

    def group(self, group: int) -> Group:
        """Raises ValueError for a group this server does not have."""
        if not 0 <= group < len(self.groups):
            raise ValueError(f"no group {group}: this server has groups 0 to {len(self.groups) - 1}")
        return self.groups[group]

    def on_report(self, report: GroupReport, now: float, gone: frozenset[str] = frozenset()) -> list[Event]:
        """A supervisor's statement. ``gone``: processes named in it that are dead already (a report that waited
        for a frontend to come back, for instance): such an epoch is never taken into service."""
        g = self.group(report.group)
        events: list[Event] = []
        if report.epoch < g.epoch:
            return events
        if report.epoch > g.epoch:
            if g.stage == "ready":
                # Its supervisor went on to the next one, so the processes are dead; kill what might not be.
                cause = g.cause or f"superseded by epoch {report.epoch}"
                events += self._lose(g, Loss("report", cause, now), now)
            g.epoch = report.epoch
            g.stage = "starting"
            g.cause = report.cause
            g.kill = None
            g.watch = EpochWatch(self._args, now)
        g.watch.on_report(report.busy_elsewhere)
        g.failed_starts = report.failed_starts
        if report.phase in ("down", "stopped"):
            cause = report.cause or ("shut down" if report.phase == "stopped" else "reported down")
            if g.stage == "ready":
                lost = self._lose(g, Loss(report.kind or "report", cause, now), now)
                events += [e for e in lost if not isinstance(e, GroupKill)]
            g.stage = "down"
            g.cause = cause
            g._retry_at = now + report.retry_in
        elif g.stage == "down":
            events.append(g.kill or GroupKill(g.id, g.epoch, g.cause, "report"))
        elif gone:
            events += self._lose(g, Loss("exit", f"{', '.join(sorted(gone))} exited", now), now)
        elif report.phase == "ready" and g.stage == "starting":
            g.stage = "ready"
            g.cause = ""
            init_info, endpoints = report.init_info or {}, report.shadow_endpoints
            events.append(GroupReady(g.id, g.epoch, init_info, endpoints, report.formed, report.formed_s))
        return events

    def on_process_exit(self, group: int, epoch: int, name: str, now: float) -> list[Event]:
        """A member, or the supervisor, of this epoch is dead."""
        g = self.group(group)
        if epoch != g.epoch:
            return []
        if g.stage == "down":
            if name == SUPERVISOR:
                g._retry_at = now
            return []
        return self._lose(g, Loss("exit", f"{name} exited", now), now)

    def on_observation(self, group: int, epoch: int, obs: Observation, now: float) -> list[Event]:
        g = self.group(group)
        # While starting there is nothing to judge: the supervisor has the deadline of a start.
        if epoch != g.epoch or g.stage != "ready":
            return []
        suspected = bool(g.watch.suspicions)
        loss = g.watch.observe(obs, now)
        if loss is not None:
            return self._lose(g, loss, now)
        if g.watch.suspicions and not suspected:
            return [GroupSuspect(g.id, g.epoch, "; ".join(g.watch.suspicions))]
        if suspected and not g.watch.suspicions:
            return [GroupTrusted(g.id, g.epoch)]
        return []

    def on_internal_error(self, group: int, epoch: int, now: float) -> list[Event]:
        """The group answered a request with an internal error (never call it for a client's own 4xx)."""
        g = self.group(group)
        if epoch != g.epoch or g.stage != "ready":
            return []
        loss = g.watch.on_internal_error(now)
        return self._lose(g, loss, now) if loss is not None else []

    def declare_lost(
        self, group: int, epoch: int, cause: str, now: float, *, kind: LossKind = "operator", planned: bool = False
    ) -> list[Event]:
        """Give an epoch up for a reason of the frontend's or the operator's own; nothing if it is not current."""
        g = self.group(group)
        if epoch != g.epoch or g.stage == "down":
            return []
        return self._lose(g, Loss(kind, cause, now), now, planned)

    def drain(self, group: int) -> None:
        """Take no new requests. Stays through restarts of the group, until ``undrain``."""
        self.group(group).draining = True

    def undrain(self, group: int) -> None:
        self.group(group).draining = False

    def _lose(self, g: Group, loss: Loss, now: float, planned: bool = False) -> list[Event]:
        assert g.stage != "down", f"epoch {g.epoch} of group {g.id} lost twice"
        was_ready = g.stage == "ready"
        g.stage = "down"
        g.cause = loss.cause
        g.kill = GroupKill(g.id, g.epoch, loss.cause, loss.kind, planned)
        g._retry_at = now
        events: list[Event] = []
        if was_ready:
            events.append(GroupLost(g.id, g.epoch, loss.cause, loss.kind, max(0.0, now - loss.since)))
        events.append(g.kill)
        return events
