"""A group supervisor with light members, which run what a test says; cold, or forked of a light template."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import zmq

from sglang_kevlar.protocol.group import GroupReport, KillGroup
from sglang_kevlar.protocol.launch import KevlarArgs, LaunchPlan, Paths

#: of this process: others may run such tests at the same time
LAUNCH_ID = f"{os.getpid():07x}b"

#: a member: leaves what real ones leave, then does what the test's file for it says
MEMBER = """
from sglang_kevlar.launcher.process import die_with_parent
if __name__ == "__main__":
    die_with_parent()
import json, os, signal, socket, subprocess, sys, time

class Left(Exception): ...

def leave(*_):
    raise Left

def main():
    run_dir, group, name = sys.argv[1:4]
    ready_fd, orders = int(sys.argv[-3]), os.fdopen(int(sys.argv[-1]), "rb")
    def say(**message):
        os.write(ready_fd, json.dumps(message).encode() + b"\\n")
    exec(open(f"{run_dir}/{name}.load.py").read(), {**globals(), **locals()})
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    say(status="loaded", can_leave=name.startswith("rank"))
    while line := orders.readline():
        epoch = str(json.loads(line)["epoch"])
        error = serve(run_dir, group, name, epoch, say)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        say(status="left", error=error, epoch=int(epoch))

def serve(run_dir, group, name, epoch, say):
    channel = socket.socket(socket.AF_UNIX)
    channel.bind(f"{run_dir}/g{group}e{epoch}.{name}")
    open(f"/dev/shm/sglang_loads_kevlar-LAUNCH_ID-g{group}e{epoch}_{name}.shm", "w").close()
    more = {}
    try:
        exec(open(f"{run_dir}/{name}.py").read(), {**globals(), **locals()})
        signal.signal(signal.SIGUSR2, leave)
        say(status="ready", max_req_input_len=7, epoch=int(epoch), **more)
        try:
            exec(open(f"{run_dir}/{name}.serve.py").read(), {**globals(), **locals()})
        except OSError as problem:
            return str(problem)
        time.sleep(1000)
    except Left:
        return ""
    finally:
        channel.close()

if __name__ == "__main__":
    main()
""".replace("LAUNCH_ID", LAUNCH_ID)

#: what they can be forked of
TEMPLATE = """
from sglang_kevlar.launcher.process import die_with_parent
die_with_parent()
import os, socket, subprocess, sys, threading, time
from sglang_kevlar.worker import template
run_dir = sys.argv[1]
open(f"{run_dir}/templates", "a").write(f"{os.getpid()}\\n")
exec(open(f"{run_dir}/template.py").read())
template.MEMBERS = ("fake_member",)
import fake_member
template.serve(socket.socket(fileno=int(sys.argv[3])))
"""

SUPERVISOR = """
import sys, msgspec
from sglang_kevlar.launcher.process import die_with_parent
die_with_parent()
from sglang_kevlar.launcher.status import StatusWriter
from sglang_kevlar.protocol.launch import LaunchPlan, Paths
from sglang_kevlar.worker.engine_group import Meeting
from sglang_kevlar.worker.supervisor import Supervisor
run_dir, warm, fail_fast, status_fd = sys.argv[1], sys.argv[2] == "1", sys.argv[3] == "1", int(sys.argv[4])
paths = Paths(run_dir)
plan = msgspec.json.decode(open(paths.plan, "rb").read(), type=LaunchPlan)
commands = {
    name: [sys.executable, "-m", "fake_member", run_dir, "0", name] for name in ("rank0", "rank1", "detokenizer")
}
sys.exit(Supervisor(
    paths,
    plan,
    0,
    commands,
    lambda: Meeting(1),
    template=[sys.executable, "-m", "fake_template", run_dir] if warm else None,
    status=StatusWriter(status_fd),
    exit_on_failed_start=fail_fast,
).run())
"""


class Group:
    """A supervisor under test, and the frontend's end of its socket."""

    def __init__(self, run_dir: Path, warm: bool) -> None:
        self.run_dir = run_dir
        self.warm = warm
        self.paths = Paths(str(run_dir))
        self.configure()
        (run_dir / "fake_member.py").write_text(MEMBER)
        (run_dir / "fake_template.py").write_text(TEMPLATE)
        for name in ("rank0", "rank1", "detokenizer", "template"):
            self.behave(name, "")
            self.behave(f"{name}.load", "")
            self.behave(f"{name}.serve", "")
        self.context = zmq.Context()
        self.listen()
        self.process: subprocess.Popen[bytes] | None = None
        self.status = b""
        self.pids: set[int] = set()

    def configure(self, on_device: bool = False, **settings: Any) -> None:
        quick = {"restart_backoff": 0.05, "restart_backoff_max": 0.4, "reform": "off"}
        kevlar = KevlarArgs(**{**quick, **settings})
        plan = LaunchPlan(
            version=1, upstream="", launch_id=LAUNCH_ID, kevlar=kevlar, tp_size=2, pp_size=1, gpu_ids=[[0, 0]],
            on_device=on_device, host="", port=0, server_args_file="",
        )  # fmt: skip
        Path(self.paths.plan).write_bytes(msgspec.json.encode(plan))

    def behave(self, name: str, code: str) -> None:
        (self.run_dir / f"{name}.py").write_text(textwrap.dedent(code))

    def listen(self) -> None:
        self.router = self.context.socket(zmq.ROUTER)
        self.router.bind(self.paths.control)

    def start(self, fail_fast: bool = False) -> None:
        self._status_reader, writer = os.pipe()
        script = [sys.executable, "-c", SUPERVISOR, str(self.run_dir), str(int(self.warm)), str(int(fail_fast))]
        search = os.pathsep.join([str(self.run_dir), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [*script, str(writer)],
            pass_fds=[writer],
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": search},
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
        # What members started and noted there, of which this supervisor's successor would have made an end.
        for noted in self.run_dir.glob("child*"):
            for pid in map(int, noted.read_text().split()):
                if alive(pid):
                    os.kill(pid, signal.SIGKILL)


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
