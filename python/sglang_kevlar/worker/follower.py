"""The supervisor of a node of a group on several hosts that is not the first: it does as that one says.

Its epochs are started and ended by orders, in a session with the first node. Without a session nothing runs here.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

import zmq

from sglang_kevlar.cluster import keys
from sglang_kevlar.cluster.dialler import Dialler
from sglang_kevlar.control import nodes
from sglang_kevlar.control.group_end import GroupEnd
from sglang_kevlar.control.session import TICK, Admitted, Ended, Event, KillArrived, NotJoined, RequestsArrived
from sglang_kevlar.frontend.shadow_status import ShadowReader
from sglang_kevlar.protocol.cluster import GroupState, Identity
from sglang_kevlar.protocol.group import GroupReport, ProcessRef
from sglang_kevlar.protocol.launch import EXIT_CONFIG, LaunchPlan, Paths
from sglang_kevlar.protocol.nodes import decode
from sglang_kevlar.worker import group_files
from sglang_kevlar.worker.engine_group import Meeting, engine_commands
from sglang_kevlar.worker.local_watch import LocalWatch
from sglang_kevlar.worker.supervisor import Supervisor
from sglang_kevlar.worker.terminal_log import log_by


class Follower(Supervisor):
    def __init__(self, paths: Paths, plan: LaunchPlan, group: int, **how: Any) -> None:
        """Raises KeyProblem or ValueError."""
        self._orders = nodes.Follower()
        self._shadows = ShadowReader(plan, paths)
        #: of an epoch that is ready
        self._local: LocalWatch | None = None
        #: sockets of the connection that is being polled
        self._dialled: list[zmq.Socket[bytes]] = []
        #: not said yet
        self._unsaid: GroupState | None = None
        super().__init__(paths, plan, group, engine_commands(paths, plan, group), self._meeting, **how)
        log_by(self._log)
        self._phase = "down"
        # Whether the group ever starts is for the first node to say.
        self._exit_on_failed_start = False

    # -- the first node

    def _connect(self) -> None:
        plan, node = self._plan, self._plan.node
        assert node is not None and plan.join is not None and plan.node_configuration is not None
        identity = Identity(kind="node", name=f"node{node.rank}", host=plan.join.host, instance=secrets.token_hex(8))
        state = GroupState(epoch=group_files.read_epoch(self._paths, self._group), phase="down")
        end = GroupEnd(identity, plan.node_configuration, state, time.monotonic())
        key = keys.load(plan.kevlar.cluster_key_file)
        self._dialler = Dialler(node.head, key, end, self._on_event, whom="first node")

    def _disconnect(self) -> None:
        if self._local is not None:
            self._local.close()
        self._dialler.close("this node shuts down")

    def _look_elsewhere(self) -> None:
        self._look_here()
        self._say()
        self._dialler.turn()
        self._watch_connection()

    def _watch_connection(self) -> None:
        """It is another one after each try, and may end with whatever is sent."""
        now_there = self._dialler.sockets
        for each in [each for each in self._dialled if each not in now_there]:
            self._unwatch(each)
        for each in [each for each in now_there if each not in self._dialled]:
            self._watch(each, lambda: None)
        self._dialled = now_there

    def _say(self) -> None:
        state, self._unsaid = self._unsaid, None
        if state is not None:
            self._dialler.change_state(state)
            self._watch_connection()

    def _on_event(self, event: Event) -> None:
        if isinstance(event, Admitted):
            self._log("joined to the first node")
        elif isinstance(event, RequestsArrived):
            self._on_order(event)
        elif isinstance(event, KillArrived):
            if event.epoch == self._epoch:
                self._end_by_order(event.cause)
        elif isinstance(event, Ended):
            self._orders.on_over()
            self._end_by_order(f"the session with the first node ended: {event.reason}")
        elif isinstance(event, NotJoined) and event.retry_s is None:
            self._exit_status = EXIT_CONFIG
            if self._status is not None:
                self._status.send({"status": "failed", "cause": f"refused by the first node: {event.reason}"})

    def _on_order(self, event: RequestsArrived) -> None:
        try:
            order = decode(event.payload)
        except ValueError as problem:
            self._dialler.reject(f"an order that is none: {problem}")
            return
        if not self._orders.on_order(event.epoch, order, epoch=self._epoch, running=self._phase in nodes.RUNNING):
            self._dialler.reject(f"an order to start after epoch {event.epoch}, in epoch {self._epoch} ({self._phase})")

    def _end_by_order(self, cause: str) -> None:
        if self._phase == "stopped":
            for member in self._members.values():
                member.process.kill()
        elif self._members and not self._ending:
            self._end_epoch(cause, by_itself=False)

    # -- an epoch

    def _start_at(self) -> float:
        """At once, as the others do: the back-off is that of the first node."""
        return 0.0 if self._orders.order is not None and super()._start_at() < float("inf") else float("inf")

    def _timeout_ms(self) -> int:
        return 0 if self._unsaid is not None else min(super()._timeout_ms(), int(TICK * 1000))

    def _meeting(self) -> Meeting:
        order = self._orders.take()
        return Meeting(order.port, order.host)

    def _look_here(self) -> None:
        if self._phase != "ready":
            if self._local is not None:
                self._local.close()
                self._local = None
            return
        now = time.monotonic()
        if self._local is None:
            members = [ProcessRef(m.name, *m.process.identity) for m in self._members.values()]
            self._local = LocalWatch(self._plan.kevlar, self._paths, self._group, self._epoch, members)
        if now < self._local.next_look:
            return
        busy = self._local.busy
        if (loss := self._local.look(now)) is not None:
            self._end_epoch(loss.cause, by_itself=False, kind=loss.kind)
        elif busy != self._local.busy:
            self._report()

    def _stop(self) -> None:
        if self._phase not in nodes.RUNNING or self._dialler.end.phase != "joined":
            super()._stop()
            return
        # Said first, and killed by the first node: its ranks would see the end of these, and be taken for the cause.
        self._ending = True
        self._phase, self._cause, self._kind = "stopped", "this node shuts down", None
        self._report()

    # -- what is said of it

    def _what_next(self, delay: float) -> str:
        return "the first node says when to start again"

    def _tell(self, report: GroupReport) -> None:
        ranks = self._shadows.by_rank(self._group, report.epoch) if report.phase == "ready" else {}
        self._unsaid = GroupState(
            epoch=report.epoch,
            phase=report.phase,
            cause=report.cause,
            kind=report.kind,
            pids={member.name: member.pid for member in report.members},
            shadow=list(ranks.values()),
            shadow_ranks=list(ranks),
            shadow_endpoints=report.shadow_endpoints,
            busy=self._local is not None and self._local.busy,
        )
        if report.kind is not None:
            # What was found here is to be known before anybody sees the end of these ranks.
            self._say()
