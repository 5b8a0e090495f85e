"""``python -m sglang_kevlar.worker.supervisor``: the parent of one worker group.

Starts the group's ranks and detokenizer, and when any of them ends, kills the others and starts the next epoch, by
forks of a process that has the imports behind it (`worker.template`). It imports neither torch nor sglang itself, so
it is there in a moment and has little to die of. Single-threaded: a parent-death signal follows the thread that
started the child.
"""

from __future__ import annotations

from sglang_kevlar.launcher.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import msgspec
import zmq

from sglang_kevlar.control.backoff import Backoff
from sglang_kevlar.control.detection import CALM_INTERVAL, EpochWatch, Observation
from sglang_kevlar.control.reforming import ASK_AGAIN, DEATH_SHOWS_WITHIN, LEAVE_WITHIN, Reforming
from sglang_kevlar.launcher.process import adopt_orphans, forget, identify, reap_adopted, record
from sglang_kevlar.launcher.rundir import end_recorded
from sglang_kevlar.launcher.status import EXIT_FAILED_START, StatusWriter
from sglang_kevlar.protocol.group import (
    REPORT_INTERVAL,
    SHADOW_ENDPOINT,
    GroupFormed,
    GroupPhase,
    GroupReport,
    KillGroup,
    LossKind,
    ProcessRef,
)
from sglang_kevlar.protocol.launch import EXIT_CONFIG, LaunchPlan, Paths
from sglang_kevlar.worker import group_files
from sglang_kevlar.worker.engine_group import Commands, Meeting, engine_commands, meeting_port
from sglang_kevlar.worker.member import Member
from sglang_kevlar.worker.orders import IN_PLACE, Order
from sglang_kevlar.worker.stderr import PassThrough
from sglang_kevlar.worker.warm_start import WarmStart

#: seconds between SIGTERM and SIGKILL at shutdown
_STOP_TIMEOUT = 5.0
#: seconds in which a member that sent SIGQUIT may end by itself, which says more about why
_QUIT_GRACE = 2.0
#: seconds before a re-form, and for how long an epoch has to have served to be no repetition
_REFORM_BACKOFF, _REFORM_HEALTHY = 0.02, 5.0
#: seconds between the death of a process's first thread, which a frontend may see, and its end
_END_SHOWS_WITHIN = 0.1
#: seconds before a spare is replaced that died
_SPARE_PAUSE = 5.0
#: seconds in which a report is heard, mostly
_HEARD = 0.05


class Supervisor:
    """One worker group: the loop, the epoch, the reports."""

    def __init__(
        self,
        paths: Paths,
        plan: LaunchPlan,
        group: int,
        commands: Commands,
        meet: Callable[[], Meeting],
        *,
        template: Sequence[str] | None = None,
        status: StatusWriter | None = None,
        exit_on_failed_start: bool = False,
    ) -> None:
        self._paths = paths
        self._plan = plan
        self._group = group
        self._commands = commands
        self._meet = meet
        self._status = status
        self._exit_on_failed_start = exit_on_failed_start
        self._backoff = Backoff(plan.kevlar.restart_backoff, plan.kevlar.restart_backoff_max)
        self._reform_backoff = Backoff(
            min(_REFORM_BACKOFF, plan.kevlar.restart_backoff_max), plan.kevlar.restart_backoff_max, _REFORM_HEALTHY
        )
        identity = identify(os.getpid())
        assert identity is not None
        self._self_ref = ProcessRef("supervisor", *identity)

        self._epoch = 0
        self._phase: GroupPhase = "starting"
        #: of the epoch of now, by name
        self._members: dict[str, Member] = {}
        #: of none: ranks that left the last one, and spares
        self._left: dict[str, Member] = {}
        self._spares: dict[str, Member] = {}
        spares = [f"rank{rank}" for rank in plan.ranks][: plan.kevlar.spare_ranks]
        self._reforming = Reforming(
            plan.kevlar.reform != "off" and plan.node is None, spares, plan.kevlar.start_timeout
        )
        #: when to look again at ranks that are leaving, and when they have to have left
        self._ask_at = self._leave_deadline = float("inf")
        #: when the next spare may be started
        self._spare_at = 0.0
        #: ranks whose loop failed, with what they said, until it shows whether another one's death is why
        self._failed_loops: dict[str, str] = {}
        self._failed_deadline = float("inf")
        #: why the frontend has given up this epoch, and when that counts if no death has shown by then
        self._fence: tuple[str, float] | None = None
        #: whose files and children are still to be removed
        self._dead: list[Member] = []
        self._started_at = 0.0
        self._cause = ""
        self._kind: LossKind | None = None
        self._failed_starts = 0
        self._ready_at: float | None = None
        self._start_deadline = float("inf")
        self._start_watch = EpochWatch(plan.kevlar, 0.0)
        self._quit_deadline = float("inf")
        self._next_start = 0.0
        self._next_report = 0.0
        self._stop_deadline: float | None = None
        self._exit_status = 0
        self._ending = False

        self._handlers: dict[object, Callable[[], None]] = {}
        self._poller = zmq.Poller()
        self._terminal = PassThrough()
        self._connect()
        self._wakeup = self._catch_signals()
        self._warm = WarmStart(template, plan.kevlar.start_timeout, self._log, self._watch, self._unwatch)

    # -- the loop

    def run(self) -> int:
        """Until SIGTERM, or a failure that another try cannot cure. Returns the exit status."""
        self._clean_up()  # after a previous supervisor that was killed
        group_files.remove_of_all_processes(self._plan.launch_id, self._group)
        group_files.remove(self._paths, self._plan.launch_id, self._group)
        self._epoch = group_files.read_epoch(self._paths, self._group)
        adopt_orphans()
        while not self._finished():
            self._look_elsewhere()
            now = time.monotonic()
            if self._stop_deadline is None and (template := self._warm.step()) is not None:
                # Not under the name of the group, whose processes end with their epoch.
                record(self._paths.processes, f"template{self._group}", template.identity)
            if now >= self._start_at():
                self._start()
            if now >= self._next_report:
                self._report()
            for source, _ in self._poller.poll(self._timeout_ms()):
                # A handler may have closed what a later event of this round is about.
                if (handler := self._handlers.get(source)) is not None:
                    handler()
            self._check_deadlines()
        self._warm.end()
        self._phase = "stopped"
        self._report()
        self._disconnect()
        return self._exit_status

    def _finished(self) -> bool:
        return not self._all() and (self._stop_deadline is not None or self._exit_status != 0)

    def _all(self) -> list[Member]:
        return [*self._members.values(), *self._left.values(), *self._spares.values()]

    def _start_at(self) -> float:
        """When the next epoch may start, as things are."""
        if self._members or self._stop_deadline is not None or self._warm.importing:
            return float("inf")
        return self._next_start

    def _look_elsewhere(self) -> None:
        """At other hosts of the group, if there are any."""

    def _timeout_ms(self) -> int:
        deadlines = [self._next_report, self._quit_deadline, self._warm.next_deadline, self._start_at()]
        deadlines += [self._ask_at, self._leave_deadline, self._failed_deadline]
        if self._fence is not None:
            deadlines.append(self._fence[1])
        if self._missing_spare() is not None:
            deadlines.append(self._spare_at)
        if self._phase == "starting":
            deadlines += [self._start_deadline, time.monotonic() + CALM_INTERVAL]
        if self._stop_deadline is not None:
            deadlines.append(self._stop_deadline)
        return max(0, int((min(deadlines) - time.monotonic()) * 1000) + 1)

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._phase == "starting" and now >= self._start_deadline:
            # We may have been stopped ourselves: what members said in time counts.
            for member in list(self._members.values()):
                self._on_ready_message(member)
            if self._phase == "starting":
                late = [m.name for m in self._members.values() if not m.ready]
                self._end_epoch(f"{', '.join(late)} not ready after {now - self._started_at:.0f} s")
        if self._phase == "starting":
            # Of a group that serves, the frontend watches this.
            stopped = frozenset(m.name for m in self._members.values() if m.process.stopped())
            if (loss := self._start_watch.observe(Observation({}, stopped), now)) is not None:
                self._end_epoch(loss.cause, by_itself=False)
        self._check_fence(now)
        self._check_leavers(now)
        if now >= self._spare_at and (name := self._missing_spare()) is not None:
            self._spares[name] = self._new_member(name)
        if now >= self._quit_deadline:
            self._quit_deadline = float("inf")
            if self._members and not self._ending:
                self._end_epoch(self._quit_cause())
        if self._stop_deadline is not None and now >= self._stop_deadline:
            for member in self._all():
                member.process.kill()
            self._stop_deadline = float("inf")

    def _check_leavers(self, now: float) -> None:
        if now >= self._failed_deadline:
            # Nobody else died, so they failed by themselves.
            failed = self._failed_loops
            cause = "; ".join(f"{name}'s scheduler failed: {error}" for name, error in failed.items())
            self._end_epoch(cause, guilty=failed)
        if now >= self._ask_at:
            self._ask_at = now + ASK_AGAIN
            for member in self._members.values():
                if member.leaving:
                    member.ask_to_leave()
        if now >= self._leave_deadline:
            self._leave_deadline = float("inf")
            for member in self._members.values():
                if member.leaving:
                    self._log(f"{member.name} (pid {member.process.pid}) does not leave epoch {self._epoch}: killed")
                    member.process.kill()

    def _watch(self, source: object, handler: Callable[[], None], flags: int = zmq.POLLIN) -> None:
        self._handlers[source] = handler
        self._poller.register(source, flags)

    def _unwatch(self, source: object) -> None:
        if self._handlers.pop(source, None) is not None:
            self._poller.unregister(source)

    # -- one epoch

    def _start(self) -> None:
        now = self._started_at = time.monotonic()
        self._epoch = group_files.next_epoch(self._paths, self._group)
        self._phase, self._ready_at, self._ending = "starting", None, False
        self._quit_deadline = float("inf")
        self._start_watch = EpochWatch(self._plan.kevlar, now)
        self._warm.begin()
        meeting = self._meet()
        order = Order(self._epoch, meeting.port, meeting.host)
        left, self._left = self._left, {}
        missing = sorted(self._commands.keys() - left.keys())
        spares = [name for name in missing if name in self._spares]
        self._reforming.form([*left, *spares], now)
        self._start_deadline = self._reforming.deadline()
        if self._reforming.reformed:
            around = ", ".join(sorted(left)) or "nobody"
            self._log(
                f"epoch {self._epoch} is re-formed around {around}; new: {', '.join(missing)}"
                + (f", of which {', '.join(spares)} from the spares" if spares else "")
            )
        for name in self._commands:
            member = left.get(name) or self._spares.pop(name, None) or self._new_member(name)
            self._members[name] = member
            member.join(order)
        self._report()

    def _new_member(self, name: str) -> Member:
        in_place = self._reforming.loads_in_place and name.startswith("rank")
        member = Member(name, [*self._commands[name], *([IN_PLACE] if in_place else [])], self._warm)
        record(self._paths.processes, f"g{self._group}.{member.record_name}", member.process.identity)
        self._watch(member.process.pidfd, partial(self._on_exit, member))
        self._watch(member.ready_fd, partial(self._on_ready_message, member))
        self._watch(member.stderr.fileno(), partial(self._on_stderr, member))
        return member

    def _missing_spare(self) -> str | None:
        if self._phase != "ready" or self._warm.importing:
            return None
        return next(iter(self._reforming.missing_spares(self._spares)), None)

    def _on_ready_message(self, member: Member) -> None:
        for message in member.messages():
            self._on_said(member, message)
        if member.ready_closed:
            self._unwatch(member.ready_fd)

    def _on_said(self, member: Member, message: dict[str, object]) -> None:
        ours = self._members.get(member.name) is member
        status = message.get("status")
        if status == "left" and ours:
            self._on_left(member, str(message.get("error", "")))
        elif status == "error" and ours and not self._ending:
            self._end_epoch(f"{member.name} failed to start: {message.get('error', 'unknown error')}")
        elif status == "error" and not ours:
            self._log(f"{member.name} (pid {member.process.pid}), a spare: {message.get('error', 'unknown error')}")
        elif status == "ready" and not self._ending:
            self._ready_if_all()

    def _on_left(self, member: Member, error: str) -> None:
        if self._phase == "ready":
            # Its loop failed: because another rank is dead, or by itself.
            self._failed_loops[member.name] = error
            self._failed_deadline = min(self._failed_deadline, time.monotonic() + DEATH_SHOWS_WITHIN)
        elif not self._ending:
            self._end_epoch(f"{member.name}'s scheduler failed: {error}")
        elif member.leaving:
            self._keep_member(member)

    def _keep_member(self, member: Member) -> None:
        """It has left the epoch, and is of the next one."""
        member.leaving = False
        self._left[member.name] = self._members.pop(member.name)
        if not self._members:
            self._on_epoch_gone()

    def _all_ready(self) -> bool:
        return all(m.ready for m in self._members.values())

    def _ready_if_all(self) -> None:
        if self._phase == "starting" and self._members and self._all_ready():
            now = self._ready_at = time.monotonic()
            self._phase = "ready"
            self._failed_starts = 0
            if self._reforming.suspect:
                self._log(
                    "ranks load their weights in place from now on, and outlive no epoch: a start failed otherwise"
                )
            self._reforming.succeeded(now)
            if self._reforming.reformed:
                self._log(f"epoch {self._epoch} is ready, {now - self._started_at:.2f} s after it was begun")
            self._warm.succeeded()
            for each in self._members.values():
                each.stderr.forget()
            self._report()
            if self._status is not None:
                self._status.send({"status": "ready"})
            self._exit_on_failed_start = False

    def _on_stderr(self, member: Member) -> None:
        data = member.stderr.read()
        if data is None:
            self._unwatch(member.stderr.fileno())
        elif data:
            self._terminal.write(data)
            if self._terminal.waiting:
                self._watch(self._terminal.fileno(), self._on_terminal, zmq.POLLOUT)

    def _on_terminal(self) -> None:
        self._terminal.flush()
        if not self._terminal.waiting:
            self._unwatch(self._terminal.fileno())

    def _on_exit(self, member: Member) -> None:
        pidfd = member.process.pidfd
        self._unwatch(pidfd)
        status = member.process.reap()
        assert status is not None
        self._on_ready_message(member)  # its last words may say more than its status
        while data := member.stderr.read():
            self._terminal.write(data)
        if status == EXIT_CONFIG:
            self._exit_status = EXIT_CONFIG
        ours = self._members.get(member.name) is member
        if ours and not self._ending:
            by_itself = status not in (-signal.SIGKILL, -signal.SIGTERM)
            self._end_epoch(member.describe_exit(status), by_itself=by_itself)
        self._unwatch(member.ready_fd)
        self._unwatch(member.stderr.fileno())
        member.close()
        group_files.remove_metrics(self._paths, member.process.pid, counted=self._ready_at is not None)
        self._dead.append(member)
        if ours:
            del self._members[member.name]
        elif self._left.get(member.name) is member:
            self._log(f"{member.describe_exit(status)}: it waited for the next epoch")
            del self._left[member.name]
        else:
            self._log(f"{member.describe_exit(status)}: it was a spare")
            del self._spares[member.name]
            self._spare_at = time.monotonic() + _SPARE_PAUSE
        self._reap_adopted()
        if not self._members:
            self._on_epoch_gone()

    def _end_epoch(
        self,
        cause: str,
        *,
        planned: bool = False,
        by_itself: bool = True,
        kind: LossKind | None = None,
        passing: bool = False,
        whole: bool = False,
        guilty: Collection[str] = (),
    ) -> None:
        """The group is lost: say so, kill what is left of it, and plan the next start.

        ``by_itself``: nobody from outside ended it. ``kind``: of a loss that only this process sees. ``passing``: a
        first start that failed so is worth another try. ``whole``: no process of it is used again; ``guilty``: not
        these.
        """
        now = time.monotonic()
        served = self._phase == "ready"
        self._ending = True
        self._phase, self._cause, self._kind = "down", cause, kind
        if self._ready_at is None and not planned:
            self._failed_starts += 1
            if by_itself:
                self._warm.failed()
        alone = [
            m.name for m in self._members.values() if m.can_leave and m.name not in guilty and not m.process.ended()
        ]
        survivors = self._reforming.survivors(served, planned or whole, alone)
        failed, self._failed_loops, self._failed_deadline = self._failed_loops, {}, float("inf")
        self._fence = None
        if not served:
            self._reforming.failed(by_itself)
        at_once = self._reforming.at_once(served, survivors, self._spares)
        backoff = self._reform_backoff if at_once else self._backoff
        delay = 0.0 if planned else backoff.failed(0.0 if self._ready_at is None else now - self._ready_at)
        self._next_start = now + delay
        if kind is not None:
            # Before others see the ends of processes, and take them for the cause.
            self._report()
            time.sleep(_HEARD)
        if self._stop_deadline is None:
            self._leave_deadline, self._ask_at = now + LEAVE_WITHIN, now + ASK_AGAIN
            for member in self._members.values():
                if member.name not in survivors:
                    member.process.kill()
                elif member.name not in failed:
                    member.leaving = True
                    member.ask_to_leave()
            if not served:
                # They are as suspect as what took so long.
                for member in [*self._left.values(), *self._spares.values()]:
                    member.process.kill()
            self._log(f"epoch {self._epoch} ended: {cause}; {self._what_next(delay)}")
            hopeless = self._ready_at is None and not passing and not self._warm.suspect
            hopeless = hopeless and not self._reforming.suspect
            if self._exit_on_failed_start and hopeless and not self._exit_status:
                self._exit_status = EXIT_FAILED_START
            for name in failed.keys() & survivors:
                self._keep_member(self._members[name])
        self._report()

    def _what_next(self, delay: float) -> str:
        return f"next start in {delay:g} s"

    def _quit_cause(self) -> str:
        for member in self._members.values():
            if line := member.stderr.last_with("watchdog timeout"):
                return f"{member.name}'s watchdog (--watchdog-timeout): {line}"
        said = [f"{m.name}: {line}" for m in self._members.values() if (line := m.stderr.last_error())]
        return " | ".join(["SIGQUIT, by which SGLang asks to end everything", *said])

    def _clean_up(self, dead: str = "") -> None:
        """After the end of the processes that are recorded under names with this beginning."""
        if not end_recorded(self._paths, f"g{self._group}.{dead}"):
            self._log("processes of an earlier epoch do not end")

    def _on_epoch_gone(self) -> None:
        self._ask_at = self._leave_deadline = float("inf")
        for member in self._dead:
            self._clean_up(member.record_name)
            forget(self._paths.processes, f"g{self._group}.{member.record_name}")
            group_files.remove_of_process(self._plan.launch_id, self._group, member.process.pid)
        self._dead.clear()
        group_files.remove(self._paths, self._plan.launch_id, self._group)
        if self._exit_status or self._stop_deadline is not None:
            for member in self._all():
                member.process.kill()
        if self._exit_status and self._status is not None:
            self._status.send({"status": "failed", "cause": self._cause})

    # -- the frontend, and signals

    def _connect(self) -> None:
        control: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        # Every report is complete, so only the newest is worth keeping while the frontend is away.
        control.setsockopt(zmq.CONFLATE, 1)
        control.setsockopt(zmq.RECONNECT_IVL, 20)
        control.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        control.connect(self._paths.control)
        self._watch(control, self._on_message)
        self._control = control

    def _disconnect(self) -> None:
        self._control.close(linger=200)
        zmq.Context.instance().term()

    def _on_message(self) -> None:
        try:
            message = msgspec.msgpack.decode(self._control.recv(zmq.NOBLOCK), type=KillGroup)
        except (zmq.Again, msgspec.DecodeError) as error:
            if not isinstance(error, zmq.Again):
                self._log(f"ignored a message that is not ours: {error}")
            return
        current = message.group == self._group and message.epoch == self._epoch
        if current and self._members and not self._ending:
            if message.planned:
                self._end_epoch(message.cause, planned=True, by_itself=False)
            elif self._fence is None:
                # Often it is told of a death that shows here a little later, and what died says who did not.
                self._fence = (message.cause, time.monotonic() + _END_SHOWS_WITHIN)

    def _check_fence(self, now: float) -> None:
        if self._fence is not None and now >= self._fence[1]:
            # Of several that hang nobody knows which is the cause; one that is stopped can be told.
            stopped = [member.name for member in self._members.values() if member.process.stopped()]
            self._end_epoch(self._fence[0], by_itself=False, whole=not stopped, guilty=stopped)

    def _report(self) -> None:
        now = time.monotonic()
        self._next_report = now + REPORT_INTERVAL
        down = self._phase in ("down", "stopped")
        ready = self._phase == "ready"
        rank0 = self._members.get("rank0")
        report = GroupReport(
            group=self._group,
            epoch=self._epoch,
            phase=self._phase,
            supervisor=self._self_ref,
            members=[] if down else [ProcessRef(m.name, *m.process.identity) for m in self._members.values()],
            init_info=rank0.init_info if rank0 is not None and ready else None,
            shadow_endpoints=self._shadow_endpoints() if ready else [],
            cause=self._cause,
            kind=self._kind if down else None,
            failed_starts=self._failed_starts,
            retry_in=max(0.0, self._next_start - now) if down else 0.0,
            formed=self._formed() if ready else None,
            formed_s=self._ready_at - self._started_at if ready and self._ready_at is not None else 0.0,
        )
        self._tell(report)

    def _formed(self) -> GroupFormed:
        if self._reforming.reformed:
            return "reformed"
        return "warm" if self._warm.warm else "cold"

    def _tell(self, report: GroupReport) -> None:
        try:
            self._control.send(msgspec.msgpack.encode(report), zmq.NOBLOCK)
        except zmq.Again:
            pass  # no frontend; the next report says it all again

    def _shadow_endpoints(self) -> list[str]:
        """By rank; none when no rank has one."""
        members = [self._members.get(f"rank{rank}") for rank in self._plan.ranks]
        said = [(member.init_info or {}).get(SHADOW_ENDPOINT) for member in members if member is not None]
        return [str(endpoint or "") for endpoint in said] if any(said) else []

    def _catch_signals(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup_writer = theirs
        # Not SIG_IGN, which the members would inherit. Upstream's scheduler sends SIGQUIT to its parent to end the
        # whole server: on an exception, after which it ends itself, and when its watchdog finds it stuck.
        signal.signal(signal.SIGQUIT, lambda *_: None)
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._watch(ours.fileno(), self._on_signal)
        return ours

    def _on_signal(self) -> None:
        numbers = self._wakeup.recv(64)
        self._reap_adopted()
        if signal.SIGQUIT in numbers and self._members and not self._ending:
            self._quit_deadline = min(self._quit_deadline, time.monotonic() + _QUIT_GRACE)
        if signal.SIGTERM in numbers and self._stop_deadline is None:
            self._stop_deadline = time.monotonic() + _STOP_TIMEOUT
            self._stop()

    def _stop(self) -> None:
        self._ending = True
        self._phase, self._cause, self._kind = "stopped", "shutdown", None
        for member in self._all():
            member.process.signal(signal.SIGTERM)

    def _reap_adopted(self) -> None:
        """What members left behind, and what forked them."""
        reap_adopted({member.process.pid for member in self._all()} | self._warm.pids)

    def _log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        self._terminal.write(f"[{stamp} kevlar] worker group {self._group}: {text}\n".encode())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", required=True)
    parser.add_argument("--group", type=int, required=True)
    parser.add_argument("--status-fd", type=int)
    parser.add_argument("--exit-on-failed-start", action="store_true")
    args = parser.parse_args()
    paths = Paths(args.run_dir)
    with open(paths.plan, "rb") as file:
        plan = msgspec.json.decode(file.read(), type=LaunchPlan)
    template = [sys.executable, "-m", "sglang_kevlar.worker.template", "--run-dir", paths.run_dir]
    status = None if args.status_fd is None else StatusWriter(args.status_fd)
    how: dict[str, Any] = {
        "template": template if plan.kevlar.warm_start == "auto" else None,
        "exit_on_failed_start": args.exit_on_failed_start,
    }
    if plan.node is not None:
        from sglang_kevlar.worker import nodes

        return nodes.run(paths, plan, args.group, status, how)

    commands = engine_commands(paths, plan, args.group)
    return Supervisor(
        paths, plan, args.group, commands, lambda: Meeting(meeting_port(plan, args.group)), status=status, **how
    ).run()


if __name__ == "__main__":
    sys.exit(main())
