"""The private run directory: created, locked for the launcher's life, swept when its launcher is dead.

The lock is what says that a directory is alive: the kernel releases it however the launcher dies. Its file holds
the launch id, by which shared memory of that launch is found.
"""

from __future__ import annotations

import fcntl
import glob
import os
import re
import secrets
import shutil
import stat
import tempfile
import time

from sglang_kevlar.launcher.process import identify, kill_recorded, recorded
from sglang_kevlar.protocol.launch import Paths

#: sun_path of unix(7), without the terminating zero
SOCKET_PATH_LIMIT = 107
#: how long a run directory may still be cleaned up by the janitor of its last launcher
_HANDOVER = 15.0
_LAUNCH_ID = re.compile("[0-9a-f]{8}")


class RunDirError(Exception):
    """The run directory cannot be used; the message says why and is for the operator."""


class RunDir:
    """A run directory whose lock is held. Make one with `create`."""

    def __init__(self, path: str, launch_id: str, lock: int) -> None:
        self.path = path
        self.launch_id = launch_id
        self._lock = lock

    def remove(self) -> None:
        """Kill what is recorded and still runs, remove all files, release the lock."""
        _clean(self.path, self.launch_id)
        os.close(self._lock)


def create(override: str | None, groups: int) -> RunDir:
    """Sweep dead run directories and make a new one, mode 0700.

    ``override``: this path instead of a new one under the temporary directory; what a dead launch left in it is
    removed. Raises RunDirError.
    """
    base = tempfile.gettempdir()
    sweep(base)
    launch_id = secrets.token_hex(4)
    path = os.path.abspath(override) if override is not None else f"{base}/{_prefix()}{launch_id}"
    _check_length(path, groups)
    deadline = time.monotonic() + _HANDOVER
    while time.monotonic() < deadline:
        run_dir = _claim(path, launch_id, fresh=override is None)
        if run_dir is not None:
            return run_dir
        time.sleep(0.05)
    raise RunDirError(f"run directory {path} is in use by another launch")


def sweep(base: str) -> None:
    """Remove run directories of ours under ``base`` whose launcher is dead, with what is left of their processes."""
    for path in glob.glob(f"{glob.escape(base)}/{_prefix()}*"):
        if _LAUNCH_ID.fullmatch(path.rpartition("-")[2]) and _is_private(path):
            remove_dead(path)


def remove_dead(path: str, expected_launch_id: str | None = None) -> bool:
    """Remove a run directory if its lock can be taken, and if it is still of that launch. Returns whether it did."""
    lock = _take_lock(path)
    if lock is None:
        return False
    try:
        launch_id = _launch_id(lock)
        if expected_launch_id not in (None, launch_id):
            return False
        _clean(path, launch_id)
        return True
    finally:
        os.close(lock)


def remove_after(path: str, launch_id: str) -> None:
    """Remove the run directory of a launcher that is just dying: it may hold the lock a moment longer."""
    deadline = time.monotonic() + _HANDOVER
    while time.monotonic() < deadline and not remove_dead(path, launch_id):
        try:
            with open(Paths(path).lock, "rb") as lock:
                if _launch_id(lock.fileno()) != launch_id:
                    return  # the next launch has taken over, and cleaned up
        except FileNotFoundError:
            return
        time.sleep(0.02)


def remove_shared_memory(launch_id: str, infix: str = "") -> None:
    """Remove what processes of this launch keep outside its run directory (heartbeats, upstream's load snapshots)."""
    if _LAUNCH_ID.fullmatch(launch_id):
        for pattern in ("/dev/shm/*", f"{glob.escape(tempfile.gettempdir())}/sglang_load_collector_*"):
            for file in glob.glob(f"{pattern}kevlar-{launch_id}{infix}*"):
                _unlink(file)


def end_recorded(paths: Paths, prefix: str = "") -> bool:
    """`kill_recorded`, and remove the shared memory that upstream names after pids (25 MB per tensor-parallel group).

    Normally Python's resource tracker of the killed process does it, if nobody killed that too.
    """
    gone = kill_recorded(paths.processes, prefix)
    for process in recorded(paths.processes, prefix):
        if identify(process.pid) is None:
            for file in glob.glob(f"/dev/shm/sgl_shm_*_{process.pid}_*"):
                _unlink(file)
    return gone


def _prefix() -> str:
    return f"kevlar-{os.getuid()}-"


def _clean(path: str, launch_id: str) -> None:
    end_recorded(Paths(path))
    remove_shared_memory(launch_id)
    shutil.rmtree(path, ignore_errors=True)


def _check_length(path: str, groups: int) -> None:
    # The longest name is that of worker/weights/rank.py.
    longest = Paths(path).channel(max(0, groups - 1), 9_999_999, "weights99.12345678").removeprefix("ipc://")
    excess = len(os.fsencode(longest)) - SOCKET_PATH_LIMIT
    if excess > 0:
        raise RunDirError(
            f"run directory {path} is {excess} characters too long: unix sockets in it are limited to "
            f"{SOCKET_PATH_LIMIT} characters; use --run-dir or TMPDIR to place it elsewhere"
        )


def _claim(path: str, launch_id: str, fresh: bool) -> RunDir | None:
    """Make (or take over) the directory; None: someone else holds it, or it is vanishing right now."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if fresh:
            raise RunDirError(f"run directory {path} exists") from None
        if not _is_private(path):
            raise RunDirError(f"run directory {path} is not a directory of this user") from None
        entries = os.listdir(path)
        if entries and "lock" not in entries:
            raise RunDirError(f"run directory {path} holds files that are not ours") from None
    except OSError as error:
        raise RunDirError(f"cannot create the run directory: {error}") from error
    lock = _take_lock(path)
    if lock is None:
        return None
    previous = _launch_id(lock)
    if previous:
        _clean_but_lock(path, previous)
    os.chmod(path, 0o700)
    os.ftruncate(lock, 0)
    os.pwrite(lock, launch_id.encode(), 0)
    return RunDir(path, launch_id, lock)


def _clean_but_lock(path: str, launch_id: str) -> None:
    end_recorded(Paths(path))
    remove_shared_memory(launch_id)
    for entry in os.scandir(path):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        elif entry.name != "lock":
            _unlink(entry.path)


def _take_lock(path: str) -> int | None:
    """The locked lock file, or None if it is held, or was removed by someone who cleaned up meanwhile."""
    name = Paths(path).lock
    try:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.stat(name).st_ino == os.fstat(lock).st_ino:
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def _launch_id(lock: int) -> str:
    return os.pread(lock, 64, 0).decode("ascii", "replace")


def _is_private(path: str) -> bool:
    """A real directory of this user: others may write to the temporary directory too."""
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
