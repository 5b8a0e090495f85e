#!/usr/bin/env python3
"""The paper's experiment: a worker is killed under Poisson load, and clients ask until they have their answers.

    python benchmark/experiment/run.py [--rates 0.5 1 1.5] [--router-python PATH] [--quick]

See README.md one folder up. Plots and every value go to benchmark/results.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from client import Answered, answer
from figures import Kill, Run, collect, mean_p99
from plots import draw
from systems import Ours, Restarting, Router, System
from workload import Ask, conversation, poisson, read_trace

import report
from load import Load, client_session, request_body
from servers import exit_on_sigterm, make_model, vocabulary

RATES = (0.5, 1.0, 1.5)
#: seconds: of arrivals, until the kill, and for answers that are late
LENGTH, KILL_AT, PATIENCE = 60.0, 20.0, 120.0


def systems(args: argparse.Namespace) -> dict[str, Callable[[Path], System]]:
    """By name, in the order of the tables."""
    chosen: dict[str, Callable[[Path], System]] = {
        "SGLang, restarted": lambda directory: Restarting(args.model, args.port, directory)
    }
    if args.router_python:
        chosen["SGLang behind sglang-router"] = lambda directory: Router(
            args.model, args.port, directory, args.router_python
        )
    chosen["ours, no shadow"] = lambda directory: Ours(args.model, args.port, directory, "--shadow-memory", "0")
    chosen["ours"] = lambda directory: Ours(args.model, args.port, directory)
    return chosen


async def undisturbed(url: str, asks: list[Ask], at_once: int = 8) -> list[list[int]]:
    """What the answers are: greedy and float32, so they do not depend on who else is served."""
    answers: list[list[int]] = []
    async with client_session() as session:
        for start in range(0, len(asks), at_once):
            async with Load(session, url) as load:
                for ask in asks[start : start + at_once]:
                    load.start(request_body(ask.prompt, ask.new_tokens))
                await load.finished(300)
            if failed := [stream.error for stream in load.streams if stream.error]:
                raise RuntimeError(f"a reference answer failed: {failed[0]}")
            answers += [stream.event(-1)["output_ids"] for stream in load.streams]
            print(f"reference: {len(answers)} of {len(asks)} answers", file=sys.stderr, flush=True)
    return answers


async def measure(
    system: System,
    name: str,
    rate: float,
    asks: list[Ask],
    times: list[float],
    reference: list[list[int]],
    killing: bool,
) -> Run:
    begin = time.monotonic()
    deadline = begin + times[-1] + PATIENCE
    answers: list[Answered] = []
    kill = None
    async with client_session() as session:
        clients = [
            asyncio.create_task(_client(session, system.url, number, ask, begin + at, deadline, answers))
            for number, (ask, at) in enumerate(zip(asks, times, strict=True))
        ]
        if killing:
            await asyncio.sleep(KILL_AT)
            kill = await _kill(system, deadline)
        await asyncio.gather(*clients)
    answers.sort(key=lambda one: one.number)
    return collect(name, rate, answers, reference, begin, kill)


async def _kill(system: System, deadline: float) -> Kill:
    """Returns when all workers serve again, or at the deadline."""
    await asyncio.to_thread(system.kill)
    at, wall = time.monotonic(), time.time()
    await asyncio.sleep(1.0)  # until it has been noticed that they do not
    detected = await asyncio.to_thread(system.detected)
    detected_after = None if detected is None else max(0.0, detected - wall)
    while time.monotonic() < deadline:
        if await asyncio.to_thread(system.whole):
            return Kill(at, detected_after, time.monotonic())
        await asyncio.sleep(0.1)
    return Kill(at, detected_after, None)


async def _client(
    session: aiohttp.ClientSession,
    url: str,
    number: int,
    ask: Ask,
    at: float,
    deadline: float,
    answers: list[Answered],
) -> None:
    await asyncio.sleep(max(0.0, at - time.monotonic()))
    answered = Answered(number, ask, at)
    answers.append(answered)
    await answer(session, url, answered, deadline)


def table(runs: list[Run]) -> str:
    head = ["requests/s", "system", "latency, s", "TTFT, s", "time per token, ms", "failed attempts"]
    head += ["never answered", "other answers"]
    rows = []
    for run in runs:
        failures = {kind: count for kind, count in run.failures.items() if kind != "never answered"}
        cells = [_pair(mean_p99(run.latency)), _pair(mean_p99(run.ttft)), _pair(mean_p99(run.tpot), 1e3, 1)]
        cells += [", ".join(f"{count} {kind}" for kind, count in sorted(failures.items())) or "0"]
        rows.append(
            [f"{run.rate:g}", run.system, *cells, run.failures.get("never answered", 0), run.changed],
        )
    return report.markdown(head, rows)


def recovery(runs: list[Run]) -> str:
    """From the kill on."""
    head = ["requests/s", "system", "loss known, ms", "requests hit", "first of them goes on, s", "last, s"]
    rows = []
    for run in runs:
        stalled = [float("inf") if one is None else one for one in run.stalled]
        cells = ["-" if run.detected_after is None else f"{run.detected_after * 1e3:.0f}", len(stalled)]
        cells += [f"{min(stalled):.2f}", f"{max(stalled):.2f}"] if stalled else ["-", "-"]
        back = "never" if run.whole_after is None else f"{run.whole_after:.1f}"
        rows.append([f"{run.rate:g}", run.system, *cells, back])
    return report.markdown([*head, "all workers serve, s"], rows)


def ratios(runs: list[Run]) -> str:
    """How many times as much as ours."""
    ours = next(run for run in runs if run.system == "ours")
    rows = []
    for run in runs:
        if run is not ours:
            values = []
            for name in ("latency", "ttft", "stalled"):
                theirs, own = mean_p99(getattr(run, name)), mean_p99(getattr(ours, name))
                values += [f"{a / b:.1f}x" if b > 0 and a >= 0 else "-" for a, b in zip(theirs, own, strict=True)]
            rows.append([f"{run.rate:g}", run.system, *values])
    head = ["requests/s", "system", "latency", "p99", "TTFT", "p99", "stalled", "p99"]
    return report.markdown(head, rows)


def _pair(values: tuple[float, float], scale: float = 1.0, digits: int = 2) -> str:
    return " / ".join(f"{value * scale:.{digits}f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: scripts/make_models.py's float32 Llama)")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES), help="requests a second")
    parser.add_argument("--trace", type=Path, help="recorded arrivals in place of synthetic ones (--rates is ignored)")
    parser.add_argument("--router-python", help="interpreter that has sglang-router; without it the router is left out")
    parser.add_argument("--port", type=int, default=30540, help="below net.ipv4.ip_local_port_range")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one rate, 20 requests: whether it works, no figures")
    args = parser.parse_args()
    exit_on_sigterm()
    args.model = args.model or make_model()
    chance = random.Random(args.seed)
    if args.trace:
        asks, times = read_trace(args.trace, chance, vocabulary(args.model))
        plans = {len(times) / times[-1]: times}
    else:
        rates = args.rates[:1] if args.quick else args.rates
        counts = {rate: 20 if args.quick else round(rate * LENGTH) for rate in rates}
        asks = conversation(max(counts.values()), chance, vocabulary(args.model))
        plans = {rate: poisson(counts[rate], rate, random.Random(args.seed)) for rate in rates}
    values: dict[str, Any] = {}
    runs: list[Run] = []
    with report.keeping("experiment", args, values) as machine:
        reference: list[list[int]] = []

        def run_once(name: str, make: Callable[[Path], System], rate: float, killing: bool) -> Run:
            with tempfile.TemporaryDirectory(prefix="kevlar-bench-") as directory:
                system = make(Path(directory))
                try:
                    system.wait_whole()
                    if not reference:
                        reference.extend(asyncio.run(undisturbed(system.url, asks)))
                    times = plans[rate]
                    run = asyncio.run(measure(system, name, rate, asks[: len(times)], times, reference, killing))
                finally:
                    system.close()
            values[f"{name}, {rate:g}/s{'' if killing else ', nothing killed'}"] = run.to_json()
            print(table([run]), file=sys.stderr, flush=True)
            return run

        made = systems(args)
        runs = [run_once(name, make, rate, True) for name, make in made.items() for rate in plans]
        middle = sorted(plans)[len(plans) // 2]
        calm = [run_once(name, make, middle, False) for name, make in made.items()]
    runs.sort(key=lambda run: run.rate)
    print(f"{report.describe(machine)}\n\nMean / p99; a worker is killed.\n\n{table(runs)}\n")
    print(f"From the kill on:\n\n{recovery(runs)}\n\nNothing is killed:\n\n{table(calm)}\n")
    for rate in plans:
        at_rate = [run for run in runs if run.rate == rate]
        path = report.RESULTS / f"experiment-{rate:g}.png"
        draw(at_rate, path)
        print(f"How many times as much as ours:\n\n{ratios(at_rate)}\n\n{path}\n")


if __name__ == "__main__":
    main()
