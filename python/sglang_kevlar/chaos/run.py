"""One run of a scenario: references, load, faults, and then the verdict."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import aiohttp
import msgspec

from sglang_kevlar.chaos import verdict
from sglang_kevlar.chaos.answers import Reference
from sglang_kevlar.chaos.faults import READY_TIMEOUT, Faults
from sglang_kevlar.chaos.load import Clients, make_prompts, reference, session
from sglang_kevlar.chaos.processes import NotHere, Processes
from sglang_kevlar.chaos.report import Report
from sglang_kevlar.chaos.scenario import DISRUPTIVE, ORDERS, Scenario
from sglang_kevlar.chaos.verdict import Evidence, Growth, Tally
from sglang_kevlar.chaos.watch import Status, Unreachable, Watch

#: seconds between two lines of progress, and two looks at the size of processes
PROGRESS = 5.0
#: seconds after the last fault for all groups to be ready, where the scenario does not say
RETURN = 120.0


class CannotRun(Exception):
    """The scenario cannot be run against this server from here; the message says why."""


class Run:
    """``minutes`` or ``kills`` instead of the scenario's duration: its faults are repeated until then."""

    def __init__(
        self,
        scenario: Scenario,
        report: Report,
        url: str,
        seed: int,
        api_key: str | None,
        minutes: float | None,
        kills: int | None,
    ) -> None:
        self._scenario = scenario
        self._report = report
        self._url = url
        self._seed = seed
        self._api_key = api_key
        self._minutes = minutes
        self._kills = kills
        self._stopping = asyncio.Event()
        self._faults: Faults | None = None
        self._tally = Tally(report.record)
        self._growth = Growth()

    def stop(self) -> None:
        """End it early; the verdict is of what was until then."""
        self._stopping.set()
        if self._faults is not None:
            self._faults.stop()

    async def execute(self) -> str:
        """Returns `verdict.outcome`. Raises CannotRun."""
        load = self._scenario.load
        async with session(self._api_key, load.hung_after) as http:
            watch = Watch(http, self._url, self._report.record)
            try:
                await watch.start()
                return await self._with(http, watch, self._processes(watch.status))
            except (Unreachable, NotHere) as error:
                raise CannotRun(str(error)) from None
            finally:
                await watch.stop()

    def _processes(self, status: Status) -> Processes:
        """Raises NotHere, CannotRun."""
        if elsewhere := [group.name for group in status.groups if group.link != "local"]:
            raise CannotRun(
                f"worker groups of other hosts have joined ({', '.join(elsewhere)}); faults reach this host only"
            )
        supervisors = [group.pids.supervisor for group in status.groups if group.pids.supervisor is not None]
        if not supervisors:
            raise NotHere("no group has a supervisor just now; is the server still starting?")
        processes = Processes(supervisors[0])
        for number, fault in enumerate(self._scenario.faults):
            group = getattr(fault, "group", 0)
            if isinstance(group, int) and group >= len(status.groups):
                raise CannotRun(f"faults[{number}].group: {group}, but the server has {len(status.groups)} groups")
            if isinstance(fault, ORDERS) and not processes.plan.kevlar.allow_chaos:
                raise CannotRun(f"faults[{number}] needs the help of the ranks: start the server with --allow-chaos")
            if isinstance(fault, DISRUPTIVE) and len(status.groups) < 2 and not fault.allow_total_loss:
                raise CannotRun(f"faults[{number}] would take the server's only group (allow_total_loss)")
        return processes

    async def _with(self, http: aiohttp.ClientSession, watch: Watch, processes: Processes) -> str:
        scenario, report = self._scenario, self._report
        report.record("run", seed=self._seed, url=self._url, launch=processes.plan.launch_id)
        if not await watch.wait(Status.all_ready, READY_TIMEOUT):
            raise CannotRun(f"not all groups are ready within {READY_TIMEOUT:g} s")
        try:
            prompts = make_prompts(scenario.load, self._seed)
        except (OSError, ValueError) as error:
            raise CannotRun(f"prompts: {error}") from None
        references = await self._references(http, prompts) if scenario.checks.answers == "exact" else None
        faults = self._faults = Faults(scenario.faults, self._seed, watch, processes, report.record)
        clients = Clients(
            http,
            self._url,
            scenario.load,
            self._seed,
            prompts,
            references,
            scenario.checks.tie,
            faults.lost_with_frontend,
            self._tally.add,
        )
        began = time.monotonic()
        until = None if self._kills is not None else began + (self._minutes or scenario.duration / 60) * 60
        progress = asyncio.create_task(self._progress(watch, processes, faults))
        if self._stopping.is_set():
            faults.stop()
        clients.start()
        try:
            await faults.run(scenario.duration, until, self._kills)
            await watch.wait(Status.all_ready, max(RETURN, scenario.checks.ready_within or 0.0))
            since = watch.all_ready_since
            ready_after = None if since is None else max(0.0, since - faults.last_at)
            report.say("no more faults; waiting for the requests that are under way")
            await clients.stop()
        finally:
            clients.cancel()
            progress.cancel()
        # The last failover is in the status with all that it moved.
        await watch.wait(lambda _: True, 10.0)
        self._sample(processes, watch.status)
        evidence = Evidence(
            growth=self._growth,
            compared=references is not None,
            failovers=len(watch.failovers),
            redirected=sum(record.redirected for record in watch.failovers.values()),
            uncounted="the frontend that counted them is gone" if watch.new_frontends else "",
            ready_after=ready_after,
            stale=self._stale(processes, watch.status) if since is not None else None,
            stuck=faults.stuck,
        )
        findings = verdict.judge(scenario.checks, self._tally, evidence)
        outcome = verdict.outcome(findings)
        result = self._result(outcome, time.monotonic() - began, watch, faults, clients.unsent)
        result["checks"] = verdict.as_json(findings)
        report.record("verdict", verdict=outcome)
        report.finish(result, findings)
        return outcome

    async def _references(self, http: aiohttp.ClientSession, prompts: list[list[int] | str]) -> list[Reference]:
        """One after the other, so that nothing disturbs them. Raises CannotRun."""
        longest = self._scenario.load.output_tokens[1]
        self._report.say(f"asking {len(prompts)} prompts once without faults, {longest} tokens each")
        references = []
        for number, prompt in enumerate(prompts):
            if self._stopping.is_set():
                raise CannotRun("stopped before the first fault")
            try:
                references.append(await reference(http, self._url, prompt, longest))
            except (aiohttp.ClientError, TimeoutError, ValueError, msgspec.MsgspecError) as error:
                raise CannotRun(f"prompt {number} without faults: {error}") from None
        self._report.record("references", prompts=len(prompts), tokens=longest)
        return references

    async def _progress(self, watch: Watch, processes: Processes, faults: Faults) -> None:
        while True:
            await asyncio.sleep(PROGRESS)
            self._sample(processes, watch.status)
            states = " ".join(f"g{group.id}={group.state}/{group.running}" for group in watch.status.groups)
            ends = " ".join(f"{end}={count}" for end, count in sorted(self._tally.ends.items()))
            done, failovers = sum(faults.done.values()), len(watch.failovers)
            self._report.say(f"{done} faults ({faults.kills} kills), {failovers} failovers; {states}; {ends}")

    def _sample(self, processes: Processes, status: Status) -> None:
        now = time.monotonic()
        if processes.launcher is not None:
            self._growth.sample(now, "launcher", processes.launcher)
        for name in ["frontend", *(f"g{group.id}.supervisor" for group in status.groups)]:
            with suppress(NotHere):
                self._growth.sample(now, name, processes.find(name))

    @staticmethod
    def _stale(processes: Processes, status: Status) -> list[str]:
        epochs = {group.id: group.epoch for group in status.groups}
        return verdict.stale_shared_memory(processes.plan.launch_id, epochs)

    def _result(self, outcome: str, seconds: float, watch: Watch, faults: Faults, unsent: int) -> dict[str, Any]:
        tally, failovers = self._tally, list(watch.failovers.values())
        detection = sorted(record.detect_ms for record in failovers)
        returns = verdict.Durations()
        for one in watch.returns:
            returns.add(one)
        return {
            "verdict": outcome,
            "seed": self._seed,
            "description": self._scenario.description,
            "seconds": round(seconds, 1),
            "faults": dict(sorted(faults.done.items())),
            "kills": faults.kills,
            "faults_missed": faults.missed,
            "groups_lost": faults.bitten,
            "requests": dict(tally.ends.most_common()),
            "unsent": unsent,
            "tokens": tally.tokens,
            "moved": tally.moved,
            "redirects_marked": tally.redirects,
            "stall_ms": tally.stalls.summary(),
            "stall_ms_moved": tally.moved_stalls.summary(),
            "first_token_ms": tally.first_tokens.summary(),
            "return_ms": returns.summary(),
            "failovers": {
                "count": len(failovers),
                "by_cause": dict(Counter(_kind(record.cause) for record in failovers).most_common()),
                "redirected": sum(record.redirected for record in failovers),
                "recomputed_tokens": sum(record.recomputed_tokens for record in failovers),
                "restored_tokens": sum(record.restored_tokens for record in failovers),
                "detect_ms_p50": detection[len(detection) // 2] if detection else None,
                "detect_ms_max": detection[-1] if detection else None,
            },
            "shadow": {
                "frames_harmed": faults.frames_harmed(),
                "resyncs": watch.resyncs,
                "rejected_frames": watch.rejected_frames,
                "wrong_blocks": watch.wrong_blocks,
            },
        }


def _kind(cause: str) -> str:
    """A cause without what differs each time."""
    words = [word for word in cause.split(":")[0].split() if not any(letter.isdigit() for letter in word.strip("0"))]
    return " ".join(words)[:60] or "unknown"
