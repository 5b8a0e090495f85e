"""Sessions with groups on other hosts, and what becomes of them: events for the actor, channels, orders to groups."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from sglang.srt.managers.load_snapshot import LoadSnapshot

from sglang_kevlar.cluster import keys, wire
from sglang_kevlar.cluster.listener import Listener
from sglang_kevlar.control.frontend_end import Sessions
from sglang_kevlar.control.joined import JoinedGroup, JoinedGroups
from sglang_kevlar.control.membership import Event, GroupKill, GroupLost, GroupReady
from sglang_kevlar.control.session import Ended, Joined, OutputsArrived, StateChanged, Suspect, Trusted
from sglang_kevlar.control.session import Event as SessionEvent
from sglang_kevlar.control.shadow_partners import Place
from sglang_kevlar.frontend.channels import CannotSend
from sglang_kevlar.frontend.peers.links import PeerLinks
from sglang_kevlar.frontend.session_channel import SessionChannel
from sglang_kevlar.frontend.shadow_status import summary
from sglang_kevlar.protocol.cluster import Identity, Setup
from sglang_kevlar.protocol.launch import LaunchPlan

logger = logging.getLogger(__name__)

#: seconds between two looks for groups that are missing for too long
FORGET_INTERVAL = 10.0
#: seconds after which groups try again that find this frontend ending: another may come in its place
RETRY = 0.5


def listener_of(
    plan: LaunchPlan, on_event: Callable[[SessionEvent], None], identity: Identity | None = None
) -> Listener:
    """``identity``: of this frontend, for others to join. Raises KeyProblem, or zmq.ZMQError."""
    args = plan.kevlar
    assert args.listen is not None and plan.configuration is not None
    setup = Setup(argv=plan.argv, kevlar=msgspec.to_builtins(args))
    # Named after the launch: one that takes over knows what the one before it changed at run time.
    sessions = Sessions(
        plan.launch_id, plan.configuration, args.lease, setup, identity, version_skew=args.allow_version_skew
    )
    return Listener(args.listen, keys.load(args.cluster_key_file), sessions, on_event)


class GroupSessions:
    """``start`` and everything after it is to be called on the event loop's thread."""

    def __init__(self, plan: LaunchPlan, on_event: Callable[[Event], None], identity: Identity | None = None) -> None:
        self._identity = identity
        #: with other frontends
        self.links: PeerLinks | None = None
        self.table = JoinedGroups(plan.kevlar, first=plan.kevlar.worker_groups)
        self._ranks = plan.tp_size * plan.pp_size
        self._on_event = on_event
        self._channels: dict[int, SessionChannel] = {}
        self._plan = plan
        #: from `start` on
        self._listener: Listener | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        # Not before: until then `startup` listens there.
        self._listener = listener_of(self._plan, self._on_session, self._identity)
        self._listener.start()
        self._forget_missing()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._listener is not None:
            self._listener.close("the frontend ends", RETRY)
            self._listener = None

    # ---- what the frontend wants ---------------------------------------------------------------------------------

    def open(self, ready: GroupReady, capacity: int) -> SessionChannel:
        """Of one that is gone meanwhile nothing is sent or taken: that it is lost is about to be said."""
        group, epoch = ready.group, ready.epoch
        g = self.table.groups.get(group)
        current = g if g is not None and g.epoch == epoch and g.session is not None else None
        if current is None:
            return SessionChannel(group, epoch, capacity, Place("gone", local=False), lambda _: None, lambda: None)
        assert current.session is not None and current.state is not None
        session, theirs, listener = current.session, current.state.epoch, self.listener

        def send(payload: bytes) -> None:
            try:
                listener.requests(session, theirs, payload)
            except ValueError as too_large:
                raise CannotSend(str(too_large)) from too_large

        standby, endpoints = current.role == "standby", tuple(ready.shadow_endpoints)
        place = Place(
            current.name,
            host=current.host,
            local=False,
            standby=standby,
            version=current.version,
            endpoints=endpoints,
        )
        load = partial(_load, current, epoch)
        # What one of several frontends changed the others would not know.
        may_change = self._plan.kevlar.peers is None
        channel = SessionChannel(group, epoch, capacity, place, send, load, current.is_primary, may_change)
        self._channels[group] = channel
        return channel

    def kill(self, group: int, epoch: int, cause: str, planned: bool) -> None:
        kind: Any = "operator" if planned else "unfit"
        self._act(self.table.declare_lost(group, epoch, cause, time.monotonic(), kind=kind, planned=planned))

    def on_internal_error(self, group: int, epoch: int) -> None:
        self._act(self.table.on_internal_error(group, epoch, time.monotonic()))

    def snapshot(self) -> list[dict[str, Any]]:
        return [self._status(g) for _, g in sorted(self.table.groups.items())]

    def _status(self, g: JoinedGroup) -> dict[str, Any]:
        state = g.state
        pids = {} if state is None or g.session is None else dict(state.pids)
        ranks = sorted((name for name in pids if name.startswith("rank")), key=lambda name: int(name[4:]))
        return {
            "id": g.id,
            "role": g.role,
            "state": g.status,
            "epoch": g.epoch,
            "pids": {
                "supervisor": pids.get("supervisor"),
                "ranks": [pids[name] for name in ranks],
                "detokenizer": pids.get("detokenizer"),
                "gateway": pids.get("gateway"),
                "launcher": pids.get("launcher"),
            },
            "cause": g.cause or "; ".join(g.suspicions),
            "retry_in": 0.0,
            "name": g.name,
            "host": g.host,
            "version": g.version,
            "link": g.link,
            "shadow": None if state is None or g.session is None else summary(state.shadow, self._ranks),
        }

    # ---- what sessions say ---------------------------------------------------------------------------------------

    def _on_session(self, event: SessionEvent) -> None:
        now = time.monotonic()
        if self.links is not None and self.links.owns(event):
            self.links.on_session(event)
        elif isinstance(event, OutputsArrived):
            self._outputs(event)
        elif isinstance(event, StateChanged):
            self._act(self.table.on_state(event.session, event.state, now))
        elif isinstance(event, Joined):
            identity = event.identity
            events = self.table.joined(event.session, identity, event.state, now, event.version)
            group = self.table.of_session(event.session)
            assert group is not None
            logger.info(
                "worker group %d joined: %s on host %s, version %s",
                group.id,
                identity.name,
                identity.host,
                event.version,
            )
            self._act(events)
        elif isinstance(event, Suspect | Trusted):
            self._act(self.table.on_silence(event.session, isinstance(event, Suspect)))
        elif isinstance(event, Ended):
            self._ended(event, now)

    def _ended(self, event: Ended, now: float) -> None:
        g = self.table.of_session(event.session)
        if g is None:
            return
        logger.info("the session with worker group %d (%s) ended: %s: %s", g.id, g.name, event.kind, event.reason)
        kind: Any = "left" if event.kind == "left" else "network"
        self._act(self.table.ended(event.session, kind, f"{event.kind}: {event.reason}", event.since, now))

    def _outputs(self, event: OutputsArrived) -> None:
        g = self.table.of_session(event.session)
        if g is None or g.stage != "ready":
            return
        channel = self._channels.get(g.id)
        if channel is None or channel.epoch != g.epoch or channel.closed:
            return
        try:
            message = wire.decode_answer(event.payload)
        except wire.NotForNetwork as problem:
            self.listener.end(event.session, f"an output that is none: {problem}")
            return
        if not channel.put(message):
            self.listener.end(event.session, "this frontend does not keep up with its outputs")

    def _act(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, GroupKill):
                g = self.table.groups.get(event.group)
                if g is not None and g.session is not None and g.state is not None and g.epoch == event.epoch:
                    self.listener.kill(g.session, g.state.epoch, event.cause, planned=event.planned)
            elif isinstance(event, GroupLost):
                self._channels.pop(event.group, None)
            self._on_event(event)

    @property
    def listener(self) -> Listener:
        assert self._listener is not None, "sessions come from it"
        return self._listener

    def _forget_missing(self) -> None:
        self.table.forget_missing(time.monotonic())
        self._timer = asyncio.get_running_loop().call_later(FORGET_INTERVAL, self._forget_missing)


def _load(g: JoinedGroup, epoch: int) -> LoadSnapshot | None:
    if g.epoch != epoch or g.state is None or not g.state.loads:
        return None
    try:
        return msgspec.convert(g.state.loads[0], LoadSnapshot)
    except msgspec.ValidationError:
        return None
