"""The launcher: starts, watches and restarts everything else, and alone ends it.

It imports neither torch nor sglang and is single-threaded: a selector over pidfds, status pipes and signals.
"""

from __future__ import annotations

import argparse
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import msgspec

from sglang_kevlar import config
from sglang_kevlar.control.backoff import Backoff
from sglang_kevlar.launcher import rundir
from sglang_kevlar.launcher.janitor import Janitor
from sglang_kevlar.launcher.process import (
    PARENT_ENV,
    Child,
    describe_exit,
    identify,
    open_pidfd,
    reap_adopted,
    record,
    spawn,
)
from sglang_kevlar.launcher.status import StatusReader, StatusWriter
from sglang_kevlar.protocol.launch import EXIT_CONFIG, EXIT_FAILED_START, JoinArgs, KevlarArgs, Paths

#: seconds the frontend may drain at shutdown, and then the supervisors may take to end their groups
DRAIN_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0
FRONTEND = "frontend"
_PYTHON = [sys.executable, "-m"]
#: in place of the frontend where the frontends are on other hosts
GATEWAY = "gateway"
#: command line of a role: "prepare", "frontend", "gateway" or "supervisor" (with the group's number)
Commands = Callable[[str, int], list[str]]


class Internal(msgspec.Struct, frozen=True, kw_only=True):
    """How `sglang_kevlar.Engine` starts the launcher: it is the frontend itself."""

    groups_only: bool = False
    #: a later node of a group: its supervisor is told by the first one what there is to do, and whether it may
    follows: bool = False
    #: the launcher ends when this process does
    owner_pid: int | None = None
    #: the process that stands between the groups and their clients
    front: str = FRONTEND
    #: receives ``{"status": "prepared", "run_dir", "launch_id"}``, then ``"ready"`` or ``"failed"`` with a cause
    status_fd: int | None = None


class _Role:
    """One process to keep running."""

    def __init__(self, name: str, group: int | None, backoff: Backoff) -> None:
        self.name = name
        self.group = group
        self.backoff = backoff
        self.child: Child | None = None
        self.status: StatusReader | None = None
        #: when its process of now, and whether any of them, said that it is ready
        self.ready_at: float | None = None
        self.was_ready = False
        #: when to start it (again); None while it runs, and when it is not (yet, or any more) to be started
        self.due: float | None = None
        self.cause = ""


class Launcher:
    """The processes of one server."""

    def __init__(
        self, run_dir: rundir.RunDir, janitor: Janitor, kevlar: KevlarArgs, internal: Internal, commands: Commands
    ) -> None:
        self._paths = Paths(run_dir.path)
        self._janitor = janitor
        self._preparation: Child | None = None
        self._run_dir = run_dir
        self._kevlar = kevlar
        self._internal = internal
        self._commands = commands
        self._owner = None if internal.status_fd is None else StatusWriter(internal.status_fd)
        self._selector = selectors.DefaultSelector()
        groups: list[tuple[str, int | None]] = [(f"g{g}.supervisor", g) for g in range(kevlar.worker_groups)]
        frontend: list[tuple[str, int | None]] = [] if internal.groups_only else [(internal.front, None)]
        self._roles = [
            _Role(name, group, Backoff(kevlar.restart_backoff, kevlar.restart_backoff_max))
            for name, group in frontend + groups
        ]
        self._exit_status = 0
        #: None while serving; then what is being ended, "frontend" (or gateway) or "groups"
        self._ending: str | None = None
        self._deadline = float("inf")
        self._signals = self._catch_signals()
        self._watch_owner()

    # -- start

    def run(self) -> int:
        """Until a signal, or an error that no restart cures. Returns the exit status."""
        status = self._prepare()
        if status is not None:
            return status
        self._tell_owner(status="prepared", run_dir=self._paths.run_dir, launch_id=self._run_dir.launch_id)
        for role in self._roles:
            role.due = 0.0
        while not self._finished():
            self._start_due()
            self._step()
        return self._exit_status

    def _prepare(self) -> int | None:
        """Resolve SGLang's arguments. Returns an exit status when that ends the launch."""
        if self._ending is not None:
            return self._exit_status
        child = self._preparation = spawn("prepare", self._commands("prepare", 0))
        record(self._paths.processes, "prepare", child.identity)
        self._watch(child.pidfd, lambda: None)
        while (status := child.reap()) is None:
            self._step()
            if self._ending is not None:
                child.kill()
        self._selector.unregister(child.pidfd)
        self._preparation = None
        if self._ending is not None:
            return self._exit_status
        if status == 0:
            return None
        self._tell_owner(status="failed", cause="the launch was refused, see standard error")
        if status < 0:
            log(f"preparation {describe_exit(status)}")
        return status if status > 0 else 1

    def _start_due(self) -> None:
        now = time.monotonic()
        for role in self._roles:
            if self._ending is None and role.due is not None and now >= role.due:
                self._start(role)

    def _start(self, role: _Role) -> None:
        role.due, role.ready_at, role.cause = None, None, ""
        status = role.status = StatusReader()
        command = self._commands(role.name, 0) if role.group is None else self._commands("supervisor", role.group)
        command = [*command, "--status-fd", str(status.writer)]
        if role.group is not None and not self._any_ready():
            command.append("--exit-on-failed-start")
        child = role.child = spawn(role.name, command, pass_fds=[status.writer])
        record(self._paths.processes, role.name, child.identity)
        self._watch(child.pidfd, lambda: self._on_exit(role))
        os.close(status.writer)
        self._watch(status.fileno(), lambda: self._on_status(role))

    # -- the loop

    def _step(self) -> None:
        deadlines = [self._deadline] + [role.due for role in self._roles if role.due is not None]
        left = min(deadlines) - time.monotonic()
        for key, _ in self._selector.select(None if left == float("inf") else max(0.0, left)):
            # A handler may have closed what a later event of this round is about.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        if time.monotonic() >= self._deadline:
            self._out_of_patience()

    def _watch(self, fd: int, handler: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, handler)

    def _any_ready(self) -> bool:
        """Whether any group ever was."""
        return any(role.was_ready for role in self._roles if role.group is not None)

    def _running(self, frontend: bool) -> list[_Role]:
        return [role for role in self._roles if role.child is not None and (role.group is None) is frontend]

    def _finished(self) -> bool:
        return self._ending is not None and not any(role.child for role in self._roles)

    def _on_status(self, role: _Role) -> None:
        assert role.status is not None
        for message in role.status.read():
            if message["status"] == "ready":
                if role.group is not None and not self._any_ready():
                    self._tell_owner(status="ready")
                role.was_ready = True
                role.ready_at = role.ready_at or time.monotonic()
            else:
                role.cause = str(message.get("cause", ""))
        if role.status.closed:
            self._drop_status(role)

    def _drop_status(self, role: _Role) -> None:
        if role.status is not None:
            self._selector.unregister(role.status.fileno())
            role.status.close()
            role.status = None

    def _on_exit(self, role: _Role) -> None:
        child = role.child
        assert child is not None
        self._selector.unregister(child.pidfd)
        status = child.reap()
        assert status is not None
        role.child = None
        self._reap_adopted()
        if role.status is not None:
            self._on_status(role)
            self._drop_status(role)
        if self._ending is not None:
            if role.group is None:
                self._exit_status = self._exit_status or max(0, status)
                self._end_groups()
            return
        what = role.name if role.group is None else f"worker group {role.group}"
        if status == EXIT_CONFIG and (role.group is None or self._internal.follows or not self._any_ready()):
            self._fail(f"{what} cannot work with this configuration", role, EXIT_CONFIG)
        elif status == EXIT_FAILED_START and not self._any_ready():
            self._fail(f"{what} failed to start, and no other has", role, 1)
        elif role.group is None and not role.was_ready:
            # Nobody was served yet, and another try meets the same flags, files and port.
            self._fail(f"{what} {describe_exit(status)} before it was ready (its own words are above)", role, 1)
        else:
            delay = role.backoff.failed(0.0 if role.ready_at is None else time.monotonic() - role.ready_at)
            role.due = time.monotonic() + delay
            name = what if role.group is None else f"supervisor of {what}"
            log(f"{name} (pid {child.pid}) {describe_exit(status)}; next start in {delay:g} s")

    def _fail(self, text: str, role: _Role, status: int) -> None:
        message = f"{text}: {role.cause}" if role.cause else text
        log(message)
        self._tell_owner(status="failed", cause=message)
        self._exit_status = status
        self._end_frontend()

    # -- the end

    def _end_frontend(self) -> None:
        """SIGTERM: it stops accepting and drains, as upstream does. The groups follow when it is gone."""
        self._ending = "frontend"
        self._deadline = time.monotonic() + DRAIN_TIMEOUT
        for role in self._roles:
            role.due = None
        running = self._running(frontend=True)
        for role in running:
            assert role.child is not None
            role.child.signal(signal.SIGTERM)
        if not running:
            self._end_groups()

    def _end_groups(self) -> None:
        self._ending = "groups"
        self._deadline = time.monotonic() + STOP_TIMEOUT
        for role in self._running(frontend=False):
            assert role.child is not None
            role.child.signal(signal.SIGTERM)
            role.child.signal(signal.SIGCONT)

    def _out_of_patience(self) -> None:
        self._deadline = float("inf")
        if self._ending is not None:
            log(f"{self._ending} did not end in time, killed")
            self._exit_status = self._exit_status or 1
            self._kill_all()

    def _kill_all(self) -> None:
        for role in self._roles:
            if role.child is not None:
                role.child.kill()

    def _catch_signals(self) -> socket.socket:
        ours, self._wakeup_writer = socket.socketpair()
        for end in (ours, self._wakeup_writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, lambda *_: None)
        self._watch(ours.fileno(), self._on_signal)
        return ours

    def _on_signal(self) -> None:
        for number in self._signals.recv(64):
            if number == signal.SIGCHLD:
                self._reap_adopted()
            elif self._ending is None:
                log("shutting down; signal again to end at once")
                self._end_frontend()
            else:
                self._kill_all()

    def _reap_adopted(self) -> None:
        own = {role.child.pid for role in self._roles if role.child is not None}
        if self._preparation is not None:
            own.add(self._preparation.pid)
        reap_adopted({*own, self._janitor.pid})

    def _watch_owner(self) -> None:
        if self._internal.owner_pid is None:
            return
        owner = identify(self._internal.owner_pid)
        pidfd = None if owner is None else open_pidfd(owner)
        if pidfd is None:
            self._ending = "groups"
            return

        def gone() -> None:
            self._selector.unregister(pidfd)
            self._end_frontend()
            self._kill_all()

        self._watch(pidfd, gone)

    def _tell_owner(self, **message: object) -> None:
        if self._owner is not None:
            self._owner.send(message)


def log(text: str) -> None:
    print(f"[{time.strftime('%Y-%m-%d %H:%M:%S')} kevlar] {text}", file=sys.stderr, flush=True)


def engine_commands(
    run_dir: rundir.RunDir,
    kevlar: KevlarArgs,
    internal: Internal,
    upstream_argv: Sequence[str],
    join: JoinArgs | None = None,
) -> Commands:
    """The real processes."""
    at = ["--run-dir", run_dir.path]

    def commands(role: str, group: int) -> list[str]:
        if role == "prepare":
            settings = ["--launch-id", run_dir.launch_id, "--kevlar", msgspec.json.encode(kevlar).decode()]
            settings += ["--no-http"] if internal.groups_only else []
            settings += ["--join", msgspec.json.encode(join).decode()] if join is not None else []
            return [*_PYTHON, "sglang_kevlar.launcher.prepare", *at, *settings, "--", *upstream_argv]
        if role == FRONTEND:
            return [*_PYTHON, "sglang_kevlar.frontend.main", *at]
        if role == GATEWAY:
            return [*_PYTHON, "sglang_kevlar.cluster.gateway", *at]
        return [*_PYTHON, "sglang_kevlar.worker.supervisor", *at, "--group", str(group)]

    return commands


def launch(
    kevlar: KevlarArgs,
    internal: Internal,
    make_commands: Callable[[rundir.RunDir], Commands],
) -> int:
    """Serve until the end, and leave nothing behind. Returns the exit status."""
    try:
        run_dir = rundir.create(kevlar.run_dir, kevlar.worker_groups)
    except rundir.RunDirError as error:
        print(f"sglang-kevlar: error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    janitor = Janitor(run_dir)
    try:
        _set_environment(Paths(run_dir.path), max(1, kevlar.worker_groups))
        return Launcher(run_dir, janitor, kevlar, internal, make_commands(run_dir)).run()
    finally:
        run_dir.remove()
        janitor.dismiss()


def _set_environment(paths: Paths, groups: int) -> None:
    """For all children."""
    os.environ["SGLANG_KEVLAR_GROUPS"] = str(groups)  # sglang_kevlar.platform.threads.GROUPS_ENV
    os.environ["SGLANG_KEVLAR"] = "1"  # sglang_kevlar.upstream.plugin.ENABLE
    # Upstream would make a directory per process; it must be one for all, and known before prometheus_client is.
    os.makedirs(paths.prometheus, mode=0o700, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = paths.prometheus


def _split_internal(argv: Sequence[str]) -> tuple[Internal, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--groups-only", action="store_true")
    parser.add_argument("--owner-pid", type=int)
    parser.add_argument("--status-fd", type=int)
    internal, rest = parser.parse_known_args(argv)
    return Internal(**vars(internal)), rest


def version_text() -> str:
    try:
        upstream = version("sglang")
    except PackageNotFoundError:
        upstream = "not installed"
    return f"sglang-kevlar {version('sglang-kevlar')} (sglang {upstream})"


def run(argv: Sequence[str], internal: Internal | None = None) -> int:
    """``launch_server`` with these arguments. Returns the exit status."""
    if "--version" in argv:
        print(version_text())
        return 0
    kevlar, upstream_argv = config.split_args(argv)
    os.environ.pop(PARENT_ENV, None)
    internal = internal or Internal()
    return launch(kevlar, internal, lambda run_dir: engine_commands(run_dir, kevlar, internal, upstream_argv))


if __name__ == "__main__":
    _internal, _rest = _split_internal(sys.argv[1:])
    sys.exit(run(_rest, _internal))
