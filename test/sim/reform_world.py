"""A simulated worker group: ranks, a detokenizer and spares that load, bind, serve, leave, hang, stop and die, under
the real `control.course` and `control.reforming`, with a frontend that gives up what hangs. Every process is known, so
each epoch is either made of the right ones or not (`test_reform_sim`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from faults import Faults
from reform_judge import LONGEST_REST, Judge
from reform_process import BINDS, LOADS, SEATS, SPARES, Process, Warmth

from sglang_kevlar.control.course import Course
from sglang_kevlar.control.reforming import LEAVE_WITHIN
from sglang_kevlar.protocol.group import REPORT_INTERVAL
from sglang_kevlar.protocol.launch import KevlarArgs

ARGS = KevlarArgs(start_timeout=40.0, restart_backoff=0.5, restart_backoff_max=4.0, stop_grace=0.25)
STEPS = 2500
#: why the frontend ends an epoch
FENCE, RESTART = "the frontend gave it up", "restart"
STEP = 0.05
#: seconds after which the frontend gives an epoch up in which somebody hangs or is stopped
FOUND_WITHIN = 3.0
#: within which a group serves when nothing fails any more: what hangs in an epoch that serves or starts is found, what
#: does not leave is killed, the back-off is over, and an epoch of new processes begins, or the third, where weights
#: could be loaded first and have to be loaded in place
READY_WITHIN = FOUND_WITHIN + ARGS.start_timeout + 3 * (LEAVE_WITHIN + ARGS.restart_backoff_max + LOADS + BINDS + 1.0)
#: in which a group that serves has its spares, one of which may just have died
HAS_SPARES_WITHIN = 2 * (LOADS + 1.0) + 6.0
#: seconds that pass, now and then, in which a group serves and nothing happens
CALM = (30.0, 100.0, 250.0, 500.0, 1000.0, 4000.0, 20000.0, 100000.0)


class Group(Course[Process]):
    """The supervisor's part."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.warm = Warmth(world)
        self.next = 0
        self.gone = 0
        #: at the latest; as a supervisor sleeps
        self.wakes_at = 0.0
        super().__init__(
            ARGS,
            SEATS,
            SPARES,
            reforms=True,
            leave_within=LEAVE_WITHIN,
            warmth=self.warm,
            clock=lambda: world.now,
            exit_on_failed_start=False,
        )

    @property
    def reformed(self) -> bool:
        return self._reforming.reformed

    def _begin_epoch(self) -> int:
        self.world.on_begin()
        self.next += 1
        return self.next

    def _new_member(self, seat: str, in_place: bool) -> Process:
        return self.world.start(seat, in_place)

    def _join(self, member: Process) -> None:
        member.told, member.ready = self._epoch, False
        member.order = self._epoch

    def _hear(self, member: Process) -> None:
        while member.outbox:
            message = member.outbox.popleft()
            if message["epoch"] not in (0, member.told):
                continue
            if message["status"] == "ready":
                member.ready = True
            elif message["status"] == "loaded":
                member.can_leave = message["can_leave"]
            elif message["status"] == "left":
                member.ready = False
            self._on_said(member, message)

    def _on_ready(self) -> None:
        self.world.on_ready()

    def _on_epoch_gone(self) -> None:
        self.gone += 1

    def _report(self) -> None: ...
    def _report_first(self) -> None: ...

    def _log(self, text: str) -> None:
        self.world.trace.append((self.world.now, text))

    def _start(self) -> None:
        spares = {each.name: each for each in self.world.processes if each.alive and not each.told}
        super()._start()
        self.world.judge.begun(self._members, spares, self.reformed, self.warm.cold, self.world.now)

    def _quit_cause(self) -> str:
        return "SIGQUIT"

    def _end_epoch(self, cause: str, **how: Any) -> None:
        served, planned = self._phase == "ready", how.get("planned", False)
        members = list(self._members.values())
        dead = any(not member.alive for member in members)
        well = {p.pid for p in members if p.alive and p.can_leave and not p.struck}
        by = "restart" if cause == RESTART else "fence" if cause == FENCE else ""
        by = "failed" if "scheduler failed" in cause else by
        self.world.judge.ended(members, self.world.processes, served, how.get("by_itself", True), by, self.world.now)
        super()._end_epoch(cause, **how)
        self.world.on_end(served, planned, well if dead else set())

    # ---- its loop

    def turn(self) -> None:
        ended = [m for m in self._all() if not m.alive and self.world.now >= m.seen_at]
        # Its word may be late.
        heard = [m for m in self._all() if m.outbox and not self.world.faults.chance(0.2)]
        if not ended and not heard and self.world.now < self.wakes_at:
            return
        if self.world.now >= self._start_at():
            self._start()
        for member in heard:
            self._hear(member)
        for member in ended:
            self._hear(member)
            member.state = "reaped"
            self._on_dead(member, f"{member.name} ended", by_itself=member.by_itself, hopeless=False)
            self._gone_if_empty()
        self._check_deadlines()
        self.wakes_at = min(self._next_deadline(), self.world.now + REPORT_INTERVAL)

    def shut_down(self) -> None:
        self._on_shutdown()
        self.wakes_at = 0.0
        for member in self._all():
            member.halted = member.hung = False

    def _stop(self) -> None:
        super()._stop()
        for member in self._all():
            if not member.hung and not member.halted:
                member.kill()


@dataclass
class World:
    """Of one seed."""

    faults: Faults
    group_class: type[Group] = Group
    now: float = 1000.0
    processes: list[Process] = field(default_factory=list)
    trace: list[tuple[float, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        chance = self.faults.random
        #: of the model and the machine, which may change, and so also when nothing fails any more
        self.loads_first_works = chance.random() < 0.85
        self.reforms_work = chance.random() < 0.85
        self.pids = 0
        self.expected: set[int] = set()
        self.kept = self.reforms = self.readies = 0
        #: when the frontend gives up the epoch that it found broken
        self.gives_up: tuple[int, float] | None = None
        self.judge = Judge(ARGS.restart_backoff, ARGS.start_timeout, STEP)
        self.course = self.group_class(self)

    def start(self, seat: str, in_place: bool) -> Process:
        self.pids += 1
        if self.course._phase == "ready":
            self.judge.spare_begun(self.now)
        self.processes.append(Process(self, self.pids, seat, in_place))
        return self.processes[-1]

    # ---- what the group does

    def on_begin(self) -> None:
        assert not [p.pid for p in self.processes if p.alive and p.in_epoch], "a process is still in an epoch"
        lost = [p.pid for p in self.processes if p.pid in self.expected and p.alive and not p.struck]
        kept = {p.pid for p in self.course._all()}
        assert set(lost) <= kept, "a rank that left was not kept"
        self.expected &= kept

    def on_end(self, served: bool, planned: bool, well: set[int]) -> None:
        """Who was asked to leave, or has left, is expected in the next epoch; so are those who are ``well``."""
        course = self.course
        self.expected = {p.pid for p in course._all() if p.leaving} | {p.pid for p in course._left.values()}
        assert (served and not planned) or not self.expected, "ranks are used again that must not be"
        if served and not planned and not self.judge.reforms_rest(self.now):
            assert well <= self.expected, "one died, and another is not kept"

    def on_ready(self) -> None:
        course = self.course
        self.readies += 1
        self.judge.is_ready(self.now)
        members = course._members
        assert set(members) == set(SEATS)
        for member in members.values():
            assert member.told == course._epoch and member.name in SEATS
            assert not member.alive or member.epoch == course._epoch, "a member serves in another epoch"
        if course.reformed:
            self.reforms += 1
            self.kept += len(self.expected & {member.pid for member in members.values()})

    # ---- what happens to it

    def step(self) -> None:
        self.faults.next_step()
        passed = STEP
        if self.faults.strike("clock jumps", 0.003):
            passed = self.faults.random.choice([0.0, 0.5, 5.0])
        if self.calm() and self.faults.event("calm", 0.03):
            self.now += self.faults.random.choice(CALM)
        self.reforms_work ^= self.faults.event("re-forms work, or no more", 0.001)
        self.loads_first_works ^= self.faults.event("weights can be loaded first, or no more", 0.0003)
        self.now += passed
        if passed > STEP:
            self.judge.jumped(self.now)
        self.course.warm.left -= passed
        if self.faults.strike("template dies", 0.001):
            self.course.warm.left = 3.0
        for process in list(self.processes):
            # Who is paused is paused with us.
            process.live(min(passed, STEP))
            self.harm(process)
        self.frontend()
        self.course.turn()
        self.processes = [p for p in self.processes if p.state != "reaped"]
        self.check()

    def harm(self, process: Process) -> None:
        if not process.alive:
            return
        faults = self.faults
        if process.halted and (faults.over or faults.random.random() < 0.02):
            process.halted = False
        where = process.state if process.told or not process.loaded else "being a spare"
        if faults.strike(f"crash while {where}", 0.05 if process.state == "leaving" else 0.001):
            process.struck = True
            process.die(by_itself=faults.random.random() < 0.5)
            if faults.strike("two at once", 0.2):
                for other in self.processes:
                    if other.alive and other.is_rank:
                        other.struck = True
                        other.die(by_itself=False)
                        break
        elif not process.halted and faults.strike("stopped", 0.0005):
            process.halted = process.struck = True
        elif process.in_epoch and faults.strike("SIGQUIT", 0.0003):
            process.struck = True
            if not self.course._ending:
                self.judge.asked_for_the_end(self.course._epoch, self.now)
            self.course._on_quit()
            self.course.wakes_at = 0.0

    def frontend(self) -> None:
        course = self.course
        members = course._members.values()
        broken = any(m.halted or m.hung or not m.alive or (m.alone and m.state == "serving") for m in members)
        if course._phase == "ready" and broken:
            if self.gives_up is None or self.gives_up[0] != course._epoch:
                # A death it sees itself; a hang takes longer.
                longest = FOUND_WITHIN - STEP if all(m.alive for m in members) else 0.2
                self.gives_up = (course._epoch, self.now + self.faults.random.uniform(0, longest))
            elif self.now >= self.gives_up[1]:
                course._on_kill_order(course._epoch, FENCE, planned=False)
                course.wakes_at = 0.0
        elif course._phase == "ready" and self.faults.strike("operator restarts", 0.0003 + 0.001 * self.resting()):
            course._on_kill_order(course._epoch, RESTART, planned=True)
            course.wakes_at = 0.0
            assert course._phase == "down", "an operator's restart is not done"
        if self.faults.strike("order for another epoch", 0.001):
            phase = course._phase
            course._on_kill_order(course._epoch - 1, "late", planned=True)
            assert course._phase == phase, "an order for an epoch that is over ends another"

    def resting(self) -> bool:
        """Something is set aside, which an operator may know, and have mended what failed."""
        return self.judge.reforms_rest(self.now) or self.now < self.judge.loads_in_place_until

    def check(self) -> None:
        course = self.course
        known = [member.pid for member in course._all()]
        assert len(known) == len(set(known)), "a process in two places"
        assert {p.pid for p in self.processes if p.alive} <= set(known), "a process that nobody knows"
        assert len(known) <= len(SEATS) + len(SPARES), "too many processes"
        for process in self.processes:
            if process.alive and process.in_epoch:
                assert process.epoch == course._epoch, "a process of an epoch that is over"
        assert course._exit_status == 0
        self.judge.look(course._members.values(), course._phase, None if course._ending else course._epoch, self.now)

    def quiet(self) -> None:
        """Nothing fails any more: the group serves in time, and ends when it is told to."""
        self.faults.over = True
        for _ in range(int(3.0 / STEP)):
            self.step()  # what has been asked for takes its course: SIGQUIT has a grace
        self.serves_again()
        self.stays()
        self.comes_back()
        self.course.shut_down()
        for _ in range(int(8 / STEP)):
            self.step()
        assert self.course._finished(), "it does not end"

    def serves_again(self) -> None:
        deadline = self.now + READY_WITHIN
        while not self.serves():
            assert self.now < deadline, "the group does not serve again"
            self.step()

    def stays(self) -> None:
        for _ in range(int(HAS_SPARES_WITHIN / STEP)):
            self.step()
            assert self.serves(), "the group does not stay"

    def comes_back(self) -> None:
        """Whatever was set aside: when all works again, it is tried again in time. Weights first, then a re-form."""
        self.reforms_work = self.loads_first_works = True
        for _ in range(2):
            self.now += LONGEST_REST
            self.step()
            self.course._members["rank0"].die(by_itself=False)
            self.serves_again()
        assert self.course.reformed, "not re-formed again"
        self.stays()
        assert set(self.course._spares) == set(SPARES), "a spare is missing"

    def calm(self) -> bool:
        """Nothing is under way in a group that serves."""
        course = self.course
        waits = course._fence is not None or course._failed_loops or self.judge.waits_for_an_end()
        return self.serves() and not waits and not any(member.outbox for member in course._members.values())

    def serves(self) -> bool:
        members = self.course._members.values()
        return self.course._phase == "ready" and all(
            m.state == "serving" and not m.hung and not m.halted and not m.alone for m in members
        )


def simulate(
    seed: int, only: frozenset[str] | None = None, steps: int = STEPS, group_class: type[Group] = Group
) -> World:
    """Raises AssertionError, with the world in the error's ``world``."""
    world = World(Faults(seed, only), group_class)
    try:
        for _ in range(steps):
            world.step()
        world.quiet()
    except BaseException as error:
        error.add_note(f"seed {seed}, step {world.faults.step}")
        error.world = world  # type: ignore[attr-defined]
        raise
    return world
