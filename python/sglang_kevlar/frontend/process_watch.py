"""One process of a worker group as the frontend sees it: alive, stopped, what it says it does, what CPU it gets."""

from __future__ import annotations

import os
import signal

from sglang_kevlar.control.detection import CpuTime
from sglang_kevlar.launcher.process import DYING
from sglang_kevlar.protocol.group import ProcessRef
from sglang_kevlar.protocol.heartbeat import Heartbeat
from sglang_kevlar.worker.heartbeat import HeartbeatReader

_TICK = 1.0 / os.sysconf("SC_CLK_TCK")
#: pidfd_open(2): a handle to a thread, readable when that thread has ended (Linux 6.9)
_PIDFD_THREAD = os.O_EXCL
#: threads watched per process. The last one to end frees the memory, so one alone could be late.
_THREADS_WATCHED = 3
#: threads (of a process) and processes (of a family) looked at for their CPU time
_MAX_THREADS = 512
_MAX_PROCESSES = 256


class ProcessWatch:
    """Handle to exactly the process named by a ``ProcessRef``, never to a later one with the same pid.

    ``heartbeat``: path of its page, which need not exist yet; None for a process without one.
    Raises ProcessLookupError if that process is dead, another OSError if it cannot be watched.
    """

    def __init__(self, ref: ProcessRef, heartbeat: str | None = None) -> None:
        self.ref = ref
        #: becomes readable when the process has exited
        self.pidfd = os.pidfd_open(ref.pid)
        self.sampled_at = 0.0
        #: become readable when a thread ends: see `watch_threads`
        self.thread_pidfds: set[int] = set()
        self._reader = HeartbeatReader(heartbeat) if heartbeat is not None else None
        self._beat: Heartbeat | None = None
        try:
            self._stat = os.open(f"/proc/{ref.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            os.close(self.pidfd)
            raise ProcessLookupError(f"{ref.name} (pid {ref.pid}) is gone") from None
        except OSError:
            os.close(self.pidfd)
            raise
        # The pidfd was opened first: if it were another process's, so would be these start ticks.
        fields = self._fields()
        if fields is None or int(fields[19]) != ref.start_ticks or self._is_dead(fields):
            self.close()
            raise ProcessLookupError(f"{ref.name} (pid {ref.pid}) is gone")

    def close(self) -> None:
        for fd in (self.pidfd, self._stat, *self.thread_pidfds):
            if fd >= 0:
                os.close(fd)
        self.thread_pidfds.clear()
        self.pidfd = self._stat = -1
        if self._reader is not None:
            self._reader.close()

    def watch_threads(self) -> set[int]:
        """Open ``thread_pidfds`` of a few threads besides the first, and return the new ones; none on old kernels.

        The pidfd of a process is readable when its memory is freed: tens of milliseconds to seconds after it was
        killed. Its other threads end at once. A thread may also end by itself: look at ``state`` then.
        """
        opened: set[int] = set()
        try:
            threads = [int(name) for name in os.listdir(f"/proc/{self.ref.pid}/task") if int(name) != self.ref.pid]
            for thread in threads[:_THREADS_WATCHED]:
                opened.add(os.pidfd_open(thread, _PIDFD_THREAD))
        except OSError:
            pass  # it is gone, or the kernel has no such handles: the process's own tells, later
        self.thread_pidfds |= opened
        return opened

    def forget_thread(self, pidfd: int) -> None:
        self.thread_pidfds.discard(pidfd)
        os.close(pidfd)

    def state(self) -> str:
        """State letter of /proc/PID/stat ("T" is stopped); "X" once the process is dead or cannot but die."""
        fields = self._fields()
        if fields is None or self._is_dead(fields):
            return "X"
        return fields[0].decode()

    def heartbeat(self) -> tuple[Heartbeat | None, bool]:
        """The last thing it said (None before it said anything), and whether that is new since the last call."""
        if self._reader is None:
            return None, False
        before, self._beat = self._beat, self._reader.read()
        return self._beat, self._beat != before

    def cpu_time(self) -> CpuTime:
        """CPU time of the process and what it started: a rank may wait for a compiler (JIT kernels).

        Waiting is 0 on a kernel without schedstat.
        """
        run, waited_ns = 0, 0
        pids = [self.ref.pid]
        for pid in pids:  # grows by the children of each
            fields = self._fields() if pid == self.ref.pid else _stat_fields(pid)
            if fields is None:
                continue
            # With what its ended children used: the sum does not fall when a compiler is done.
            run += sum(map(int, fields[11:15]))
            for task in _tasks(pid):
                waited_ns += _schedstat_wait(task)
                pids += _children(task)[: _MAX_PROCESSES - len(pids)]
        return CpuTime(run * _TICK, waited_ns / 1e9)

    def kill(self) -> None:
        """SIGKILL; nothing if it is dead already."""
        try:
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def _fields(self) -> list[bytes] | None:
        """Fields of /proc/PID/stat from the state on; None once reaped."""
        try:
            return _split_stat(os.pread(self._stat, 1024, 0))
        except ProcessLookupError:
            return None

    @staticmethod
    def _is_dead(fields: list[bytes]) -> bool:
        return fields[0] in (b"Z", b"X") or bool(int(fields[6]) & DYING)


def _split_stat(data: bytes) -> list[bytes]:
    """The name, in parentheses, may contain anything."""
    return data[data.rfind(b")") + 2 :].split(b" ", 20)


def _stat_fields(pid: int) -> list[bytes] | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return _split_stat(file.read())
    except OSError:
        return None


def _tasks(pid: int) -> list[str]:
    """Directories of a process's threads."""
    try:
        return [f"/proc/{pid}/task/{task}" for task in os.listdir(f"/proc/{pid}/task")[:_MAX_THREADS]]
    except OSError:
        return []


def _schedstat_wait(task: str) -> int:
    """Nanoseconds a thread was ready to run and had to wait."""
    try:
        with open(f"{task}/schedstat", "rb") as file:
            return int(file.read().split()[1])
    except (OSError, IndexError):
        return 0


def _children(task: str) -> list[int]:
    """Processes a thread started; none on a kernel that does not list them."""
    try:
        with open(f"{task}/children", "rb") as file:
            return [int(pid) for pid in file.read().split()]
    except OSError:
        return []
