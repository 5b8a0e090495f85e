"""The one actor: outputs of groups and changes of membership are handled in one order, in one place.

What is in service, and where, is in `frontend.requests`. Everything that changes that happens on the event loop, and
whatever spans an await happens in a *turn*, so that nothing is redirected between two halves of a batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

from sglang.srt.constants import HEALTH_CHECK_RID_PREFIX
from sglang.srt.managers.io_struct import (
    AbortReq,
    BatchEmbeddingOutput,
    BatchStrOutput,
    BatchTokenIDOutput,
)

from sglang_kevlar.cluster import wire
from sglang_kevlar.control.journal import Entry
from sglang_kevlar.control.membership import Event, GroupChanged, GroupLost, GroupReady, GroupSuspect, GroupTrusted
from sglang_kevlar.frontend.channels import Channel
from sglang_kevlar.frontend.finish_reasons import is_internal_error, is_refused_resume
from sglang_kevlar.frontend.host import BatchOutput, Groups, Host
from sglang_kevlar.frontend.in_flight import InFlight, TextMismatch
from sglang_kevlar.frontend.kept import messages
from sglang_kevlar.frontend.kept.progress import Progress, Recorded
from sglang_kevlar.frontend.outcome import Failure
from sglang_kevlar.frontend.requests import Requests
from sglang_kevlar.frontend.shadows import ShadowPlans
from sglang_kevlar.observability.events import FailoverEvents
from sglang_kevlar.observability.metrics import NoMetrics
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.worker.resume import StartedReqOutput

logger = logging.getLogger(__name__)

#: Upstream skips outputs under such an id without a word: what a fenced attempt sends is given this one.
FENCED_RID = f"{HEALTH_CHECK_RID_PREFIX}_FENCED"
#: seconds that a control request waits for the first group, which is there but not yet known
FIRST_GROUP_TIMEOUT = 10.0
#: seconds between two looks at the hold queue's deadlines
EXPIRY_TICK = 0.25


class Failover(Requests):
    def __init__(
        self,
        host: Host,
        groups: Groups,
        plan: LaunchPlan,
        paths: Paths,
        incarnation: str,
        events: FailoverEvents,
        metrics: NoMetrics,
    ) -> None:
        super().__init__(host, groups, plan.kevlar, incarnation, events)
        self._metrics = metrics
        self._shadows = ShadowPlans(plan, paths)
        self._turn = asyncio.Lock()
        self._inbox: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        self._first_serves = asyncio.Event()

    # ---- the groups ----------------------------------------------------------------------------------------------

    async def first_group(self) -> None:
        """Right after the start of this process, wait (a little) for a group to be found."""
        if self._first_serves.is_set():
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_GROUP_TIMEOUT):
                await self._first_serves.wait()

    def on_event(self, event: Event) -> None:
        """Called by the monitor, on the event loop. Acted on in order, each in its own turn."""
        channel = self.channels.get(event.group)
        if isinstance(event, GroupLost) and channel is not None and channel.epoch == event.epoch:
            # Before its turn: what comes until then is not to be moved, and not to be suspected of this death.
            self._give_up(channel)
        self._inbox.put_nowait(event)

    async def run(self) -> None:
        """Act on membership and on time until cancelled. Raises what went wrong in any task of the actor."""
        while True:
            event: Event | BaseException | None = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EXPIRY_TICK):
                    event = await self._inbox.get()
            if isinstance(event, BaseException):
                raise event
            if event is not None:
                async with self._turn:
                    await self._apply(event)
            self._expire()

    async def _apply(self, event: Event) -> None:
        group, epoch = event.group, event.epoch
        channel = self.channels.get(group)
        current = channel if channel is not None and channel.epoch == epoch else None
        if isinstance(event, GroupReady):
            assert channel is None, f"group {group} is attached twice"
            capacity = int(event.init_info.get("max_total_num_tokens") or 0)  # type: ignore[call-overload]
            self.channels[group] = self._groups.open(event, capacity)
            if event.formed is not None:
                self._metrics.formed(group, event.formed, event.formed_s)
            self.spawn(self._attach(self.channels[group]))
        elif isinstance(event, GroupLost) and current is not None:
            await self._lost(current, event)
        elif isinstance(event, GroupSuspect) and current is not None:
            logger.warning("worker group %d (epoch %d) is suspect: %s; others are preferred", group, epoch, event.why)
            current.suspect = True
            self.route()
        elif isinstance(event, GroupTrusted) and current is not None:
            logger.info("worker group %d (epoch %d) is trusted again", group, epoch)
            current.suspect = False
            self.route()
        elif isinstance(event, GroupChanged) and current is not None:
            self.route()
        # GroupKill is the monitor's to act on.

    async def _attach(self, channel: Channel) -> None:
        """A group is ready: connect, bring it up to date, let it serve."""
        group, epoch = channel.group, channel.epoch
        if not await channel.connected():
            self._groups.kill(group, epoch, "did not connect to the frontend after it became ready")
            return
        if channel.closed:
            return
        self.spawn(self._receive(channel))
        # Requests of a frontend that died: their clients are gone.
        self.send(channel, AbortReq(abort_all=True))
        reason = await self._host.prepare_group(channel)
        if channel.closed:
            return
        if reason is not None:
            self._groups.kill(group, epoch, reason)
            return
        # Now, not in the turn: a change that is broadcast in between must reach it.
        channel.up_to_date = True
        self._first_serves.set()
        async with self._turn:
            if channel.closed:
                return
            self.route()
            serving = ", ".join(map(str, sorted(self.router.groups)))
            logger.info("worker group %d (epoch %d) is up to date; groups that serve: %s", group, epoch, serving)

    def route(self) -> None:
        """Let the right groups serve: all active ones that can, and a standby for each that cannot.

        A suspect is asked only when nobody else is left: with too little CPU, everything may be suspect at once.
        """
        able: dict[str, list[int]] = {}
        for group, channel in sorted(self.channels.items()):
            if channel.up_to_date and not channel.given_up and not self._emptied(channel):
                able.setdefault(channel.weights, []).append(group)
        serving: set[int] = set()
        for fit in able.values():
            can = [group for group in fit if not self.channels[group].suspect] or fit
            active = [group for group in can if not self._groups.is_standby(group)]
            standby = [group for group in can if self._groups.is_standby(group)]
            serving |= {*active, *standby[: max(0, self._groups.active - len(active))]}
        for group in self.router.groups.keys() - serving:
            self._stop_routing(self.channels[group])
        for group in sorted(serving - self.router.groups.keys()):
            self._add(self.channels[group])
        self.plan_shadows()
        self._pump()

    def _emptied(self, channel: Channel) -> bool:
        """What it runs may end there or is moved, and nothing new goes to it."""
        return channel.taken or self._groups.is_draining(channel.group)

    def set_weights(self, channels: Iterable[Channel], weights: str) -> None:
        """What these groups serve from here on. Empty: they change, and nothing is shadowed or promoted meanwhile."""
        for channel in channels:
            channel.weights = weights
            self.router.set_weights(channel.group, weights)
        self.plan_shadows()

    def plan_shadows(self) -> None:
        """Tell the groups what is news about the shadows."""
        channels = [channel for channel in self.channels.values() if channel.up_to_date and not channel.given_up]
        draining = {channel.group for channel in channels if self._emptied(channel)}
        for channel, plan in self._shadows.news(channels, draining):
            self.send(channel, plan)

    def _stop_routing(self, channel: Channel) -> None:
        self.router.remove(channel.group, channel.heir)
        self._metrics.group(channel.group, ready=False, epoch=channel.epoch)

    def _give_up(self, channel: Channel) -> None:
        """Nothing more goes to a group that is about to be fenced."""
        if not channel.given_up:
            channel.given_up = True
            # Now: the next plan does not know this group any more.
            channel.heir = self._shadows.targets.get(channel.group)
        self._stop_routing(channel)

    def _add(self, channel: Channel) -> None:
        self.router.add(channel.group, channel.epoch, channel.capacity, channel.weights)
        self._metrics.group(channel.group, ready=True, epoch=channel.epoch)
        for request in self.requests.values():
            attempt = request.entry.attempt
            if attempt is not None and (attempt.group, attempt.epoch) == (channel.group, channel.epoch):
                self.router.started(channel.group, attempt.reserved_tokens, request.blocks)

    async def _lost(self, channel: Channel, event: GroupLost) -> None:
        """Fence the group, then move everything it was running."""
        self._give_up(channel)
        for message in channel.drain():
            await self._handle(channel, message)
        channel.close()
        del self.channels[event.group]
        self._host.group_lost(event.group, event.epoch)
        crashed_at = time.monotonic() if event.kind in ("exit", "report") else None
        # What was on its way when a host or a link went is not what it went of.
        on_purpose = event.kind in ("operator", "left")
        innocent = on_purpose or event.kind == "network"
        entries = self.journal.fence(event.group, event.epoch, innocent, crashed_at, counted=not on_purpose)
        if not channel.up_to_date:
            # It never served: nothing failed over.
            logger.error(
                "worker group %d (epoch %d) was lost before it served: %s", event.group, event.epoch, event.cause
            )
            self.route()
            return
        self.events.failover(
            group=event.group,
            epoch=event.epoch,
            cause=event.cause,
            kind=event.kind,
            detect_ms=event.detect_s * 1e3,
            rids=[entry.rid for entry in entries],
        )
        for entry in entries:
            self._redirect(self.requests[entry.rid], channel.heir)
        self.route()

    async def move_away(self, group: int, cause: str = "drained by an operator") -> tuple[int, int]:
        """Move what a group that is to be empty runs to the others: how many were moved, and how many are left.

        What cannot be continued elsewhere ends where it is, and so does everything while no other group serves.
        """
        async with self._turn:
            channel = self.channels.get(group)
            if channel is None or channel.given_up:
                return 0, 0  # its loss moves them
            entries = self.journal.running_on(group, channel.epoch)
            if not self._emptied(channel):
                return 0, 0
            going = [
                entry
                for entry in entries
                if not self.requests[entry.rid].abort_requested
                and self._served(entry.rid)
                and self.journal.stays(entry) is None
                # It may report nothing before its end: elsewhere it would begin from nothing.
                and not (entry.started and entry.not_continuable is not None)
            ]
            if not going:
                return 0, len(entries)
            # The longest first, as after a loss.
            going.sort(key=lambda entry: entry.context_tokens, reverse=True)
            self.events.failover(
                group=group,
                epoch=channel.epoch,
                cause=cause,
                kind="operator",
                detect_ms=0.0,
                rids=[entry.rid for entry in going],
            )
            heir = self._shadows.targets.get(group)
            for entry in going:
                assert entry.attempt is not None
                # What it still sends of it comes under an id that nobody knows any more.
                self.send(channel, AbortReq(rid=entry.attempt.wire_rid))
                self.journal.take_away(entry)
                self._redirect(self.requests[entry.rid], heir)
            self._pump()
            return len(going), len(entries) - len(going)

    async def refuse_running(self, which: Callable[[Entry], bool], why: str) -> None:
        """End these requests with an error, wherever they are."""
        async with self._turn:
            for request in [r for r in self.requests.values() if which(r.entry) and not r.ended]:
                attempt = request.entry.attempt
                if attempt is not None:
                    # What it still sends of it comes under an id that nobody knows any more.
                    self.send(self.channels[attempt.group], AbortReq(rid=attempt.wire_rid))
                self._refuse(request, Failure(500, f"request {request.entry.rid}: {why}", "weights"))

    def _redirect(self, request: InFlight, heir: int | None) -> None:
        """Queue a request of a lost group, before all new ones; or end it, if it must not run again."""
        entry = request.entry
        request.heir = heir
        if request.abort_requested:
            self._end_aborted(request, AbortReq(rid=entry.rid))
            return
        # While others are served, `_pump` refuses: that takes time, too, of which each go has little.
        refusal = None if self._served(entry.rid) else self.journal.refusal(entry)
        if refusal is not None:
            self._refuse(request, Failure(500, refusal.message, refusal.kind))
            return
        held = self.hold.hold(entry.rid, time.monotonic(), redirected=True)
        assert held, "a redirected request always finds a place"
        if not self._served(entry.rid):
            self.events.held(entry.rid)

    # ---- what groups send ----------------------------------------------------------------------------------------

    async def _receive(self, channel: Channel) -> None:
        while not channel.closed:
            await channel.arrival()
            async with self._turn:
                if not channel.closed:
                    await self._handle(channel, channel.take())
                    self._pump()

    async def _handle(self, channel: Channel, message: Any) -> None:
        channel.received += 1
        if isinstance(message, BatchStrOutput | BatchTokenIDOutput | BatchEmbeddingOutput):
            await self._outputs(channel, message)
        elif isinstance(message, AbortReq):
            entry = self.journal.accept(message.rid or "", channel.group, channel.epoch)
            if entry is not None and is_refused_resume(entry, message.finished_reason):
                self._refuse_resume(self.requests[entry.rid], message.finished_reason)
            elif entry is not None:
                message.rid = entry.rid
                self._host.finish_aborted(message)
                self._close(entry)
        elif isinstance(message, StartedReqOutput):
            entry = self.journal.accept(message.rid or "", channel.group, channel.epoch)
            if entry is not None:
                entry.started = True
                entry.recomputed_tokens += message.recomputed_tokens
                self.requests[entry.rid].recomputed_now = message.recomputed_tokens
        else:
            self._host.control_reply(channel.group, channel.epoch, message)

    async def _outputs(self, channel: Channel, batch: BatchOutput) -> None:
        """Journal what is current, blank what is fenced, then let the clients have it."""
        ended: list[Entry] = []
        mismatched: list[InFlight] = []
        refused: list[tuple[InFlight, Any]] = []
        recorded: dict[int, Progress] = {}
        now = time.monotonic()
        for i, wire_rid in enumerate(batch.rids):
            entry = self.journal.accept(wire_rid, channel.group, channel.epoch)
            if entry is None:
                batch.rids[i] = FENCED_RID
                continue
            request = self.requests[entry.rid]
            if is_refused_resume(entry, batch.finished_reasons[i]):
                refused.append((request, batch.finished_reasons[i]))
                batch.rids[i] = FENCED_RID
                continue
            try:
                self._journal_output(request, batch, i, now)
            except TextMismatch:
                mismatched.append(request)
                batch.rids[i] = FENCED_RID
                continue
            batch.rids[i] = entry.rid
            kept = None if request.outcome is None else request.outcome.kept
            if kept is not None and kept.is_recorded and kept.unrecordable is None:
                recorded[i] = kept
            reason = batch.finished_reasons[i]
            if reason is not None:
                request.ended = True
                ended.append(entry)
                if is_internal_error(reason):
                    self._groups.on_internal_error(channel.group, channel.epoch)
        if recorded:
            messages.write(batch, recorded)
        await self._host.deliver(batch)
        for entry in ended:
            self._close(entry)
        for request, reason in refused:
            self._refuse_resume(request, reason)
        for request in mismatched:
            attempt = request.entry.attempt
            assert attempt is not None
            self.send(channel, AbortReq(rid=attempt.wire_rid))
            differs = "the group that continued it decodes its earlier tokens to another text"
            self._refuse(request, Failure(500, f"request {request.entry.rid}: {differs}", "not_continuable"))

    def _refuse_resume(self, request: InFlight, reason: Any) -> None:
        attempt = request.entry.attempt
        assert attempt is not None
        message = str(reason.get("message", "")).replace(attempt.wire_rid, request.entry.rid)
        self._refuse(request, Failure(500, message, "not_continuable"))

    def _journal_output(self, request: InFlight, batch: BatchOutput, i: int, now: float) -> None:
        entry = request.entry
        if isinstance(batch, BatchEmbeddingOutput):
            return
        tokens = batch.output_ids[i]
        if isinstance(batch, BatchStrOutput) and request.replaying:
            batch.output_strs[i] = request.new_text(batch.output_strs[i], self._host.delivered_text(entry.rid))
        if entry.delivered:
            # Usage is what it was: a redirect's recomputation is ours to explain, not the client's to pay.
            batch.cached_tokens[i] = entry.cached_tokens
        else:
            entry.cached_tokens = batch.cached_tokens[i]
        if request.waits_since is not None and len(tokens):
            self.latency.tokens(now, now - request.waits_since, len(tokens), first=not entry.delivered)
            request.waits_since = now
        self.journal.deliver(entry, tokens)
        entry.input_logprobs_sent = True
        if request.outcome is not None and len(tokens):
            request.outcome.first_token = True
        if entry.redirects and len(tokens):
            restored = entry.context_tokens - len(tokens) - request.recomputed_now
            redirect = self.events.resumed(entry.rid, request.recomputed_now, restored)
            if redirect is not None:
                self._host.redirect_through(entry.rid, redirect)

    # ---- requests that outlive a frontend ------------------------------------------------------------------------

    async def _go_through(self, request: InFlight, recorded: Recorded) -> None:
        """What the frontend before us recorded of it, output by output as its endpoint takes them; then go on."""
        rid, entry = request.entry.rid, request.entry
        assert request.outcome is not None and request.outcome.kept is not None
        for output in recorded.outputs:
            await recorded.wanted()
            async with self._turn:
                for message in output:
                    if self.requests.get(rid) is not request:
                        return
                    if recorded.left:
                        self._end_aborted(request, AbortReq(rid=rid))
                        return
                    try:
                        batch = messages.read(message)
                    except wire.NotForNetwork as problem:
                        why = f"request {rid}: what its frontend recorded of it cannot be used: {problem}"
                        self._refuse(request, Failure(500, why, "not_continuable"))
                        return
                    batch.rids[0] = rid
                    self.journal.take_over(entry, batch.output_ids[0], batch.cached_tokens[0])
                    if request.outcome.kept.is_recorded:
                        messages.write(batch, {0: request.outcome.kept})
                    request.outcome.first_token = True
                    request.ended = batch.finished_reasons[0] is not None
                    await self._host.deliver(batch)
                    if request.ended:
                        self._close(entry)
                        return
        if recorded.outputs:
            await recorded.wanted()
        async with self._turn:
            if self.requests.get(rid) is not request:
                return
            if recorded.failure is not None:
                self._refuse(request, Failure(*recorded.failure))  # type: ignore[arg-type]
            elif recorded.ended or recorded.left or request.abort_requested:
                self._end_aborted(request, AbortReq(rid=rid))
            else:
                self.journal.go_on(entry)
                request.waits_since = time.monotonic()
                self.hold.hold(rid, time.monotonic(), redirected=True)
                self._pump()

    def close(self) -> None:
        """At shutdown, when nothing is in flight any more."""
        self.events.close()
        for task in self._tasks:
            task.cancel()
        for channel in self.channels.values():
            channel.close()

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # State may be half changed: end this frontend; the launcher starts one that finds its groups running.
            self._inbox.put_nowait(error)
