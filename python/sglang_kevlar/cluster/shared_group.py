"""One group, shared by the frontends that it joined: whose requests, whose answers, whose orders.

Each request belongs to one frontend, by its wire id. The first connected frontend of --join is the *primary*: it alone
changes the group (weights, adapters, caches) and says who keeps its shadow. A frontend that did not make a change
cannot know of it, and would take other answers for its own: while one made by another is in effect, the group is down
for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import msgspec
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchStrOutput,
    BatchTokenIDOutput,
    TokenizedEmbeddingReqInput,
    TokenizedGenerateReqInput,
)

from sglang_kevlar.cluster import batches, wire
from sglang_kevlar.cluster.dialler import Dialler
from sglang_kevlar.cluster.driver import RareLog
from sglang_kevlar.cluster.keys import ClusterKey
from sglang_kevlar.cluster.local_group import LocalGroup
from sglang_kevlar.control.group_end import GroupEnd
from sglang_kevlar.control.owners import Owners
from sglang_kevlar.control.session import Admitted, Ended, Event, KillArrived, NotJoined, RequestsArrived
from sglang_kevlar.protocol.cluster import GroupState, Identity
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.worker.resume import ShadowPlanReq, StartedReqOutput

logger = logging.getLogger(__name__)

#: seconds between two statements of the group's load
STATE_INTERVAL = 1.0
#: seconds in which a server that changed the group may come back; then it starts anew, as it was configured, for others
CHANGES_GRACE = 30.0


class SharedGroup:
    """To be made on the running event loop."""

    def __init__(self, plan: LaunchPlan, paths: Paths, key: ClusterKey | None, instance: str) -> None:
        assert plan.join is not None and plan.configuration is not None
        self.group = LocalGroup(plan, paths, self._on_answer, self._on_change)
        #: reasons of frontends that will never have this group
        self.refused: dict[str, str] = {}
        self._log = RareLog(logger)
        self._owners = Owners()
        #: names of the frontends with a session
        self._joined: dict[int, str] = {}
        self._was_joined = False
        #: who made the changes that are in effect, and who asked last for something that only one may ask for
        self._changed_by: str | None = None
        self._controller: int | None = None
        self._away_since: float | None = None
        self._epoch = -1
        self._stated: dict[int, tuple[GroupState, float]] = {}
        identity = Identity(name=plan.join.name, host=plan.join.host, instance=instance)
        now = time.monotonic()
        state, frontends = self.group.state(), range(len(plan.join.frontends))
        ends = [GroupEnd(identity, plan.configuration, state, now, number) for number in frontends]
        self._ways = [
            Dialler(address, key, end, partial(self._on_session, number))
            for number, (address, end) in enumerate(zip(plan.join.frontends, ends, strict=True))
        ]

    def start(self) -> None:
        self.group.start()
        for way in self._ways:
            way.start()

    def close(self, reason: str) -> None:
        """Leave: what is known goes out, then the frontends move the rest."""
        self.group.flush()
        for way in self._ways:
            way.close(reason)
        self.group.close()

    @property
    def is_refused(self) -> bool:
        """No try will go better. Of a group that was joined, which one of its frontends may come back to, all must
        have said so."""
        return len(self.refused) == len(self._ways) or (len(self.refused) > 0 and not self._was_joined)

    # ---- state ---------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Now and then: what changes slowly."""
        now = time.monotonic()
        self._state_all(now)
        self._free_of_changes(now)

    def _on_change(self) -> None:
        self._state_all(time.monotonic())

    def _state_all(self, now: float) -> None:
        state = self.group.state()
        if state.epoch != self._epoch:
            # A new incarnation is as it was configured, and has nobody's requests.
            self._epoch, self._changed_by = state.epoch, None
        if state.phase != "ready":
            self._owners.clear()
        # Also those that are not joined: a join begins with it.
        for number in range(len(self._ways)):
            self._state(number, state, now)

    def _state(self, number: int, state: GroupState, now: float) -> None:
        state = msgspec.structs.replace(state, primary=number == min({*self._joined, number}))
        if self._changed_by not in (None, self._joined.get(number)) and state.phase == "ready":
            why = "its weights or adapters were changed at run time, by a server that is not this one"
            state = msgspec.structs.replace(state, phase="down", kind="unfit", cause=why, init_info=None)
        said, at = self._stated.get(number, (None, 0.0))
        if said is not None and _without_load(said) == _without_load(state) and now - at < STATE_INTERVAL:
            return
        self._stated[number] = state, now
        self._ways[number].change_state(state)

    # ---- sessions ------------------------------------------------------------------------------------------------

    def _on_session(self, number: int, event: Event) -> None:
        if isinstance(event, RequestsArrived):
            self._on_request(number, event.epoch, event.payload)
        elif isinstance(event, KillArrived):
            self.group.kill(event.epoch, event.cause, event.planned)
        elif isinstance(event, Admitted):
            logger.info("joined the frontend at %s", self._ways[number].address)
            self._joined[number] = event.frontend
            self._was_joined = True
            self._on_change()
        elif isinstance(event, Ended):
            logger.warning("the session with %s ended: %s: %s", self._ways[number].address, event.kind, event.reason)
            self._joined.pop(number, None)
            self._forget(number)
            self._on_change()
        elif isinstance(event, NotJoined) and event.retry_s is None:
            self.refused[self._ways[number].address] = event.reason

    def _free_of_changes(self, now: float) -> None:
        """Changes whose server is gone would keep the group from all others for ever."""
        epoch = self.group.serving_epoch
        if self._changed_by is None or self._changed_by in self._joined.values() or not self._joined or epoch is None:
            self._away_since = None
        elif self._away_since is None:
            self._away_since = now
        elif now - self._away_since > CHANGES_GRACE:
            self.group.kill(epoch, "the server that changed its weights or adapters is gone", planned=True)

    def _forget(self, number: int) -> None:
        """Requests of a frontend that is gone: their clients are."""
        rids = self._owners.forget(number)
        if self._controller == number:
            self._controller = None
        for rid in rids:
            if self.group.serving_epoch is not None:
                self.group.send(AbortReq(rid=rid))

    # ---- from the frontends --------------------------------------------------------------------------------------

    def _on_request(self, number: int, epoch: int, payload: bytes) -> None:
        try:
            message = wire.decode_request(payload)
        except wire.NotForNetwork as problem:
            self._ways[number].reject(f"a request that is none: {problem}")
            return
        if epoch != self.group.serving_epoch:
            return  # it is lost, and the frontend is about to hear of it
        if isinstance(message, TokenizedGenerateReqInput | TokenizedEmbeddingReqInput):
            if self._owners.begin(message.rid, number):
                self.group.send(message)
            else:
                self._refuse(number, epoch, message.rid, "a request of this id runs already")
        elif isinstance(message, AbortReq):
            rids = self._owners.of(number) if message.abort_all else [message.rid]
            for rid in rids:
                if self._owners.owner(rid) == number:
                    self.group.send(msgspec.structs.replace(message, rid=rid, abort_all=False))
        elif wire.reads(message):
            self._owners.ask(wire.READS[type(message)].__name__, number)
            self.group.send(message)
        elif number == min(self._joined):
            if isinstance(message, wire.CHANGES):
                self._changed_by = self._joined[number]
                self._on_change()
            if not isinstance(message, ShadowPlanReq):
                self._controller = number
            self.group.send(message)
        elif not isinstance(message, ShadowPlanReq):
            # It asks before it sends; this one was on its way when another became the first.
            self._log("not primary", "ignored %s of a frontend that is not the first", type(message).__name__)

    # ---- from the group ------------------------------------------------------------------------------------------

    def _on_answer(self, epoch: int, message: Any) -> None:
        if isinstance(message, BatchStrOutput | BatchTokenIDOutput | BatchEmbeddingOutput):
            self._outputs(epoch, message)
        elif isinstance(message, AbortReq):
            number = self._owners.owner(message.rid)
            if number is not None and message.rid is not None:
                self._owners.end(message.rid)
                self._send(number, epoch, message)
        elif isinstance(message, StartedReqOutput):
            number = self._owners.owner(message.rid)
            if number is not None:
                self._send(number, epoch, message)
        elif type(message) in wire.READS.values():
            number = self._owners.answered(type(message).__name__)
            if number is not None:
                self._send(number, epoch, message)
        elif self._controller is not None:
            self._send(self._controller, epoch, message)

    def _outputs(self, epoch: int, batch: Any) -> None:
        rids: Sequence[str] = batch.rids
        owners = [self._owners.owner(rid) for rid in rids]
        try:
            parts = {number: wire.encode(part) for number, part in batches.cut(batch, owners).items()}
        except (wire.NotForNetwork, batches.UnknownShape) as problem:
            for rid, owner in zip(rids, owners, strict=True):
                if owner is not None:
                    self._owners.end(rid)
                    self.group.send(AbortReq(rid=rid))
                    self._refuse(owner, epoch, rid, str(problem))
            return
        for rid, reason in zip(rids, batch.finished_reasons, strict=True):
            if reason is not None:
                self._owners.end(rid)
        for number, payload in parts.items():
            self._outgoing(number, epoch, payload)

    def _refuse(self, number: int, epoch: int, rid: str, why: str) -> None:
        reason = {
            "type": "abort",
            "status_code": 500,
            "message": f"request {rid}: {why}",
            "err_type": "not_continuable",
        }
        self._send(number, epoch, AbortReq(rid=rid, finished_reason=reason))

    def _send(self, number: int, epoch: int, message: Any) -> None:
        try:
            payload = wire.encode(message)
        except wire.NotForNetwork as problem:
            self._log("answer", "an answer was not sent: %s", problem)
            return
        self._outgoing(number, epoch, payload)

    def _outgoing(self, number: int, epoch: int, payload: bytes) -> None:
        try:
            self._ways[number].outputs(epoch, payload)
        except ValueError as too_large:
            self._ways[number].reject(f"an answer is too large for it: {too_large}")


def _without_load(state: GroupState) -> GroupState:
    return msgspec.structs.replace(state, loads=[], shadow=[])
