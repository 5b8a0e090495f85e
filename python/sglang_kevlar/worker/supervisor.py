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
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import zmq

from sglang_kevlar.control.course import Course
from sglang_kevlar.control.reforming import LEAVE_WITHIN, LEAVE_WITHIN_ON_DEVICE
from sglang_kevlar.launcher.process import adopt_orphans, forget, identify, reap_adopted, record
from sglang_kevlar.launcher.rundir import end_recorded
from sglang_kevlar.launcher.status import StatusWriter
from sglang_kevlar.protocol.group import (
    REPORT_INTERVAL,
    SHADOW_ENDPOINT,
    GroupFormed,
    GroupReport,
    KillGroup,
    ProcessRef,
)
from sglang_kevlar.protocol.launch import EXIT_CONFIG, EXIT_WEIGHTS_GONE, LaunchPlan, Paths
from sglang_kevlar.worker import group_files
from sglang_kevlar.worker.engine_group import Commands, Meeting, engine_commands, meeting_port
from sglang_kevlar.worker.member import Member
from sglang_kevlar.worker.orders import IN_PLACE, Order
from sglang_kevlar.worker.stderr import PassThrough
from sglang_kevlar.worker.warm_start import WarmStart

#: seconds in which a report is heard, mostly
_HEARD = 0.05


class Supervisor(Course[Member]):
    """One worker group: the loop, the processes, the reports; when what happens is its `control.course`."""

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
        identity = identify(os.getpid())
        assert identity is not None
        self._self_ref = ProcessRef("supervisor", *identity)
        #: of the epoch of now
        self._order = Order(0, 0)
        #: whose files and children are still to be removed
        self._dead: list[Member] = []
        self._next_report = 0.0
        self._handlers: dict[object, Callable[[], None]] = {}
        self._poller = zmq.Poller()
        self._terminal = PassThrough()
        self._warm = WarmStart(template, plan.kevlar.start_timeout, self._log, self._watch, self._unwatch)
        super().__init__(
            plan.kevlar,
            list(commands),
            [f"rank{rank}" for rank in plan.ranks][: plan.kevlar.spare_ranks],
            reforms=plan.kevlar.reform != "off" and plan.node is None,
            leave_within=LEAVE_WITHIN_ON_DEVICE if plan.on_device else LEAVE_WITHIN,
            warmth=self._warm,
            clock=time.monotonic,
            exit_on_failed_start=exit_on_failed_start,
        )
        self._connect()
        self._wakeup = self._catch_signals()

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

    def _look_elsewhere(self) -> None:
        """At other hosts of the group, if there are any."""

    def _timeout_ms(self) -> int:
        deadline = min(self._next_report, self._warm.next_deadline, self._next_deadline())
        return max(0, int((deadline - time.monotonic()) * 1000) + 1)

    def _watch(self, source: object, handler: Callable[[], None], flags: int = zmq.POLLIN) -> None:
        self._handlers[source] = handler
        self._poller.register(source, flags)

    def _unwatch(self, source: object) -> None:
        if self._handlers.pop(source, None) is not None:
            self._poller.unregister(source)

    # -- one epoch

    def _begin_epoch(self) -> int:
        epoch = group_files.next_epoch(self._paths, self._group)
        meeting = self._meet()
        self._order = Order(epoch, meeting.port, meeting.host)
        return epoch

    def _join(self, member: Member) -> None:
        member.join(self._order)

    def _new_member(self, seat: str, in_place: bool) -> Member:
        member = Member(seat, [*self._commands[seat], *([IN_PLACE] if in_place else [])], self._warm)
        record(self._paths.processes, f"g{self._group}.{member.record_name}", member.process.identity)
        self._watch(member.process.pidfd, partial(self._on_exit, member))
        self._watch(member.ready_fd, partial(self._hear, member))
        self._watch(member.stderr.fileno(), partial(self._on_stderr, member))
        return member

    def _hear(self, member: Member) -> None:
        for message in member.messages():
            self._on_said(member, message)
        if member.ready_closed:
            self._unwatch(member.ready_fd)

    def _on_ready(self) -> None:
        for each in self._members.values():
            each.stderr.forget()
        if self._status is not None:
            self._status.send({"status": "ready"})

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
        self._hear(member)  # its last words may say more than its status
        while data := member.stderr.read():
            self._terminal.write(data)
        by_itself = status not in (-signal.SIGKILL, -signal.SIGTERM, EXIT_WEIGHTS_GONE)
        self._on_dead(member, member.describe_exit(status), by_itself=by_itself, hopeless=status == EXIT_CONFIG)
        self._unwatch(member.ready_fd)
        self._unwatch(member.stderr.fileno())
        member.close()
        group_files.remove_metrics(self._paths, member.process.pid, counted=self._ready_at is not None)
        self._dead.append(member)
        self._reap_adopted()
        self._gone_if_empty()

    def _report_first(self) -> None:
        self._report()
        time.sleep(_HEARD)

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
        for member in self._dead:
            self._clean_up(member.record_name)
            forget(self._paths.processes, f"g{self._group}.{member.record_name}")
            group_files.remove_of_process(self._plan.launch_id, self._group, member.process.pid)
        self._dead.clear()
        group_files.remove(self._paths, self._plan.launch_id, self._group)
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
        # The last report takes that long on a starved machine; without a frontend it is nobody's.
        self._control.close(linger=500)
        zmq.Context.instance().term()

    def _on_message(self) -> None:
        try:
            message = msgspec.msgpack.decode(self._control.recv(zmq.NOBLOCK), type=KillGroup)
        except (zmq.Again, msgspec.DecodeError) as error:
            if not isinstance(error, zmq.Again):
                self._log(f"ignored a message that is not ours: {error}")
            return
        if message.group == self._group:
            self._on_kill_order(message.epoch, message.cause, message.planned)

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
        if signal.SIGQUIT in numbers:
            self._on_quit()
        if signal.SIGTERM in numbers:
            self._on_shutdown()

    def _stop(self) -> None:
        super()._stop()
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
