"""Numbers to tables: percentiles, bootstrap intervals, the machine, Markdown, and the JSON that keeps everything."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parent / "results"


def milliseconds(seconds: Sequence[float]) -> str:
    """p50 / p99 / max in ms, as a table cell."""
    if not seconds:
        return "-"
    return " / ".join(f"{1e3 * value:.0f}" for value in [*np.percentile(seconds, (50, 99)), max(seconds)])


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ratio_of_medians(ours: np.ndarray, theirs: np.ndarray, resamples: int = 4000) -> tuple[float, float, float]:
    """``(median(ours) / median(theirs), low, high)`` with the 95 % bootstrap interval.

    Both are (pairs, values): a row of ours and the same row of theirs were measured one after the other, and are
    drawn together, so what drifts over the run does not widen the interval.
    """
    return _bootstrap(ours, theirs, np.median, resamples)


def ratio_of_sums(ours: np.ndarray, theirs: np.ndarray, resamples: int = 4000) -> tuple[float, float, float]:
    """The same of the sums: for costs that add up, such as CPU time."""
    return _bootstrap(ours, theirs, np.sum, resamples)


def _bootstrap(ours: np.ndarray, theirs: np.ndarray, statistic: Any, resamples: int) -> tuple[float, float, float]:
    generator = np.random.default_rng(0)
    draws = generator.integers(0, len(ours), (resamples, len(ours)))
    ratios = [statistic(ours[draw]) / statistic(theirs[draw]) for draw in draws]
    low, high = np.percentile(ratios, (2.5, 97.5))
    return float(statistic(ours) / statistic(theirs)), float(low), float(high)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
    }


def describe(before: dict[str, Any]) -> str:
    """One line for above the tables."""
    load = f"load before {before['load'][0]:.1f}, at the end {os.getloadavg()[0]:.1f}"
    return f"{before['at']}, commit {before['commit']}, {before['cores']} x {before['cpu']}, {load}"


@contextlib.contextmanager
def keeping(name: str, options: argparse.Namespace, values: Any) -> Iterator[dict[str, Any]]:
    """Yields what the numbers are measured on; at the end, however it comes, ``values`` are saved, if there are any."""
    before = machine()
    try:
        yield before
    finally:
        if values:
            plain = {option: str(value) for option, value in vars(options).items()}
            path = save(name, {"machine": before, "options": plain, "values": values})
            print(f"everything: {path}", file=sys.stderr)


def save(name: str, content: dict[str, Any]) -> Path:
    """Write ``content`` to ``benchmark/results/NAME-TIME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(content, indent=1))
    return path
