"""A simulated worker group: ranks, a detokenizer and spares that load, bind, serve, leave, hang, stop and die, under
the real `control.course` and `control.reforming`, with a frontend that gives up what hangs. Every process is known, so
each epoch is either made of the right ones or not (`test_reform_sim`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from faults import Faults
from reform_judge import LONGEST_REST, Judge

from sglang_kevlar.control.course import Course
from sglang_kevlar.control.reforming import LEAVE_WITHIN
from sglang_kevlar.protocol.group import REPORT_INTERVAL
from sglang_kevlar.protocol.launch import KevlarArgs

ARGS = KevlarArgs(start_timeout=40.0, restart_backoff=0.5, restart_backoff_max=4.0, stop_grace=0.25)
SEATS = ("rank0", "rank1", "detokenizer")
SPARES = ("rank0", "rank1")
STEPS = 2500
#: why the frontend ends an epoch
FENCE, RESTART = "the frontend gave it up", "restart"
STEP = 0.05
#: seconds after which the frontend gives an epoch up in which somebody hangs or is stopped
FOUND_WITHIN = 3.0
#: most seconds that a process takes for its imports and weights, and an epoch to bind
LOADS, BINDS, LEAVES = 4.0, 1.0, 0.1
#: within which a group serves when nothing fails any more: what hangs in an epoch that serves or starts is found, what
#: does not leave is killed, the back-off is over, and an epoch of new processes begins, or the third, where weights
#: could be loaded first and have to be loaded in place
READY_WITHIN = FOUND_WITHIN + ARGS.start_timeout + 3 * (LEAVE_WITHIN + ARGS.restart_backoff_max + LOADS + BINDS + 1.0)
#: in which a group that serves has its spares, one of which may just have died
HAS_SPARES_WITHIN = 2 * (LOADS + 1.0) + 6.0
#: seconds that pass, now and then, in which a group serves and nothing happens
CALM = (30.0, 100.0, 250.0, 500.0, 1000.0, 4000.0, 20000.0, 100000.0)


class Process:
    """The truth about one, and what the group's supervisor has in hand of it (`course.Occupant`)."""

    def __init__(self, world: World, pid: int, name: str, in_place: bool) -> None:
        self.world = world
        self.pid = pid
        self.name = name
        self.in_place = in_place
        self.is_rank = name.startswith("rank")
        #: loading, waiting, binding, serving, leaving; dead, reaped
        self.state = "loading"
        self.left = world.faults.random.uniform(0.1, LOADS)
        self.halted = False
        self.hung = False
        self.loaded = False
        #: in which a peer has died under it, so that it can only leave or end
        self.alone = False
        #: of it, as it knows; and the order that it has not read yet
        self.epoch = 0
        self.order: int | None = None
        self.asked = False
        self.error = ""
        #: how it died, if by itself, and when its supervisor sees it
        self.by_itself = False
        self.seen_at = 0.0
        #: a fault has struck it: nothing is expected of it any more
        self.struck = False
        #: its loop failed for a reason of its own; and requests to leave that it did not hear
        self.broke = False
        self.unheard = 0
        self.outbox: deque[dict[str, Any]] = deque()
        # what the supervisor has in hand
        self.told = 0
        self.ready = self.can_leave = self.leaving = False

    @property
    def process(self) -> Process:
        return self

    @property
    def alive(self) -> bool:
        return self.state not in ("dead", "reaped")

    @property
    def in_epoch(self) -> bool:
        return self.state in ("binding", "serving", "leaving")

    def kill(self) -> None:
        if self.alive:
            self.world.judge.killed(self)
            self.die(by_itself=False)

    def ending(self) -> bool:
        return not self.alive

    def stopped(self) -> bool:
        return self.halted and self.alive

    def ask_to_leave(self) -> None:
        # A signal; one that comes when nobody listens for it is lost.
        if self.state == "serving" and not self.asked:
            self.asked = not self.world.faults.strike("request not heard", 0.1)
            self.unheard += not self.asked

    def die(self, by_itself: bool) -> None:
        self.state, self.by_itself = "dead", by_itself
        # Its first thread is gone, and the rest of it takes its time.
        slow = self.world.faults.strike("ends slowly", 0.2)
        self.seen_at = self.world.now + (self.world.faults.random.uniform(0.2, 2.0) if slow else 0.0)
        for peer in self.world.processes:
            if peer is not self and peer.in_epoch and peer.epoch == self.epoch and self.is_rank and peer.is_rank:
                peer.alone = True

    def say(self, status: str, **more: Any) -> None:
        self.outbox.append({"status": status, "epoch": self.epoch, **more})

    # ---- a step of its life

    def live(self, passed: float) -> None:
        if not self.alive or self.halted or self.hung:
            return
        self.left -= passed
        getattr(self, f"on_{self.state}")()

    def on_loading(self) -> None:
        if self.left > 0:
            return
        if self.world.faults.strike("load fails", 0.05) or (
            self.is_rank and not self.in_place and not self.world.loads_first_works
        ):
            self.fail("cannot load")
        else:
            self.state, self.loaded = "waiting", True
            self.say("loaded", can_leave=self.is_rank and not self.in_place)

    def fail(self, error: str) -> None:
        self.struck = True
        self.say("error", error=error)
        self.die(by_itself=True)

    def on_waiting(self) -> None:
        if self.order is not None:
            self.epoch, self.order = self.order, None
            self.state, self.alone = "binding", False
            self.left = self.world.faults.random.uniform(0.05, BINDS)
            peers = [p for p in self.world.processes if p.name in SEATS and p.told == self.epoch and p is not self]
            self.alone = self.is_rank and any(p.is_rank and not p.alive for p in peers)

    def on_binding(self) -> None:
        if self.alone:
            # Upstream's error, or a collective that waits for ever.
            if self.world.faults.random.random() < 0.5:
                self.fail("its peer is gone")
            else:
                self.hung = True
            return
        ranks = [p for p in self.world.processes if p.is_rank and p.in_epoch and p.epoch == self.epoch]
        if self.left > 0 or (self.is_rank and len(ranks) < len(SPARES)):
            return
        if self.world.faults.strike("binding fails", 0.03) or (
            self.is_rank and self.world.course.reformed and not self.world.reforms_work
        ):
            self.fail("cannot bind")
        elif self.world.faults.strike("binding hangs", 0.02):
            self.hung = self.struck = True
        else:
            self.state = "serving"
            self.asked = False
            self.say("ready")

    def on_serving(self) -> None:
        if self.asked or (self.alone and self.world.faults.random.random() < 0.3):
            self.error = "" if self.asked else "connection closed by peer"
            self.asked = False
            self.state, self.left = "leaving", self.world.faults.random.uniform(0.0, LEAVES)
        elif self.is_rank and self.world.faults.strike("loop fails", 0.0005):
            self.struck = self.broke = True
            self.error = "an error in its loop"
            self.state, self.left = "leaving", 0.0

    def on_leaving(self) -> None:
        if self.left > 0:
            return
        if self.world.faults.strike("does not leave", 0.1):
            self.hung = self.struck = True
        elif not self.loaded or self.in_place:
            self.fail("its scheduler is over")
        else:
            self.state, self.alone = "waiting", False
            self.say("left", error=self.error)


class Warmth:
    """The template, as far as it matters: while it imports, nothing is started."""

    suspect = False

    def __init__(self) -> None:
        self.left = 0.0

    @property
    def importing(self) -> bool:
        return self.left > 0

    def begin(self) -> None: ...
    def failed(self) -> None: ...
    def succeeded(self) -> None: ...


class Group(Course[Process]):
    """The supervisor's part."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.warm = Warmth()
        self.next = 0
        self.gone = 0
        #: at the latest; as a supervisor sleeps
        self.wakes_at = 0.0
        super().__init__(
            ARGS,
            SEATS,
            SPARES,
            reforms=True,
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
        self.world.judge.begun(self._members, spares, self.reformed, self.world.now)

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
        elif course._phase == "ready" and self.faults.strike("operator restarts", 0.0003):
            course._on_kill_order(course._epoch, RESTART, planned=True)
            course.wakes_at = 0.0
            assert course._phase == "down", "an operator's restart is not done"
        if self.faults.strike("order for another epoch", 0.001):
            phase = course._phase
            course._on_kill_order(course._epoch - 1, "late", planned=True)
            assert course._phase == phase, "an order for an epoch that is over ends another"

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
