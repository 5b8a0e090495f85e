"""Hangs and stops of the ranks of a node on which no gateway looks for them."""

from __future__ import annotations

import time
from collections.abc import Iterable

from sglang_kevlar.control.detection import (
    CALM_INTERVAL,
    SAMPLE_AFTER,
    SAMPLE_INTERVAL,
    CpuTime,
    EpochWatch,
    Loss,
    Observation,
    deadline,
)
from sglang_kevlar.frontend.process_watch import ProcessWatch
from sglang_kevlar.protocol.group import ProcessRef
from sglang_kevlar.protocol.heartbeat import Heartbeat, Phase
from sglang_kevlar.protocol.launch import KevlarArgs, Paths

#: seconds at one step from which others may be found waiting for it
_LONG = 1.0


class LocalWatch:
    """Of one epoch that is ready. That a process ended its supervisor sees by itself."""

    def __init__(self, args: KevlarArgs, paths: Paths, group: int, epoch: int, members: Iterable[ProcessRef]) -> None:
        self._args = args
        self._evidence = EpochWatch(args, time.monotonic())
        self._processes: list[ProcessWatch] = []
        for ref in members:
            try:
                self._processes.append(ProcessWatch(ref, paths.heartbeat(group, epoch, ref.name)))
            except OSError:
                continue  # it is gone, which its supervisor is about to see
        self.next_look = 0.0
        #: a rank is at a long step
        self.busy = False

    def look(self, now: float) -> Loss | None:
        self.next_look = now + CALM_INTERVAL
        beats: dict[str, Heartbeat] = {}
        cpu: dict[str, CpuTime] = {}
        stopped = []
        self.busy = False
        for process in self._processes:
            if process.state() == "T":
                stopped.append(process.ref.name)
            beat, _ = process.heartbeat()
            # One that idles waits for the first rank, which is on another host: its own node judges that one.
            if beat is None or beat.phase is Phase.IDLE:
                continue
            beats[process.ref.name] = beat
            limit = deadline(beat, self._args)
            age = now - beat.since_ns / 1e9
            if limit is None:
                continue
            self.busy = self.busy or age > min(_LONG, limit / 4)
            if age > min(SAMPLE_AFTER, limit / 4) and now - process.sampled_at >= SAMPLE_INTERVAL:
                cpu[process.ref.name] = process.cpu_time()
                process.sampled_at = now
        self._evidence.on_report()
        return self._evidence.observe(Observation(beats, frozenset(stopped), cpu), now)

    def close(self) -> None:
        for process in self._processes:
            process.close()
