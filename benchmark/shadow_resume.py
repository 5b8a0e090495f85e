#!/usr/bin/env python3
"""Measure how long a stream stands still when its group is killed, by context length: see README.md beside this file.

    python benchmark/shadow_resume.py [--quick] [--model DIR]

One group serves and one stands by. Streams in turn are shadowed, or ask not to be and are then prefilled again.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp

import report
from load import Load, client_session, random_prompt, request_body
from servers import Server, exit_on_sigterm, make_model, vocabulary

CONTEXTS = (512, 2048, 8192, 16384)
#: tokens a stream has when its group is killed, and has to get afterwards
BEFORE, AFTER = 60, 40
NEW_TOKENS = 400


class Bench:
    def __init__(self, server: Server, session: aiohttp.ClientSession, args: argparse.Namespace) -> None:
        self._server = server
        self._session = session
        self._chance = random.Random(args.seed)
        self._tokens = vocabulary(args.model)

    async def kill(self, context: int, shadowed: bool) -> dict[str, Any]:
        """One stream through a kill of its group; how long it stood still."""
        await asyncio.to_thread(self._server.wait_ready)
        await asyncio.sleep(2)  # the shadow's link
        body = request_body(random_prompt(self._chance, context, self._tokens), NEW_TOKENS)
        body["sampling_params"]["custom_params"] = {"kevlar_shadow": shadowed}
        async with Load(self._session, self._server.url) as load:
            stream = load.start(body)
            await load.wait_for_tokens(BEFORE, timeout=300)
            pid = self._server.status()["groups"][0]["pids"]["ranks"][0]
            killed, had = time.monotonic(), len(stream.times)
            os.kill(pid, signal.SIGKILL)
            await load.wait_for_tokens(had + AFTER, timeout=300)
        gaps = [b - a for a, b in zip(stream.times, stream.times[1:], strict=False) if b > killed]
        usual = statistics.median(b - a for a, b in zip(stream.times[10:], stream.times[11 : had - 1], strict=False))
        recomputed = stream.meta_info["kevlar"]["recomputed_tokens"]
        return {
            "context": context,
            "shadowed": shadowed,
            "stall": max(gaps) - usual,
            "usual": usual,
            "recomputed": recomputed,
        }


async def measure(server: Server, args: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    async with client_session() as session:
        bench = Bench(server, session, args)
        for number in range(args.kills):
            for context in args.contexts:
                for shadowed in (True, False) if number % 2 == 0 else (False, True):
                    rounds.append(await bench.kill(context, shadowed))
                    print(f"kill {len(rounds)}: {rounds[-1]}", file=sys.stderr, flush=True)


def table(rounds: list[dict[str, Any]], contexts: list[int]) -> str:
    rows = []
    for context in contexts:
        of = {
            shadowed: [r for r in rounds if r["context"] == context and r["shadowed"] is shadowed]
            for shadowed in (True, False)
        }
        if not of[True] or not of[False]:
            continue
        stalls = {shadowed: sorted(r["stall"] for r in kills) for shadowed, kills in of.items()}
        # Of the kill beside it, so that what drifts over the run is in both.
        ratios = sorted(b["stall"] / a["stall"] for a, b in zip(of[True], of[False], strict=False))
        rows.append(
            [
                context,
                _spread(stalls[True], 1e3),
                _spread(stalls[False], 1e3),
                _spread(ratios, 1, "x"),
                max(r["recomputed"] for r in of[True]),
                min(r["recomputed"] for r in of[False]),
            ]
        )
    head = [
        "context, tokens",
        "stall, shadowed, ms",
        "stall, recomputed, ms",
        "ratio",
        "tokens recomputed, most",
        "without, least",
    ]
    return report.markdown(head, rows)


def _spread(values: list[float], factor: float, unit: str = "") -> str:
    """Median, with the least and the most."""
    low, middle, high = (value * factor for value in (values[0], statistics.median(values), values[-1]))
    digits = 0 if factor > 1 else 1
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f} - {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: scripts/make_models.py's float32 Llama)")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--kills", type=int, default=5, help="for each context, shadowed and not")
    parser.add_argument("--port", type=int, default=30520, help="below net.ipv4.ip_local_port_range")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one kill each, short contexts: whether it works")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.contexts = 1, [512, 2048]
    exit_on_sigterm()
    args.model = args.model or make_model()
    flags = ["--standby-groups", "1", "--restart-backoff", "0.5", "--restart-backoff-max", "0.5"]
    rounds: list[dict[str, Any]] = []
    with report.keeping("shadow_resume", args, rounds) as machine:
        with tempfile.TemporaryDirectory(prefix="kevlar-bench-") as directory:
            with Server(args.model, args.port, Path(directory) / "log", *flags) as server:
                server.wait_ready()
                asyncio.run(measure(server, args, rounds))
    print(f"{report.describe(machine)}\n\n{table(rounds, args.contexts)}")


if __name__ == "__main__":
    main()
