"""A simulated host: groups that start, work, stop, hang, starve and die, seen through late, stale and doubled reports
by a frontend that is itself paused now and then. The truth is known, so every loss is either right or a false alarm
(`test_membership_sim`).
"""

from __future__ import annotations

from collections import deque

from faults import Faults

from sglang_kevlar.control.detection import MAX_TICK, OBSERVE_INTERVAL, CpuTime, Observation
from sglang_kevlar.control.membership import Event, GroupKill, GroupLost, GroupReady, Membership
from sglang_kevlar.protocol.group import GroupReport, ProcessRef
from sglang_kevlar.protocol.heartbeat import Heartbeat, Phase
from sglang_kevlar.protocol.launch import KevlarArgs

ARGS = KevlarArgs(worker_groups=3, standby_groups=1, hang_timeout=2.0, hang_per_ktoken=1.0)
NAMES = ("rank0", "rank1", "detokenizer")
STEPS = 4000
#: looks for which a process must be seen stopped before the grace can be over, however long our own pauses
MIN_STOP_LOOKS = int(ARGS.stop_grace / MAX_TICK) + 2
#: looks within which a stop or a hang must have been found
FOR_GOOD = 10**9
MAX_STOP_LOOKS = int(ARGS.stop_grace / OBSERVE_INTERVAL) + 3
MAX_HANG_LOOKS = int(4 * 3.0 / OBSERVE_INTERVAL) + 20


class Process:
    def __init__(self, name: str) -> None:
        self.name = name
        self.stopped_looks = 0  # looks it has been stopped for so far
        self.stop_for = 0  # looks it stays stopped; a large number is for good
        self.hung = False
        #: looks, while its group is in service, that found it stopped or hanging
        self.stopped_in_service = self.hung_in_service = 0
        #: since it was last stopped
        self.seen_running = True
        self.starved = False
        self.cpu = 0.0
        self.left = 0.0  # of its phase, in seconds in which it runs
        self.beat = Heartbeat(Phase.IDLE, 0, 0, 0, 0)


class SimGroup:
    """The supervisor's side of a group, and the truth about its processes."""

    def __init__(self, group: int) -> None:
        self.id = group
        self.epoch = 0
        self.outbox: deque[GroupReport] = deque()
        self.start_epoch()

    def start_epoch(self) -> None:
        self.epoch += 1
        self.phase = "starting"
        self.processes = {n: Process(n) for n in NAMES}
        self.supervisor_stopped = False
        self.down_looks = 0
        self.send()

    def send(self) -> None:
        members = [] if self.phase == "down" else [ProcessRef(n, 2, self.epoch) for n in NAMES]
        self.outbox.append(
            GroupReport(
                group=self.id, epoch=self.epoch, phase=self.phase, supervisor=ProcessRef("supervisor", 1, 1),
                members=members, cause="sim" if self.phase == "down" else "",
            )
        )  # fmt: skip

    def end_epoch(self) -> None:
        self.phase = "down"
        self.supervisor_stopped = False
        self.send()


class Sim:
    def __init__(self, seed: int, only: frozenset[str] | None = None) -> None:
        self.faults = Faults(seed, only)
        self.random = self.faults.random
        self.membership = Membership(ARGS)
        self.groups = [SimGroup(i) for i in range(ARGS.worker_groups)]
        self.now = 1000.0
        self.old: list[GroupReport] = []
        self.died: set[tuple[int, int]] = set()
        self.ready: set[tuple[int, int]] = set()
        self.lost: dict[tuple[int, int], str] = {}
        self.trace: list[tuple[float, Event]] = []

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def handle(self, events: list[Event]) -> None:
        for event in events:
            self.trace.append((self.now, event))
            key = (event.group, event.epoch)
            group = self.groups[event.group]
            if isinstance(event, GroupReady):
                assert key not in self.ready and key not in self.lost
                self.ready.add(key)
            elif isinstance(event, GroupLost):
                assert key in self.ready and key not in self.lost
                self.lost[key] = event.kind
                self.judge(event, group)
            elif isinstance(event, GroupKill):
                assert key not in self.ready or key in self.lost
                if group.epoch == event.epoch and group.phase != "down" and not group.supervisor_stopped:
                    group.end_epoch()

    def judge(self, event: GroupLost, group: SimGroup) -> None:
        """Was it right?"""
        processes = group.processes.values()
        if event.kind == "stopped":
            assert group.epoch == event.epoch
            assert any(p.stopped_looks >= MIN_STOP_LOOKS for p in processes)
        elif event.kind == "hang":
            assert group.epoch == event.epoch
            # One that is stopped for good may be found by its deadline first.
            assert any(p.hung or p.stop_for >= FOR_GOOD for p in processes)
        elif event.kind == "report":
            assert group.epoch > event.epoch or group.phase == "down"
        else:
            assert event.kind == "exit" and (event.group, event.epoch) in self.died

    def world(self, passed: float) -> None:
        """``passed`` seconds go by, of which every process ran for OBSERVE_INTERVAL at most: whoever pauses us
        for longer is a machine that pauses everything."""
        ran = min(passed, OBSERVE_INTERVAL)
        for group in self.groups:
            if group.phase == "down":
                group.down_looks += 1
                if group.down_looks > 10:
                    group.start_epoch()
                continue
            if group.phase == "starting":
                if self.chance(0.1):
                    group.phase = "ready"
                    group.send()
                continue
            if self.chance(0.1) and not group.supervisor_stopped:
                group.send()
            if self.faults.strike("supervisor stopped", 0.002):
                group.supervisor_stopped = not group.supervisor_stopped
            if self.faults.over:
                group.supervisor_stopped = False
            for p in group.processes.values():
                self.run(p, ran)
            if self.faults.strike("crash", 0.001):
                self.die(group)

    def run(self, p: Process, ran: float) -> None:
        if p.stop_for > 0:
            p.stopped_looks += 1
            if p.stopped_looks > p.stop_for:
                p.stop_for = p.stopped_looks = 0
            return
        # It was seen to run since it was last stopped, or two short stops would be one to any observer.
        if p.seen_running and self.faults.strike("stopped", 0.01):
            p.seen_running = False
            p.stop_for = self.random.choice([1, 2, MIN_STOP_LOOKS - 1, FOR_GOOD] if self.chance(0.1) else [1, 2])
            p.stopped_looks = 1
            return
        if p.hung:
            return
        p.left -= ran * (0.3 if p.starved else 1.0)
        p.cpu += ran * (1.0 if p.starved else 0.5)
        if p.left <= 0:
            phase = self.random.choice([Phase.IDLE, Phase.FORWARD, Phase.FORWARD, Phase.CONTROL])
            tokens = self.random.randrange(0, 1000)
            tokens = 0 if phase is Phase.IDLE else tokens  # idling has no tokens
            limit = ARGS.hang_timeout + tokens / 1000
            p.starved = self.faults.strike("slow", 0.2)
            # Starved ones take 3.3 times as long and are given 4 times, less what they are stopped (often, in some
            # seeds) or not yet sampled.
            longest = limit * (0.45 if p.starved else 0.75)
            p.left = self.random.uniform(0, longest if self.chance(0.3) else 0.2)
            ns = int(self.now * 1e9)
            p.beat = Heartbeat(phase, tokens, ns, ns, p.beat.steps + 1)
            p.hung = phase is Phase.FORWARD and self.faults.strike("hang", 0.003)

    def die(self, group: SimGroup) -> None:
        self.died.add((group.id, group.epoch))
        name = self.random.choice([*NAMES, "supervisor"])
        epoch = group.epoch
        if self.chance(0.5):  # the supervisor's word comes first, or ours does
            group.end_epoch()
            self.deliver(group, len(group.outbox))
        self.handle(self.membership.on_process_exit(group.id, epoch, name, self.now))
        if group.epoch == epoch and group.phase != "down":
            group.end_epoch()

    def deliver(self, group: SimGroup, count: int) -> None:
        for _ in range(min(count, len(group.outbox))):
            report = group.outbox.popleft()
            if self.chance(0.05):
                self.old.append(report)
            if self.faults.strike("report doubled", 0.02):
                self.handle(self.membership.on_report(report, self.now))
            self.handle(self.membership.on_report(report, self.now))

    def look(self, group: SimGroup) -> None:
        stopped = {p.name for p in group.processes.values() if p.stop_for > 0}
        if group.supervisor_stopped:
            stopped.add("supervisor")
        beats = {p.name: p.beat for p in group.processes.values() if not self.faults.strike("beat not read", 0.01)}
        # A starved process is sampled as the monitor does it; a hung one uses nothing.
        old = [p for p in group.processes.values() if self.now - p.beat.phase_start_ns / 1e9 > 0.5]
        cpu = {p.name: CpuTime(p.cpu, 0.0) for p in old}
        epoch = group.epoch
        if self.faults.strike("observation of another epoch", 0.02):
            epoch = self.random.randrange(group.epoch + 2)
        if epoch != group.epoch:  # stale, or of an epoch we do not know yet: whatever it says
            stopped = set(NAMES)
        else:
            for p in group.processes.values():
                p.seen_running |= p.stop_for == 0
        obs = Observation(beats, frozenset(stopped), cpu)
        self.handle(self.membership.on_observation(group.id, epoch, obs, self.now))

    def step(self) -> None:
        self.faults.next_step()
        passed = OBSERVE_INTERVAL
        if self.faults.strike("clock jumps", 0.02):
            passed = self.random.choice([0.0, 0.3, 3.0, 100.0])
        self.now += passed
        self.world(passed)
        for group in self.groups:
            if group.outbox and not self.faults.strike("report delayed", 0.3):
                self.deliver(group, self.random.randrange(1, 4))
            if group.phase == "ready":
                self.look(group)
                self.check_found(group)
        # An old report of the *current* epoch would be the truth out of order, which a socket does not do.
        old = [report for report in self.old if report.epoch < self.groups[report.group].epoch]
        if old and self.faults.strike("old report", 0.05):
            report = self.random.choice(old)
            self.handle(self.membership.on_report(report, self.now))

    def quiet(self) -> None:
        """Everything broken is found, everything comes back, and nothing else happens."""
        self.faults.over = True
        for _ in range(2 * MAX_HANG_LOOKS):
            self.step()
        for group in self.groups:
            known = self.membership.group(group.id)
            assert (known.epoch, known.state, group.phase) == (group.epoch, "ready", "ready")
            ended = [epoch for g, epoch in self.ready if g == group.id and epoch < group.epoch]
            assert all((group.id, epoch) in self.lost for epoch in ended)

    def check_found(self, group: SimGroup) -> None:
        """What is really broken was found in time."""
        if (group.id, group.epoch) not in self.ready - set(self.lost):
            return
        for p in group.processes.values():
            p.stopped_in_service = p.stopped_in_service + 1 if p.stop_for else 0
            p.hung_in_service = p.hung_in_service + 1 if p.hung else 0
            assert p.stopped_in_service <= 2 * MAX_STOP_LOOKS, f"{p.name} of group {group.id} stopped and not found"
            assert p.hung_in_service <= 2 * MAX_HANG_LOOKS, f"{p.name} of group {group.id} hangs and was not found"


def simulate(seed: int, only: frozenset[str] | None = None, steps: int = STEPS) -> Sim:
    """Raises AssertionError, with the world in the error's ``world``."""
    sim = Sim(seed, only)
    try:
        for _ in range(steps):
            sim.step()
        sim.quiet()
    except BaseException as error:
        error.add_note(f"seed {seed}, step {sim.faults.step}")
        error.world = sim  # type: ignore[attr-defined]
        raise
    return sim
