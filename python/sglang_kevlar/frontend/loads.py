"""/v1/loads over several groups: upstream's per-scheduler snapshots, one reader per group that serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sglang.srt.managers.load_snapshot import LoadSnapshot, ShmLoadSnapshotReader, shm_path_for

from sglang_kevlar.protocol.launch import LaunchPlan, instance_id

if TYPE_CHECKING:
    from sglang_kevlar.frontend.failover import Failover


class GroupLoadReader:
    """Upstream's reader interface; a group takes the place of a data-parallel rank."""

    def __init__(self, plan: LaunchPlan, failover: Failover) -> None:
        self._launch_id = plan.launch_id
        self._failover = failover
        self._readers: dict[tuple[int, int], ShmLoadSnapshotReader] = {}

    def read(self, group: int) -> LoadSnapshot | None:
        channel = self._failover.channels.get(group)
        if channel is None:
            return None
        key = (channel.group, channel.epoch)
        if key not in self._readers:
            for stale in [other for other in self._readers if other[0] == group]:
                self._readers.pop(stale).close()
            self._readers[key] = ShmLoadSnapshotReader(shm_path_for(instance_id(self._launch_id, *key)), dp_size=1)
        return self._readers[key].read(0)

    def read_all(self) -> list[LoadSnapshot]:
        loads = (self.read(group) for group in sorted(self._failover.channels))
        return [load for load in loads if load is not None]
