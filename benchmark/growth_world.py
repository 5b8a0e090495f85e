"""The frontend's real actor over real sockets, with stand-ins for the worker groups, and what its turns cost.

Everything between `submit` and the sockets is the server's own: `frontend.failover.Failover` with journal, router,
hold queue, shadow plans and channels, `control.membership`, and for the watching `frontend.groups.WorkerGroups`. Of
the frontend only upstream's side (HTTP, tokenizer, detokenized text) is missing.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import time
import tracemalloc
from array import array
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()

# sglang itself must not be imported before the line above.
import zmq  # noqa: E402
from sglang.srt.managers import io_struct  # noqa: E402
from sglang.srt.managers.io_struct import (  # noqa: E402
    AbortReq,
    BatchStrOutput,
    TokenizedGenerateReqInput,
)
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from sglang_kevlar.control.membership import Event, GroupReady, Membership  # noqa: E402
from sglang_kevlar.frontend.failover import FENCED_RID, Failover  # noqa: E402
from sglang_kevlar.frontend.groups import WorkerGroups  # noqa: E402
from sglang_kevlar.frontend.host import Host  # noqa: E402
from sglang_kevlar.frontend.loads import GroupLoadReader  # noqa: E402
from sglang_kevlar.frontend.outcome import RequestOutcome  # noqa: E402
from sglang_kevlar.frontend.tokenizer_manager import KevlarTokenizerManager  # noqa: E402
from sglang_kevlar.observability.events import HISTORY, FailoverEvents, Redirect  # noqa: E402
from sglang_kevlar.observability.metrics import NoMetrics  # noqa: E402
from sglang_kevlar.protocol.group import GroupReport, ProcessRef  # noqa: E402
from sglang_kevlar.protocol.launch import KevlarArgs, LaunchPlan, Paths  # noqa: E402
from sglang_kevlar.protocol.shadow import ShadowCounters  # noqa: E402
from sglang_kevlar.worker.heartbeat import HeartbeatWriter  # noqa: E402
from sglang_kevlar.worker.resume import (  # noqa: E402
    ResumedGenerateReqInput,
    ShadowPlanReq,
    StartedReqOutput,
    register_wire_types,
)

#: text of every token, about as long as those of English
TEXT = "word"
#: tokens of a row when many are delivered at once
CHUNK = 64
#: batches of one token per request whose cost is measured, and seconds between two of them
STEPS, STEP_INTERVAL = 40, 0.005
#: a stream of another group during a redirect: seconds between two of its tokens
BYSTANDER, BYSTANDER_INTERVAL = "bystander", 0.002
AT = "at "
#: seconds that a frontend is watched with nothing to do but look at its groups
WATCHED = 2.0
REPORT_INTERVAL = 0.5


class Point(msgspec.Struct, frozen=True):
    """What is in flight when a group is lost."""

    requests: int
    context: int = 1024
    groups: int = 2
    #: requests in flight on each of the other groups
    elsewhere: int = 0
    #: they cannot go on elsewhere (hidden states), so each is refused
    refused: bool = False


# ---- the groups


class StandIns:
    """All groups, in a process of their own: they take what comes, and make tokens when they are told."""

    def __init__(self, paths: Paths, commands: Connection) -> None:
        self._paths = paths
        self._commands = commands
        self._context = zmq.Context()
        self._sockets: dict[int, tuple[zmq.Socket[bytes], zmq.Socket[bytes]]] = {}
        #: wire id -> tokens it has when it arrives, by group
        self._runs: dict[int, dict[str, int]] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._reports: list[GroupReport] = []

    def run(self) -> None:
        register_wire_types()
        try:
            while (command := self._commands.recv())[0] != "end":
                if command[0] in ("accompany", "report"):  # these go on until the next command
                    self._commands.send(None)
                    getattr(self, command[0])(*command[1:])
                else:
                    self._commands.send(getattr(self, command[0])(*command[1:]))
        finally:
            for process in self._processes:
                process.kill()
                process.wait()

    def connect(self, group: int, epoch: int) -> None:
        for socket in self._sockets.pop(group, ()):
            socket.close(linger=0)
        outputs, requests = self._context.socket(zmq.PUSH), self._context.socket(zmq.PULL)
        requests.setsockopt(zmq.RCVHWM, 0)
        outputs.connect(self._paths.channel(group, epoch, "tokenizer"))
        requests.connect(self._paths.channel(group, epoch, "scheduler"))
        self._sockets[group], self._runs[group] = (outputs, requests), {}

    def read(self, groups: list[int], wanted: int) -> None:
        """Until so many requests run on ``groups`` in all."""
        while sum(len(self._runs[group]) for group in groups) < wanted:
            for group in groups:
                while self._sockets[group][1].poll(1):
                    message = io_struct.sock_recv(self._sockets[group][1])
                    if not isinstance(message, AbortReq | ShadowPlanReq):
                        resume = getattr(message, "resume", None)
                        self._runs[group][message.rid] = 0 if resume is None else len(resume.output_ids)

    def make(self, group: int, tokens: list[int], interval: float, reason: dict[str, Any] | None = None) -> None:
        """A batch of all runs of ``group`` for each number of ``tokens``."""
        for count in tokens:
            self._send(group, [(wire, count, TEXT * count) for wire in self._runs[group]], reason)
            time.sleep(interval)
        if reason is not None:
            self._runs[group].clear()

    def resume(self, group: int) -> None:
        """What a group says of the requests that were moved to it: that they start, and then one token."""
        runs = self._runs[group]
        for wire in runs:
            self._sockets[group][0].send_pyobj(StartedReqOutput(rid=wire, recomputed_tokens=14))
        # Its detokenizer begins with the first token.
        self._send(group, [(wire, 1, TEXT * (had + 1)) for wire, had in runs.items()], None)

    def accompany(self, group: int) -> None:
        """Until the next command: one stream of ``group`` goes on; its text is the time."""
        wire = next(wire for wire in self._runs[group] if wire.startswith(BYSTANDER))
        while not self._commands.poll(BYSTANDER_INTERVAL):
            self._send(group, [(wire, 1, f"{AT}{time.monotonic()}")], None)

    def live(self, group: int) -> None:
        """Processes that do nothing, with heartbeats and counters, for the monitor to watch."""
        members = []
        for name in ("supervisor", "rank0", "detokenizer"):
            process = subprocess.Popen(["sleep", "600"])
            self._processes.append(process)
            ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2].split()[19]
            members.append(ProcessRef(name, process.pid, int(ticks)))
            if name != "supervisor":
                # Busy with something that has no deadline while it is fresh.
                HeartbeatWriter(self._paths.heartbeat(group, 1, name)).forward(100_000)
        Path(self._paths.shadow_counters(group, 1, 0)).write_bytes(msgspec.json.encode(ShadowCounters()))
        init_info: dict[str, object] = {"max_total_num_tokens": 1_000_000}
        self._reports.append(
            GroupReport(
                group=group, epoch=1, phase="ready", supervisor=members[0], members=members[1:], init_info=init_info
            )
        )

    def report(self) -> None:
        """As supervisors do, until the next command."""
        sockets = {report.group: self._context.socket(zmq.DEALER) for report in self._reports}
        for socket in sockets.values():
            socket.connect(self._paths.control)
        while True:
            for report in self._reports:
                sockets[report.group].send(msgspec.msgpack.encode(report))
            if self._commands.poll(REPORT_INTERVAL):
                break
        for socket in sockets.values():
            socket.close(linger=0)

    def _send(self, group: int, rows: list[tuple[str, int, str]], reason: dict[str, Any] | None) -> None:
        if not rows:
            return
        count = len(rows)
        unused = dict.fromkeys(_UNUSED)
        batch = BatchStrOutput(
            rids=[row[0] for row in rows],
            output_ids=[array("q", range(1000, 1000 + row[1])) for row in rows],
            output_strs=[row[2] for row in rows],
            finished_reasons=[reason] * count,
            prompt_tokens=[1] * count,
            completion_tokens=[1] * count,
            reasoning_tokens=[0] * count,
            cached_tokens=[0] * count,
            **unused,
        )
        io_struct.sock_send(self._sockets[group][0], batch)


_UNUSED = [
    name
    for name in BatchStrOutput.__struct_fields__
    if name.startswith(("input_", "output_token", "output_top", "output_hidden", "placeholder"))
    or name in ("routed_experts", "indexer_topk")
]


# ---- the frontend


class Clocks(msgspec.Struct):
    """Seconds: of the clock, of CPU of this thread, of CPU of all threads (ZMQ's send beside it)."""

    wall: float
    thread: float
    process: float

    @staticmethod
    def now() -> Clocks:
        return Clocks(time.perf_counter(), time.thread_time(), time.process_time())

    def since(self, before: Clocks) -> dict[str, float]:
        return {name: getattr(self, name) - getattr(before, name) for name in self.__struct_fields__}


class Actor(Failover):
    """Notes when the last request was sent on, or refused."""

    settled = awaited = 0
    last = Clocks(0.0, 0.0, 0.0)

    def send(self, channel: Any, message: Any) -> bool:
        sent = super().send(channel, message)
        if isinstance(message, ResumedGenerateReqInput):
            self._settle()
        return sent

    def _refuse(self, request: Any, failure: Any) -> None:
        super()._refuse(request, failure)
        self._settle()

    def _settle(self) -> None:
        self.settled += 1
        if self.settled == self.awaited:
            self.last = Clocks.now()


def unasked(*what: object) -> None:
    raise AssertionError(f"nothing is wrong with {what}")


class Healthy(WorkerGroups):
    """Only the channels of the groups, whose membership is the benchmark's."""

    kill = on_internal_error = staticmethod(unasked)


class Frontend(Host):
    def __init__(self, point: Point, directory: str, commands: Connection) -> None:
        self._point = point
        self._commands = commands
        self._directory = directory
        self._random = np.random.default_rng(0)
        args = KevlarArgs(worker_groups=point.groups)
        self.plan = launch_plan(args)
        self._membership = Membership(args)
        self._epochs = [0] * point.groups
        metrics = NoMetrics()
        self._actor = Actor(
            host=self, groups=Healthy(self.plan, Paths(directory), unasked), plan=self.plan, paths=Paths(directory),
            incarnation="f", events=FailoverEvents(metrics), metrics=metrics,
        )  # fmt: skip
        self._awaited = 0
        self._all_came = asyncio.Event()
        #: seconds from a token of the bystander being made to its delivery
        self._late: list[float] = []
        self._count = 0

    # -- Host

    async def deliver(self, batch: Any) -> None:
        if (text := batch.output_strs[0]).startswith(AT):
            self._late.append(time.monotonic() - float(text.removeprefix(AT)))
            return
        self._awaited -= sum(rid != FENCED_RID for rid in batch.rids)
        if self._awaited <= 0:
            self._all_came.set()

    def finish_aborted(self, abort: AbortReq) -> None:
        pass

    def delivered_text(self, rid: str) -> str:
        entry = self._actor.journal.get(rid)
        return TEXT * (0 if entry is None else len(entry.delivered))

    async def prepare_group(self, channel: Any) -> str | None:
        return None

    def content(self) -> str:
        return "0"

    def group_lost(self, group: int, epoch: int) -> None:
        pass

    def redirect_through(self, rid: str, redirect: Redirect) -> None:
        pass

    # -- the groups

    async def _tell(self, *command: Any) -> None:
        self._commands.send(command)
        while not self._commands.poll():
            await asyncio.sleep(0.001)
        self._commands.recv()

    def _act(self, events: list[Event]) -> None:
        for event in events:
            self._actor.on_event(event)

    async def _start(self, group: int, capacity: int) -> None:
        self._epochs[group] += 1
        epoch = self._epochs[group]
        report = GroupReport(
            group=group, epoch=epoch, phase="ready", supervisor=ProcessRef("supervisor", 1, 1),
            members=[ProcessRef("rank0", 2, epoch)], init_info={"max_total_num_tokens": capacity},
        )  # fmt: skip
        self._act(self._membership.on_report(report, time.monotonic()))
        await asyncio.sleep(0)
        while group not in self._actor.channels:
            await asyncio.sleep(0.001)
        await self._tell("connect", group, epoch)
        while group not in self._actor.router.groups:
            await asyncio.sleep(0.001)

    def _submit(self, rid: str, group: int, context: int, refused: bool = False) -> None:
        tokens = array("q")
        tokens.frombytes(self._random.integers(64, 32000, context, dtype=np.int64).tobytes())
        message = TokenizedGenerateReqInput(
            rid=rid, input_text=None, input_ids=tokens, input_embeds=None, mm_inputs=None, token_type_ids=None,
            sampling_params=SamplingParams(max_new_tokens=100_000), return_logprob=False, logprob_start_len=-1,
            top_logprobs_num=0, token_ids_logprob=None, stream=True, return_hidden_states=refused,
        )  # fmt: skip
        self._actor.submit(message, RequestOutcome(), group)

    async def _batches(self, group: int, tokens: list[int], interval: float = 0.0, reason: Any = None) -> None:
        """Let a group make these numbers of tokens for each of its requests, and wait until they are delivered."""
        here = sum(r.entry.attempt.group == group for r in self._actor.requests.values() if r.entry.attempt)
        await self._expecting(here * len(tokens), self._tell("make", group, tokens, interval, reason))

    async def _expecting(self, rows: int, done: Any) -> None:
        self._awaited += rows
        self._all_came.clear()
        await done
        if rows:
            await self._all_came.wait()

    # -- what is measured

    async def measure(self, traced: bool) -> dict[str, Any]:
        """``traced``: by tracemalloc, which makes all else slow: only memory counts then."""
        running = asyncio.create_task(self._actor.run())
        measuring = asyncio.create_task(self._measure(traced))
        await asyncio.wait([running, measuring], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()  # raises what the actor ended with
        running.cancel()
        self._actor.close()
        return measuring.result()

    async def _measure(self, traced: bool) -> dict[str, Any]:
        point = self._point
        # What one group runs has room in one other, as far as the number of groups allows.
        capacity = max(point.requests, point.elsewhere, 32) * (point.context + 1024) * 3
        for group in range(point.groups):
            await self._start(group, capacity)
        # Once to warm up: the first of everything takes longer.
        await self._round(Point(requests=16, context=256, groups=point.groups), capacity, False)
        return await self._round(point, capacity, traced)

    async def _round(self, point: Point, capacity: int, traced: bool) -> dict[str, Any]:
        actor, result = self._actor, {}
        others = list(range(1, point.groups))
        delivered = point.context // 4
        gc.collect()
        if traced:
            tracemalloc.start()
        before, memory = Clocks.now(), resident()
        for _ in range(point.requests):
            self._count += 1
            self._submit(f"request-{self._count:08d}", 0, point.context - delivered, point.refused)
        result["submit"] = Clocks.now().since(before)
        await self._tell("read", [0], point.requests)
        await self._batches(0, [CHUNK] * (delivered // CHUNK))
        gc.collect()
        result["resident"] = resident() - memory
        if traced:
            result["traced"] = tracemalloc.get_traced_memory()[0]
            tracemalloc.stop()
        for group in others:
            for _ in range(point.elsewhere):
                self._count += 1
                self._submit(f"request-{self._count:08d}", group, point.context)
        self._submit(BYSTANDER, 1, 64)
        await self._tell("read", others, point.elsewhere * len(others) + 1)
        before = Clocks.now()
        await self._batches(0, [1] * STEPS, STEP_INTERVAL)
        result["step"] = {name: spent / STEPS for name, spent in Clocks.now().since(before).items()}
        result["redirect"] = await self._redirect(point)
        moved = 0 if point.refused else point.requests
        await self._tell("read", others, (point.elsewhere * len(others)) + 1 + moved)
        before = Clocks.now()
        for group in others if moved and not point.elsewhere else []:
            here = sum(r.entry.attempt.group == group for r in actor.requests.values() if r.entry.attempt)
            await self._expecting(here, self._tell("resume", group))
        result["resume"] = Clocks.now().since(before)
        before = Clocks.now()
        for group in others:
            await self._batches(group, [1], reason={"type": "length"})
        result["finish"] = Clocks.now().since(before)
        assert not actor.requests and not len(actor.hold), "every request has ended"
        await self._start(0, capacity)
        return result

    async def _redirect(self, point: Point) -> dict[str, Any]:
        actor = self._actor
        actor.settled, actor.awaited, watching = 0, point.requests, True
        turns = {"wall": 0.0, "thread": 0.0}

        async def watch() -> None:
            """The longest turn of the event loop: nothing else happens in it."""
            before = Clocks.now()
            while watching:
                await asyncio.sleep(0)
                now = Clocks.now()
                for name in turns:
                    turns[name] = max(turns[name], getattr(now, name) - getattr(before, name))
                before = now

        gc.collect()
        self._late.clear()
        await self._tell("accompany", 1)
        await asyncio.sleep(0.03)
        usual, self._late = self._late, []
        watcher = asyncio.create_task(watch())
        await asyncio.sleep(0)
        begin = Clocks.now()
        self._act(self._membership.on_process_exit(0, self._epochs[0], "rank0", time.monotonic()))
        while actor.settled < point.requests:
            await asyncio.sleep(0.001)
        spent = actor.last.since(begin)
        watching = False
        await watcher
        await asyncio.sleep(0.02)
        await self._tell("read", [1], 0)  # ends the bystander
        late, usually = max(self._late, default=0.0), max(usual, default=0.0)
        return spent | {"blocked": turns["wall"], "blocked_cpu": turns["thread"], "late": late, "usual": usually}


class Watcher:
    """The frontend's look at groups that do nothing: its monitor, and a call of /kevlar/status."""

    def __init__(self, groups: int, directory: str, commands: Connection) -> None:
        self._groups, self._paths, self._commands = groups, Paths(directory), commands
        self._ready: set[int] = set()

    def _on_event(self, event: Event) -> None:
        assert isinstance(event, GroupReady), f"nothing is wrong, but {event}"
        self._ready.add(event.group)

    async def measure(self) -> dict[str, Any]:
        plan = launch_plan(KevlarArgs(worker_groups=self._groups))
        groups = WorkerGroups(plan, self._paths, self._on_event)
        groups.start()
        for command in [*(("live", group) for group in range(self._groups)), ("report",)]:
            self._commands.send(command)
            self._commands.recv()
        while len(self._ready) < self._groups:
            await asyncio.sleep(0.01)
        await asyncio.sleep(2 * REPORT_INTERVAL)
        begin = Clocks.now()
        await asyncio.sleep(WATCHED)
        spent = Clocks.now().since(begin)
        result = {"watch": {name: value / WATCHED for name, value in spent.items()}}
        status = self._status(groups, plan)
        status()
        begin = Clocks.now()
        status()
        result["status"] = Clocks.now().since(begin)
        groups.close()
        return result

    def _status(self, groups: WorkerGroups, plan: LaunchPlan) -> Callable[[], dict[str, Any]]:
        """Of a frontend that has run for long, with 32 requests a group."""
        events = FailoverEvents(NoMetrics())
        for count in range(HISTORY):
            events.failover(group=0, epoch=count, cause="rank0 exited", kind="exit", detect_ms=1.0, rids=())
        attempts = [SimpleNamespace(attempt=SimpleNamespace(group=i % self._groups)) for i in range(32 * self._groups)]
        requests = {str(i): SimpleNamespace(entry=entry) for i, entry in enumerate(attempts)}
        channels = {group: SimpleNamespace(up_to_date=True, epoch=1) for group in range(self._groups)}
        failover = SimpleNamespace(requests=requests, channels=channels, hold=(), events=events)
        manager = SimpleNamespace(
            groups=groups, failover=failover, plan=plan, started_at=0.0, config_value=lambda name: "default",
            load_snapshot_reader=GroupLoadReader(plan, failover), kept=SimpleNamespace(status=dict), peers=None,
        )  # fmt: skip
        manager._queued = partial(KevlarTokenizerManager._queued, manager)
        return partial(KevlarTokenizerManager.kevlar_status, manager)


def launch_plan(args: KevlarArgs) -> LaunchPlan:
    groups = args.worker_groups
    return LaunchPlan(
        version=1, upstream="growth", launch_id="growth", kevlar=args, tp_size=1, pp_size=1, gpu_ids=[[0]] * groups,
        host="", port=0, server_args_file="",
    )  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
