"""From what clients saw to numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np
from client import Answered

#: seconds; of the rolling curves
WINDOW = 5.0


@dataclass(frozen=True)
class Kill:
    """Times are CLOCK_MONOTONIC seconds."""

    at: float
    #: seconds
    detected_after: float | None
    whole: float | None


@dataclass
class Run:
    """One system at one rate, through one kill. Times are seconds after the first arrival could have come."""

    system: str
    rate: float
    #: None: nothing was killed
    killed_at: float | None
    #: from the kill until the loss was known; None: nobody says it
    detected_after: float | None
    #: from the kill until all workers served again; None: they did not
    whole_after: float | None
    arrived: list[float] = field(default_factory=list)
    #: to the first token and to the last one, from the arrival; None where it never came
    ttft: list[float | None] = field(default_factory=list)
    latency: list[float | None] = field(default_factory=list)
    #: seconds per token of the attempt that ended well
    tpot: list[float] = field(default_factory=list)
    #: of requests that the kill hit: the longest wait for a token that the client did not have, from the kill on
    stalled: list[float | None] = field(default_factory=list)
    #: by kind, of all attempts
    failures: dict[str, int] = field(default_factory=dict)
    changed: int = 0
    #: when tokens came
    tokens: list[float] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def collect(
    system: str,
    rate: float,
    answers: Sequence[Answered],
    reference: Sequence[list[int]],
    begin: float,
    kill: Kill | None,
) -> Run:
    run = Run(system, rate, None, None, None)
    if kill is not None:
        run.killed_at, run.detected_after = kill.at - begin, kill.detected_after
        run.whole_after = None if kill.whole is None else kill.whole - kill.at
    failures: Counter[str] = Counter()
    for one in answers:
        failures.update(one.failures)
        run.arrived.append(one.arrived - begin)
        first = one.first_token
        run.ttft.append(None if first is None else first - one.arrived)
        run.latency.append(None if one.finished is None else one.finished - one.arrived)
        run.tokens += [at - begin for at in one.token_times()]
        if one.finished is None:
            failures["never answered"] += 1
            continue
        last = one.attempts[-1]
        if len(one.tokens) > 1:
            run.tpot.append((last.times[-1] - last.times[0]) / (len(one.tokens) - 1))
        run.changed += one.tokens != reference[one.number]
    if kill is not None:
        hit = [one for one in answers if one.stands_at(kill.at) and (one.redirects > 0 or len(one.attempts) > 1)]
        run.stalled = [one.longest_wait(kill.at) for one in hit]
    run.failures = dict(failures)
    run.tokens.sort()
    return run


def mean_p99(values: Sequence[float | None]) -> tuple[float, float]:
    """What never came counts as infinitely late."""
    known = [np.inf if value is None else value for value in values]
    if not known:
        return float("nan"), float("nan")
    return float(np.mean(known)), float(np.percentile(known, 99, method="higher"))


def rolling_ttft(run: Run, step: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the requests that arrived in the `WINDOW` seconds before; NaN where there were none."""
    arrived = np.array(run.arrived)
    ttft = np.array([np.nan if value is None else value for value in run.ttft])
    at = np.arange(WINDOW, arrived.max() if len(arrived) else WINDOW, step)
    known = ~np.isnan(ttft)
    inside = [known & (arrived > when - WINDOW) & (arrived <= when) for when in at]
    return at, np.array([ttft[some].mean() if some.any() else np.nan for some in inside])


def throughput(run: Run, bin_seconds: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens a second that clients got, those that they had got before included."""
    edges = np.arange(0, (run.tokens[-1] if run.tokens else 0) + bin_seconds, bin_seconds)
    counts, _ = np.histogram(run.tokens, edges)
    return edges[:-1] + bin_seconds / 2, counts / bin_seconds
