"""The group supervisor with light members: real processes, real signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from sglang_kevlar.launcher.process import identify
from sglang_kevlar.protocol.group import GroupReport, KillGroup
from sglang_kevlar.protocol.launch import EXIT_CONFIG, KevlarArgs, LaunchPlan, Paths, instance_id

LAUNCH_ID = "00aa11bb"

#: a member: leaves what real ones leave, then does what the test's file for it says
MEMBER = """
import json, os, socket, subprocess, sys, time
from sglang_kevlar.launcher.process import die_with_parent
die_with_parent()
run_dir, group, epoch, name, ready_fd = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[6])
channel = socket.socket(socket.AF_UNIX)
channel.bind(f"{run_dir}/g{group}e{epoch}.{name}")
open(f"/dev/shm/sglang_loads_kevlar-LAUNCH_ID-g{group}e{epoch}_{name}.shm", "w").close()
def say(**message):
    os.write(ready_fd, json.dumps(message).encode() + b"\\n")
behaviour = f"{run_dir}/{name}.py"
exec(open(behaviour).read())
say(status="ready", max_req_input_len=7)
time.sleep(1000)
""".replace("LAUNCH_ID", LAUNCH_ID)

SUPERVISOR = """
import sys, msgspec
from sglang_kevlar.launcher.process import die_with_parent
die_with_parent()
from sglang_kevlar.launcher.status import StatusWriter
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.worker.supervisor import Supervisor
run_dir, member, fail_fast, status_fd = sys.argv[1], sys.argv[2], sys.argv[3] == "1", int(sys.argv[4])
paths = Paths(run_dir)
plan = msgspec.json.decode(open(paths.plan, "rb").read(), type=LaunchPlan)
commands = lambda epoch: {
    name: [sys.executable, member, run_dir, "0", str(epoch), name] for name in ("rank0", "rank1", "detokenizer")
}
sys.exit(Supervisor(
    paths, plan, 0, commands, status=StatusWriter(status_fd), exit_on_failed_start=fail_fast
).run())
"""


class Group:
    """A supervisor under test, and the frontend's end of its socket."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.paths = Paths(str(run_dir))
        self.configure()
        (run_dir / "member.script").write_text(MEMBER)
        for name in ("rank0", "rank1", "detokenizer"):
            self.behave(name, "")
        self.context = zmq.Context()
        self.listen()
        self.process: subprocess.Popen[bytes] | None = None
        self.status = b""
        self.pids: set[int] = set()

    def configure(self, **settings: float) -> None:
        kevlar = KevlarArgs(**{"restart_backoff": 0.05, "restart_backoff_max": 0.4, **settings})
        plan = LaunchPlan(
            version=1, upstream="", launch_id=LAUNCH_ID, kevlar=kevlar, tp_size=2, pp_size=1, gpu_ids=[[0, 0]],
            host="", port=0, server_args_file="",
        )  # fmt: skip
        Path(self.paths.plan).write_bytes(msgspec.json.encode(plan))

    def behave(self, name: str, code: str) -> None:
        (self.run_dir / f"{name}.py").write_text(textwrap.dedent(code))

    def listen(self) -> None:
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(self.paths.control)

    def start(self, fail_fast: bool = False) -> None:
        self._status_reader, writer = os.pipe()
        script = [sys.executable, "-c", SUPERVISOR, str(self.run_dir), str(self.run_dir / "member.script")]
        self.process = subprocess.Popen(
            [*script, str(int(fail_fast)), str(writer)], pass_fds=[writer], stderr=subprocess.PIPE
        )
        os.close(writer)

    def report(self, condition: Callable[[GroupReport], bool], timeout: float = 30) -> GroupReport:
        """The next report that fulfils the condition."""
        deadline = time.monotonic() + timeout
        while self.router.poll(max(0, (deadline - time.monotonic()) * 1000)):
            self.identity, data = self.router.recv_multipart()
            report = msgspec.msgpack.decode(data, type=GroupReport)
            self.pids |= {member.pid for member in report.members}
            if condition(report):
                return report
        raise AssertionError("no such report")

    def ready(self, after: int = 0) -> GroupReport:
        return self.report(lambda r: r.phase == "ready" and r.epoch > after)

    def kill_group(self, epoch: int, planned: bool = False) -> None:
        message = KillGroup(group=0, epoch=epoch, cause="fenced by the test", planned=planned)
        self.router.send_multipart([self.identity, msgspec.msgpack.encode(message)])

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(30)

    def messages(self) -> list[dict[str, str]]:
        data = b""
        while chunk := os.read(self._status_reader, 65536):
            data += chunk
        return [msgspec.json.decode(line) for line in data.splitlines()]

    def leftovers(self) -> list[str]:
        """Files of epochs, in the run directory and in shared memory."""
        return [path.name for path in self.run_dir.glob("g0e*")] + [
            name for name in os.listdir("/dev/shm") if LAUNCH_ID in name
        ]

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()
        if self.process is not None and self.process.stderr is not None:
            self.process.stderr.close()
        self.router.close(linger=0)
        self.context.term()
        for name in os.listdir("/dev/shm"):
            if LAUNCH_ID in name:
                os.unlink(f"/dev/shm/{name}")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], timeout: float = 20) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


def pid_of(report: GroupReport, name: str) -> int:
    return next(member.pid for member in report.members if member.name == name)


@pytest.fixture
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    run_dir = tmp_path_factory.mktemp("g")
    group = Group(run_dir)
    yield group
    group.end()
    eventually(lambda: not any(alive(pid) for pid in group.pids))


def test_reports_ready_with_identities_and_init_info(group: Group) -> None:
    group.start()
    report = group.ready()
    assert (report.epoch, report.failed_starts, report.cause) == (1, 0, "")
    assert [member.name for member in report.members] == ["rank0", "rank1", "detokenizer"]
    assert all(identify(m.pid) == (m.pid, m.start_ticks) for m in report.members)
    assert report.init_info is not None and report.init_info["max_req_input_len"] == 7
    assert group.process is not None and report.supervisor.pid == group.process.pid
    # Said again without any change: a frontend that starts late needs nothing else.
    assert group.ready().members == report.members


@pytest.mark.parametrize("victim", ["rank0", "rank1", "detokenizer"])
def test_any_member_dead_ends_the_epoch_and_starts_the_next(group: Group, victim: str) -> None:
    group.start()
    first = group.ready()
    os.kill(pid_of(first, victim), signal.SIGKILL)
    down = group.report(lambda r: r.phase == "down")
    assert down.epoch == 1 and down.members == []
    assert victim in down.cause and "SIGKILL" in down.cause
    second = group.ready(after=1)
    assert second.epoch == 2
    assert not any(alive(member.pid) for member in first.members)
    assert not {m.pid for m in first.members} & {m.pid for m in second.members}
    assert all("g0e2" in name for name in group.leftovers())


def test_cause_quotes_the_last_error_line(group: Group) -> None:
    group.behave(
        "rank1",
        """
        if epoch == "1":
            say(status="ready")
            time.sleep(0.3)
            print("step 1", "step 2", sep="\\n", file=sys.stderr)
            raise RuntimeError("device lost")
        """,
    )
    group.start()
    down = group.report(lambda r: r.phase == "down")
    assert "rank1" in down.cause and "exited with status 1" in down.cause
    assert "RuntimeError: device lost" in down.cause
    group.ready(after=1)
    assert group.process is not None and group.process.stderr is not None
    os.set_blocking(group.process.stderr.fileno(), False)
    assert b"step 1\nstep 2\n" in group.process.stderr.read()  # passed through


def test_failed_starts_are_counted_and_back_off(group: Group) -> None:
    group.behave("rank0", """if int(epoch) <= 3: say(status="error", error="no such model"); time.sleep(1000)""")
    group.start()
    delays = [
        group.report(lambda r, n=n: r.phase == "down" and r.failed_starts == n).retry_in for n in (1, 2, 3)
    ]  # fmt: skip
    assert delays[0] <= 0.05 < delays[2] <= 0.2
    down = group.report(lambda r: r.failed_starts == 3)
    assert down.cause == "rank0 failed to start: no such model"
    assert group.ready(after=3).failed_starts == 0


def test_member_that_never_becomes_ready_is_started_again(group: Group) -> None:
    group.configure(start_timeout=1.0)
    group.behave("detokenizer", """if epoch == "1": time.sleep(1000)""")
    group.start()
    down = group.report(lambda r: r.phase == "down")
    assert down.cause == "detokenizer not ready after 1 s"
    group.ready(after=1)


def test_member_that_is_stopped_while_it_starts_is_noticed(group: Group) -> None:
    group.configure(stop_grace=0.5)
    group.behave("rank1", """time.sleep(1000 if epoch == "1" else 0)""")
    group.start()
    starting = group.report(lambda r: r.phase == "starting" and len(r.members) == 3)
    os.kill(pid_of(starting, "rank1"), signal.SIGSTOP)
    time.sleep(0.2)
    os.kill(pid_of(starting, "rank1"), signal.SIGCONT)
    assert group.report(lambda r: True).epoch == 1
    os.kill(pid_of(starting, "rank1"), signal.SIGSTOP)
    assert "rank1 stopped (state T)" in group.report(lambda r: r.phase == "down", timeout=10).cause
    assert group.ready(after=1).epoch == 2


def test_first_failure_ends_a_supervisor_that_was_asked_to(group: Group) -> None:
    group.behave("rank0", """raise ValueError("bad weights")""")
    group.start(fail_fast=True)
    assert group.wait() == 79
    (message,) = group.messages()
    assert message["status"] == "failed" and "ValueError: bad weights" in message["cause"]
    assert group.leftovers() == []


def test_failure_after_ready_does_not_end_it(group: Group) -> None:
    group.start(fail_fast=True)
    os.kill(pid_of(group.ready(), "rank0"), signal.SIGKILL)
    group.ready(after=1)


def test_configuration_error_of_a_member_ends_it(group: Group) -> None:
    group.behave("rank1", f"sys.exit({EXIT_CONFIG})")
    group.start()
    assert group.wait() == EXIT_CONFIG


def test_kill_from_the_frontend_counts_only_for_this_epoch(group: Group) -> None:
    group.start()
    first = group.ready()
    group.kill_group(epoch=7)
    group.report(lambda r: r.phase == "ready")
    group.kill_group(epoch=1, planned=True)
    down = group.report(lambda r: r.phase == "down")
    assert down.cause == "fenced by the test" and down.retry_in == 0
    second = group.ready(after=1)
    assert not any(alive(member.pid) for member in first.members)
    group.kill_group(epoch=1)
    assert group.ready().epoch == second.epoch


def test_restarted_frontend_learns_everything(group: Group) -> None:
    group.start()
    first = group.ready()
    group.router.close(linger=0)
    time.sleep(1.2)
    group.listen()
    report = group.report(lambda r: True)
    assert (report.phase, report.members) == ("ready", first.members)
    group.kill_group(epoch=1)
    group.ready(after=1)


def test_sigterm_ends_everything(group: Group) -> None:
    group.start()
    report = group.ready()
    assert group.process is not None
    group.process.terminate()
    assert group.wait() == 0
    assert not any(alive(member.pid) for member in report.members)
    assert group.leftovers() == []
    assert group.report(lambda r: r.phase == "stopped").members == []


def test_sigterm_is_enforced(group: Group) -> None:
    group.behave("rank0", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    group.start()
    report = group.ready()
    assert group.process is not None
    group.process.terminate()
    assert group.wait() == 0
    assert not any(alive(member.pid) for member in report.members)


def test_a_member_whose_watchdog_sends_sigquit_ends_its_epoch(group: Group) -> None:
    stuck = """
        if epoch == "1":
            import signal
            say(status="ready")
            time.sleep(1)
            print("ERROR Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)", file=sys.stderr)
            os.kill(os.getppid(), signal.SIGQUIT)
            time.sleep(1000)
    """
    group.behave("rank1", stuck)
    group.start()
    assert group.ready().epoch == 1
    cause = group.report(lambda r: r.phase == "down").cause
    assert cause.startswith("rank1's watchdog") and "self.watchdog_timeout=300" in cause
    assert group.ready(after=1).epoch == 2


def test_a_member_that_sends_sigquit_and_ends_says_why_itself(group: Group) -> None:
    group.behave(
        "rank0",
        """
        if epoch == "1":
            import signal
            print("ValueError: the reason", file=sys.stderr)
            os.kill(os.getppid(), signal.SIGQUIT)
            time.sleep(0.5)
            sys.exit(1)
        """,
    )
    group.start()
    cause = group.report(lambda r: r.phase == "down").cause
    assert "exited with status 1: ValueError: the reason" in cause
    time.sleep(2.5)  # the signal is not held against the next epoch
    assert group.ready().epoch == 2


def test_killed_supervisor_takes_its_members_along_and_epochs_go_on(group: Group) -> None:
    group.start()
    report = group.ready()
    assert group.process is not None
    group.process.kill()
    group.process.wait()
    eventually(lambda: not any(alive(member.pid) for member in report.members))
    group.start()
    assert group.ready(after=1).epoch == 2
    assert all("g0e2" in name for name in group.leftovers())


def test_stopped_supervisor_catches_up(group: Group) -> None:
    """Stopped over the start deadline and the death of a member: what was in time counts, what died is replaced."""
    group.configure(start_timeout=3.0)
    group.behave("rank0", """time.sleep(1) if epoch == "1" else None""")
    group.start()
    starting = group.report(lambda r: r.phase == "starting")
    assert group.process is not None
    group.process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    group.process.send_signal(signal.SIGCONT)
    assert group.ready().members == starting.members
    group.process.send_signal(signal.SIGSTOP)
    os.kill(pid_of(starting, "rank1"), signal.SIGKILL)
    time.sleep(0.2)
    group.process.send_signal(signal.SIGCONT)
    assert "rank1" in group.report(lambda r: r.phase == "down").cause
    group.ready(after=1)


def test_children_of_members_die_with_them(group: Group) -> None:
    group.behave(
        "rank0",
        """
        helper = subprocess.Popen(["sleep", "1000"])
        open(f"{run_dir}/helper{epoch}", "w").write(str(helper.pid))
        """,
    )
    group.start()
    os.kill(pid_of(group.ready(), "rank0"), signal.SIGKILL)
    group.ready(after=1)
    helpers = [int((group.run_dir / f"helper{epoch}").read_text()) for epoch in (1, 2)]
    assert not alive(helpers[0]) and alive(helpers[1])
    assert group.process is not None
    group.process.kill()
    group.process.wait()
    group.start()  # finds what its predecessor left
    group.ready(after=2)
    assert not alive(helpers[1])


def test_member_that_writes_more_than_anyone_reads_goes_on(group: Group) -> None:
    """Nobody reads our standard error here: 8 MB are more than all buffers together."""
    group.behave("rank0", """for _ in range(80): os.write(2, b"x" * 99_999 + b"\\n")""")
    group.start()
    group.ready()


def test_instance_id_is_what_the_cleanup_looks_for() -> None:
    assert instance_id(LAUNCH_ID, 0, 1) == f"kevlar-{LAUNCH_ID}-g0e1"
