#!/usr/bin/env python3
"""Measure how the frontend's work grows with requests in flight, contexts and groups: see README.md beside this file.

    python benchmark/growth.py [--quick]

The actor, its journal and its sockets are the server's; the groups are stand-ins, so any number fits any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import multiprocessing
import random
import statistics
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import uvloop

import report

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from growth_world import Frontend, Point, StandIns, Watcher

from servers import exit_on_sigterm
from sglang_kevlar.protocol.launch import Paths

REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 16384)
GROUPS = (2, 4, 8, 16)
#: slopes are fitted over points that are at least this share of the largest: below it the fixed cost shows
FITTED = 1 / 16
#: bytes: what the allocator has free when a measurement begins is not seen to grow
FREED = 1 << 20
#: a slope from which a cost counts as growing faster than what it is for
SUPERLINEAR = 1.15
TIMEOUT = 120.0

Results = dict[str, list[dict[str, Any]]]


def sweeps(args: argparse.Namespace) -> dict[str, list[Point]]:
    """By name; in each of them one thing grows."""
    most = max(args.requests)
    few = min(64, most)
    return {
        "requests": [Point(n) for n in args.requests],
        "refused requests": [Point(n, elsewhere=most, refused=True) for n in args.requests],
        "contexts": [Point(few, context) for context in args.contexts],
        "groups": [Point(few, groups=groups, elsewhere=few) for groups in args.groups],
        "groups, all requests": [Point(most, groups=groups, elsewhere=most) for groups in args.groups],
    }


# ---- one measurement, in a fork of this process


def measure(point: Point | int, traced: bool = False) -> dict[str, Any]:
    """What ``point`` costs; of a number, what looking at so many groups costs. Raises RuntimeError."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="kevlar-growth-") as directory:
        ours, result = context.Pipe()
        commands, answers = context.Pipe()
        groups = context.Process(target=_stand_in, args=(directory, answers))
        frontend = context.Process(target=_frontend, args=(point, traced, directory, commands, result))
        with _running(groups), _running(frontend):
            measured = ours.recv() if ours.poll(TIMEOUT) else "no result in time"
            commands.send(("end",))
            groups.join(10)
    if isinstance(measured, str):
        raise RuntimeError(f"{point}: {measured}")
    return measured


@contextlib.contextmanager
def _running(process: Any) -> Iterator[None]:
    process.start()
    try:
        yield
    finally:
        process.join(5)
        process.kill()


def _stand_in(directory: str, commands: Connection) -> None:
    StandIns(Paths(directory), commands).run()


def _frontend(point: Point | int, traced: bool, directory: str, commands: Connection, result: Connection) -> None:
    # Log lines are written, as the server writes them.
    log = Path(directory) / "log"
    logging.basicConfig(filename=log, level=logging.INFO, format="[%(asctime)s] %(message)s", force=True)
    try:
        if isinstance(point, Point):
            measured = uvloop.run(_measure(point, traced, directory, commands))
        else:
            measured = uvloop.run(Watcher(point, directory, commands).measure())
        result.send(measured)
    except BaseException:
        result.send(traceback.format_exc())


async def _measure(point: Point, traced: bool, directory: str, commands: Connection) -> dict[str, Any]:
    return await Frontend(point, directory, commands).measure(traced)


# ---- the sweep


def run(args: argparse.Namespace, values: Results) -> None:
    """Every size in turn, again and again, so that what drifts is in all of them."""
    chance = random.Random(args.seed)
    for number in range(args.repeats):
        jobs = [(name, point) for name, points in sweeps(args).items() for point in points]
        jobs += [("watching", groups) for groups in args.groups]
        chance.shuffle(jobs)
        for name, point in jobs:
            key = msgspec.to_builtins(point)
            values.setdefault(name, []).append({"point": key, "repeat": number, **measure(point)})
        print(f"repeat {number + 1} of {args.repeats}", file=sys.stderr, flush=True)
    for name in ("requests", "contexts"):
        for point in sweeps(args)[name]:
            traced = measure(point, traced=True)["traced"]
            values.setdefault(f"traced {name}", []).append({"point": msgspec.to_builtins(point), "traced": traced})


# ---- tables


class Column(msgspec.Struct, frozen=True):
    """One cost: where it is found, in which unit, and whether its total, or its share of a request, is shown."""

    head: str
    pick: Callable[[dict[str, Any]], float]
    unit: float
    each: bool = False
    #: what is less says nothing of how it grows
    least: float = 0.0
    #: by the clock: on a busy machine its slope says more of the machine
    clock: bool = False


def _part(*path: str) -> Callable[[dict[str, Any]], float]:
    def pick(value: Any) -> float:
        for name in path:
            value = value[name]
        return float(value)

    return pick


MILLI, MICRO, KIB = 1e3, 1e6, 1 / 1024
REDIRECT = [
    Column("redirect, ms", _part("redirect", "wall"), MILLI, clock=True),
    Column("CPU of it, ms", _part("redirect", "thread"), MILLI),
    Column("CPU a request, us", _part("redirect", "thread"), MICRO, True),
    Column("longest turn, ms", _part("redirect", "blocked"), MILLI, clock=True),
    Column("its CPU, ms", _part("redirect", "blocked_cpu"), MILLI),
    Column("a bystander's token late by, ms", _part("redirect", "late"), MILLI, clock=True),
]
STEP = Column("token, us a request", _part("step", "thread"), MICRO, True)
REST = [
    Column("submit, us a request", _part("submit", "thread"), MICRO, True),
    STEP,
    Column("resume, us a request", _part("resume", "thread"), MICRO, True),
    Column("end, us a request", _part("finish", "thread"), MICRO, True),
    Column("resident, KiB a request", _part("resident"), KIB, True, least=FREED),
]
WATCHING = [
    Column("watching, CPU ms a second", _part("watch", "thread"), MILLI),
    Column("a status, CPU ms", _part("status", "thread"), MILLI),
]
TRACED = [Column("traced, KiB a request", _part("traced"), KIB, True)]


def slope(sizes: list[float], costs: list[float], least: float) -> float:
    """The exponent of the power of the size that the cost grows with; 1 is linear."""
    pairs = zip(sizes, costs, strict=True)
    fitted = [(size, cost) for size, cost in pairs if size >= FITTED * max(sizes) and cost > least]
    if len(fitted) < 2:
        return float("nan")
    return float(np.polyfit(*np.log(np.array(fitted).T), 1)[0])


def table(values: list[dict[str, Any]], size: str, columns: list[Column]) -> tuple[str, list[str]]:
    """Markdown: cells are median (least - most), the last line slopes of totals; and what is superlinear."""
    by_size: dict[float, list[dict[str, Any]]] = {}
    for value in values:
        point = value["point"]
        by_size.setdefault(point[size] if isinstance(point, dict) else point, []).append(value)
    sizes = sorted(by_size)
    rows, slopes, faster = [], [], []
    for each in sizes:
        shown = []
        for column in columns:
            parts = by_size[each][0]["point"]["requests"] if column.each else 1
            shown.append(_spread([column.pick(value) * column.unit / parts for value in by_size[each]]))
        rows.append([f"{each:,}", *shown])
    for column in columns:
        medians = [statistics.median(column.pick(value) for value in by_size[each]) for each in sizes]
        exponent = slope(sizes, medians, column.least)
        slopes.append("-" if np.isnan(exponent) else f"{exponent:.2f}")
        if exponent > SUPERLINEAR and not column.clock:
            faster.append(f"{column.head.split(',')[0]} grows with {size} to the power of {exponent:.2f}")
    rows.append(["slope of the total", *slopes])
    return report.markdown([size, *(column.head for column in columns)], rows), faster


def _spread(values: list[float]) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    digits = 0 if middle >= 100 else 1 if middle >= 10 else 2
    shown = f"{middle:,.{digits}f}"
    return shown if len(values) == 1 else f"{shown} ({low:,.{digits}f} - {high:,.{digits}f})"


def tables(values: Results) -> str:
    wanted = [
        ("requests", "requests", REDIRECT, "requests in flight"),
        ("requests", "requests", REST, "the rest of a request's life"),
        ("traced requests", "requests", TRACED, "memory"),
        ("refused requests", "requests", REDIRECT[:5], "requests that cannot go on, beside others in another group"),
        ("contexts", "context", REDIRECT, "contexts"),
        ("contexts", "context", REST, "contexts, the rest of a request's life"),
        ("traced contexts", "context", TRACED, "contexts, memory"),
        ("groups", "groups", [*REDIRECT, STEP], "groups, each with few requests"),
        ("groups, all requests", "groups", [*REDIRECT, STEP], "groups, each with all requests"),
        ("watching", "groups", WATCHING, "groups that are watched"),
    ]
    sections, faster = [], []
    for name, size, columns, title in wanted:
        if name in values:
            text, found = table(values[name], size, columns)
            sections.append(f"{title}\n\n{text}")
            faster += [f"{title}: {each}" for each in found]
    named = "\n".join(f"* {line}" for line in faster) or "nothing"
    return "\n\n".join([*sections, f"Grows faster than linear:\n\n{named}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=list(REQUESTS), help="in flight on the lost group")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--groups", type=int, nargs="+", default=list(GROUPS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="few sizes, once each: whether it works, no figures")
    args = parser.parse_args()
    exit_on_sigterm()
    if args.quick:
        args.requests, args.contexts, args.groups, args.repeats = [1, 16, 64], [256, 2048], [2, 4], 1
    values: Results = {}
    # What is imported is not looked at again by the collector, nor copied into the forks by that.
    gc.collect()
    gc.freeze()
    with report.keeping("growth", args, values) as machine:
        run(args, values)
    print(f"{report.describe(machine)}\n\n{tables(values)}")


if __name__ == "__main__":
    main()
