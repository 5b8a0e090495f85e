"""Which processes a server has on this host, and signals that reach no others.

The status says pids. They are believed only where the run directory of the supervisor of that pid has them on record,
with the time at which the process started: a status may be old, or come from another host.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec

from sglang_kevlar.launcher.process import ProcessId, identify, open_pidfd
from sglang_kevlar.protocol.launch import LaunchPlan, Paths, member_record

_SUPERVISOR = "sglang_kevlar.worker.supervisor"


class NotHere(Exception):
    """A process that is not one of the server's on this host; the message says why."""


class Processes:
    """Those of one server. Made from the pid of any of its supervisors."""

    def __init__(self, supervisor: int) -> None:
        """Raises NotHere."""
        run_dir = _run_dir(supervisor)
        self.paths = Paths(run_dir)
        try:
            with open(self.paths.plan, "rb") as file:
                self.plan = msgspec.json.decode(file.read(), type=LaunchPlan)
        except (OSError, msgspec.MsgspecError) as error:
            raise NotHere(
                f"the run directory {run_dir} cannot be read: {error}. Run this as the server's user"
            ) from None
        self.launcher = identify(_parent(supervisor))

    def find(self, name: str, pid: int | None = None) -> ProcessId:
        """``name``: ``frontend``, ``g0.supervisor``, ``g0.rank1``, ``g0.detokenizer``. ``pid``: what the status says.

        Raises NotHere.
        """
        # Members of a group may be several of one name, so their records are named by their pids, too.
        member = Path(self.paths.processes, member_record(name, pid)) if pid is not None else None
        path = member if member is not None and member.exists() else Path(self.paths.processes, name)
        try:
            recorded_pid, ticks = map(int, path.read_text().split())
        except (OSError, ValueError):
            said = "" if pid is None else f" (the status says pid {pid})"
            raise NotHere(f"{name} is not on record in {self.paths.processes}{said}") from None
        if pid is not None and pid != recorded_pid:
            raise NotHere(f"{name}: the status says pid {pid}, the record {recorded_pid}")
        process = ProcessId(recorded_pid, ticks)
        if identify(process.pid) != process:
            raise NotHere(f"{name} (pid {process.pid}) has ended; that pid is free or another's")
        return process


def send(process: ProcessId, number: signal.Signals) -> bool:
    """Signal exactly this process. False: it has ended. Raises NotHere when it is not ours to signal."""
    pidfd = open_pidfd(process)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    except PermissionError:
        raise NotHere(f"pid {process.pid} belongs to another user: run this as the server's user") from None
    finally:
        os.close(pidfd)
    return True


def resident_bytes(process: ProcessId) -> int | None:
    try:
        pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def open_files(process: ProcessId) -> int | None:
    try:
        return len(os.listdir(f"/proc/{process.pid}/fd"))
    except OSError:
        return None


def _run_dir(supervisor: int) -> str:
    try:
        command = Path(f"/proc/{supervisor}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        command = []
    if _SUPERVISOR not in command or "--run-dir" not in command[:-1]:
        raise NotHere(
            f"pid {supervisor}, which the status calls a supervisor, is none on this host. Faults are signals: run "
            "this on the server's own host (inside its container), as its user"
        )
    return command[command.index("--run-dir") + 1]


def _parent(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        raise NotHere(f"the supervisor (pid {pid}) has just ended") from None
    return int(stat.rpartition(") ")[2].split()[1])
