"""The requests in service: each on one group or in the hold queue, and the journal knows which.

They enter by `submit`, leave by their last output or by `_refuse`. Nothing here waits; what the groups do is the
business of `frontend.failover`, which calls it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from sglang.srt.managers.io_struct import AbortReq

from sglang_kevlar.control.admission import HoldQueue, must_wait
from sglang_kevlar.control.journal import Entry, Journal
from sglang_kevlar.control.routing import Router
from sglang_kevlar.frontend.channels import CannotSend, Channel, ChannelFull
from sglang_kevlar.frontend.host import Groups, Host
from sglang_kevlar.frontend.in_flight import Call, InFlight, TokenizedRequest, not_continuable
from sglang_kevlar.frontend.kept.progress import Recorded
from sglang_kevlar.frontend.outcome import Failure, RequestOutcome
from sglang_kevlar.observability.events import FailoverEvents
from sglang_kevlar.observability.latency import RollingLatency
from sglang_kevlar.protocol.launch import KevlarArgs

#: seconds a client is told to wait after a 503
RETRY_AFTER = 5
#: context tokens of held requests that are given to groups in one go, some milliseconds of work: then all other streams
#: have a turn. And how many of them cost as much to send as a request does besides its own.
GIVEN_AT_ONCE = 300_000
REQUEST_COST = 8192

NOT_SERVED = "the weights that it began with are no longer served"


class Requests:
    def __init__(self, host: Host, groups: Groups, args: KevlarArgs, incarnation: str, events: FailoverEvents) -> None:
        self._args = args
        self._host = host
        self._groups = groups
        self.events = events
        self.journal = Journal(args, incarnation)
        self.router = Router()
        self.hold = HoldQueue(args)
        self.channels: dict[int, Channel] = {}
        self.requests: dict[str, InFlight] = {}
        #: requests in flight that were moved: their answers say so
        self.redirected: set[str] = set()
        #: calls under way of which a request was submitted
        self.calls: set[Call] = set()
        self.latency = RollingLatency()
        self._tasks: set[asyncio.Task[None]] = set()
        #: more held requests are about to be given to groups
        self._pumping = False

    # ---- what the actor does about them --------------------------------------------------------------------------

    def _give_up(self, channel: Channel) -> None:
        """Nothing more goes to a group that is about to be fenced."""
        raise NotImplementedError

    async def _go_through(self, request: InFlight, recorded: Recorded) -> None:
        """What the frontend before us recorded of it, output by output as its endpoint takes them; then go on."""
        raise NotImplementedError

    def _task_done(self, task: asyncio.Task[None]) -> None:
        raise NotImplementedError

    # ---- requests in ---------------------------------------------------------------------------------------------

    def submit(
        self,
        message: TokenizedRequest,
        outcome: RequestOutcome | None,
        pinned_group: int | None = None,
        call: Call | None = None,
    ) -> None:
        """Accept a request. Never waits; a refusal reaches the client as the request's own error.

        ``pinned_group``: a health probe, for that group if it serves. ``call``: what it is a part of (a batch, n > 1):
        all of that is made with the same weights.
        """
        namesake = self.requests.get(message.rid)
        if namesake is not None and namesake.ended:
            self._close(namesake.entry)
        probed = None if pinned_group is None else self.router.groups.get(pinned_group)
        if call is not None and call.weights is None:
            call.weights = self.journal.weights if probed is None else probed.weights
            self.calls.add(call)
        entry = self.journal.open(
            message.rid,
            prompt_tokens=len(message.input_ids or ()),
            max_new_tokens=message.sampling_params.max_new_tokens or 0,
            not_continuable=not_continuable(message),
            weights=None if call is None else call.weights,
        )
        request = InFlight(entry, message, outcome, self._args.journal_interval)
        request.call = call
        if pinned_group is None:
            request.waits_since = time.monotonic()
        self.requests[entry.rid] = request
        if outcome is not None:
            outcome.rids[entry.rid] = None
            if outcome.kept is not None:
                outcome.kept.made_a_request()
                recorded = outcome.kept.recorded
                if recorded is not None and (recorded.outputs or recorded.ended):
                    self.spawn(self._go_through(request, recorded))
                    return
                if recorded is not None:
                    # Nobody was given anything of it: it begins anew, before those that come after it.
                    self.hold.hold(entry.rid, time.monotonic(), redirected=True)
                    self._pump()
                    return
        if call is not None and call.refused:
            failure = Failure(500, f"request {entry.rid}: {NOT_SERVED}", "weights")
            asyncio.get_running_loop().call_soon(self._refuse, request, failure)
        elif pinned_group is not None and probed is not None:
            self._dispatch(request, pinned_group)
        elif self._served(entry.rid) and not must_wait(
            self._has_room(entry), self._degraded(entry), self._waiting(self._weights(entry))
        ):
            self._dispatch(request, self._choose(request))
        elif not self.hold.hold(entry.rid, time.monotonic(), redirected=False):
            full = f"request {entry.rid}: the hold queue is full ({self._args.hold_queue} requests)"
            failure = Failure(503, full, "queue_full", RETRY_AFTER)
            # Later: upstream looks the request up once more after this call.
            asyncio.get_running_loop().call_soon(self._refuse, request, failure)
        else:
            self.events.held(entry.rid)

    def abort(self, abort: AbortReq) -> None:
        """Abort one request, or all. One that is on no group ends here and now."""
        if abort.abort_all:
            for channel in [channel for channel in self.channels.values() if channel.up_to_date]:
                self.send(channel, abort)
            targets = list(self.requests.values())
        else:
            target = self.requests.get(abort.rid or "")
            targets = [] if target is None else [target]
        for request in targets:
            request.abort_requested = True
            attempt = request.entry.attempt
            if attempt is None:
                self.hold.remove(request.entry.rid)
                asyncio.get_running_loop().call_soon(self._end_held, request, abort)
            elif not abort.abort_all:
                wire = AbortReq(
                    rid=attempt.wire_rid, finished_reason=abort.finished_reason, abort_message=abort.abort_message
                )
                self.send(self.channels[attempt.group], wire)

    # ---- the hold queue ------------------------------------------------------------------------------------------

    def _weights(self, entry: Entry) -> str:
        """Those that a group for it must have."""
        return entry.weights if self.journal.serves(entry.weights) else self.journal.weights

    def _served(self, rid: str) -> bool:
        """Whether there is a group for it."""
        return bool(self.router.having(self._weights(self.requests[rid].entry)))

    def _waiting(self, weights: str) -> int:
        """How many are held before a request of these."""
        if self.journal.other_weights is None:
            return len(self.hold)
        return int(self.hold.first(lambda rid: self._weights(self.requests[rid].entry) == weights) is not None)

    def _degraded(self, entry: Entry) -> bool:
        return len(self.router.having(self._weights(entry))) < self._groups.active

    def _has_room(self, entry: Entry) -> bool:
        return self.router.has_room(entry.reserved_tokens, self._weights(entry))

    def _pump(self) -> None:
        """Give held requests to groups, as far as there is room for new ones; many of them in several goes."""
        if not self._pumping and self._pump_some():
            self._pumping = True
            self.spawn(self._pump_rest())

    async def _pump_rest(self) -> None:
        # No turn: each go is one step, and what is left is held, as it would be without a group.
        more = True
        while more:
            await asyncio.sleep(0)
            more = self._pump_some()
        self._pumping = False

    def _pump_some(self) -> bool:
        """Whether there are more that can be given to a group."""
        budget = GIVEN_AT_ONCE
        #: weights of which no group has room
        full: set[str] = set()

        def can_go(rid: str) -> bool:
            return self._served(rid) and self._weights(self.requests[rid].entry) not in full

        while budget > 0:
            held = self.hold.first(can_go) if self.router.groups else None
            if held is None:
                return False
            request = self.requests[held.rid]
            redirected = request.entry.redirects > 0
            if not redirected and self._degraded(request.entry) and not self._has_room(request.entry):
                if self.journal.other_weights is None:
                    return False
                full.add(self._weights(request.entry))
                continue
            self.hold.remove(held.rid)
            budget -= request.entry.context_tokens + REQUEST_COST
            refusal = self.journal.refusal(request.entry) if redirected else None
            if refusal is None:
                self._dispatch(request, self._choose(request, spread=redirected))
            else:
                self._refuse(request, Failure(500, refusal.message, refusal.kind))
        return self.hold.first(can_go) is not None

    def _expire(self) -> None:
        for held in self.hold.expired(time.monotonic()):
            waited = f"waited {self._args.hold_timeout:g} s for a worker group to serve it"
            failure = Failure(503, f"request {held.rid}: {waited}", "no_group", RETRY_AFTER)
            self._refuse(self.requests[held.rid], failure)
        self._pump()

    def call_ended(self, call: Call) -> None:
        self.calls.discard(call)

    def begin_with(self, weights: str) -> None:
        """Requests begin with these from now on: also those that are held and have not begun."""
        for request in self.requests.values():
            call, entry = request.call, request.entry
            if entry.attempt is None and not entry.delivered and (call is None or not call.begun):
                entry.weights = weights
                if call is not None:
                    call.weights = weights

    # ---- groups --------------------------------------------------------------------------------------------------

    def _choose(self, request: InFlight, spread: bool = False) -> int:
        weights = self._weights(request.entry)
        heir = self.router.having(weights).get(-1 if request.heir is None else request.heir)
        if heir is not None and (heir.requests == 0 or heir.fits(request.entry.reserved_tokens)):
            assert request.heir is not None
            return request.heir
        group = self.router.choose(request.blocks, request.entry.reserved_tokens, spread, weights)
        assert group is not None, "asked only while a group serves"
        return group

    def _dispatch(self, request: InFlight, group: int) -> None:
        entry = request.entry
        channel = self.channels[group]
        if request.call is not None:
            request.call.begun = True
        attempt = self.journal.begin_attempt(entry, group, channel.epoch, time.monotonic(), channel.weights)
        self.router.started(group, attempt.reserved_tokens, request.blocks)
        if entry.redirects:
            self.redirected.add(entry.rid)
            self.events.redirected(entry.rid, group=group, epoch=channel.epoch, delivered_tokens=len(entry.delivered))
        else:
            self.events.dispatched(entry.rid)
        try:
            self.send(channel, request.for_attempt(attempt))
        except CannotSend as reason:
            failure = Failure(400, f"request {entry.rid}: {reason}", "invalid")
            # Later: it may be that upstream has yet to look the request up.
            asyncio.get_running_loop().call_soon(self._refuse, request, failure)

    def send(self, channel: Channel, message: Any) -> bool:
        """False: the group does not read its input and is given up; its requests move, this one with them."""
        try:
            channel.send(message)
        except ChannelFull as full:
            self._give_up(channel)
            self._groups.kill(channel.group, channel.epoch, str(full))
            return False
        return True

    # ---- requests out --------------------------------------------------------------------------------------------

    def _close(self, entry: Entry) -> None:
        if self.journal.get(entry.rid) is not entry:
            return  # already closed, and perhaps its id in use again
        attempt = entry.attempt
        if attempt is not None:
            self.router.finished(attempt.group, attempt.epoch, attempt.reserved_tokens)
        self.journal.close(entry.rid)
        self.hold.remove(entry.rid)
        request = self.requests.pop(entry.rid)
        if request.outcome is not None:
            request.outcome.rids.pop(entry.rid, None)
        self.redirected.discard(entry.rid)
        self.events.gone(entry.rid)

    def _end_held(self, request: InFlight, abort: AbortReq) -> None:
        self._end_aborted(request, abort)
        self._pump()  # it may have been in the way of others

    def _end_aborted(self, request: InFlight, abort: AbortReq) -> None:
        """End a request that is on no group, as its client asked."""
        if self.requests.get(request.entry.rid) is not request:
            return
        self._close(request.entry)
        self._host.finish_aborted(
            AbortReq(rid=request.entry.rid, finished_reason=abort.finished_reason, abort_message=abort.abort_message)
        )

    def _refuse(self, request: InFlight, failure: Failure) -> None:
        """End a request with an error that names it. Never a silently different answer."""
        rid = request.entry.rid
        if self.requests.get(rid) is not request:
            return
        self.events.refused(rid, failure.kind, failure.message)
        self._close(request.entry)
        if request.outcome is not None and request.outcome.fail(failure):
            # One sub-request of a batch or n > 1 failed, so the HTTP request has: no need for the others.
            for sibling in list(request.outcome.rids):
                self.abort(AbortReq(rid=sibling))
        reason = {"type": "abort", "status_code": failure.status, "message": failure.message, "err_type": failure.kind}
        self._host.finish_aborted(AbortReq(rid=rid, finished_reason=reason))

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
