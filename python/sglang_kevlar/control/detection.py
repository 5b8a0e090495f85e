"""Failure detection of one incarnation of a group: what was seen of its processes, and what it proves.

A false alarm kills a healthy group, so evidence is counted in time during which *we* watched, not in time that
passed: when the frontend itself did not run (a starved machine, a blocked loop, a suspended host), an interval
between two observations counts for ``MAX_TICK`` at most. Nothing here reads a wall clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import msgspec

from sglang_kevlar.protocol.group import REPORT_INTERVAL, LossKind
from sglang_kevlar.protocol.heartbeat import Heartbeat, Phase
from sglang_kevlar.protocol.launch import KevlarArgs

#: seconds between two observations while any group is suspect, as the monitor tries to make them
OBSERVE_INTERVAL = 0.05
#: and while none is: half the cost for 25 ms more, on average, until a stopped process is found
CALM_INTERVAL = 2 * OBSERVE_INTERVAL
#: the most that one interval between two observations counts as evidence
MAX_TICK = CALM_INTERVAL
#: a supervisor that says nothing for this long (of watched time) is suspect, never lost: it is not what serves
REPORT_SILENCE = 10 * REPORT_INTERVAL
#: a phase of a process that runs, or waits for a CPU, ages this much more slowly, so its deadline is at most 4x
PROGRESS_STRETCH = 4.0
#: CPU seconds used or waited for, per second, from which a process counts as running (idle threads stay below)
PROGRESS_SHARE = 0.05
#: age of a phase from which the monitor samples the CPU time of its process, and how often
SAMPLE_AFTER = 1.0
SAMPLE_INTERVAL = 0.5

SUPERVISOR = "supervisor"
_BUSY = (Phase.FORWARD, Phase.CONTROL)


class CpuTime(msgspec.Struct, frozen=True):
    """CPU seconds a process used, and seconds its threads were ready to run but had to wait; both cumulative."""

    run: float
    wait: float


class Observation(msgspec.Struct, frozen=True):
    """One look at the processes of an incarnation, all of the same moment."""

    beats: Mapping[str, Heartbeat]
    #: names of processes in /proc state T
    stopped: frozenset[str] = frozenset()
    #: fresh samples, of processes whose phase is old
    cpu: Mapping[str, CpuTime] = {}


class Loss(msgspec.Struct, frozen=True):
    kind: LossKind
    cause: str
    #: monotonic seconds of the earliest evidence
    since: float


class PhaseWatch:
    """How long one member has been seen in the same phase of the same step (or, idling, turn)."""

    def __init__(self, beat: Heartbeat) -> None:
        self.beat = beat
        #: watched seconds, and the same with the time of a running process stretched
        self.watched = 0.0
        self.age = 0.0
        self._sample: tuple[CpuTime, float] | None = None
        self._running = False

    def same_phase(self, beat: Heartbeat) -> bool:
        old = self.beat
        return (old.phase, old.since_ns, old.steps) == (beat.phase, beat.since_ns, beat.steps)

    def advance(self, beat: Heartbeat, tick: float, cpu: CpuTime | None) -> None:
        self.beat = beat
        self.watched += tick
        if cpu is not None:
            # Per watched second, like all evidence: in a pause of the whole machine nobody got any CPU.
            if self._sample is not None and self.watched > self._sample[1]:
                before, at = self._sample
                # A thread that ended takes its waiting time with it: a negative difference proves nothing.
                used = max(0.0, cpu.run - before.run) + max(0.0, cpu.wait - before.wait)
                self._running = used >= PROGRESS_SHARE * (self.watched - at)
            self._sample = (cpu, self.watched)
        self.age += tick / PROGRESS_STRETCH if self._running else tick


def deadline(beat: Heartbeat, args: KevlarArgs) -> float | None:
    """Seconds a phase may last; None for phases without a deadline (starting has the supervisor's).

    Of an idle rank: seconds until its loop must have turned.
    """
    if beat.phase is Phase.FORWARD:
        return args.hang_timeout + args.hang_per_ktoken * beat.tokens / 1000
    if beat.phase in (Phase.DETOKENIZE, Phase.IDLE):
        return args.hang_timeout
    if beat.phase is Phase.CONTROL:
        # The request itself fails by name at control_timeout; a group is only given up well after that.
        return 2 * args.control_timeout
    return None


class EpochWatch:
    """All evidence about one (group, epoch). ``suspicions`` is what is wrong but proves nothing yet."""

    def __init__(self, args: KevlarArgs, now: float) -> None:
        self._args = args
        self._at = now
        self._silence = 0.0
        self._busy_elsewhere = False
        #: name -> (monotonic time first seen stopped, watched seconds since)
        self._stopped: dict[str, tuple[float, float]] = {}
        self._phases: dict[str, PhaseWatch] = {}
        self._errors: deque[float] = deque(maxlen=max(1, args.error_budget))
        self.suspicions: tuple[str, ...] = ()

    def on_report(self, busy_elsewhere: bool = False) -> None:
        """``busy_elsewhere``: ranks that are not seen here are at a long step."""
        self._silence = 0.0
        self._busy_elsewhere = busy_elsewhere

    def on_internal_error(self, now: float) -> Loss | None:
        """Count one; a loss when the budget is used up within the window."""
        self._errors.append(now)
        first = self._errors[0]
        if len(self._errors) < self._args.error_budget or now - first > self._args.error_window:
            return None
        return Loss("errors", f"{len(self._errors)} internal errors in {now - first:.1f} s", first)

    def observe(self, obs: Observation, now: float) -> Loss | None:
        tick = min(max(now - self._at, 0.0), MAX_TICK)
        self._at = max(now, self._at)
        self._silence += tick
        suspicions: list[str] = []
        if self._silence > REPORT_SILENCE:
            suspicions.append("supervisor silent")
        loss = self._observe_stopped(obs.stopped, tick, now, suspicions)
        hang = self._observe_phases(obs, tick, now, suspicions)
        self.suspicions = tuple(suspicions)
        return loss or hang

    def _observe_stopped(self, stopped: frozenset[str], tick: float, now: float, suspicions: list[str]) -> Loss | None:
        if not stopped and not self._stopped:
            return None
        loss = None
        seen: dict[str, tuple[float, float]] = {}
        for name in sorted(stopped):
            since, watched = self._stopped.get(name, (now, -tick))
            seen[name] = (since, watched + tick)
            suspicions.append(f"{name} stopped")
            # A stopped supervisor serves as well as ever; it matters when there is something to restart.
            if watched + tick > self._args.stop_grace and name != SUPERVISOR:
                loss = loss or Loss("stopped", f"{name} stopped (state T) for {now - since:.2f} s", since)
        self._stopped = seen
        return loss

    def _observe_phases(self, obs: Observation, tick: float, now: float, suspicions: list[str]) -> Loss | None:
        loss = None
        # An idle rank's loop turns together with those of the others, so it may wait for one that is busy.
        busy = self._busy_elsewhere or any(beat.phase in _BUSY for beat in obs.beats.values())
        for name, beat in obs.beats.items():
            watch = self._phases.get(name)
            if watch is None or not watch.same_phase(beat):
                self._phases[name] = PhaseWatch(beat)
                continue
            limit = deadline(beat, self._args)
            if limit is None or (busy and beat.phase is Phase.IDLE):
                continue
            watch.advance(beat, tick, obs.cpu.get(name))
            if watch.watched > limit:
                what = f"{name} in {beat.phase.name} for {watch.watched:.1f} s (limit {limit:.1f} s)"
                suspicions.append(what)
                if watch.age > limit:
                    since = min(max(beat.since_ns / 1e9, 0.0), now - watch.watched)
                    loss = loss or Loss("hang", f"{what}, {beat.tokens} tokens", since)
        return loss
