#!/usr/bin/env python3
"""Measure what our frontend costs against plain SGLang: see README.md beside this file.

    python benchmark/frontend_cost.py [--quick] [--model DIR]

Starts SGLang-Kevlar with one worker group and stock SGLang beside it, and gives both the same requests in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

import report
from load import Stream, client_session, random_prompt, request_body
from servers import Server, cpu_seconds, exit_on_sigterm, make_model, vocabulary

CONCURRENCIES = (1, 8)
ROLES = ("frontend", "detokenizer", "scheduler")
PROMPT_TOKENS = 64
NEW_TOKENS = 64
#: rounds of each server before anything counts
WARM_UP = 5


async def burst(
    server: Server, pids: dict[str, int], session: aiohttp.ClientSession, prompts: list[list[int]]
) -> dict[str, Any]:
    """All ``prompts`` at once: what each request saw, and the CPU seconds per token of the server's processes."""
    before = {role: cpu_seconds(pids[role]) for role in ROLES}
    requests = [Stream(request_body(prompt, NEW_TOKENS)) for prompt in prompts]
    streams = await asyncio.gather(*(request.run(session, server.url) for request in requests))
    if failed := [stream.error for stream in streams if stream.error]:
        raise RuntimeError(f"a request failed: {failed[0]}")
    # What they still do for these requests after the last token.
    await asyncio.sleep(0.02)
    tokens = len(prompts) * NEW_TOKENS
    return {
        "ttft": [stream.first_token_seconds() for stream in streams],
        "tpot": [stream.seconds_per_token() for stream in streams],
        "cpu": {role: (cpu_seconds(pids[role]) - before[role]) / tokens for role in ROLES},
    }


async def measure(servers: list[Server], vocabulary_size: int, args: argparse.Namespace) -> dict[int, list[list[Any]]]:
    """Per concurrency, pairs of bursts: [ours, theirs]."""
    chance = random.Random(args.seed)
    pids = [server.pids() for server in servers]
    pairs: dict[int, list[list[Any]]] = {}
    async with client_session() as session:
        for concurrency in CONCURRENCIES:
            pairs[concurrency] = []
            count = args.pairs if concurrency == 1 else args.pairs // 2
            for i in range(WARM_UP + count):
                prompts = [random_prompt(chance, PROMPT_TOKENS, vocabulary_size) for _ in range(concurrency)]
                pair: list[Any] = [None, None]
                # Who is first alternates, so that neither always runs behind the other.
                for which in ((0, 1), (1, 0))[i % 2]:
                    pair[which] = await burst(servers[which], pids[which], session, prompts)
                if i >= WARM_UP:
                    pairs[concurrency].append(pair)
                if (i + 1) % 20 == 0:
                    print(f"concurrency {concurrency}: {i + 1} of {WARM_UP + count}", file=sys.stderr, flush=True)
    return pairs


def table(pairs: dict[int, list[list[Any]]]) -> str:
    rows = []
    for concurrency, of_concurrency in pairs.items():
        for name, title in (("ttft", "time to first token, ms"), ("tpot", "time per further token, ms")):
            ours, theirs = (np.array([pair[which][name] for pair in of_concurrency]) for which in (0, 1))
            rows.append(_row(concurrency, title, ours, theirs, 1e3, np.median, report.ratio_of_medians))
        for role in ROLES:
            ours, theirs = (np.array([[pair[which]["cpu"][role]] for pair in of_concurrency]) for which in (0, 1))
            title = f"CPU of the {role} per token, us"
            rows.append(_row(concurrency, title, ours, theirs, 1e6, np.mean, report.ratio_of_sums))
    head = ["requests at once", "what", "ours", "SGLang", "ratio", "95 % interval", "1 % could be seen"]
    return report.markdown(head, rows)


def _row(
    concurrency: int, title: str, ours: np.ndarray, theirs: np.ndarray, unit: float, statistic: Any, ratio_of: Any
) -> list[object]:
    ratio, low, high = ratio_of(ours, theirs)
    values = [f"{unit * statistic(values):.2f}" for values in (ours, theirs)]
    # An interval wider than 1 % to either side cannot tell a cost of 1 % from none.
    fine = "yes" if high - low <= 0.02 else "no, noise"
    return [concurrency, title, *values, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", fine]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: scripts/make_models.py's float32 Llama)")
    parser.add_argument("--pairs", type=int, default=300, help="pairs of single requests; half as many of 8 at once")
    parser.add_argument("--port", type=int, default=30500, help="the first of two")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="10 pairs: whether it works, no figures")
    args = parser.parse_args()
    if args.quick:
        args.pairs = 10
    return args


def main() -> None:
    args = parse_args()
    exit_on_sigterm()
    machine = report.machine()
    args.model = args.model or make_model()
    with tempfile.TemporaryDirectory(prefix="kevlar-bench-") as directory:
        logs = [Path(directory) / name for name in ("ours", "stock")]
        with (
            Server(args.model, args.port, logs[0], groups=1) as ours,
            Server(args.model, args.port + 1, logs[1], stock=True) as stock,
        ):
            for server in (ours, stock):
                server.wait_ready()
            pairs = asyncio.run(measure([ours, stock], vocabulary(args.model), args))
    options = {name: str(value) for name, value in vars(args).items()}
    path = report.save("frontend-cost", {"machine": machine, "options": options, "pairs": pairs})
    print(f"{report.describe(machine)}\n\n{table(pairs)}")
    print(f"everything: {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
