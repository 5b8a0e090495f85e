"""The launcher with light children: real processes, real signals, nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest

from sglang_kevlar.control.backoff import Backoff
from sglang_kevlar.protocol.launch import EXIT_CONFIG, KevlarArgs

#: a launcher whose children are scripts in the test's directory
LAUNCHER = """
import sys, msgspec
from sglang_kevlar.launcher.main import Internal, launch
from sglang_kevlar.protocol.launch import KevlarArgs
scripts, settings, internal = sys.argv[1:4]
def make(run_dir):
    def commands(role, group):
        return [sys.executable, f"{scripts}/{role}.py", run_dir.path, str(group), run_dir.launch_id]
    return commands
sys.exit(launch(
    msgspec.json.decode(settings, type=KevlarArgs), msgspec.json.decode(internal, type=Internal), make
))
"""

PREAMBLE = """
import json, os, signal, subprocess, sys, time
from sglang_kevlar.launcher.process import die_with_parent
die_with_parent()
run_dir, group, launch_id, scripts = sys.argv[1], sys.argv[2], sys.argv[3], os.path.dirname(sys.argv[0])
role = os.path.basename(sys.argv[0]).removesuffix(".py") + ("" if "supervisor" not in sys.argv[0] else group)
with open(f"{scripts}/log", "a") as log:
    log.write(f"{role} {os.getpid()}\\n")
def say(**message):
    os.write(int(sys.argv[sys.argv.index("--status-fd") + 1]), json.dumps(message).encode() + b"\\n")
"""
#: with a child that nobody would miss, and shared memory
SUPERVISOR = """
helper = subprocess.Popen(["sleep", "1000"])
with open(f"{scripts}/log", "a") as log:
    log.write(f"helper {helper.pid}\\n")
open(f"/dev/shm/sglang_loads_kevlar-{launch_id}-g{group}e1_x.shm", "w").close()
say(status="ready")
signal.signal(signal.SIGTERM, lambda *_: (helper.kill(), sys.exit(0)))
while True: time.sleep(1000)
"""
FRONTEND = """
say(status="ready")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
while True: time.sleep(1000)
"""


class Server:
    """A launcher under test."""

    def __init__(self, scripts: Path, base: Path) -> None:
        self.scripts = scripts
        self.base = base
        self.settings: dict[str, object] = {"worker_groups": 2, "restart_backoff": 0.05, "restart_backoff_max": 0.2}
        self.process: subprocess.Popen[bytes] | None = None
        self.behave("prepare", "")
        self.behave("supervisor", SUPERVISOR)
        self.behave("frontend", FRONTEND)

    def behave(self, role: str, code: str) -> None:
        (self.scripts / f"{role}.py").write_text(PREAMBLE + code)

    def start(self, command: list[str] | None = None, pass_fds: tuple[int, ...] = (), **internal: object) -> None:
        encoded = [msgspec.json.encode(what).decode() for what in (self.settings, internal)]
        self.process = subprocess.Popen(
            [*(command or []), sys.executable, "-c", LAUNCHER, str(self.scripts), *encoded],
            env={**os.environ, "TMPDIR": str(self.base)},
            stderr=(self.scripts / "stderr").open("wb"),
            pass_fds=pass_fds,
            start_new_session=True,
        )

    def started(self, role: str) -> list[int]:
        """pids of all starts of ``role``: prepare, frontend, supervisor0, ..."""
        if not (self.scripts / "log").exists():
            return []
        lines = (self.scripts / "log").read_text().splitlines()
        return [int(line.split()[1]) for line in lines if line.split()[0] == role]

    def wait_started(self, role: str, times: int = 1) -> int:
        eventually(lambda: len(self.started(role)) >= times)
        return self.started(role)[times - 1]

    def up(self) -> None:
        for role in ("frontend", "supervisor0", "supervisor1"):
            self.wait_started(role)
        eventually(lambda: len(self.started("helper")) == 2)
        time.sleep(0.2)

    def everyone(self) -> list[int]:
        return [int(line.split()[1]) for line in (self.scripts / "log").read_text().splitlines()]

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(30)

    def stderr(self) -> str:
        return (self.scripts / "stderr").read_text()

    def assert_nothing_left(self) -> None:
        eventually(lambda: not any(alive(pid) for pid in self.everyone()))
        eventually(lambda: list(self.base.glob("kevlar-*")) == [])
        eventually(lambda: not any("_x.shm" in name for name in os.listdir("/dev/shm")))
        eventually(lambda: not processes_naming(str(self.base)))


def processes_naming(text: str) -> list[str]:
    """Command lines (the janitor's, for one) that contain ``text``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().decode(errors="replace") if entry.name.isdecimal() else ""
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in command:
            found.append(command)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.02)


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("scripts"), tmp_path_factory.mktemp("t"))
    yield server
    if server.process is not None and server.process.poll() is None:
        server.process.kill()
        server.process.wait()
    server.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_everything(server: Server, number: int) -> None:
    server.start()
    server.up()
    assert server.process is not None
    server.process.send_signal(number)
    assert server.wait() == 0
    # All gone when it returns, not some time later.
    assert not any(alive(pid) for pid in server.everyone())
    assert list(server.base.glob("kevlar-*")) == []


def test_groups_serve_while_the_frontend_drains(server: Server) -> None:
    server.behave(
        "frontend",
        """
pids = [int(l.split()[1]) for l in open(f"{scripts}/log") if l.startswith("supervisor")]
def drain(*_):
    time.sleep(0.5)
    alive = [int(l.split()[1]) for l in open(f"{scripts}/log") if l.startswith("supervisor")]
    open(f"{scripts}/alive", "w").write(str(all(os.path.exists(f"/proc/{p}") for p in alive)))
    sys.exit(3)
signal.signal(signal.SIGTERM, drain)
while True: time.sleep(1000)
""",
    )
    server.start()
    server.up()
    assert server.process is not None
    server.process.terminate()
    assert server.wait() == 3  # the frontend's own status
    assert (server.scripts / "alive").read_text() == "True"


def test_second_signal_ends_at_once(server: Server) -> None:
    server.behave("frontend", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(1000)")
    server.start()
    server.up()
    assert server.process is not None
    server.process.terminate()
    eventually(lambda: "shutting down" in server.stderr())
    server.process.terminate()
    server.wait()
    assert not any(alive(pid) for pid in server.everyone())


def test_sigkill_of_the_launcher_leaves_nothing(server: Server) -> None:
    server.start()
    server.up()
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.assert_nothing_left()


def test_sigkill_during_preparation_leaves_nothing(server: Server) -> None:
    server.behave("prepare", "time.sleep(1000)")
    server.start()
    server.wait_started("prepare")
    assert server.process is not None
    server.process.kill()
    server.process.wait()
    server.assert_nothing_left()


def test_signal_during_preparation(server: Server) -> None:
    server.behave("prepare", "time.sleep(1000)")
    server.start()
    server.wait_started("prepare")
    time.sleep(0.2)
    assert server.process is not None
    server.process.send_signal(signal.SIGINT)
    assert server.wait() == 0
    assert server.started("frontend") == []


@pytest.mark.parametrize("status", [2, EXIT_CONFIG])
def test_refused_launch_starts_nothing(server: Server, status: int) -> None:
    server.behave("prepare", f"sys.exit({status})")
    server.start()
    assert server.wait() == status
    assert server.started("supervisor0") == []


def test_the_launcher_sleeps_during_preparation(server: Server) -> None:
    server.behave("prepare", "time.sleep(1000)")
    server.start()
    server.wait_started("prepare")
    assert server.process is not None
    launcher = psutil.Process(server.process.pid)
    before = sum(launcher.cpu_times()[:2])
    time.sleep(1)
    assert sum(launcher.cpu_times()[:2]) - before < 0.2
    server.process.terminate()
    server.wait()


@pytest.mark.parametrize("role", ["frontend", "supervisor1"])
def test_dead_child_is_replaced_and_the_others_stay(server: Server, role: str) -> None:
    server.start()
    server.up()
    others = [server.started(other)[0] for other in ("frontend", "supervisor0", "supervisor1") if other != role]
    for times in (1, 2):
        os.kill(server.started(role)[-1], signal.SIGKILL)
        server.wait_started(role, times + 1)
    assert all(alive(pid) for pid in others)
    eventually(lambda: server.stderr().count("killed by SIGKILL") == 2)


def test_child_in_a_stopped_state_is_ended_too(server: Server) -> None:
    server.start()
    server.up()
    os.kill(server.started("supervisor0")[0], signal.SIGSTOP)
    assert server.process is not None
    server.process.terminate()
    assert server.wait() == 0


FAILING = """
fails = ONLY in (None, int(group))
if fails:
    WAIT
    say(status="failed", cause=f"rank0 failed to start: no weights for group {group}")
    sys.exit(79 if "--exit-on-failed-start" in sys.argv else 1)
"""


def test_first_start_that_fails_ends_the_server_with_its_cause(server: Server) -> None:
    server.behave("supervisor", FAILING.replace("ONLY", "None").replace("WAIT", ""))
    server.start()
    assert server.wait() == 1
    assert "failed to start: no weights for group" in server.stderr()
    assert all(len(server.started(role)) <= 1 for role in ("supervisor0", "supervisor1"))


def test_failed_start_beside_a_ready_group_is_tried_again(server: Server) -> None:
    server.behave("supervisor", FAILING.replace("ONLY", "1").replace("WAIT", "time.sleep(2)") + SUPERVISOR)
    server.start()
    server.wait_started("supervisor1", times=2)
    assert server.process is not None and server.process.poll() is None


def test_a_frontend_that_cannot_start_ends_the_server_with_its_cause(server: Server) -> None:
    server.behave("frontend", 'time.sleep(0.5); say(status="failed", cause="OSError: no template"); sys.exit(1)')
    server.start()
    assert server.wait() == 1
    assert "frontend exited with status 1 before it was ready" in server.stderr()
    assert server.stderr().rstrip().endswith("OSError: no template")
    assert len(server.started("frontend")) == 1


def test_a_frontend_that_has_served_is_tried_again_whatever_happens(server: Server) -> None:
    server.start()
    server.up()
    server.behave("frontend", "sys.exit(1)")
    os.kill(server.started("frontend")[0], signal.SIGKILL)
    server.wait_started("frontend", 4)
    delays = [line.split("next start in ")[1] for line in server.stderr().splitlines() if "next start" in line]
    assert delays[:3] == ["0.05 s", "0.1 s", "0.2 s"]


def test_configuration_error_of_a_child_ends_the_server(server: Server) -> None:
    server.behave("frontend", f"time.sleep(1); sys.exit({EXIT_CONFIG})")
    server.start()
    assert server.wait() == EXIT_CONFIG
    assert "frontend cannot work with this configuration" in server.stderr()


def test_groups_only_for_an_engine(server: Server) -> None:
    """The engine is the frontend: told about the progress, and the groups end with it."""
    reader, writer = os.pipe()
    engine = subprocess.Popen(["sleep", "1000"])
    server.start(pass_fds=(writer,), groups_only=True, owner_pid=engine.pid, status_fd=writer)
    os.close(writer)
    with os.fdopen(reader) as messages:
        prepared = msgspec.json.decode(messages.readline())
        assert prepared["status"] == "prepared"
        assert (Path(prepared["run_dir"]).parent, prepared["run_dir"][-8:]) == (server.base, prepared["launch_id"])
        assert msgspec.json.decode(messages.readline()) == {"status": "ready"}
        eventually(lambda: len(server.started("helper")) == 2)
        assert server.started("frontend") == []
        engine.kill()
        engine.wait()
        server.wait()


def test_run_directory_of_the_operator(server: Server) -> None:
    server.settings["run_dir"] = str(server.base / "mine")
    server.start()
    server.up()
    second = Server(server.scripts, server.base)
    assert (server.base / "mine" / "lock").exists()
    assert server.process is not None
    server.process.kill()
    second.settings["run_dir"] = str(server.base / "mine")
    second.start()  # while the janitor cleans up
    second.wait_started("frontend", times=2)
    assert second.process is not None
    second.process.terminate()
    assert second.wait() == 0
    assert not (server.base / "mine").exists()


def test_version_names_both() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "sglang_kevlar.launch_server", "--version"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("sglang-kevlar ") and "(sglang " in result.stdout


def test_launcher_and_supervisor_stay_light() -> None:
    code = "import sys, sglang_kevlar.launcher.main, sglang_kevlar.worker.supervisor; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert not {"torch", "sglang", "transformers"} & set(result.stdout.split())


def test_default_settings_are_valid_for_the_backoff() -> None:
    kevlar = KevlarArgs()
    Backoff(kevlar.restart_backoff, kevlar.restart_backoff_max)


def test_backoff_doubles_up_to_the_cap_and_resets_after_health() -> None:
    backoff = Backoff(0.5, 3.0, healthy_after=10.0)
    assert [backoff.failed(healthy_for) for healthy_for in (0, 1, 9, 0, 0)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert [backoff.failed(healthy_for) for healthy_for in (10, 0)] == [0.5, 1.0]


def test_backoff_without_delay_stays_without() -> None:
    backoff = Backoff(0.0, 0.0)
    assert [backoff.failed(0) for _ in range(3)] == [0, 0, 0]
    with pytest.raises(ValueError):
        Backoff(2.0, 1.0)
