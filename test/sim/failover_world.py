"""The frontend's actor in a world of simulated worker groups and clients (`test_failover_sim`).

Groups make the tokens of a known oracle and crash, hang, restart, are drained, get new weights, stop reading; messages
are late and, at a death, lost. A token says by which incarnation and under which weights it was made, so that whatever
reaches a client can be judged. Time is virtual, every choice is drawn from the seed.
"""

from __future__ import annotations

import asyncio
from typing import Any
from unittest.mock import patch

from failover_groups import BASE, MAKER, Client, SimGroup, oracle, text_of
from failover_weights import Rolled, SimWeights
from faults import Faults

from frontend_fakes import (
    AbortReq,
    BatchStrOutput,
    FakeChannel,
    FakeGroups,
    VirtualLoop,
    plan,
    run_virtual,
    str_batch,
    tokenized,
)
from sglang_kevlar.control.membership import (
    Event,
    GroupKill,
    Membership,
)
from sglang_kevlar.frontend import failover as failover_module
from sglang_kevlar.frontend import requests as requests_module
from sglang_kevlar.frontend import rolling_weights as rolling_module
from sglang_kevlar.frontend.failover import FENCED_RID, Failover
from sglang_kevlar.frontend.host import Host
from sglang_kevlar.frontend.in_flight import Call
from sglang_kevlar.frontend.outcome import RequestOutcome
from sglang_kevlar.observability.events import FailoverEvents, Redirect
from sglang_kevlar.observability.metrics import NoMetrics
from sglang_kevlar.protocol.launch import KevlarArgs, Paths
from sglang_kevlar.worker.resume import ResumedGenerateReqInput

STEPS = 500
#: virtual seconds in which everything has to end once nothing fails any more
QUIET = 60.0
#: virtual seconds within which a request moves while a group serves and all answer
PATIENCE = 5.0


class CheckedEvents(FailoverEvents):
    sim: Sim

    def dispatched(self, rid: str) -> None:
        actor = self.sim.failover
        # Of two sets of weights each has its own groups.
        alike = [held for held in actor.hold._redirected if held != rid and self.weights(held) == self.weights(rid)]
        waiting = [held for held in alike if actor._served(held)]
        assert not waiting, f"new request {rid} goes before redirected {waiting}"
        super().dispatched(rid)

    def weights(self, rid: str) -> str:
        return self.sim.failover._weights(self.sim.failover.requests[rid].entry)


class Sim(Host):
    """The world: groups, clients, and the frontend's surroundings (Host, monitor, channels)."""

    def __init__(self, seed: int, actor: type[Failover] = Failover, only: frozenset[str] | None = None) -> None:
        self.faults = Faults(seed, only)
        self.random = self.faults.random
        self.loop = VirtualLoop()
        standbys = self.random.randrange(2)
        self.args = KevlarArgs(worker_groups=3, standby_groups=standbys, hold_timeout=2.0, hold_queue=8)
        self.membership = Membership(self.args)
        self.groups = [SimGroup(self, i) for i in range(3)]
        self.clients: dict[str, Client] = {}
        self.open: dict[str, Client] = {}
        #: how many of each are yet to be submitted
        self.batches: list[tuple[RequestOutcome, Call, int]] = []
        self.fenced: set[int] = set()
        self.stray: list[tuple[list[str], BatchStrOutput]] = []
        self.nowhere: set[str] = set()
        #: those that a group gets that starts now
        self.weights = self.newest = 0
        self.control = SimWeights(self)
        #: updates of the weights that stopped for nobody
        self.updates = 0
        #: since when no group has been slow to answer, and no clock jumped
        self.well_since = self.served_since = self.loop.now
        #: when last nobody was on the way from the hold queue to a group
        self.given_out = self.loop.now
        self.count = 0
        self.trace: list[str] = []
        self.ends: dict[str, int] = {}
        self._actor = actor
        self.steps = STEPS
        #: seconds until the next step
        self.pause = 0.0

    # -- surroundings of the actor

    def channel(self, group: int, epoch: int, name: str) -> str:
        return f"{group} {epoch} {name}"

    def opened(self, channel: FakeChannel) -> None:
        group = self.groups[channel.group]
        if group.epoch == channel.epoch:
            group.channel = channel

    async def connected(self, channel: FakeChannel) -> bool:
        await asyncio.sleep(self.random.choice([0, 0.01, 0.1]))
        return not self.faults.strike("does not connect", 0.02)

    def sent(self, channel: FakeChannel, message: Any) -> None:
        group = self.groups[channel.group]
        if group.epoch != channel.epoch:
            return
        if (rid := getattr(message, "rid", None)) and "~" in rid and not isinstance(message, AbortReq):
            self.client_of(rid).moved_at = self.loop.now
        if isinstance(message, ResumedGenerateReqInput):
            assert message.resume is not None
            client = self.client_of(message.rid)
            assert message.resume.output_ids.tolist() == client.tokens, (
                f"{client.rid} is not continued where its client is"
            )
        group.input.append((message, channel.weights))

    async def prepare_group(self, channel: FakeChannel) -> str | None:  # type: ignore[override]
        known = 0
        while known != (wanted := self.control.target()):
            known = wanted
            self.failover.send(channel, ("weights", known))
            await asyncio.sleep(self.random.choice([0, 0, 0.1]))
        channel.weights = str(known)
        return "sim" if self.faults.strike("cannot be brought up to date", 0.02) else None

    async def deliver(self, batch: BatchStrOutput) -> None:  # type: ignore[override]
        for i, rid in enumerate(batch.rids):
            if rid == FENCED_RID:
                continue
            client = self.open.get(rid)
            assert client is not None, f"output for {rid}, which ended"
            tokens = list(batch.output_ids[i])
            makers = {token // BASE % MAKER for token in tokens}
            assert not makers & self.fenced, f"{rid} was given a token of a fenced attempt"
            client.tokens += tokens
            client.weights |= {token // BASE // MAKER for token in tokens}
            mixed = len(client.weights) > 1 and client.updates == self.updates
            assert not mixed, f"{rid} was made with weights {client.weights}"
            client.moved_at = self.loop.now
            client.text += batch.output_strs[i]
            assert [t % BASE for t in client.tokens] == client.answer[: len(client.tokens)], f"{rid}: other tokens"
            assert text_of(client.answer).startswith(client.text), f"{rid}: other text"
            reason = batch.finished_reasons[i]
            if reason is not None:
                if reason["type"] == "length":
                    assert len(client.tokens) == client.max_new, f"{rid} finished early"
                    assert client.text == text_of(client.answer), f"{rid}: text is missing"
                self.ended(client, reason["type"])
            if self.faults.chance(0.2):
                await asyncio.sleep(0)
                if self.faults.event("same id again", 0.1):  # a client that is done uses its id again at once
                    self.submit(next((c for c in self.clients.values() if c.end is not None), None))

    def finish_aborted(self, abort: AbortReq) -> None:
        client = self.open[abort.rid or ""]
        reason = (abort.finished_reason or {}).get("err_type")
        if reason == "weights":
            assert self.newest
        elif reason == "not_continuable":
            assert not client.continuable and client.tokens, f"{client.rid} is refused, and could go on"
        elif reason == "queue_full":
            assert not client.tokens
        elif reason is None:
            siblings = client.outcome is not None and client.outcome.failure is not None
            assert client.aborted or siblings, f"{client.rid} ends unasked"
        self.ended(client, reason or "aborted")

    def ended(self, client: Client, how: str) -> None:
        client.end = how
        self.ends[how] = self.ends.get(how, 0) + 1
        del self.open[client.rid]
        self.check_batch(client)
        parts = [*(other.call for other in self.open.values()), *(call for _, call, _ in self.batches)]
        if client.call is not None and not any(call is client.call for call in parts):
            self.failover.call_ended(client.call)

    def check_batch(self, client: Client) -> None:
        parts = [part for part in self.clients.values() if part.call is client.call]
        weights = set().union(*(part.weights for part in parts))
        stopped = any(part.updates != self.updates for part in parts)
        assert len(weights) <= 1 or stopped, f"parts of a batch have weights {weights}"

    def delivered_text(self, rid: str) -> str:
        return self.open[rid].text

    def control_reply(self, group: int, epoch: int, reply: Any) -> None:
        assert isinstance(reply, Rolled), f"nobody asked for {reply}"
        self.control.answer(group, epoch, reply)

    def redirect_through(self, rid: str, redirect: Redirect) -> None:
        there = (redirect.from_group, redirect.from_epoch), (redirect.to_group, redirect.to_epoch)
        # A group that was to get other weights and is the last one left takes its requests back.
        assert redirect.stall_s >= 0 and (there[0] != there[1] or self.control.driver is not None)

    def group_lost(self, group: int, epoch: int) -> None:
        self.fenced.add(group * 1024 + epoch)
        self.control.group_lost(group, epoch)

    def dispatch(self, events: list[Event]) -> None:
        for event in events:
            self.trace.append(f"{self.loop.now:10.2f} {event}")
            self.failover.on_event(event)
            group = self.groups[event.group]
            if isinstance(event, GroupKill) and group.epoch == event.epoch and group.phase != "down":
                group.end_epoch()

    def kill(self, group: int, epoch: int, cause: str) -> None:
        self.dispatch(self.membership.declare_lost(group, epoch, cause, self.loop.now, kind="unfit"))

    def lose(self, group: SimGroup, kind: Any) -> None:
        planned = kind == "operator"
        now = self.loop.now
        self.dispatch(self.membership.declare_lost(group.id, group.epoch, "sim", now, kind=kind, planned=planned))

    def die(self, group: SimGroup) -> None:
        epoch = group.epoch
        group.end_epoch()
        self.dispatch(self.membership.on_process_exit(group.id, epoch, "rank0", self.loop.now))

    # -- what happens

    def client_of(self, wire: str) -> Client:
        return self.clients[wire.split("~")[0]]

    def submit(
        self, again: Client | None = None, outcome: RequestOutcome | None = None, call: Call | None = None
    ) -> None:
        rid = again.rid if again is not None else f"r{len(self.clients)}"
        if rid in self.open:
            return
        max_new = self.random.randrange(1, 40)
        poison = not self.faults.over and self.faults.chance(0.01)
        answer = [oracle(rid, k) for k in range(max_new)]
        client = Client(rid, max_new, self.faults.chance(0.9), poison, answer, self.loop.now)
        client.outcome = outcome
        client.call = call or Call()
        client.updates = self.updates
        prompt = [self.random.randrange(3)] * self.random.choice([1, 10, 70, 130])
        hidden = {} if client.continuable else {"return_hidden_states": True}
        self.clients[rid] = self.open[rid] = client
        self.failover.submit(tokenized(rid, prompt, max_new, **hidden), outcome, call=client.call)

    def misfortunes(self) -> None:
        for group in self.groups:
            self.strike_group(group)
        strike = self.strike
        if strike("all groups die", 0.001):
            for other in [group for group in self.groups if group.phase != "down"]:
                self.die(other)
            for other in self.groups:
                other.wait = self.random.randrange(100, 200)
        if self.control.rolling is None and strike("weight update", 0.004):
            self.weights = self.newest = self.newest + 1
            self.updates += 1
            up_to_date = [c for c in self.failover.channels.values() if c.up_to_date]
            self.failover.set_weights(up_to_date, "")
            for channel in up_to_date:
                self.failover.send(channel, ("weights", self.weights))
            self.failover.journal.weights = str(self.weights)
            self.failover.set_weights(up_to_date, str(self.weights))
        if self.control.rolling is None and strike("weights group by group", 0.006):
            self.control.start(self.random.choice([0.5, 5.0, 50.0]))
        if strike("clock jumps", 0.01):
            self.loop.now += self.random.choice([0.5, 3.0, 100.0])
            self.well_since = self.loop.now
        if self.open and strike("abort", 0.03):
            self.abort(self.random.choice(list(self.open.values())))
        if strike("abort of all", 0.002):
            for client in self.open.values():
                client.aborted = True
            self.failover.abort(AbortReq(abort_all=True))
        if self.stray:
            self.inject()

    def strike_group(self, group: SimGroup) -> None:
        strike, draw = self.strike, self.random
        ready = group.phase == "ready"
        if group.phase != "down" and strike("crash", 0.005, group):
            self.die(group)
        elif ready and strike("supervisor reports a crash first", 0.002, group):
            group.end_epoch()
            group.report("down")
        elif ready and strike("restart by the operator", 0.002, group):
            self.membership.group(group.id).draining = False
            self.lose(group, "operator")
        elif ready and strike("hang", 0.004, group):
            group.hung = draw.randrange(2, 12)
        elif ready and strike("slow", 0.03, group):
            group.slow = draw.randrange(2, 12)
        elif ready and strike("partition towards the group", 0.005, group):
            group.deaf = draw.randrange(2, 20)
        elif ready and strike("partition towards the frontend", 0.005, group):
            group.mute = draw.randrange(2, 20)
        elif group.channel is not None and strike("input full", 0.001, group):
            group.channel.full = True
        if self.control.rolling is None and strike("drain", 0.002, group):
            known = self.membership.group(group.id)
            known.draining = not known.draining
            self.failover.route()
        if self.membership.group(group.id).draining and strike("planned move", 0.1, group):
            self.failover.spawn(self.move_away(group.id))

    async def move_away(self, group: int) -> None:
        moved, _ = await self.failover.move_away(group)
        self.faults.counts["moved by the operator"] += moved

    def strike(self, kind: str, probability: float, group: SimGroup | None = None) -> bool:
        struck = self.faults.strike(kind, probability)
        if struck:
            self.trace.append(f"{self.loop.now:10.2f} {kind} {'' if group is None else group.id}")
        return struck

    def step(self) -> None:
        self.faults.next_step()
        self.pause = self.random.choice([0, 0, 0, 0.01, 0.1])
        self.count += 1
        if self.faults.event("request", 0.3):
            self.submit()
        if self.faults.event("batch", 0.03):
            self.batches.append((RequestOutcome(), Call(), 3))
        for outcome, call, left in [self.batches.pop(0) for _ in self.batches]:
            # As upstream: not all at once. It does not go on after an error.
            if outcome.failure is None and self.faults.chance(0.5):
                left -= 1
                self.submit(outcome=outcome, call=call)
            if left and outcome.failure is None:
                self.batches.append((outcome, call, left))
            elif not any(client.call is call for client in self.open.values()):
                self.failover.call_ended(call)
        if not self.faults.over:
            self.misfortunes()
        if any(group.hung or group.deaf or group.mute for group in self.groups):
            self.well_since = self.loop.now
        for group in self.groups:
            group.step()

    def abort(self, client: Client) -> None:
        client.aborted = True
        self.failover.abort(AbortReq(rid=client.rid))

    def inject(self) -> None:
        """What was once sent, by whom it was not sent: as if two incarnations shared a socket."""
        rids, message = self.random.choice(self.stray)
        live = {request.entry.attempt.wire_rid for request in self.failover.requests.values() if request.entry.attempt}
        channels = [channel for channel in self.failover.channels.values() if channel.up_to_date]
        if channels and not live & set(rids) and self.strike("output of a fenced attempt", 0.1):
            rows = zip(rids, message.output_ids, message.output_strs, message.finished_reasons, strict=True)
            self.random.choice(channels).put(str_batch(*[(r, list(ids), s, f) for r, ids, s, f in rows]))

    # -- what must hold

    def check(self) -> None:
        actor = self.failover
        actor.journal.check()
        now = self.loop.now
        per_group: dict[tuple[int, int], int] = {}
        nowhere: set[str] = set()
        for rid, request in actor.requests.items():
            assert rid in self.open or request.ended, f"{rid} is in flight, and its client has gone"
            attempt = request.entry.attempt
            held = rid in actor.hold
            assert not (held and attempt), f"{rid} is held and runs"
            if attempt is not None:
                key = (attempt.group, attempt.epoch)
                per_group[key] = per_group.get(key, 0) + 1
                assert key[0] in actor.channels and actor.channels[key[0]].epoch == key[1], f"{rid} runs nowhere"
            else:
                if not held and not request.abort_requested:
                    nowhere.add(rid)  # for now: a refusal comes a moment later
        assert not nowhere & self.nowhere, f"{nowhere & self.nowhere} is forgotten"
        self.nowhere = nowhere
        assert self.open.keys() <= actor.requests.keys(), "a client waits for a request that nobody has"
        for group, load in actor.router.groups.items():
            assert load.requests == per_group.get((group, load.epoch), 0)
        assert len(actor.hold._new) <= self.args.hold_queue, "too many wait"
        for held_request in [*actor.hold._new.values(), *actor.hold._redirected.values()]:
            late = held_request.deadline <= now - 1 and self.well_since <= now - 1
            assert not late, f"{held_request.rid} is held beyond its time"
        self.check_bounds(now)
        if not actor._pumping:
            self.given_out = now
        elif self.well_since <= now - 1:
            assert self.given_out > now - 1, "some were given out, and then no more"
        if actor.router.groups and not actor._pumping:
            waiting = [rid for rid in actor.hold._redirected if actor._served(rid)]
            assert not waiting, f"redirected {waiting} wait while a group serves"
            if self.control.rolling is None and len(actor.router.groups) >= actor._groups.active:
                assert not actor.hold._new, "a request waits while all groups serve"

    def check_bounds(self, now: float) -> None:
        actor = self.failover
        assert len(actor.hold._redirected) <= len(actor.requests) == len(actor.journal)
        assert actor.redirected <= actor.requests.keys()
        # Those of channels that were closed a moment ago still end.
        assert len(actor._tasks) <= 20 * len(self.groups), "tasks pile up"
        assert actor._inbox.qsize() <= 100, "events pile up"
        if self.control.rolling is not None:
            # Some may wait for a group with the old weights; `quiet` sees to it that nobody does for ever.
            self.served_since = now
        elif actor.router.groups:
            since = max(self.well_since, self.served_since)
            for client in self.open.values():
                assert now - max(since, client.moved_at) < PATIENCE, f"{client.rid}: nothing happens"
        else:
            self.served_since = now

    async def main(self) -> None:
        events = CheckedEvents(NoMetrics(), self.loop.time, self.loop.time)
        events.sim = self
        groups = FakeGroups(
            self, self.args, self.kill, self.internal_error, lambda group: self.membership.group(group).draining
        )
        self.failover = self._actor(
            host=self, groups=groups, plan=plan(self.args), paths=Paths("run"), incarnation="i", events=events,
            metrics=NoMetrics(),
        )  # fmt: skip
        self.failover.journal.weights = str(self.weights)
        running = self.loop.create_task(self.failover.run())
        try:
            for _ in range(self.steps):
                await self.one(running)
            await self.quiet(running)
        finally:
            running.cancel()
            self.failover.close()

    def internal_error(self, group: int, epoch: int) -> None:
        self.dispatch(self.membership.on_internal_error(group, epoch, self.loop.now))

    async def one(self, running: asyncio.Task[None]) -> None:
        self.step()
        await asyncio.sleep(self.pause)
        if running.done():
            running.result()
        if not self.failover._turn.locked():
            self.check()

    async def quiet(self, running: asyncio.Task[None]) -> None:
        """Nothing fails any more: every request comes to its end, and every group serves."""
        self.faults.over = True
        for group in self.groups:
            self.membership.group(group.id).draining = False
        self.failover.route()
        end = self.loop.now + QUIET
        actor = self.failover
        while self.loop.now < end and (
            actor.requests or self.batches or self.control.rolling or len(actor.router.groups) < actor._groups.active
        ):
            await self.one(running)
        assert self.control.rolling is None, f"a weight update does not end: {self.control.driver.status()}"
        assert not actor.calls and actor.journal.other_weights is None
        assert not self.open, f"never ended: {list(self.open)}"
        assert not self.failover.requests and not len(self.failover.hold) and not len(self.failover.journal)
        assert len(self.failover.router.groups) == self.failover._groups.active
        await asyncio.sleep(1.0)
        assert len(actor._tasks) <= 2 * len(self.groups), "tasks of closed channels are left"
        for group in self.groups:
            group.read()
        if all(group.phase == "ready" for group in self.groups):
            told = {group.id: group.plan for group in self.groups if group.plan is not None}
            assert len(told) == 3 and all(plan.content == str(self.weights) for plan in told.values())
            for plan in told.values():
                assert plan.target is not None and self.groups[int(plan.target.name)].epoch == plan.target.epoch


def simulate(
    seed: int, only: frozenset[str] | None = None, steps: int = STEPS, actor: type[Failover] = Failover
) -> Sim:
    """Raises AssertionError, with the world in the error's ``world``."""
    sim = Sim(seed, actor, only)
    sim.steps = steps
    with (
        patch.object(failover_module, "time", sim.loop),
        patch.object(requests_module, "time", sim.loop),
        patch.object(rolling_module, "time", sim.loop),
        patch.object(requests_module, "GIVEN_AT_ONCE", requests_module.REQUEST_COST * (1 + seed % 3)),
    ):
        try:
            run_virtual(sim.loop, sim.main())
        except BaseException as error:
            error.add_note(f"seed {seed}, step {sim.faults.step}")
            error.world = sim  # type: ignore[attr-defined]
            raise
    return sim
