"""Does the faults of a scenario, each when its time has come and nobody else is down."""

from __future__ import annotations

import asyncio
import heapq
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from sglang_kevlar.chaos.orders import Disobeyed, ask
from sglang_kevlar.chaos.processes import NotHere, Processes, send
from sglang_kevlar.chaos.scenario import (
    DISRUPTIVE,
    ORDERS,
    Error,
    Fault,
    Frames,
    Hang,
    Kill,
    Memory,
    Process,
    Slow,
    Starve,
    Stop,
)
from sglang_kevlar.chaos.watch import Group, Watch
from sglang_kevlar.launcher.process import ProcessId, spawn
from sglang_kevlar.protocol.chaos import HarmFrames, Raise, Report, Sleep

#: seconds for all groups to be ready again; a server that takes longer is stuck
READY_TIMEOUT = 900.0
#: seconds within which a fault that makes a group lost shows in the status
BITE = 5.0
#: of --stop-grace: one stop of a process that is to be slow, least and most. No constant: the server looks at intervals
SLOW_STOP = (0.2, 0.4)
_BURDEN = [sys.executable, "-m", "sglang_kevlar.chaos.burden"]


@dataclass
class Target:
    #: of the record in the run directory: g0.rank1
    name: str
    process: ProcessId
    group: int
    epoch: int
    rank: int
    #: requests
    running: int

    @property
    def kind(self) -> str:
        return self.name.rpartition(".")[2].rstrip("0123456789")


class Faults:
    """``record`` is told of each fault, what it did, and why one could not be done."""

    def __init__(
        self,
        faults: list[Fault],
        seed: int,
        watch: Watch,
        processes: Processes,
        record: Callable[..., None],
    ) -> None:
        self._faults = faults
        self._watch = watch
        self._processes = processes
        self._record = record
        #: one for each fault of the scenario: what the others do does not change its choices
        self._chances = [random.Random(f"{seed}/fault/{number}") for number in range(len(faults))]
        self._stopping = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        #: faults that were done, by what they do and to which kind of process
        self.done: Counter[str] = Counter()
        #: and of the disruptive ones, those after which the group was lost
        self.bitten = 0
        self.kills = 0
        #: faults for which there was no process, or that the rank refused
        self.missed = 0
        #: frames of the shadow that were harmed, by rank and kind of harm
        self._harmed_by: dict[ProcessId, dict[str, int]] = {}
        #: why no more faults could be done; "" while they can
        self.stuck = ""
        #: when the last of them was over, monotonic seconds
        self.last_at = time.monotonic()
        #: when frontends that we killed died, and were replaced
        self.frontends: list[tuple[float, float]] = []

    def stop(self) -> None:
        self._stopping.set()

    def frames_harmed(self) -> dict[str, int]:
        """By kind of harm; of ranks that died soon after, perhaps too few."""
        total: Counter[str] = Counter()
        for harmed in self._harmed_by.values():
            total.update(harmed)
        return dict(total)

    def lost_with_frontend(self, started: float, ended: float) -> bool:
        return any(died <= ended and started <= replaced for died, replaced in self.frontends)

    async def run(self, duration: float, until: float | None, kills: int | None) -> None:
        """Until ``until`` (monotonic seconds), or ``kills`` have been done, or `stop`. Then none of them is in effect.

        ``duration``: after which those with ``at`` come again, as long as this lasts.
        """
        began = time.monotonic()
        due = [(began + self._first(number), number) for number in range(len(self._faults))]
        heapq.heapify(due)
        try:
            while due and not self._stopping.is_set() and not self.stuck:
                at, number = heapq.heappop(due)
                if until is not None and at >= until:
                    break
                await self._unless_stopped(asyncio.sleep(max(0.0, at - time.monotonic())))
                if self._stopping.is_set() or not await self._may(self._faults[number], until):
                    break
                await self._do(number)
                if kills is not None and self.kills >= kills:
                    break
                heapq.heappush(due, (self._next(number, at, duration), number))
            if until is not None and not self.stuck:
                await self._unless_stopped(asyncio.sleep(max(0.0, until - time.monotonic())))
        finally:
            await self._undo()

    def _first(self, number: int) -> float:
        fault = self._faults[number]
        return fault.at if fault.at is not None else self._interval(number)

    def _next(self, number: int, at: float, duration: float) -> float:
        if self._faults[number].at is not None:
            return at + duration
        # From when it was done: what had to wait for others does not come in a burst.
        return time.monotonic() + self._interval(number)

    def _interval(self, number: int) -> float:
        fault = self._faults[number]
        assert fault.every is not None
        return fault.every * (1 + fault.jitter * self._chances[number].uniform(-1, 1))

    async def _unless_stopped(self, what: Coroutine[Any, Any, Any]) -> None:
        stopped = asyncio.create_task(self._stopping.wait())
        waited = asyncio.create_task(what)
        await asyncio.wait((stopped, waited), return_when=asyncio.FIRST_COMPLETED)
        for task in (stopped, waited):
            task.cancel()
        await asyncio.gather(stopped, waited, return_exceptions=True)

    async def _may(self, fault: Fault, until: float | None) -> bool:
        """Waits until enough groups are ready. False: time is up, or it takes too long, which is noted."""
        if not fault.waits and (fault.allow_total_loss or not isinstance(fault, DISRUPTIVE)):
            return True
        # One goes, another has to stay.
        wanted = len(self._watch.status.groups) if fault.waits else 2
        patience = READY_TIMEOUT
        if until is not None and fault.every is not None:  # one with ``at`` is done, if late
            patience = min(patience, max(0.0, until - time.monotonic()))
        reached = asyncio.create_task(self._watch.wait(lambda status: len(status.ready()) >= wanted, patience))
        await self._unless_stopped(asyncio.wait((reached,)))
        if self._stopping.is_set():
            reached.cancel()
            return False
        if not reached.result() and patience == READY_TIMEOUT:
            self.stuck = f"not {wanted} ready groups within {READY_TIMEOUT:g} s"
            self._record("stuck", reason=self.stuck)
        return reached.result()

    # -- one fault

    async def _do(self, number: int) -> None:
        fault = self._faults[number]
        # All draws, always, so that a fault's later choices do not depend on what the server was like at the first.
        draws = [self._chances[number].random() for _ in range(4)]
        try:
            if isinstance(fault, Memory):
                self.done["memory"] += 1
                self._record("fault", do="memory", leave=fault.leave)
                self._begin(self._burden(fault.seconds, 1, ["--leave", str(int(fault.leave * 2**30))]))
            else:
                kinds: list[Process] = ["rank"] if isinstance(fault, ORDERS) else fault.processes
                kind = kinds[int(draws[1] * len(kinds))]
                if kind == "frontend":
                    await self._to_frontend(fault)
                else:
                    groups = self._groups(fault, draws[0])
                    targets = [self._target(fault, group, kind, draws[2]) for group in groups]
                    await self._to_groups(fault, targets, int(draws[3] * 2**32))
        except (NotHere, Disobeyed) as error:
            self.missed += 1
            self._record("missed", do=_name(fault), reason=str(error))
        self.last_at = time.monotonic()

    def _groups(self, fault: Any, draw: float) -> list[Group]:
        groups = self._watch.status.groups
        if fault.group == "all":
            return groups
        if isinstance(fault.group, int):
            return [groups[fault.group]]
        # What does not serve has nothing to lose.
        serving = [group for group in groups if group.serves] or groups
        if fault.group == "random":
            return [serving[int(draw * len(serving))]]
        choose = max if fault.group == "busiest" else min
        return [choose(serving, key=lambda group: group.running)]

    def _target(self, fault: Any, group: Group, kind: Process, draw: float) -> Target:
        ranks = group.pids.ranks
        rank = int(draw * len(ranks)) if fault.rank == "random" else fault.rank
        if kind == "rank":
            if rank >= len(ranks):
                raise NotHere(f"group {group.id} has no rank {rank}")
            name, pid = f"rank{rank}", ranks[rank]
        else:
            name, pid = kind, getattr(group.pids, kind)
            if pid is None:
                raise NotHere(f"group {group.id} has no {kind}")
        name = f"g{group.id}.{name}"
        return Target(name, self._processes.find(name, pid), group.id, group.epoch, rank, group.running)

    async def _to_groups(self, fault: Any, targets: list[Target], seed: int) -> None:
        for target in targets:
            self._note(fault, target)
        if isinstance(fault, Kill):
            if len(targets) > 1:
                # Between two kills a survivor could begin a moved request, and its death would be held against that.
                for target in targets:
                    send(target.process, signal.SIGSTOP)
            self.kills += sum(send(target.process, signal.SIGKILL) for target in targets)
        elif isinstance(fault, Stop):
            for target in targets:
                self._begin(self._halt(target.process, fault.seconds))
        elif isinstance(fault, Slow):
            for target in targets:
                self._begin(self._slow(target.process, fault))
        elif isinstance(fault, Starve):
            cpus = ",".join(str(cpu) for cpu in os.sched_getaffinity(targets[0].process.pid))
            self._begin(self._burden(fault.seconds, fault.loops, ["--cpus", cpus]))
        else:
            await self._order(fault, targets, seed)
        if isinstance(fault, DISRUPTIVE):
            patience = BITE + getattr(fault, "seconds", 0.0)
            await asyncio.gather(*(self._bite(target, patience) for target in targets))

    async def _to_frontend(self, fault: Any) -> None:
        process = self._processes.find("frontend")
        self.done[f"{_name(fault)} frontend"] += 1
        self._record("fault", do=_name(fault), process="frontend", pid=process.pid)
        if isinstance(fault, Stop):
            await self._halt(process, fault.seconds)
        elif isinstance(fault, Slow):
            await self._slow(process, fault)
        elif isinstance(fault, Starve):
            cpus = ",".join(str(cpu) for cpu in os.sched_getaffinity(process.pid))
            self._begin(self._burden(fault.seconds, fault.loops, ["--cpus", cpus]))
        else:
            before, died = self._watch.new_frontends, time.monotonic()
            self.frontends.append((died, float("inf")))
            self.kills += send(process, signal.SIGKILL)
            came = await self._watch.wait(lambda _: self._watch.new_frontends > before, READY_TIMEOUT)
            self.frontends[-1] = (died, time.monotonic())
            self.bitten += came
            if not came:
                self.stuck = f"no new frontend within {READY_TIMEOUT:g} s"

    async def _order(self, fault: Error | Hang | Frames, targets: list[Target], seed: int) -> None:
        for target in targets:
            endpoint = self._processes.paths.channel(target.group, target.epoch, f"chaos{target.rank}")
            if isinstance(fault, Error):
                await asyncio.to_thread(ask, endpoint, Raise())
            elif isinstance(fault, Hang):
                await asyncio.to_thread(ask, endpoint, Sleep(seconds=fault.seconds))
            else:
                await asyncio.to_thread(ask, endpoint, HarmFrames(count=fault.count, harm=fault.harm, seed=seed))
                self._begin(self._harmed(endpoint, target, fault))

    async def _harmed(self, endpoint: str, target: Target, fault: Frames) -> None:
        """Follows the harm to its end."""
        deadline = time.monotonic() + fault.seconds
        while True:
            await asyncio.sleep(0.5)
            try:
                account = await asyncio.to_thread(ask, endpoint, Report())
            except Disobeyed as error:
                known = self._harmed_by.get(target.process, {})
                self._record("frames", group=target.group, harmed=known, reason=str(error))
                return
            self._harmed_by[target.process] = account.harmed
            if account.to_harm == 0 or time.monotonic() > deadline:
                self._record("frames", group=target.group, harmed=account.harmed, left=account.to_harm)
                return

    async def _bite(self, target: Target, patience: float) -> None:
        began, group, epoch = time.monotonic(), target.group, target.epoch

        def lost(status: Any) -> bool:
            now = status.groups[group]
            return bool(now.epoch != epoch or not now.serves)

        if await self._watch.wait(lost, patience):
            self.bitten += 1
            cause = self._watch.status.groups[group].cause
            self._record("bite", group=group, within_ms=round((time.monotonic() - began) * 1e3), cause=cause)
        else:
            self._record("no bite", group=group, process=target.name)

    # -- what lasts

    def _begin(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(what)
        self._background.add(task)
        task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        self.last_at = time.monotonic()
        if not task.cancelled() and (error := task.exception()) is not None:
            self.missed += 1
            self._record("missed", reason=repr(error))

    async def _halt(self, process: ProcessId, seconds: float) -> None:
        try:
            if send(process, signal.SIGSTOP):
                await asyncio.sleep(seconds)
        finally:
            send(process, signal.SIGCONT)

    async def _slow(self, process: ProcessId, fault: Slow) -> None:
        chance = random.Random(process.start_ticks)
        grace = self._processes.plan.kevlar.stop_grace
        end = time.monotonic() + fault.seconds
        while time.monotonic() < end:
            stop = grace * chance.uniform(*SLOW_STOP)
            await self._halt(process, stop)
            await asyncio.sleep(stop * (1 - fault.share) / fault.share)

    async def _burden(self, seconds: float, count: int, arguments: list[str]) -> None:
        children = [spawn("burden", [*_BURDEN, *arguments]) for _ in range(count)]
        try:
            await asyncio.sleep(seconds)
        finally:
            for child in children:
                child.kill()
            for child in children:
                while child.reap() is None:
                    await asyncio.sleep(0.01)

    async def _undo(self) -> None:
        """What lasts is ended now."""
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _note(self, fault: Fault, target: Target) -> None:
        self.done[f"{_name(fault)} {target.kind}"] += 1
        what = {"do": _name(fault), "process": target.name, "pid": target.process.pid}
        self._record("fault", **what, epoch=target.epoch, running=target.running)


def _name(fault: Fault) -> str:
    return type(fault).__name__.lower()
