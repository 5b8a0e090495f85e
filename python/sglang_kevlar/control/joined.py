"""Groups on other hosts, as one frontend counts them: who joined, which incarnation serves, when one is given up.

The counterpart of `control.membership` for groups whose processes we cannot see. What is known of one comes over its
session, and ends with it. Ids are this frontend's own, kept by name while it lives. An epoch is one session with one
incarnation of the group: a group that joins again is a new epoch, so nothing of an ended session can be taken for it.
"""

from __future__ import annotations

from typing import Literal

from sglang_kevlar.control.detection import EpochWatch, Loss
from sglang_kevlar.control.membership import (
    Event,
    GroupChanged,
    GroupKill,
    GroupLost,
    GroupReady,
    GroupSuspect,
    GroupTrusted,
    Role,
    State,
)
from sglang_kevlar.protocol.cluster import GroupState, Identity
from sglang_kevlar.protocol.group import LossKind
from sglang_kevlar.protocol.launch import KevlarArgs

#: seconds after which a group that was lost and did not come back is no longer counted as missing
FORGET_AFTER = 600.0
#: names whose ids are remembered; beyond that the id of the one that was away longest is given to another
MAX_NAMES = 1024

Link = Literal["up", "silent", "down"]


class JoinedGroup:
    """What is known of one group. Read by others, changed by ``JoinedGroups`` only."""

    def __init__(self, group: int, name: str) -> None:
        self.id = group
        self.name = name
        self.host = ""
        #: of its software
        self.version = ""
        self.role: Role = "active"
        #: counted by us, never twice for one id
        self.epoch = 0
        self.stage: Literal["starting", "ready", "down"] = "starting"
        #: takes no new requests; stays through restarts. Set by the frontend
        self.draining = False
        self.cause = ""
        self.link: Link = "down"
        #: None while it is not connected
        self.session: str | None = None
        self.state: GroupState | None = None
        #: its processes' own statement, and what we make of its silence
        self.suspicions: tuple[str, ...] = ()
        #: what to answer an epoch that is down for us and goes on
        self.kill: GroupKill | None = None
        self.errors: EpochWatch | None = None
        self.away_since: float | None = None

    def is_primary(self) -> bool:
        """Whether it takes changes, and plans of its shadow, from this frontend."""
        return self.state is not None and self.state.primary

    @property
    def status(self) -> State:
        if self.stage != "ready":
            return self.stage
        if self.draining:
            return "draining"
        return "suspect" if self.suspicions else "ready"


class JoinedGroups:
    """Ids from ``first`` on."""

    def __init__(self, args: KevlarArgs, first: int) -> None:
        self._args = args
        self._first = first
        self.groups: dict[int, JoinedGroup] = {}
        #: id and last epoch by name, the one heard of most recently last
        self._ids: dict[str, tuple[int, int]] = {}
        self._sessions: dict[str, JoinedGroup] = {}

    def active(self) -> int:
        """How many should serve, whether they do or not."""
        return sum(g.role == "active" for g in self.groups.values())

    def of_session(self, session: str) -> JoinedGroup | None:
        return self._sessions.get(session)

    # ---- what sessions say ---------------------------------------------------------------------------------------

    def joined(self, session: str, identity: Identity, state: GroupState, now: float, version: str = "") -> list[Event]:
        """A session was opened. One of the same name must have ended before."""
        g = self._group(identity.name)
        assert g.session is None, f"group {g.name} joined twice"
        g.session, g.link, g.host, g.away_since = session, "up", identity.host, None
        g.version = version
        self._sessions[session] = g
        g.state = None
        return self._apply(g, state, now)

    def on_state(self, session: str, state: GroupState, now: float) -> list[Event]:
        g = self._sessions.get(session)
        return [] if g is None else self._apply(g, state, now)

    def on_silence(self, session: str, silent: bool) -> list[Event]:
        """The session is silent for longer than is usual, or no longer so."""
        g = self._sessions.get(session)
        if g is None:
            return []
        g.link = "silent" if silent else "up"
        return self._suspect(g)

    def ended(self, session: str, kind: LossKind, cause: str, since: float, now: float) -> list[Event]:
        """The session is over. A group that ``left`` on purpose is forgotten; one that was lost is missed."""
        g = self._sessions.pop(session, None)
        if g is None:
            return []
        events = self._lose(g, Loss(kind, cause, since), now, kill=False)
        g.session, g.link, g.suspicions = None, "down", ()
        g.stage, g.cause = "down", cause
        g.away_since = now
        if kind == "left":
            self._forget(g)
        return events

    # ---- what the frontend decides -------------------------------------------------------------------------------

    def on_internal_error(self, group: int, epoch: int, now: float) -> list[Event]:
        g = self.groups.get(group)
        if g is None or epoch != g.epoch or g.stage != "ready" or g.errors is None:
            return []
        loss = g.errors.on_internal_error(now)
        return [] if loss is None else self._lose(g, loss, now)

    def declare_lost(
        self, group: int, epoch: int, cause: str, now: float, *, kind: LossKind, planned: bool = False
    ) -> list[Event]:
        """Give an epoch up for a reason of our own; nothing if it is not current."""
        g = self.groups.get(group)
        if g is None or epoch != g.epoch or g.stage == "down":
            return []
        return self._lose(g, Loss(kind, cause, now), now, planned)

    def forget_missing(self, now: float) -> None:
        for g in list(self.groups.values()):
            if g.away_since is not None and now - g.away_since >= FORGET_AFTER:
                self._forget(g)

    # ---- one group -----------------------------------------------------------------------------------------------

    def _group(self, name: str) -> JoinedGroup:
        group, epoch = self._ids.pop(name) if name in self._ids else (self._free_id(), 0)
        self._ids[name] = (group, epoch)
        g = self.groups.get(group)
        if g is None:
            g = self.groups[group] = JoinedGroup(group, name)
            g.epoch = epoch
        return g

    def _free_id(self) -> int:
        if len(self._ids) < MAX_NAMES:
            return self._first + len(self._ids)
        oldest = next((name for name, (group, _) in self._ids.items() if group not in self.groups), None)
        # Sessions are bounded well below this, and what is missing is forgotten.
        assert oldest is not None, "more groups than names are remembered"
        group, _ = self._ids.pop(oldest)
        return group

    def _forget(self, g: JoinedGroup) -> None:
        assert g.session is None
        del self.groups[g.id]

    def _apply(self, g: JoinedGroup, state: GroupState, now: float) -> list[Event]:
        events: list[Event] = []
        if g.state is None or g.state.epoch != state.epoch:
            events += self._lose(g, Loss("report", f"superseded by its epoch {state.epoch}", now), now, kill=False)
            g.epoch += 1
            self._ids[g.name] = (g.id, g.epoch)
            g.stage, g.kill, g.suspicions = "starting", None, ()
            g.errors = EpochWatch(self._args, now)
        before = g.is_primary()
        g.state, g.role = state, state.role
        if state.phase in ("down", "stopped"):
            cause = state.cause or "reported down"
            events += self._lose(g, Loss(state.kind or "report", cause, now), now, kill=False)
            g.stage, g.cause = "down", cause
        elif g.stage == "down":
            # Fenced, and its kill may have been lost: ask again.
            if g.kill is not None:
                events.append(g.kill)
        elif state.phase == "ready" and g.stage == "starting":
            g.stage, g.cause = "ready", ""
            events.append(GroupReady(g.id, g.epoch, state.init_info or {}, state.shadow_endpoints))
        elif state.phase == "starting":
            g.cause = state.cause
        elif g.stage == "ready" and before != g.is_primary():
            events.append(GroupChanged(g.id, g.epoch))
        return events + self._suspect(g)

    def _suspect(self, g: JoinedGroup) -> list[Event]:
        before = bool(g.suspicions)
        said = g.state.suspicions if g.state is not None else []
        silent = ["its host is silent"] if g.link == "silent" else []
        g.suspicions = (*said, *silent)
        if g.stage != "ready" or before == bool(g.suspicions):
            return []
        if before:
            return [GroupTrusted(g.id, g.epoch)]
        return [GroupSuspect(g.id, g.epoch, "; ".join(g.suspicions))]

    def _lose(self, g: JoinedGroup, loss: Loss, now: float, planned: bool = False, kill: bool = True) -> list[Event]:
        """``kill``: it does not know yet that it is lost."""
        was_ready = g.stage == "ready"
        if kill or was_ready:
            g.stage, g.cause = "down", loss.cause
        events: list[Event] = []
        if was_ready:
            events.append(GroupLost(g.id, g.epoch, loss.cause, loss.kind, max(0.0, now - loss.since)))
        if kill:
            g.kill = GroupKill(g.id, g.epoch, loss.cause, loss.kind, planned)
            events.append(g.kill)
        return events
