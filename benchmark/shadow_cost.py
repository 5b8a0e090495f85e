#!/usr/bin/env python3
"""Measure what the shadow costs while nothing fails: see README.md beside this file.

    python benchmark/shadow_cost.py [--quick] [--model DIR]

Two groups that shadow to each other. The same load in turn with and without the shadow: without it every request asks
to be left out.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

import report
from load import Load, client_session, random_prompt, request_body
from servers import Server, exit_on_sigterm, make_model, vocabulary

LOADS = (1, 8, 16)
PROMPT_TOKENS = 256
NEW_TOKENS = 200


class Bench:
    def __init__(self, server: Server, session: aiohttp.ClientSession, args: argparse.Namespace) -> None:
        self._server = server
        self._session = session
        self._chance = random.Random(args.seed)
        self._tokens = vocabulary(args.model)

    async def run(self, streams: int, shadowed: bool) -> dict[str, float]:
        before = await asyncio.to_thread(self._cpu)
        started = time.monotonic()
        async with Load(self._session, self._server.url) as load:
            for _ in range(streams):
                body = request_body(random_prompt(self._chance, PROMPT_TOKENS, self._tokens), NEW_TOKENS)
                body["sampling_params"]["custom_params"] = {"kevlar_shadow": shadowed}
                load.start(body)
            await load.finished(300)
        elapsed = time.monotonic() - started
        if failed := [stream.error for stream in load.streams if stream.error]:
            raise RuntimeError(f"{len(failed)} streams failed: {failed[0]}")
        gaps = np.concatenate([np.diff(stream.times) for stream in load.streams])
        await asyncio.sleep(1.2)  # the counters are written twice a second
        after = await asyncio.to_thread(self._cpu)
        return {
            "throughput": streams * NEW_TOKENS / elapsed,
            "tpot": float(np.mean([stream.seconds_per_token() for stream in load.streams])),
            "gap_p99": float(np.percentile(gaps, 99)),
            "scheduler_cpu": after["scheduler"] - before["scheduler"],
            "shadow_cpu": after["shadow"] - before["shadow"],
        }

    def _cpu(self) -> dict[str, float]:
        """CPU seconds of all scheduler threads, and of what they spent on the shadow."""
        groups = self._server.status()["groups"]
        ranks = [pid for group in groups for pid in group["pids"]["ranks"]]
        spent = [int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9 for pid in ranks]
        return {"scheduler": sum(spent), "shadow": sum(group["shadow"]["scheduler_cpu_s"] for group in groups)}


async def measure(server: Server, args: argparse.Namespace, runs: dict[int, list[dict[str, Any]]]) -> None:
    async with client_session() as session:
        bench = Bench(server, session, args)
        for streams in args.loads:
            await bench.run(streams, True)  # warm-up
            for pair in range(args.pairs):
                order = (True, False) if pair % 2 == 0 else (False, True)
                both = {shadowed: await bench.run(streams, shadowed) for shadowed in order}
                runs.setdefault(streams, []).append({"on": both[True], "off": both[False]})
                print(f"{streams} streams, pair {pair + 1}: {both[True]} | {both[False]}", file=sys.stderr, flush=True)


def table(runs: dict[int, list[dict[str, Any]]]) -> str:
    rows = []
    for streams, pairs in runs.items():

        def of(side: str, name: str, pairs: list[dict[str, Any]] = pairs) -> np.ndarray:
            return np.array([[pair[side][name]] for pair in pairs])

        ratios = [
            report.ratio_of_medians(of("on", name), of("off", name)) for name in ("throughput", "tpot", "gap_p99")
        ]
        share = of("on", "shadow_cpu").sum() / of("on", "scheduler_cpu").sum()
        idle = of("off", "shadow_cpu").sum() / of("off", "scheduler_cpu").sum()
        rows.append(
            [
                streams,
                f"{np.median(of('on', 'throughput')):.0f}",
                *(f"{middle:.3f} ({low:.3f} - {high:.3f})" for middle, low, high in ratios),
                f"{share:.2%}",
                f"{idle:.2%}",
            ]
        )
    head = [
        "streams",
        "tokens/s, shadowed",
        "throughput, on / off",
        "time per token, on / off",
        "p99 gap, on / off",
        "shadow code in the scheduler thread",
        "of it without",
    ]
    return report.markdown(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: scripts/make_models.py's float32 Llama)")
    parser.add_argument("--loads", type=int, nargs="+", default=list(LOADS), help="streams at once")
    parser.add_argument("--pairs", type=int, default=12, help="for each load")
    parser.add_argument("--port", type=int, default=30530, help="below net.ipv4.ip_local_port_range")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two pairs of one load: whether it works, no figures")
    args = parser.parse_args()
    if args.quick:
        args.pairs, args.loads = 2, [8]
    exit_on_sigterm()
    args.model = args.model or make_model()
    runs: dict[int, list[dict[str, Any]]] = {}
    with report.keeping("shadow_cost", args, runs) as machine:
        with tempfile.TemporaryDirectory(prefix="kevlar-bench-") as directory:
            with Server(args.model, args.port, Path(directory) / "log") as server:
                server.wait_ready()
                asyncio.run(measure(server, args, runs))
    print(f"{report.describe(machine)}\n\n{table(runs)}")


if __name__ == "__main__":
    main()
