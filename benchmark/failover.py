#!/usr/bin/env python3
"""Measure what clients notice when a worker group dies: see README.md beside this file.

    python benchmark/failover.py [--quick] [--model DIR] [-- FLAGS of the server]

Starts a server with two worker groups, kills one of them again and again under load, and prints Markdown tables.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import gc
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
from load import Load, Stream, client_session, random_prompt, request_body
from servers import Server, exit_on_sigterm, make_model, vocabulary

#: what is hit, with what
FAULTS = {
    "rank SIGKILL": ("ranks", signal.SIGKILL),
    "detokenizer SIGKILL": ("detokenizer", signal.SIGKILL),
    "supervisor SIGKILL": ("supervisor", signal.SIGKILL),
    "rank SIGSTOP": ("ranks", signal.SIGSTOP),
}
GROUPS = 2
#: seconds around the kill in which the longest gap of a stream is looked for, on either side
WINDOW = 1.0
#: seconds from the kill until the streams are ended
OBSERVED = 3.0
#: more tokens than a stream gets to, so that it is the benchmark that ends it. Not many more: the survivor has to have
#: room for what all streams may still ask for, or some of them wait in its queue.
ENDLESS = 1500
PROMPT_TOKENS = (32, 128)
#: streams beside the probes that measure the time to first token, and seconds between two of these
PROBE_BACKGROUND = 4
PROBE_INTERVAL = 0.05
PROBE_TOKENS = 32
REPLAYS = 3


class Bench:
    #: seconds from the fault until the streams are ended
    observed = OBSERVED

    def __init__(self, server: Server, session: aiohttp.ClientSession, tokens: int, seed: int) -> None:
        """``tokens``: size of the model's vocabulary."""
        self._server = server
        self._session = session
        self._chance = random.Random(seed)
        self._tokens = tokens
        self._kills = 0

    def _prompt(self, tokens: int | None = None) -> list[int]:
        return random_prompt(self._chance, tokens or self._chance.randint(*PROMPT_TOKENS), self._tokens)

    def _load(self) -> Load:
        return Load(self._session, self._server.url)

    async def _status(self) -> dict[str, Any]:
        return await asyncio.to_thread(self._server.status)

    # ---- rounds: one fault each

    async def stall_round(self, fault: str, streams: int) -> dict[str, Any]:
        """Kill a group under ``streams`` streams; what each of them saw."""
        result = await self._begin(fault)
        async with self._load() as load:
            for _ in range(streams):
                load.start(request_body(self._prompt(), ENDLESS))
            await load.wait_for_tokens(10)
            await asyncio.sleep(WINDOW + self._chance.uniform(0.2, 0.7))
            self._hit(result)
            await asyncio.sleep(self.observed)
        result["streams"] = [_stall(stream, result["killed"]) for stream in load.streams]
        await self._end(result)
        return result

    async def probe_round(self, fault: str) -> dict[str, Any]:
        """Kill a group while short requests arrive at a steady rate; their times to first token."""
        result = await self._begin(fault)
        async with self._load() as background, self._load() as probes:
            for _ in range(PROBE_BACKGROUND):
                background.start(request_body(self._prompt(), ENDLESS))
            await background.wait_for_tokens(10)
            for until_hit in (True, False):
                begin = time.monotonic()
                for i in range(int((2 if until_hit else 1) * WINDOW / PROBE_INTERVAL)):
                    await asyncio.sleep(begin + i * PROBE_INTERVAL - time.monotonic())
                    probes.start(request_body(self._prompt(PROBE_TOKENS), 1))
                if until_hit:
                    self._hit(result)
            await probes.finished()
        result["probes"] = [
            {"sent": probe.sent - result["killed"], "ttft": probe.first_token_seconds() if probe.done else None}
            for probe in probes.streams
        ]
        await self._end(result)
        return result

    async def _begin(self, fault: str) -> dict[str, Any]:
        await asyncio.to_thread(self._server.wait_ready)
        # A group that is ready takes part in routing a moment later.
        await asyncio.sleep(1)
        status = await self._status()
        group = status["groups"][self._kills % GROUPS]
        self._kills += 1
        gc.collect()
        return {
            "fault": fault,
            "group": group["id"],
            "epoch": group["epoch"],
            "failovers": len(status["failovers"]),
            **self._aim(fault, group),
        }

    def _aim(self, fault: str, group: dict[str, Any]) -> dict[str, Any]:
        """What ``_strike`` needs to know of the group."""
        kind, sig = FAULTS[fault]
        pid = group["pids"][kind]
        return {"pid": pid[0] if isinstance(pid, list) else pid, "signal": int(sig)}

    def _strike(self, result: dict[str, Any]) -> None:
        os.kill(result["pid"], result["signal"])

    def _hit(self, result: dict[str, Any]) -> None:
        result["killed_wall"], result["killed"] = time.time(), time.monotonic()
        self._strike(result)

    async def _end(self, result: dict[str, Any]) -> None:
        """Wait for the group to be back, and add what the server says of its failover."""
        deadline = time.monotonic() + 120
        while True:
            status = await self._status()
            group = status["groups"][result["group"]]
            if group["epoch"] > result["epoch"] and group["state"] == "ready":
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"group {result['group']} does not come back: {group}")
            await asyncio.sleep(0.1)
        result["serves_again"] = time.monotonic() - result["killed"]
        record = next(f for f in status["failovers"][result["failovers"] :] if f["group"] == result["group"])
        at = datetime.datetime.fromisoformat(record["at"]).timestamp()
        result["record"] = record
        # Both are wall clock of this host; the record's has a resolution of 1 ms.
        result["detected"] = at - result["killed_wall"]

    # ---- what the recomputation alone costs

    async def measure_recomputation(self, rounds: list[dict[str, Any]]) -> None:
        """Give the redirected requests of every round once more, as one batch of new prompts, to one group alone.

        It has as much other work as the surviving group had. Adds ``recompute`` to each redirected stream: the time
        to first token of its counterpart, the median of several times.
        """
        for group in range(1, GROUPS):
            await asyncio.to_thread(self._server.post, f"/kevlar/groups/{group}/drain")
        for result in rounds:
            # The order in which a failover gives them to a group.
            redirected = sorted(moved_streams(result), key=lambda s: s["recomputed"], reverse=True)
            if not redirected:
                continue
            async with self._load() as background:
                for other in other_streams(result):
                    background.start(request_body(self._prompt(other["context"]), ENDLESS))
                await background.wait_for_tokens(5)
                replays = []
                for _ in range(REPLAYS):
                    prompts = [self._prompt(stream["recomputed"]) for stream in redirected]
                    replay = await Stream(request_body(prompts, 1)).run(self._session, self._server.url)
                    replays.append(replay.first_token_seconds_of_batch())
            for index, stream in enumerate(redirected):
                stream["recompute"] = statistics.median(replay[index] for replay in replays)


def _stall(stream: Stream, killed: float) -> dict[str, Any]:
    gaps = list(zip(stream.times, stream.times[1:], strict=False))
    undisturbed = [end - begin for begin, end in gaps if end <= killed]
    before = [end - begin for begin, end in gaps if killed - WINDOW < end <= killed]
    # Also one that was open when the fault came.
    around = [end - begin for begin, end in gaps if end > killed and begin < killed + WINDOW]
    kevlar = stream.meta_info.get("kevlar", {})
    return {
        "redirected": kevlar.get("redirects", 0),
        "recomputed": kevlar.get("recomputed_tokens", 0),
        "context": stream.meta_info.get("prompt_tokens", 0) + sum(at <= killed for at in stream.times),
        "usual": statistics.median(undisturbed),
        "longest_before": max(before, default=WINDOW),
        "longest": max(around, default=None),
        "gaps": [(begin - killed, end - killed) for begin, end in gaps if end > killed],
        "error": stream.error,
    }


def moved_streams(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for s in result["streams"] if s["redirected"] and s["longest"] is not None]


def other_streams(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [s for s in result["streams"] if not s["redirected"] and s["longest"] is not None]


def failed(rounds: list[dict[str, Any]]) -> int:
    """Streams and probes that failed or stood still."""
    streams = [s["longest"] is None or bool(s["error"]) for r in rounds for s in r.get("streams", ())]
    probes = [p["ttft"] is None for r in rounds for p in r.get("probes", ())]
    return sum(streams) + sum(probes)


# ---- tables


def _stalls(rounds: list[dict[str, Any]]) -> list[object]:
    moved = [s for r in rounds for s in moved_streams(r)]
    stayed = [s for r in rounds for s in other_streams(r)]
    columns = (
        [s["usual"] for s in moved],
        [s["longest_before"] - s["usual"] for s in moved],
        [s["longest"] - s["usual"] for s in moved],
        [s["recompute"] for s in moved],
        [s["longest"] - s["usual"] - s["recompute"] for s in moved],
        [s["longest"] - s["usual"] for s in stayed],
    )
    recomputed = f"{statistics.median(s['recomputed'] for s in moved):.0f}" if moved else "-"
    return [f"{len(moved)} / {len(rounds)}", recomputed, *map(report.milliseconds, columns)]


def _detection(rounds: list[dict[str, Any]]) -> list[object]:
    back = [r["serves_again"] for r in rounds]
    reported = statistics.median(r["record"]["detect_ms"] for r in rounds)
    detected = report.milliseconds([r["detected"] for r in rounds])
    return [len(rounds), detected, f"{reported:.1f}", f"{statistics.median(back):.1f} / {max(back):.1f}"]


def _first_tokens(rounds: list[dict[str, Any]]) -> list[list[object]]:
    probes = [p for r in rounds for p in r.get("probes", ()) if p["ttft"] is not None]
    periods = {
        "answered before the kill": [p["ttft"] for p in probes if p["sent"] + p["ttft"] < 0],
        "waiting when it came": [p["ttft"] for p in probes if p["sent"] < 0 <= p["sent"] + p["ttft"]],
        "sent in the second after": [p["ttft"] for p in probes if p["sent"] >= 0],
    }
    return [[name, len(values), report.milliseconds(values)] for name, values in periods.items()]


def tables(rounds: list[dict[str, Any]]) -> str:
    """Markdown; every cell of several times is p50 / p99 / max."""
    stalls, detections = [], []
    by_fault = {fault: [r for r in rounds if r["fault"] == fault] for fault in FAULTS}
    by_fault["all SIGKILL"] = [r for r in rounds if r["signal"] == signal.SIGKILL]
    for fault, of_fault in by_fault.items():
        if not of_fault:
            continue
        stalls.append([fault, *_stalls([r for r in of_fault if "streams" in r])])
        detections.append([fault, *_detection(of_fault)])
    stall_head = ["fault", "streams / kills", "tokens recomputed", "usual gap", "longest before, beyond the usual"]
    stall_head += ["stall", "recomputation", "stall beyond it", "stall in the other group"]
    detection_head = ["fault", "faults", "fault to failover", "detect_ms", "fault to group back, s (p50 / max)"]
    sections = {
        "Stall of redirected streams": report.markdown(stall_head, stalls),
        "Time to first token": report.markdown(["request", "requests", "time"], _first_tokens(rounds)),
        "Detection and recovery": report.markdown(detection_head, detections),
    }
    return "\n\n".join(f"{title} (ms, p50 / p99 / max)\n\n{table}" for title, table in sections.items())


async def measure(server: Server, args: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    """Appends to ``rounds``, so that what an interrupted run has measured is there."""
    async with client_session() as session:
        bench = Bench(server, session, vocabulary(args.model), args.seed)
        for fault in args.faults:
            for i in range(args.kills):
                rounds.append(await bench.stall_round(fault, args.streams))
                say(f"{fault}: kill {i + 1} of {args.kills}", rounds[-1])
        for i in range(args.probe_kills):
            fault = args.faults[i % len(args.faults)]
            if FAULTS[fault][1] == signal.SIGSTOP:
                fault = args.faults[0]
            rounds.append(await bench.probe_round(fault))
            say(f"probes: kill {i + 1} of {args.probe_kills}", rounds[-1])
        print("measuring the recomputation alone", file=sys.stderr)
        await asyncio.to_thread(server.wait_ready)
        await bench.measure_recomputation([r for r in rounds if "streams" in r])


def say(what: str, result: dict[str, Any]) -> None:
    longest = [s["longest"] - s["usual"] for s in moved_streams(result)] if "streams" in result else []
    stall = f"longest stall {max(longest) * 1e3:.0f} ms, " if longest else ""
    print(
        f"{what}: detected in {result['detected'] * 1e3:.0f} ms, {stall}back in {result['serves_again']:.1f} s",
        file=sys.stderr,
        flush=True,
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: scripts/make_models.py's float32 Llama)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--kills", type=int, default=13, help="kills under streams, per fault")
    parser.add_argument("--probe-kills", type=int, default=6, help="kills under new requests")
    parser.add_argument("--streams", type=int, default=16, help="at once, over all groups")
    parser.add_argument("--port", type=int, default=30500, help="below net.ipv4.ip_local_port_range")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two kills each, 8 streams: whether it works, no figures")
    parser.add_argument("flags", nargs="*", help="for the server; behind --")
    args = parser.parse_args()
    if args.quick:
        args.kills, args.probe_kills, args.streams = 2, 2, 8
    return args


def main() -> None:
    args = parse_args()
    exit_on_sigterm()
    machine = report.machine()
    args.model = args.model or make_model()
    # The first delay of the default back-off for every restart: the kills here come faster than any real ones.
    flags = ["--restart-backoff", "0.5", "--restart-backoff-max", "0.5", *args.flags]
    rounds: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory(prefix="kevlar-bench-") as directory:
            with Server(args.model, args.port, Path(directory) / "log", *flags, groups=GROUPS) as server:
                server.wait_ready()
                asyncio.run(measure(server, args, rounds))
    finally:
        if rounds:
            options = {name: str(value) for name, value in vars(args).items()}
            path = report.save("failover", {"machine": machine, "options": options, "rounds": rounds})
            print(f"everything: {path}", file=sys.stderr)
    print(f"{report.describe(machine)}\n\n{tables(rounds)}")
    if lost := failed(rounds):
        sys.exit(f"{lost} requests failed or stood still")


if __name__ == "__main__":
    main()
