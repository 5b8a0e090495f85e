"""The supervisor of the first node of a group on several hosts: its epoch is one of all nodes.

It starts an epoch when every other node is there and has nothing left of the last one, is ready when all are, and ends
it on all when it ends on one, or when a node is lost.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from sglang_kevlar.cluster import keys
from sglang_kevlar.cluster.listener import Listener
from sglang_kevlar.cluster.sockets import split_address
from sglang_kevlar.control import nodes
from sglang_kevlar.control.frontend_end import Sessions
from sglang_kevlar.control.session import TICK, Ended, Event, Joined, StateChanged
from sglang_kevlar.protocol.cluster import GroupState
from sglang_kevlar.protocol.group import GroupReport, LossKind
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.protocol.nodes import StartNode, encode
from sglang_kevlar.worker.engine_group import Meeting, engine_commands, meeting_port
from sglang_kevlar.worker.supervisor import Supervisor
from sglang_kevlar.worker.terminal_log import log_by

#: seconds between two lines about who is waited for
_LOG_INTERVAL = 30.0
#: seconds after which nodes try again that find this one ending
_RETRY = 0.5


class Head(Supervisor):
    def __init__(self, paths: Paths, plan: LaunchPlan, group: int, **how: Any) -> None:
        """Raises KeyProblem, ValueError, or zmq.ZMQError."""
        assert plan.node is not None
        self._nodes = nodes.Nodes(range(1, plan.node.count))
        #: of the nodes that are there, by session
        self._ranks: dict[str, int] = {}
        self._lost: nodes.Lost | None = None
        self._waiting = ""
        self._told_at = 0.0
        super().__init__(paths, plan, group, engine_commands(paths, plan, group), self._meeting, **how)
        log_by(self._log)
        self._phase = "down"

    # -- the other nodes

    def _connect(self) -> None:
        super()._connect()
        plan = self._plan
        assert plan.node is not None and plan.node_configuration is not None
        sessions = Sessions(f"head-{secrets.token_hex(8)}", plan.node_configuration, plan.kevlar.lease, takes="node")
        self._listener = Listener(plan.node.head, keys.load(plan.kevlar.cluster_key_file), sessions, self._on_event)
        here = split_address(self._listener.address)[0]
        if keys.is_loopback(here) and not keys.is_loopback(split_address(plan.node.head)[0]):
            raise ValueError(f"it is {here} here, which no other host reaches; give an address that others reach")
        for each in self._listener.sockets:
            self._watch(each, lambda: None)  # it is looked at in every turn

    def _disconnect(self) -> None:
        self._listener.close("the first node ends", _RETRY)
        super()._disconnect()

    def _look_elsewhere(self) -> None:
        self._listener.turn()
        lost, self._lost = self._lost, None
        if lost is not None and self._members and not self._ending:
            self._end_epoch(lost.cause, by_itself=False, kind=lost.kind, passing=lost.passing)
        self._ready_if_all()
        self._waiting = "" if self._members or self._stop_deadline is not None else "; ".join(self._nodes.missing())
        now = time.monotonic()
        if self._waiting and now - self._told_at >= _LOG_INTERVAL:
            self._told_at = now
            self._log(f"waiting for other nodes ({self._waiting})")

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Joined):
            rank = self._rank_of(event.identity.name)
            if rank is None:
                self._listener.end(event.session, f"{event.identity.name} is no node of this group")
                return
            self._ranks[event.session] = rank
            self._log(f"node {rank} ({event.identity.host}) has joined")
            self._act(self._nodes.on_joined(rank, event.session, event.identity.host, event.state))
        elif isinstance(event, StateChanged) and (rank := self._ranks.get(event.session)) is not None:
            self._keep_counters(rank, event.state)
            self._act(self._nodes.on_state(rank, event.state))
        elif isinstance(event, Ended) and (rank := self._ranks.pop(event.session, None)) is not None:
            kind: LossKind = "left" if event.kind == "left" else "network"
            self._log(f"node {rank} is gone: {event.reason}")
            self._act(self._nodes.on_left(rank, event.reason, kind))

    def _rank_of(self, name: str) -> int | None:
        assert self._plan.node is not None
        return next((rank for rank in range(1, self._plan.node.count) if name == f"node{rank}"), None)

    def _act(self, effects: Sequence[nodes.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, nodes.Order):
                self._listener.requests(effect.session, effect.after, encode(effect.start))
            elif isinstance(effect, nodes.Kill):
                self._listener.kill(effect.session, effect.epoch, effect.cause)
            else:
                self._lost = self._lost or effect

    # -- an epoch

    def _start_at(self) -> float:
        return float("inf") if self._nodes.missing() else super()._start_at()

    def _timeout_ms(self) -> int:
        return min(super()._timeout_ms(), int(TICK * 1000))

    def _meeting(self) -> Meeting:
        """The other nodes are told, too: all of them start now."""
        assert self._plan.node is not None
        host, port = split_address(self._plan.node.head)[0], meeting_port(self._plan, self._group)
        self._lost = None
        self._act(self._nodes.begin(StartNode(host=host, port=port)))
        return Meeting(port, host)

    def _all_ready(self) -> bool:
        return self._nodes.ready and super()._all_ready()

    def _ready_if_all(self) -> None:
        if self._phase == "starting" and self._members and self._all_ready():
            self._keep(self._paths.shadow_stores(self._group, self._epoch), self._shadow_endpoints())
        super()._ready_if_all()

    def _end_epoch(self, cause: str, **how: Any) -> None:
        super()._end_epoch(cause, **how)
        self._act(self._nodes.end(cause))

    def _stop(self) -> None:
        super()._stop()
        self._act(self._nodes.end("the group shuts down"))

    # -- what is said of it

    def _tell(self, report: GroupReport) -> None:
        cause = report.cause
        if self._waiting and report.phase == "down":
            cause = f"{cause}; {self._waiting}" if cause else self._waiting
        super()._tell(msgspec.structs.replace(report, cause=cause, busy_elsewhere=self._nodes.busy))

    def _shadow_endpoints(self) -> list[str]:
        node = self._plan.node
        assert node is not None
        share = len(self._plan.ranks)
        said = [super()._shadow_endpoints()]
        said += [state.shadow_endpoints if (state := self._nodes.state(r)) else [] for r in range(1, node.count)]
        return [each for part in said for each in (part or [""] * share)] if any(said) else []

    def _keep_counters(self, node: int, state: GroupState) -> None:
        """For the gateway, which reads those of its own host."""
        if self._phase != "ready":
            return
        first = node * len(self._plan.ranks)
        for rank, counters in zip(state.shadow_ranks, state.shadow, strict=False):
            if first <= rank < first + len(self._plan.ranks):
                self._keep(self._paths.shadow_counters(self._group, self._epoch, rank), counters)

    def _keep(self, path: str, content: object) -> None:
        with open(f"{path}.new", "wb") as file:
            file.write(msgspec.json.encode(content))
        os.replace(f"{path}.new", path)
