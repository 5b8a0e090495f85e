"""/v1/loads over several groups: upstream's per-scheduler snapshots, one reader per group that serves."""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

from sglang.srt.managers.load_snapshot import LoadSnapshot, ShmLoadSnapshotReader, shm_path_for

from sglang_kevlar.frontend.session_channel import SessionChannel
from sglang_kevlar.protocol.launch import LaunchPlan, instance_id

if TYPE_CHECKING:
    from sglang_kevlar.frontend.failover import Failover


class GroupLoadReader:
    """Upstream's reader interface; a group takes the place of a data-parallel rank."""

    def __init__(self, plan: LaunchPlan, failover: Failover) -> None:
        self._launch_id = plan.launch_id
        self._failover = failover
        self._readers: dict[int, _Reader] = {}

    def read(self, group: int) -> LoadSnapshot | None:
        channel = self._failover.channels.get(group)
        if channel is None:
            return None
        if isinstance(channel, SessionChannel):
            return channel.load()
        reader = self._readers.get(group)
        if reader is None or reader.epoch != channel.epoch:
            if reader is not None:
                reader.close()
            path = shm_path_for(instance_id(self._launch_id, group, channel.epoch))
            self._readers[group] = reader = _Reader(path, channel.epoch)
        return reader.read()

    def read_all(self) -> list[LoadSnapshot]:
        loads = (self.read(group) for group in sorted(self._failover.channels))
        return [load for load in loads if load is not None]


class _Reader:
    """Upstream's reader of one file, never waiting for its lock: a scheduler that was stopped while it wrote would
    stop this event loop with it, and nobody would notice that it was stopped."""

    def __init__(self, path: str, epoch: int) -> None:
        self.epoch = epoch
        self._path = path
        self._fd: int | None = None
        self._upstream: ShmLoadSnapshotReader | None = None
        self._last: LoadSnapshot | None = None

    def read(self) -> LoadSnapshot | None:
        """The last one that could be read, while a new one is being written."""
        if self._fd is None:
            try:
                self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                return None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return self._last
        try:
            # Upstream's own shared lock is granted at once while we have one.
            if self._upstream is None:
                self._upstream = ShmLoadSnapshotReader(self._path, dp_size=1)
            self._last = self._upstream.read(0)
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
        return self._last

    def close(self) -> None:
        if self._upstream is not None:
            self._upstream.close()
        if self._fd is not None:
            os.close(self._fd)
