"""Whether what was demanded came true. What cannot be judged is said to be so, and does not count as true."""

from __future__ import annotations

import glob
import os
import re
import statistics
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from sglang_kevlar.chaos.answers import BROKEN, Answer
from sglang_kevlar.chaos.processes import open_files, resident_bytes
from sglang_kevlar.chaos.scenario import Checks
from sglang_kevlar.launcher.process import ProcessId

#: answers that are told of one by one; behind that they are counted only
TOLD = 1000
#: samples of a process's size that are kept; then every second one is dropped
SAMPLES = 4096
#: seconds that a process has to be watched before its growth means anything
WARM = 60.0
#: durations that are kept for percentiles; then every second one is dropped
DURATIONS = 200_000


class Finding(msgspec.Struct, frozen=True):
    """One check. ``held``: None when it cannot be judged, and ``note`` says why."""

    check: str
    demanded: str
    found: str
    held: bool | None
    note: str = ""


class Durations:
    """Seconds, thinned out when there are many. The largest is never lost."""

    def __init__(self) -> None:
        self._seconds = array("d")
        self._step = 1
        self.count = 0
        self.longest = 0.0

    def add(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)
        if self.count % self._step == 0:
            self._seconds.append(seconds)
            if len(self._seconds) >= DURATIONS:
                self._seconds = self._seconds[::2]
                self._step *= 2
        self.count += 1

    def summary(self) -> dict[str, float] | None:
        """In milliseconds."""
        if not self._seconds:
            return None
        ordered = sorted(self._seconds)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        shown = {"p50": statistics.median(ordered), "p99": p99, "max": self.longest}
        return {"count": self.count} | {name: round(seconds * 1e3, 1) for name, seconds in shown.items()}


class Tally:
    """Counts the answers, and tells of those that are not as they should be."""

    def __init__(self, record: Callable[..., None]) -> None:
        self._record = record
        self._told = 0
        self.ends: Counter[str] = Counter()
        self.tokens = 0
        self.redirects = 0
        #: requests whose redirects the client may not have been told of
        self.unmarked = 0
        self.moved = 0
        self.stalls = Durations()
        self.moved_stalls = Durations()
        self.first_tokens = Durations()

    def add(self, answer: Answer) -> None:
        self.ends[answer.end] += 1
        self.tokens += len(answer.output)
        self.redirects += answer.redirects
        self.moved += answer.redirects > 0
        self.unmarked += answer.end not in ("complete", "tie")
        if answer.streamed and answer.first_token is not None:
            (self.moved_stalls if answer.redirects else self.stalls).add(answer.stall)
            self.first_tokens.add(answer.first_token - answer.started)
        if answer.end not in ("complete", "left", "frontend") and self._told < TOLD:
            self._told += 1
            self._record(
                "answer",
                end=answer.end,
                detail=answer.detail,
                prompt=answer.prompt,
                asked=answer.asked,
                got=len(answer.output),
                redirects=answer.redirects,
                seconds=round(answer.ended - answer.started, 3),
            )

    @property
    def longest_stall(self) -> float:
        return max(self.stalls.longest, self.moved_stalls.longest)


class Growth:
    """Resident memory and open files of processes that should not grow, sampled now and then."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, ProcessId], list[tuple[float, int, int]]] = {}

    def sample(self, now: float, name: str, process: ProcessId) -> None:
        resident, files = resident_bytes(process), open_files(process)
        if resident is None or files is None:
            return
        samples = self._samples.setdefault((name, process), [])
        samples.append((now, resident, files))
        if len(samples) >= SAMPLES:
            del samples[::2]

    def largest(self, what: Literal[1, 2]) -> tuple[str, float] | None:
        """Name of the process and what it has gained since a quarter of its time; ``what``: 1 bytes, 2 files.

        None when none was watched long enough.
        """
        grown = [
            (samples[-1][what] - samples[len(samples) // 4][what], name)
            for (name, _), samples in self._samples.items()
            if samples[-1][0] - samples[0][0] >= WARM
        ]
        if not grown:
            return None
        gain, name = max(grown)
        return name, gain


def stale_shared_memory(launch_id: str, epochs: dict[int, int]) -> list[str]:
    """Files in /dev/shm of older epochs than these."""
    stale = []
    for path in glob.glob(f"/dev/shm/*kevlar-{launch_id}-g*"):
        found = re.search(r"-g(\d+)e(\d+)(?!\d)", path)
        if found is not None and int(found[2]) < epochs.get(int(found[1]), 0):
            stale.append(os.path.basename(path))
    return stale


class Evidence(msgspec.Struct, kw_only=True):
    """What the verdict needs besides the answers."""

    growth: Growth
    #: whether there were answers to compare with
    compared: bool
    failovers: int
    #: redirects that the server counted
    redirected: int
    #: why that count may be incomplete; "" when it is not
    uncounted: str
    #: seconds from the last fault until all groups were ready; None: not as long as we waited
    ready_after: float | None
    #: None: not looked at, as not all groups were ready
    stale: list[str] | None
    #: why the faults could not go on; "" when they could
    stuck: str


def judge(checks: Checks, tally: Tally, evidence: Evidence) -> list[Finding]:
    """One finding for each thing that is demanded."""
    findings = [_answers(checks, tally, evidence)]

    def at_most(check: str, bound: float | None, found: float, unit: str = "") -> None:
        if bound is not None:
            findings.append(Finding(check, f"at most {bound:g}{unit}", f"{found:g}{unit}", found <= bound))

    at_most("refused", checks.refused, tally.ends["refused"])
    at_most("stall_ms", checks.stall_ms, round(tally.longest_stall * 1e3, 1), " ms")
    if checks.ready_within is not None:
        after = evidence.ready_after
        found = "not ready" if after is None else f"{after:.1f} s"
        held = after is not None and after <= checks.ready_within
        findings.append(Finding("ready_within", f"within {checks.ready_within:g} s", found, held))
    if checks.redirects_marked:
        findings.append(_marked(tally, evidence))
    if checks.growth_mb is not None:
        findings.append(_growth("growth_mb", evidence.growth.largest(1), checks.growth_mb, 1 << 20, " MiB"))
    if checks.growth_files is not None:
        findings.append(_growth("growth_files", evidence.growth.largest(2), checks.growth_files, 1, ""))
    if checks.stale_shm is not None:
        if evidence.stale is None:
            note = "not all groups were ready at the end"
            findings.append(Finding("stale_shm", f"at most {checks.stale_shm}", "", None, note))
        else:
            held = len(evidence.stale) <= checks.stale_shm
            note = " ".join(evidence.stale[:8])
            findings.append(Finding("stale_shm", f"at most {checks.stale_shm}", str(len(evidence.stale)), held, note))
    if checks.failovers_at_least is not None:
        held = evidence.failovers >= checks.failovers_at_least
        demanded = f"at least {checks.failovers_at_least}"
        findings.append(Finding("failovers_at_least", demanded, str(evidence.failovers), held))
    at_most("failovers_at_most", checks.failovers_at_most, evidence.failovers)
    if evidence.stuck:
        findings.append(Finding("faults", "until the end", "they stopped", False, evidence.stuck))
    return findings


def _answers(checks: Checks, tally: Tally, evidence: Evidence) -> Finding:
    total = sum(tally.ends.values())
    bad = {end: tally.ends[end] for end in (*BROKEN, "changed") if tally.ends[end]}
    found = f"{total} requests, {tally.moved} of them moved"
    if checks.answers == "any":
        return Finding("answers", "any", found, True)
    if total == tally.ends["left"] + tally.ends["frontend"] + tally.ends["refused"]:
        return Finding("answers", checks.answers, found, None, "no request ran to its end")
    if checks.answers == "exact" and not evidence.compared:
        return Finding("answers", "exact", found, None, "there is nothing to compare them with")
    note = ", ".join(f"{count} {end}" for end, count in bad.items())
    return Finding("answers", checks.answers, found, not bad, note)


def _marked(tally: Tally, evidence: Evidence) -> Finding:
    demanded, found = f"{evidence.redirected} redirects", f"{tally.redirects} marked"
    if evidence.uncounted:
        return Finding("redirects_marked", demanded, found, None, evidence.uncounted)
    # Whoever left, or was refused, may have been moved without being told.
    missing = evidence.redirected - tally.redirects
    note = f"{tally.unmarked} requests may not have been told" if missing else ""
    return Finding("redirects_marked", demanded, found, 0 <= missing <= tally.unmarked, note)


def _growth(check: str, largest: tuple[str, float] | None, bound: float, unit: int, name: str) -> Finding:
    demanded = f"at most {bound:g}{name}"
    if largest is None:
        return Finding(check, demanded, "", None, f"no process was watched for {WARM:g} s")
    process, gain = largest
    return Finding(check, demanded, f"{gain / unit:.1f}{name}", gain / unit <= bound, process)


def outcome(findings: list[Finding]) -> str:
    """``held``, ``violated``, or ``not judged``."""
    if any(finding.held is False for finding in findings):
        return "violated"
    return "held" if all(finding.held for finding in findings) else "not judged"


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [msgspec.structs.asdict(finding) for finding in findings]
