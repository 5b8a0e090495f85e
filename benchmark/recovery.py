#!/usr/bin/env python3
"""Measure how long a group of two ranks is gone when one of them dies: see README.md beside this file.

    python benchmark/recovery.py [--rounds N] [--kills N] [--model DIR] [-- FLAGS of the servers]

Four ways back, in turn: SGLang itself, started again at once; and a server of ours with that one group, which is
started again whole, formed again around the rank that lives, or that with a spare in the dead rank's place.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import psutil

import report
from servers import START_TIMEOUT, Server, exit_on_sigterm, make_model

#: name -> flags; the first one is upstream's server, which knows none of ours
WAYS: dict[str, tuple[str, ...]] = {
    "SGLang, started again": (),
    "warm restart of the group": ("--reform", "off"),
    "re-form, cold rank": ("--reform", "on"),
    "re-form, spare": ("--reform", "on", "--spare-ranks", "2"),
}
STOCK = next(iter(WAYS))
#: a line of the log that each re-form has, and none of the other ways
REFORMED, SPARED = "re-formed around", "from the spares"
#: seconds that a server has been ready before a rank is killed: its spares are loaded by then
SETTLE = 5.0
SHM = "/dev/shm"


def token(url: str, timeout: float) -> list[int]:
    """The two tokens that a greedy request gets. Raises OSError when it is refused or cut."""
    body = {"input_ids": list(range(100, 132)), "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
    asked = Request(f"{url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(asked, timeout=timeout) as answer:
        return json.loads(answer.read())["output_ids"]


def serves_again(url: str, deadline: float) -> list[int]:
    """Ask until there is an answer. Ours holds the request until the group is back; upstream refuses until then."""
    while time.monotonic() < deadline:
        try:
            return token(url, timeout=max(deadline - time.monotonic(), 1))
        except OSError:
            time.sleep(0.01)
    raise RuntimeError("no answer before the deadline")


def ranks_of(server: Server) -> list[int]:
    if not server.stock:
        return server.status()["groups"][0]["pids"]["ranks"]
    family = psutil.Process(server.process.pid).children(recursive=True)
    found = {name: process.pid for process in family if (name := " ".join(process.cmdline())).startswith("sglang::sch")}
    return [found[name] for name in sorted(found)]


def sweep(before: set[str]) -> None:
    """Remove what upstream's killed ranks left in shared memory since, unless somebody has it mapped."""
    new = [
        name for name in set(os.listdir(SHM)) - before if name.startswith(("sglang_loads_", "sgl_shm_mq_", "sem.mp-"))
    ]
    mapped = ""
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            mapped += Path(f"/proc/{process.pid}/maps").read_text()
    for name in new:
        if f"{SHM}/{name}" not in mapped:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{SHM}/{name}")


class Bench:
    def __init__(self, args: argparse.Namespace, directory: Path) -> None:
        self._args = args
        self._directory = directory
        self._chance = random.Random(args.seed)
        self._expected: list[int] | None = None
        self.results: list[dict[str, Any]] = []

    def round(self, number: int) -> None:
        for way in WAYS:
            (self._upstream if way == STOCK else self._ours)(way, number)

    def _start(self, way: str, number: int) -> Server:
        log = self._directory / f"{number}-{way}.log".replace(" ", "-")
        # As for a first death: not the back-off between restarts of a group that dies every 10 s.
        pause = () if way == STOCK else ("--restart-backoff-max", "0.5")
        flags = ("--tp-size", "2", *pause, *self._args.flags, *WAYS[way])
        return Server(self._args.model, self._args.port, log, *flags, groups=1, stock=way == STOCK)

    def _upstream(self, way: str, number: int) -> None:
        """Started again as soon as it has ended: upstream's server ends whole when a rank dies."""
        before = set(os.listdir(SHM))
        server = self._start(way, number).__enter__()
        try:
            server.wait_ready()
            self._check(serves_again(server.url, time.monotonic() + START_TIMEOUT))
            for _ in range(self._args.cold_kills):
                rank = self._chance.randrange(2)
                at = time.monotonic()
                os.kill(ranks_of(server)[rank], signal.SIGKILL)
                server.process.wait(START_TIMEOUT)
                server.__exit__(None, None, None)
                server = self._start(way, number).__enter__()
                self._check(serves_again(server.url, time.monotonic() + START_TIMEOUT))
                self._note(way, number, rank, time.monotonic() - at)
        finally:
            server.__exit__(None, None, None)
            sweep(before)

    def _ours(self, way: str, number: int) -> None:
        with self._start(way, number) as server:
            for _ in range(self._args.kills):
                server.wait_ready()
                time.sleep(SETTLE)
                rank, before = self._chance.randrange(2), ranks_of(server)
                at = time.monotonic()
                os.kill(before[rank], signal.SIGKILL)
                self._check(serves_again(server.url, at + START_TIMEOUT))
                self._note(way, number, rank, time.monotonic() - at)
                survived = ranks_of(server)[1 - rank] == before[1 - rank]
                if survived != ("re-form" in way):
                    raise RuntimeError(f"{way}: the other rank {'lives on' if survived else 'was started again'}")
            log = server.log.read_text(errors="replace")
        spared = log.count(SPARED)
        if spared != (self._args.kills if "spare" in way else 0) or (REFORMED in log) != ("re-form" in way):
            raise RuntimeError(f"{way}: {spared} spares were used; see {server.log}")

    def _check(self, answer: list[int]) -> None:
        self._expected = self._expected or answer
        if answer != self._expected:
            raise RuntimeError(f"another answer: {answer}, expected {self._expected}")

    def _note(self, way: str, number: int, rank: int, seconds: float) -> None:
        self.results.append({"way": way, "round": number, "rank": rank, "seconds": seconds})
        print(f"round {number + 1}: {way}: rank {rank} died, served again after {seconds:.2f} s", flush=True)


def table(results: list[dict[str, Any]]) -> str:
    seconds = {way: [one["seconds"] for one in results if one["way"] == way] for way in WAYS}
    cold = {
        number: statistics.median(one["seconds"] for one in results if one["way"] == STOCK and one["round"] == number)
        for number in {one["round"] for one in results}
    }
    rows = []
    for way, values in seconds.items():
        # Each against the cold starts of its own round, so that what drifts over the run does not count.
        ratios = [cold[one["round"]] / one["seconds"] for one in results if one["way"] == way]
        p50, p99 = np.percentile(values, (50, 99))
        low, middle, high = np.percentile(ratios, (5, 50, 95))
        ratio = "1" if way == STOCK else f"{middle:.0f}x ({low:.0f} - {high:.0f})"
        rows.append((way, len(values), f"{p50:.2f}", f"{p99:.2f}", f"{max(values):.2f}", ratio))
    return report.markdown(
        ("way", "deaths", "p50, s", "p99, s", "max, s", "sooner than the first, p50 (p5 - p95)"), rows
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the random-weight Llama of scripts/make_models.py")
    parser.add_argument("--rounds", type=int, default=3, help="of all four ways in turn")
    parser.add_argument("--kills", type=int, default=7, help="in a round, of each of our ways")
    parser.add_argument("--cold-kills", type=int, default=2, help="in a round, of upstream's server")
    parser.add_argument("--port", type=int, default=31900)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("flags", nargs="*", help="for all servers, upstream's too; behind --")
    args = parser.parse_args()
    exit_on_sigterm()
    args.model = args.model or make_model()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(args, Path(directory))
        with report.keeping("recovery", args, bench.results) as machine:
            for number in range(args.rounds):
                bench.round(number)
        print(report.describe(machine))
        print(table(bench.results))


if __name__ == "__main__":
    main()
