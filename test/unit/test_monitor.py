"""GroupMonitor with real (light) processes: what it notices, how fast, and what it must not take for a failure."""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time

import msgspec
import pytest
import uvloop
import zmq
import zmq.asyncio

from sglang_kevlar.control.membership import GroupKill, GroupLost, GroupReady, GroupSuspect, GroupTrusted
from sglang_kevlar.frontend.monitor import GroupMonitor
from sglang_kevlar.frontend.process_watch import ProcessWatch
from sglang_kevlar.protocol.group import GroupReport, KillGroup, ProcessRef
from sglang_kevlar.protocol.heartbeat import PAGE_SIZE, Heartbeat, Phase, pack
from sglang_kevlar.protocol.launch import KevlarArgs, Paths

SLEEP = "import time; time.sleep(600)"
#: for whatever a loaded machine may do; no test relies on its being reached
PATIENCE = 20.0


def start_ticks(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as f:
        return int(f.read().rpartition(")")[2].split()[19])


class FakeGroup:
    """Processes that sleep, and the reports a supervisor would send about them."""

    def __init__(self, paths: Paths, context: zmq.Context, group: int = 0, epoch: int = 1) -> None:
        self.paths, self.group, self.epoch = paths, group, epoch
        self.processes = {}  # the last one of each name
        self.spawned = []
        self.supervisor = self.spawn("supervisor", SLEEP)
        self.members = [self.spawn(n, SLEEP) for n in ("rank0", "rank1", "detokenizer")]
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.socket.connect(paths.control)

    def spawn(self, name: str, code: str, *args: str) -> ProcessRef:
        process = subprocess.Popen([sys.executable, "-c", code, *args])
        self.processes[name] = process
        self.spawned.append(process)
        return ProcessRef(name, process.pid, start_ticks(process.pid))

    def report(self, phase: str = "ready", **fields) -> None:
        fields = {"supervisor": self.supervisor, "members": [] if phase == "down" else self.members} | fields
        report = GroupReport(group=self.group, epoch=self.epoch, phase=phase, **fields)
        self.socket.send(msgspec.msgpack.encode(report))

    def signal(self, name: str, sig: int) -> None:
        self.processes[name].send_signal(sig)

    def beat(self, name: str, phase: Phase, tokens: int = 1, age: float = 0.0) -> None:
        start = max(0, time.monotonic_ns() - int(age * 1e9))
        with open(self.paths.heartbeat(self.group, self.epoch, name), "a+b") as f:
            f.truncate(PAGE_SIZE)
            with mmap.mmap(f.fileno(), PAGE_SIZE) as page:
                data = pack(2, Heartbeat(phase, tokens, start, start, 1))
                page[: len(data)] = data

    def close(self) -> None:
        self.socket.close()
        for process in self.spawned:
            process.kill()
            process.wait()


class World:
    """A run directory, a monitor, and groups. ``events`` is what the frontend was told."""

    def __init__(self, **args) -> None:
        self.dir = tempfile.TemporaryDirectory(prefix="kvmon")
        self.paths = Paths(self.dir.name)
        self.args = KevlarArgs(worker_groups=2, **args)
        self.events: list = []
        self.context = zmq.Context()
        self.groups: list[FakeGroup] = []
        self.monitor: GroupMonitor | None = None

    def start_monitor(self) -> GroupMonitor:
        self.monitor = GroupMonitor(self.paths, self.args, self.on_event)
        self.monitor.start()
        return self.monitor

    def on_event(self, event) -> None:
        self.events.append(event)

    def group(self, group: int = 0, epoch: int = 1) -> FakeGroup:
        self.groups.append(FakeGroup(self.paths, self.context, group, epoch))
        return self.groups[-1]

    async def ready(self, group: int = 0) -> FakeGroup:
        fake = self.group(group)
        fake.report()
        await self.until(GroupReady, group)
        return fake

    async def until(self, kind: type, group: int = 0):
        """The next event of this kind, also if it came already; it and those before it are forgotten."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            for i, event in enumerate(self.events):
                if isinstance(event, kind) and event.group == group:
                    del self.events[: i + 1]
                    return event
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {kind.__name__} of group {group}; got {self.events}")

    def close(self) -> None:
        if self.monitor is not None:
            self.monitor.close()
        for group in self.groups:
            group.close()
        self.context.term()
        self.dir.cleanup()


def in_world(scenario, loop=asyncio.run, **args) -> None:
    async def main() -> None:
        world = World(**args)
        try:
            world.start_monitor()
            await scenario(world)
        finally:
            world.close()

    loop(main())


@pytest.mark.parametrize("loop", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("victim", ["rank1", "detokenizer", "supervisor"])
def test_sigkill_is_noticed(loop, victim):
    async def scenario(world: World) -> None:
        group = await world.ready()
        await world.ready(1)
        group.signal(victim, signal.SIGKILL)
        lost = await world.until(GroupLost)
        assert (lost.kind, lost.epoch) == ("exit", 1) and victim in lost.cause
        await world.until(GroupKill)
        # nothing of the epoch is left alive, and the other group is as it was
        for ref in group.members:
            await asyncio.to_thread(group.processes[ref.name].wait, PATIENCE)
        assert (group.processes["supervisor"].poll() is None) == (victim != "supervisor")
        assert [s["state"] for s in world.monitor.snapshot()] == ["down", "ready"]

    in_world(scenario, loop)


def test_stopped_longer_than_grace():
    async def scenario(world: World) -> None:
        group = await world.ready()
        group.signal("rank0", signal.SIGSTOP)
        lost = await world.until(GroupLost)
        assert lost.kind == "stopped" and "rank0" in lost.cause
        await asyncio.to_thread(group.processes["rank0"].wait, PATIENCE)

    in_world(scenario)


def test_stopped_shorter_than_grace():
    async def scenario(world: World) -> None:
        group = await world.ready()
        for _ in range(3):
            group.signal("rank0", signal.SIGSTOP)
            await world.until(GroupSuspect)
            assert world.monitor.snapshot()[0]["state"] == "suspect"
            group.signal("rank0", signal.SIGCONT)
            await world.until(GroupTrusted)
        assert world.events == []
        assert world.monitor.snapshot()[0]["state"] == "ready"

    in_world(scenario, stop_grace=5.0)


def test_stopped_supervisor_serves_on_but_cannot_delay_a_kill():
    async def scenario(world: World) -> None:
        group = await world.ready()
        group.signal("supervisor", signal.SIGSTOP)
        assert "supervisor" in (await world.until(GroupSuspect)).why
        await asyncio.sleep(1.0)
        assert world.events == []
        world.monitor.kill(0, 1, "operator says so")
        assert (await world.until(GroupLost)).kind == "unfit"
        for ref in group.members:
            await asyncio.to_thread(group.processes[ref.name].wait, PATIENCE)

    in_world(scenario)


def test_hang_and_long_prefill():
    async def scenario(world: World) -> None:
        group = world.group()
        for name in ("rank0", "detokenizer"):
            group.beat(name, Phase.WAITING, age=3600)
        group.beat("rank1", Phase.FORWARD, tokens=100_000)
        group.report()
        await world.until(GroupReady)
        await asyncio.sleep(2.0)
        assert world.events == []
        group.beat("rank0", Phase.FORWARD, tokens=10)
        lost = await world.until(GroupLost)
        assert lost.kind == "hang" and "rank0" in lost.cause
        await asyncio.to_thread(group.processes["rank0"].wait, PATIENCE)

    in_world(scenario, hang_timeout=1.0)


#: a rank that waits for its compiler, which ends when the rank does
COMPILING_RANK = r"""
import subprocess, sys
subprocess.run([sys.executable, "-c", "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"])
"""


@pytest.mark.parametrize("code", ["while True: pass", COMPILING_RANK])
def test_a_busy_process_past_its_deadline_gets_longer(code):
    async def scenario(world: World) -> None:
        group = world.group()
        group.members = [group.spawn("rank0", code)]
        group.beat("rank0", Phase.FORWARD)
        group.report()
        await world.until(GroupSuspect)
        lost = await world.until(GroupLost)
        assert lost.kind == "hang" and lost.detect_s > 1.5

    in_world(scenario, hang_timeout=1.0)


#: a rank whose every step takes half a second of CPU, and a beat before and after
BUSY_RANK = """
import sys, time
from sglang_kevlar.worker.heartbeat import HeartbeatWriter
page = HeartbeatWriter(sys.argv[1])
while True:
    page.forward(1)
    start = time.process_time()
    while time.process_time() < start + 0.5: pass
    page.idle()
    time.sleep(0.05)
"""


def test_cpu_time_of_children_stays_when_they_end():
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'sum(range(20_000_000))']); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    watch = ProcessWatch(ProcessRef("rank0", process.pid, start_ticks(process.pid)))
    times = [watch.cpu_time().run]
    deadline = time.monotonic() + PATIENCE
    while times[-1] < 0.2 or times[-1] != times[max(0, len(times) - 10)]:  # until nothing runs any more
        assert time.monotonic() < deadline
        time.sleep(0.05)
        times.append(watch.cpu_time().run)
    assert times == sorted(times)
    watch.close()
    process.communicate(b"\n")


def test_a_starved_machine_is_no_failure():
    async def scenario(world: World) -> None:
        group = world.group()
        group.members = [group.spawn(n, BUSY_RANK, world.paths.heartbeat(0, 1, n)) for n in ("rank0", "rank1")]
        for i in range(6 * (os.cpu_count() or 1)):
            group.spawn(f"hog{i}", "while True: pass")
        group.report()
        await world.until(GroupReady)
        for _ in range(12):
            await asyncio.sleep(0.5)
            group.report()
        assert not any(isinstance(e, GroupLost) for e in world.events)

    in_world(scenario, hang_timeout=4.0)


def test_our_own_blocked_loop_is_no_failure_of_theirs():
    async def scenario(world: World) -> None:
        group = world.group()
        group.beat("rank0", Phase.FORWARD)
        group.report()
        await world.until(GroupReady)
        await asyncio.sleep(0.1)
        time.sleep(3)  # noqa: ASYNC251
        await asyncio.sleep(0.2)
        group.beat("rank0", Phase.IDLE)
        await asyncio.sleep(1.0)
        assert world.events == []
        # stopped, unnoticed while blocked, and going on again
        group.signal("rank0", signal.SIGSTOP)
        await world.until(GroupSuspect)
        time.sleep(1)  # noqa: ASYNC251
        group.signal("rank0", signal.SIGCONT)
        await asyncio.sleep(0.5)
        assert not any(isinstance(e, GroupLost) for e in world.events)

    in_world(scenario, hang_timeout=2.0, stop_grace=0.5)


def test_reused_pid_is_an_exit():
    async def scenario(world: World) -> None:
        group = world.group()
        rank = group.members[0]
        group.members[0] = ProcessRef(rank.name, rank.pid, rank.start_ticks - 1)
        group.report()
        kill = await world.until(GroupKill)
        assert "rank0" in kill.cause and world.events == []
        assert world.monitor.snapshot()[0]["state"] == "down"
        await asyncio.to_thread(group.processes["rank1"].wait, PATIENCE)
        assert group.processes["rank0"].poll() is None  # the process that has that pid now is none of ours

    in_world(scenario)
    with pytest.raises(ProcessLookupError):
        ProcessWatch(ProcessRef("rank0", os.getpid(), 1))


def test_kill_reaches_the_supervisor_and_reports_of_the_epoch_repeat_it():
    async def scenario(world: World) -> None:
        group = await world.ready()

        async def received() -> KillGroup:
            end = time.monotonic() + PATIENCE
            while not group.socket.poll(0):
                assert time.monotonic() < end
                await asyncio.sleep(0.01)
            return msgspec.msgpack.decode(group.socket.recv(), type=KillGroup)

        world.monitor.kill(0, 7, "not the current epoch")
        world.monitor.kill(0, 1, "restart", planned=True)
        expected = KillGroup(group=0, epoch=1, cause="restart", planned=True)
        assert await received() == expected
        assert (await world.until(GroupLost)).kind == "operator"
        group.report()
        assert await received() == expected
        group.report("down", cause="restart", retry_in=5.0)
        await asyncio.sleep(0.2)
        status = world.monitor.snapshot()[0]
        assert status["state"] == "down" and 0 < status["retry_in"] <= 5
        assert status["pids"]["ranks"] == [] and status["pids"]["supervisor"] == group.supervisor.pid
        group.epoch = 2
        group.members = [group.spawn("rank0", SLEEP)]
        group.report("starting")
        group.report()
        assert (await world.until(GroupReady)).epoch == 2
        await asyncio.sleep(1.0)  # the kill of epoch 1 does not reach epoch 2
        assert group.processes["rank0"].poll() is None
        assert world.monitor.snapshot()[0]["pids"]["ranks"] == [group.members[0].pid]

    in_world(scenario)


def test_bad_reports_are_dropped_and_named(caplog):
    async def scenario(world: World) -> None:
        group = await world.ready()
        good = GroupReport(group=0, epoch=1, phase="ready", supervisor=group.supervisor, members=group.members)
        path = ProcessRef("../../etc/passwd", group.members[0].pid, group.members[0].start_ticks)
        bad = [
            b"",
            b"garbage",
            os.urandom(1000),
            msgspec.msgpack.encode({"type": "kill", "group": 0}),
            msgspec.msgpack.encode(msgspec.structs.replace(good, group=9)),
            msgspec.msgpack.encode(msgspec.structs.replace(good, epoch=-1)),
            msgspec.msgpack.encode(msgspec.structs.replace(good, members=[path])),
            msgspec.msgpack.encode(msgspec.structs.replace(good, members=group.members * 2)),
            msgspec.msgpack.encode(msgspec.structs.replace(good, supervisor=group.members[0])),
        ]
        for data in bad:
            group.socket.send(data)
        group.socket.send_multipart([b"", b"two", b"frames"])
        await asyncio.sleep(0.3)
        assert world.events == []
        assert "bad report of group 0" in caplog.text
        group.signal("rank0", signal.SIGKILL)
        await world.until(GroupLost)

    with caplog.at_level(logging.WARNING):
        in_world(scenario)


def test_oversized_report_does_not_get_in():
    async def scenario(world: World) -> None:
        group = await world.ready()
        flood = world.context.socket(zmq.DEALER)
        flood.setsockopt(zmq.LINGER, 0)
        flood.connect(world.paths.control)
        flood.send(b"x" * (2 << 20))
        await asyncio.sleep(0.3)
        flood.close()
        group.signal("rank0", signal.SIGKILL)
        await world.until(GroupLost)

    in_world(scenario)


def test_new_frontend_finds_running_groups():
    async def scenario(world: World) -> None:
        group = await world.ready()
        world.monitor.close()
        # as left by a frontend that was killed
        with open(world.paths.control.removeprefix("ipc://"), "w"):
            pass
        assert all(p.poll() is None for p in group.processes.values())
        group.report()  # nobody is there; it waits in the socket
        group.signal("rank1", signal.SIGKILL)
        await asyncio.to_thread(group.processes["rank1"].wait, PATIENCE)
        world.events.clear()
        world.start_monitor()
        await world.until(GroupKill)  # an old report of a group that is dead by now is no GroupReady
        assert world.events == []
        group.epoch = 2
        group.members = [group.spawn("rank0", SLEEP)]
        group.report()
        await world.until(GroupReady)
        group.signal("rank0", signal.SIGKILL)
        assert (await world.until(GroupLost)).epoch == 2

    in_world(scenario)


def test_restarted_supervisor_of_the_same_group():
    async def scenario(world: World) -> None:
        old = await world.ready()
        new = world.group(0, epoch=2)
        new.report()
        lost = await world.until(GroupLost)
        assert (lost.epoch, lost.kind) == (1, "report")
        assert (await world.until(GroupReady)).epoch == 2
        for ref in old.members:
            await asyncio.to_thread(old.processes[ref.name].wait, PATIENCE)
        old.report()
        old.signal("supervisor", signal.SIGKILL)
        await asyncio.sleep(0.5)
        assert not any(isinstance(e, GroupLost) for e in world.events)
        assert world.monitor.snapshot()[0]["state"] == "ready"

    in_world(scenario)


def test_error_budget_and_order_of_events():
    """What a handler itself causes comes after what it was handling, and its exceptions stop nothing."""

    async def scenario(world: World) -> None:
        await world.ready()
        await world.ready(1)
        order = []

        def on_event(event) -> None:
            order.append(("begin", type(event), event.group))
            if isinstance(event, GroupLost) and event.group == 0:
                world.monitor.kill(1, 1, "with it")
            order.append(("end", type(event), event.group))
            raise RuntimeError("a bug in the frontend")

        world.monitor._on_event = on_event
        for _ in range(3):
            world.monitor.on_internal_error(0, 1)
        assert order == [
            (when, kind, group)
            for kind, group in ((GroupLost, 0), (GroupKill, 0), (GroupLost, 1), (GroupKill, 1))
            for when in ("begin", "end")
        ]

    in_world(scenario, error_budget=3)
