"""Processes that cannot be confused, forgotten or orphaned. Linux, standard library only.

A child is a session of its own, so that Ctrl-C reaches the launcher alone, and so that what the child itself started
can be killed with it. It dies with its parent (`die_with_parent`, which every entry module calls first), and is
recorded in the run directory for the janitor.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import IO, NamedTuple

#: pid of the process that started this one with `spawn`
PARENT_ENV = "SGLANG_KEVLAR_PARENT"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
#: seconds for what a dead process left to end by itself
_LAST_WISH = 1.0


class ProcessId(NamedTuple):
    """A pid with the time its process started (field 22 of /proc/PID/stat), which makes it unique."""

    pid: int
    start_ticks: int


#: task flags of /proc/PID/stat: a fatal signal was taken, or exit has begun. The pidfd only tells when exit is
#: complete, which for a process with much memory, or one that writes a core file, is seconds later.
DYING = 0x4 | 0x400  # PF_EXITING, PF_SIGNALED


class _Stat(NamedTuple):
    state: str
    flags: int
    session: int
    start_ticks: int


def _stat(pid: int) -> _Stat | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            content = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field, the name, may contain anything; what follows its last ")" is plain.
    fields = content[content.rindex(b")") + 2 :].split()
    return _Stat(fields[0].decode(), int(fields[6]), int(fields[3]), int(fields[19]))


def identify(pid: int) -> ProcessId | None:
    """The process that has this pid now; None when there is none."""
    stat = _stat(pid)
    return None if stat is None else ProcessId(pid, stat.start_ticks)


def die_with_parent() -> None:
    """Called first by every entry module: SIGKILL this process when its parent dies, or exit if it already has.

    Imports take seconds. A parent that dies meanwhile would leave an orphan if this came after them.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ.get(PARENT_ENV, os.getppid())):
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of whatever processes below this one leave behind. They have to be reaped."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def open_pidfd(process: ProcessId) -> int | None:
    """A pidfd of exactly this process; None when it is gone."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    # The pid may have been given to another process before we opened it.
    if identify(process.pid) != process:
        os.close(pidfd)
        return None
    return pidfd


class Child:
    """A child process in a session of its own.

    Until `reap` has returned its status the kernel keeps the pid, so signals cannot reach a stranger.
    """

    def __init__(self, name: str, pid: int, wait: Callable[[], int]) -> None:
        """``wait`` returns the exit status (negative: the signal) when it has ended, and reaps it."""
        self.name = name
        self.pid = pid
        self._wait = wait
        self._status: int | None = None
        self.pidfd = os.pidfd_open(pid)
        identity = identify(pid)
        assert identity is not None, "a child that was not reaped has a /proc entry"
        self.identity = identity

    def signal(self, number: int) -> None:
        """Signal the process; nothing happens when it has ended."""
        if self._status is None:
            try:
                signal.pidfd_send_signal(self.pidfd, number)
            except ProcessLookupError:
                pass

    def stopped(self) -> bool:
        """Whether it is in /proc state T, as after SIGSTOP."""
        stat = _stat(self.pid)
        return stat is not None and stat.state == "T"

    def ending(self) -> bool:
        """Whether it is dead, or cannot but die: until all of a large process has ended takes longer, under load."""
        stat = _stat(self.pid)
        return stat is None or stat.state in "ZX" or bool(stat.flags & DYING)

    def kill(self) -> None:
        """SIGKILL the process, and ask what it started to end.

        Only ask: Python's resource tracker, which removes named semaphores of a killed process, ignores SIGTERM and
        ends when it is done. `kill_recorded` takes care of others that do not listen.
        """
        if self._status is None:
            self.signal(signal.SIGKILL)
            try:
                os.killpg(self.pid, signal.SIGTERM)
            except ProcessLookupError:
                pass

    def ended(self) -> bool:
        return self._status is not None or bool(select.select([self.pidfd], [], [], 0)[0])

    def reap(self) -> int | None:
        """The exit status (negative: the signal), or None while it runs."""
        if self._status is None and self.ended():
            self.kill()
            self._status = self._wait()
            os.close(self.pidfd)
        return self._status


def spawn(
    name: str,
    command: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    stderr: int | IO[bytes] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Child:
    """Start ``command``. Only from the main thread: a parent-death signal follows the thread, not the process."""
    popen = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=pass_fds,
        start_new_session=True,
        env={**(os.environ if environment is None else environment), PARENT_ENV: str(os.getpid())},
    )
    return Child(name, popen.pid, popen.wait)


def adopted(name: str, pid: int) -> Child:
    """A child that another process forked for us, and left to us (`adopt_orphans`)."""
    return Child(name, pid, lambda: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def reap_adopted(own: Collection[int]) -> None:
    """Reap ended children that are not ``own``: orphans that became ours.

    As process 1 of a container we inherit everyone's, otherwise only after `adopt_orphans`. One of ``own`` that has
    ended hides what ended behind it, and the kernel reports no child twice: call this at SIGCHLD, and again when one
    of ``own`` was reaped.
    """
    try:
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid in own:
                return
            os.waitpid(ended.si_pid, 0)
    except ChildProcessError:
        pass  # no children at all


def describe_exit(status: int) -> str:
    """``killed by SIGKILL`` or ``exited with status 3``."""
    if status >= 0:
        return f"exited with status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def record(directory: str, name: str, process: ProcessId) -> None:
    """Write ``process`` down under ``name``, for `kill_recorded`. A later process of that name replaces it."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    temporary = f"{directory}/.{name}"
    with open(temporary, "w") as file:
        file.write(f"{process.pid} {process.start_ticks}")
    os.replace(temporary, f"{directory}/{name}")


def forget(directory: str, name: str) -> None:
    try:
        os.unlink(f"{directory}/{name}")
    except FileNotFoundError:
        pass


def recorded(directory: str, prefix: str = "") -> list[ProcessId]:
    """What was written down under names with this prefix; may have ended long ago."""
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return []
    processes = []
    for name in names:
        if name.startswith(prefix) and not name.startswith("."):
            try:
                with open(f"{directory}/{name}") as file:
                    pid, start_ticks = map(int, file.read().split())
            except (FileNotFoundError, ValueError):
                continue
            processes.append(ProcessId(pid, start_ticks))
    return processes


def _left_in_sessions(leaders: Iterable[ProcessId]) -> list[ProcessId]:
    """What recorded processes started and left behind: members of sessions whose leader is recorded, or gone."""
    since = {leader.pid: leader.start_ticks for leader in leaders}
    for pid in list(since):
        now = identify(pid)
        if now is not None and now.start_ticks != since[pid]:
            del since[pid]  # the pid leads something else today
    left = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and (stat := _stat(int(entry))) is not None and stat.state not in "ZX":
            leader_start = since.get(stat.session)
            if leader_start is not None and stat.start_ticks >= leader_start:
                left.append(ProcessId(int(entry), stat.start_ticks))
    return left


def kill_recorded(directory: str, prefix: str = "", wait: float = 10.0) -> bool:
    """End every recorded process whose name starts with ``prefix``, and what is left in their sessions.

    The recorded ones by SIGKILL, the others after a moment to end by themselves. Never the caller. Returns whether
    all were gone within ``wait`` seconds.
    """
    leaders = recorded(directory, prefix)
    gone = _send(leaders, signal.SIGKILL, wait)
    if left := _left_in_sessions(leaders):
        gone = (_send(left, signal.SIGTERM, _LAST_WISH) or _send(left, signal.SIGKILL, wait)) and gone
    return gone


def _send(processes: Iterable[ProcessId], number: int, wait: float) -> bool:
    """Signal these processes, except for the caller; returns whether they are gone within ``wait`` seconds."""
    pidfds = []
    for process in processes:
        if process.pid != os.getpid() and (pidfd := open_pidfd(process)) is not None:
            try:
                signal.pidfd_send_signal(pidfd, number)
            except (ProcessLookupError, PermissionError):
                pass
            pidfds.append(pidfd)
    try:
        return _wait_all(pidfds, wait)
    finally:
        for pidfd in pidfds:
            os.close(pidfd)


def _wait_all(pidfds: Iterable[int], timeout: float) -> bool:
    poller = select.poll()
    waiting = set(pidfds)
    for pidfd in waiting:
        poller.register(pidfd, select.POLLIN)
    deadline = time.monotonic() + timeout
    while waiting and (left := deadline - time.monotonic()) > 0:
        for pidfd, _ in poller.poll(left * 1000):
            poller.unregister(pidfd)
            waiting.discard(pidfd)
    return not waiting
