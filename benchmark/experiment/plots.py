"""Time to first token and throughput through the loss of a worker, all systems in one picture for each rate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from figures import WINDOW, Run, rolling_ttft, throughput

matplotlib.use("Agg")
from matplotlib import pyplot


def draw(runs: Sequence[Run], path: Path) -> None:
    """All of one rate, each with a kill."""
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6.5), layout="constrained")
    for run in runs:
        assert run.killed_at is not None
        at, ttft = rolling_ttft(run)
        above.plot(at - run.killed_at, ttft, label=run.system)
        at, tokens = throughput(run)
        below.plot(at - run.killed_at, tokens, label=run.system)
    for axes in (above, below):
        axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
    above.set_yscale("log")
    above.set_ylabel(f"time to first token, s\n(mean of {WINDOW:g} s of arrivals)")
    above.legend(loc="upper right")
    below.set_ylabel("tokens/s received")
    below.set_xlabel("seconds after a worker was killed")
    figure.suptitle(f"{runs[0].rate:g} requests a second")
    figure.savefig(path)
    pyplot.close(figure)
