#!/usr/bin/env python3
"""Measure what clients notice when one of several frontends dies, hangs or is cut off: see README.md beside this file.

    python benchmark/frontend_failover.py [--quick] [--model DIR]

Two frontends, the group that both share, and the clients, on a host each: network namespaces (as root, with iproute2).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import itertools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

import report
from load import random_prompt, request_body
from network_failover import new_key
from servers import ROOT, START_TIMEOUT, Server, WorkerGroup, exit_on_sigterm, make_model, vocabulary

sys.path.insert(0, str(ROOT / "test"))

from net.hosts import Hosts, unavailable
from sglang_kevlar.client import AsyncResumingTransport

FRONTENDS, WORKER, CLIENTS = ("a", "b"), "w", "clients"
FAULTS = ("frontend SIGKILL", "frontend SIGSTOP", "frontend's host cut off")
#: seconds between two looks at the other frontend's status; what it shows is known so exactly
LOOK = 0.01
#: seconds of streams before the fault, and behind the lease and the clients' time-out
BEFORE, AFTER = 1.0, 4.0
#: seconds by which a client may read the last token of the frontend that is gone after its loss is known
LATE = 0.05
#: more tokens than a stream gets to; not many more: it runs to its end when its client has left
ENDLESS = 3000


class Cluster:
    def __init__(self, hosts: Hosts, model: Path, port: int, lease: float, directory: Path) -> None:
        self.hosts = hosts
        key = ["--cluster-key-file", str(new_key(directory))]
        listen = {name: f"{hosts[name].address}:{port + 1}" for name in FRONTENDS}
        peers = ",".join(f"{name}={at}" for name, at in listen.items())
        flags = [*key, "--lease", str(lease), "--peers", peers, "--host", "0.0.0.0", "--restart-backoff", "0.5"]
        flags += ["--stream-retention", "8"]
        self._stack = contextlib.ExitStack()
        self.frontends: dict[str, Server] = {}
        with contextlib.ExitStack() as stack:
            for name, at in listen.items():
                own = [*flags, "--listen", at, "--frontend-name", name]
                log = directory / f"{name}.log"
                server = Server(model, port, log, *own, groups=0, joined=1, host=hosts[name])
                server.url = f"http://{hosts[name].address}:{port}"
                self.frontends[name] = stack.enter_context(server)
            join = ["--join", ",".join(listen.values()), "--name", WORKER, "--advertise", hosts[WORKER].address]
            stack.enter_context(WorkerGroup(directory / "w.log", *join, *key, host=hosts[WORKER]))
            self._stack = stack.pop_all()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: Any) -> None:
        self.hosts.heal()
        self._stack.close()

    def wait_whole(self) -> None:
        """Both serve and have what the other one has, and nothing runs."""
        deadline = time.monotonic() + START_TIMEOUT
        while not all(map(self._whole, self.frontends.values())):
            if time.monotonic() > deadline:
                raise RuntimeError(f"not whole: {[server.status() for server in self.frontends.values()]}")
            time.sleep(0.2)

    @staticmethod
    def _whole(server: Server) -> bool:
        try:
            status = server.status()
            return server.ready() and states_of(status) == ["current"] and not status["kept"]["running"]
        except OSError:
            return False

    def pid(self, name: str) -> int:
        """Of its frontend process."""
        return self.frontends[name].pids()["frontend"]


def states_of(status: dict[str, Any]) -> list[str]:
    return [peer["state"] for peer in status["frontends"]]


class Stream:
    """One kept request, whose client turns to the other frontend when it has to."""

    def __init__(self, urls: list[str], body: dict[str, Any], timeout: float) -> None:
        self._urls, self._body, self._timeout = urls, body, timeout
        #: of each new token
        self.times: list[float] = []
        self.error = ""

    async def run(self) -> None:
        transport = AsyncResumingTransport(base_urls=self._urls)
        limits = httpx.Timeout(self._timeout, connect=1.0)
        try:
            async with httpx.AsyncClient(transport=transport, timeout=limits) as client:
                async with client.stream("POST", f"{self._urls[0]}/generate", json=self._body) as response:
                    async for line in response.aiter_lines():
                        self._on_line(line)
        except (httpx.HTTPError, ValueError) as error:
            self.error = repr(error)

    def _on_line(self, line: str) -> None:
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            tokens = len(event.get("output_ids", ()))
            if "error" in event or tokens <= len(self.times):
                raise ValueError(f"after {len(self.times)} tokens: {line[:300]}")
            self.times += [time.monotonic()] * (tokens - len(self.times))


class Bench:
    def __init__(self, cluster: Cluster, args: argparse.Namespace) -> None:
        self._cluster = cluster
        self._args = args
        self._chance = random.Random(args.seed)
        self._vocabulary = vocabulary(args.model)
        self._victims = itertools.cycle(FRONTENDS)

    async def round(self, fault: str) -> dict[str, Any]:
        args, cluster = self._args, self._cluster
        await asyncio.to_thread(cluster.wait_whole)
        await asyncio.sleep(1)
        victim = next(self._victims)
        other = next(name for name in FRONTENDS if name != victim)
        pid = cluster.pid(victim)
        urls = {name: server.url for name, server in cluster.frontends.items()}
        streams = []
        for number in range(args.streams):
            home, away = (victim, other) if number % 2 == 0 else (other, victim)
            body = request_body(random_prompt(self._chance, 64, self._vocabulary), ENDLESS)
            streams.append((home, Stream([urls[home], urls[away]], body, args.client_timeout)))
        tasks = [asyncio.create_task(stream.run()) for _, stream in streams]
        try:
            async with asyncio.timeout(60):
                while any(len(stream.times) < 10 and not stream.error for _, stream in streams):
                    await asyncio.sleep(0.01)
            await asyncio.sleep(BEFORE + self._chance.uniform(0.2, 0.7))
            struck = time.monotonic()
            self._strike(fault, victim, pid)
            seen = await self._watch(urls[other], struck, len(streams))
            await asyncio.sleep(max(0.0, struck + args.lease + args.client_timeout + AFTER - time.monotonic()))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._mend(fault, pid)
        known = struck + seen["detected"] + LATE
        return {
            "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "fault": fault,
            "victim": victim,
            **seen,
            "streams": [{"moved": home == victim, **stall(stream, struck, known)} for home, stream in streams],
        }

    def _strike(self, fault: str, victim: str, pid: int) -> None:
        if fault == "frontend SIGKILL":
            os.kill(pid, signal.SIGKILL)
        elif fault == "frontend SIGSTOP":
            os.kill(pid, signal.SIGSTOP)
        else:
            self._cluster.hosts[victim].down()

    def _mend(self, fault: str, pid: int) -> None:
        self._cluster.hosts.heal()
        if fault == "frontend SIGSTOP":
            os.kill(pid, signal.SIGCONT)

    async def _watch(self, url: str, struck: float, running: int) -> dict[str, float]:
        """When the other frontend has given it up, and when it runs all of its requests, from the fault."""
        seen: dict[str, float] = {}
        async with httpx.AsyncClient(timeout=5) as client, asyncio.timeout(self._args.lease + 20):
            while "taken_up" not in seen:
                status = (await client.get(f"{url}/kevlar/status")).json()
                now = time.monotonic() - struck
                if not states_of(status):
                    seen.setdefault("detected", now)
                    if status["kept"]["running"] == running:
                        seen["taken_up"] = now
                await asyncio.sleep(LOOK)
        return seen


def stall(stream: Stream, struck: float, known: float) -> dict[str, Any]:
    """Of the gaps that are open at the fault or begin until it is ``known``, the longest. Behind that, the frontend
    that starts again takes its CPU."""
    gaps = list(itertools.pairwise(stream.times))
    before = [end - begin for begin, end in gaps if end <= struck]
    behind = [(begin - struck, end - struck) for begin, end in gaps if end > struck and begin < known]
    longest = max(behind, key=lambda gap: gap[1] - gap[0], default=None)
    return {
        "usual": statistics.median(before),
        "goes_on": None if longest is None else longest[1],
        "longest": None if longest is None else longest[1] - longest[0],
        "error": stream.error,
    }


def table(rounds: list[dict[str, Any]]) -> str:
    head = ["fault", "streams / faults", "fault to detection", "to all taken up", "to the next token at the client"]
    head += ["stall", "stall at the other frontend"]
    rows = []
    for fault in FAULTS:
        of_fault = [r for r in rounds if r["fault"] == fault]
        streams = [s for r in of_fault for s in r["streams"] if s["longest"] is not None]
        moved = [s for s in streams if s["moved"]]
        if not moved:
            continue
        columns = [
            [r["detected"] for r in of_fault],
            [r["taken_up"] for r in of_fault],
            [s["goes_on"] for s in moved],
            [s["longest"] - s["usual"] for s in moved],
            [s["longest"] - s["usual"] for s in streams if not s["moved"]],
        ]
        rows.append([fault, f"{len(moved)} / {len(of_fault)}", *map(report.milliseconds, columns)])
    return report.markdown(head, rows)


async def measure(cluster: Cluster, args: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    """Appends to ``rounds``, so that what an interrupted run has measured is there."""
    bench = Bench(cluster, args)
    for fault in args.faults:
        for i in range(args.repeats):
            rounds.append(await bench.round(fault))
            seen = rounds[-1]
            failed = [s["error"] for s in seen["streams"] if s["error"]]
            print(f"{fault} {i + 1}: {seen['detected']:.3f} {seen['taken_up']:.3f} {failed}", file=sys.stderr)


@contextlib.contextmanager
def cluster_of(args: argparse.Namespace) -> Iterator[Cluster]:
    with Hosts(*FRONTENDS, WORKER, CLIENTS, wire=True, seed=args.seed) as hosts:
        # What is started from here on, clients and threads, is on the clients' host.
        with hosts[CLIENTS].network(), tempfile.TemporaryDirectory(prefix="kevlar-bench-") as directory:
            with Cluster(hosts, args.model, args.port, args.lease, Path(directory)) as cluster:
                yield cluster


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: scripts/make_models.py's float32 Llama)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--repeats", type=int, default=6, help="of each fault")
    parser.add_argument("--streams", type=int, default=8, help="at once, over both frontends")
    parser.add_argument("--lease", type=float, default=3.0, help="of the servers")
    parser.add_argument("--client-timeout", type=float, default=4.0, help="of silence; longer than the lease")
    parser.add_argument("--port", type=int, default=30500, help="the next one is listened on too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="once each, 4 streams: whether it works, no figures")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.streams = 1, 4
    return args


def main() -> None:
    args = parse_args()
    if reason := unavailable(wire=True):
        sys.exit(reason)
    exit_on_sigterm()
    args.model = args.model or make_model()
    rounds: list[dict[str, Any]] = []
    with report.keeping("frontend_failover", args, rounds) as machine, cluster_of(args) as cluster:
        asyncio.run(measure(cluster, args, rounds))
    print(f"{report.describe(machine)}\n\nms, p50 / p99 / max\n\n{table(rounds)}")
    if lost := sum(bool(s["error"]) or s["longest"] is None for r in rounds for s in r["streams"]):
        sys.exit(f"{lost} requests failed or stood still")


if __name__ == "__main__":
    main()
