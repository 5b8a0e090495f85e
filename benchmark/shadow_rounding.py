#!/usr/bin/env python3
"""Measure whether failovers change answers in bf16: see README.md beside this file.

    python benchmark/shadow_rounding.py [--quick] [--model DIR]

Runs the same greedy streams undisturbed, undisturbed again, and with their group killed at a random token; once with
the shadow and once without it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass
from math import comb
from pathlib import Path
from typing import Any

import aiohttp

import report
from load import Load, Stream, client_session
from servers import ROOT, Server, exit_on_sigterm

NEW_TOKENS = 200
#: the kill comes when a stream has so many tokens
CUT_AT = (10, 150)
DEMO_MODEL = ROOT / "python/sglang_kevlar/demo/model"


@dataclass
class Count:
    streams: int = 0
    diverged: int = 0
    recomputed: int = 0

    def add(self, other: Count) -> None:
        self.streams += other.streams
        self.diverged += other.diverged
        self.recomputed += other.recomputed


def prompts(count: int, chance: random.Random) -> list[str]:
    """Pieces of Python's standard library, 200 to 2,000 characters long."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    found = []
    while len(found) < count:
        text = chance.choice(files).read_text(errors="replace")
        start = chance.randrange(len(text))
        piece = text[start : start + chance.randrange(200, 2000)]
        if len(piece) >= 200:
            found.append(piece)
    return found


class Bench:
    def __init__(self, server: Server, session: aiohttp.ClientSession, seed: int) -> None:
        self._server = server
        self._session = session
        self._chance = random.Random(seed)

    async def round(self, streams: int) -> tuple[Count, Count]:
        """Of one set of prompts: what a second undisturbed run changed, and what a kill changed."""
        bodies = [
            {
                "text": text,
                "sampling_params": {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True},
                "stream": True,
            }
            for text in prompts(streams, self._chance)
        ]
        reference, again, cut = [await self._run(bodies, kill) for kill in (False, False, True)]
        moved = [stream.meta_info.get("kevlar", {}) for stream in cut]
        for position, meta in enumerate(moved):
            if not meta.get("redirects"):
                raise RuntimeError(f"stream {position} was not moved: the group that serves was not the one killed")
        changed = Count(streams, _diverged(reference, cut), sum(meta["recomputed_tokens"] for meta in moved))
        return Count(streams, _diverged(reference, again)), changed

    async def _run(self, bodies: list[dict[str, object]], kill: bool) -> list[Stream]:
        """All at once, with nothing cached."""
        await asyncio.to_thread(self._server.wait_ready)
        await asyncio.sleep(2)  # the shadow's link
        await asyncio.to_thread(self._server.post, "/flush_cache?timeout=30")
        async with Load(self._session, self._server.url) as load:
            for body in bodies:
                load.start(body)
            if kill:
                await load.wait_for_tokens(self._chance.randint(*CUT_AT))
                os.kill(self._server.status()["groups"][0]["pids"]["ranks"][0], signal.SIGKILL)
            await load.finished()
        if failed := [stream.error for stream in load.streams if stream.error]:
            raise RuntimeError(f"{len(failed)} streams failed: {failed[0]}")
        return load.streams


def _diverged(one: list[Stream], other: list[Stream]) -> int:
    outputs = [[stream.event(-1)["output_ids"] for stream in streams] for streams in (one, other)]
    assert all(len(tokens) == NEW_TOKENS for tokens in outputs[0] + outputs[1])
    return sum(a != b for a, b in zip(*outputs, strict=True))


def more_than_chance(cut: Count, again: Count) -> float:
    """One-sided p-value (Fisher's exact test) that a cut stream diverges more often than one that is run again."""
    streams, diverged = cut.streams + again.streams, cut.diverged + again.diverged
    ways = comb(streams, cut.streams)
    at_least = range(cut.diverged, min(diverged, cut.streams) + 1)
    return sum(comb(diverged, k) * comb(streams - diverged, cut.streams - k) for k in at_least) / ways


def measure(args: argparse.Namespace, name: str, flags: list[str]) -> dict[str, Count]:
    # One group serves and the other stands by, so that a kill moves every stream.
    flags = ["--dtype", "bfloat16", "--standby-groups", "1", "--restart-backoff", "0.5", *flags]
    counts = {"again": Count(), "cut": Count()}

    async def rounds(server: Server) -> None:
        async with client_session() as session:
            bench = Bench(server, session, args.seed)
            for number in range(args.rounds):
                again, cut = await bench.round(args.streams)
                counts["again"].add(again)
                counts["cut"].add(cut)
                print(f"{name}, round {number + 1} of {args.rounds}: {again} {cut}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="kevlar-bench-") as directory:
        with Server(args.model, args.port, Path(directory) / "log", *flags) as server:
            server.wait_ready()
            asyncio.run(rounds(server))
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="model directory (default: the demo model)")
    parser.add_argument("--rounds", type=int, default=13, help="kills, with and without the shadow")
    parser.add_argument("--streams", type=int, default=16, help="at once")
    parser.add_argument("--port", type=int, default=30510, help="below net.ipv4.ip_local_port_range")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one round each: whether it works, no figures")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 1
    exit_on_sigterm()
    ways = {"shadow": [], "token replay (--shadow-memory 0)": ["--shadow-memory", "0"]}
    results: dict[str, dict[str, Count]] = {}
    kept: dict[str, Any] = {}
    with report.keeping("shadow_rounding", args, kept) as machine:
        for name, flags in ways.items():
            results[name] = measure(args, name, flags)
            kept[name] = {run: asdict(count) for run, count in results[name].items()}
    rows = []
    for name, counts in results.items():
        again, cut = counts["again"], counts["cut"]
        rows.append(
            [
                name,
                f"{cut.diverged} of {cut.streams}",
                f"{again.diverged} of {again.streams}",
                f"{more_than_chance(cut, again):.3f}",
                f"{cut.recomputed / cut.streams:.0f}",
            ]
        )
    head = ["resumed by", "diverged when cut", "diverged when run again", "p (one-sided)", "tokens recomputed, mean"]
    print(f"{report.describe(machine)}\n\n{report.markdown(head, rows)}")


if __name__ == "__main__":
    main()
