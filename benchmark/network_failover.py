#!/usr/bin/env python3
"""Measure what clients notice when a group on another host dies, or its network does: see README.md beside this file.

    python benchmark/network_failover.py [--quick] [--model DIR]

A frontend with the clients, and two worker groups, on a host each: network namespaces (as root, with iproute2).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

import failover
import report
from load import client_session
from servers import ROOT, Server, WorkerGroup, exit_on_sigterm, make_model, vocabulary

sys.path.insert(0, str(ROOT / "test"))

from net.hosts import Host, Hosts, unavailable
from net.link_faults import Faults

FRONT, WORKERS = "front", ("w1", "w2")
#: of a process of the group
SIGNALS = {
    "rank SIGKILL": ("ranks", signal.SIGKILL),
    "gateway SIGKILL": ("gateway", signal.SIGKILL),
    "gateway SIGSTOP": ("gateway", signal.SIGSTOP),
    "launcher SIGKILL": ("launcher", signal.SIGKILL),
}
#: of the group's host
LINKS = ("link down", "only the group hears", "only the frontend hears")
FAULTS = (*SIGNALS, *LINKS)
#: seconds by which a client may read the last token of the lost group after the failover
LATE = 0.05
#: seconds behind the lease in which streams have to go on
MARGIN = 4.0


class Cluster:
    """A server, the groups that joined it, and the network between them."""

    def __init__(self, hosts: Hosts, model: Path, port: int, lease: float, directory: Path) -> None:
        self.hosts = hosts
        self.lease = lease
        self._directory = directory
        self._address = f"{hosts[FRONT].address}:{port + 1}"
        self._key = ["--cluster-key-file", str(new_key(directory))]
        # The first delay of the default back-off for every restart: faults come faster here than any real ones.
        flags = ["--restart-backoff", "0.5", "--restart-backoff-max", "0.5", "--lease", str(lease), *self._key]
        self.server = Server(
            model,
            port,
            directory / "log",
            *flags,
            "--listen",
            self._address,
            groups=0,
            joined=len(WORKERS),
            host=hosts[FRONT],
        )
        self._groups = contextlib.ExitStack()
        self._started = 0

    def __enter__(self) -> Cluster:
        for name in WORKERS:
            self.start_group(name)
        return self

    def __exit__(self, *error: Any) -> None:
        self.hosts.heal()
        try:
            self._groups.close()
        finally:
            self.server.__exit__(*error)

    def start_group(self, name: str) -> None:
        self._started += 1
        host: Host = self.hosts[name]
        flags = ["--join", self._address, "--name", name, "--host-label", name, "--advertise", host.address]
        log = self._directory / f"{name}.{self._started}.log"
        self._groups.enter_context(WorkerGroup(log, *flags, *self._key, host=host))


def new_key(directory: Path) -> Path:
    command = [sys.executable, "-m", "sglang_kevlar.cluster.keys"]
    made = subprocess.run(command, check=True, capture_output=True, text=True)
    file = directory / "cluster.key"
    file.touch(0o600)
    file.write_text(made.stdout)
    return file


class NetworkBench(failover.Bench):
    def __init__(self, cluster: Cluster, session: aiohttp.ClientSession, tokens: int, seed: int) -> None:
        super().__init__(cluster.server, session, tokens, seed)
        self._cluster = cluster
        self.observed = cluster.lease + MARGIN

    def _aim(self, fault: str, group: dict[str, Any]) -> dict[str, Any]:
        aim: dict[str, Any] = {"name": group["name"]}
        if fault in SIGNALS:
            kind, sig = SIGNALS[fault]
            pid = group["pids"][kind]
            aim |= {"pid": pid[0] if isinstance(pid, list) else pid, "signal": int(sig)}
        return aim

    def _strike(self, result: dict[str, Any]) -> None:
        hosts, name, fault = self._cluster.hosts, result["name"], result["fault"]
        if fault in SIGNALS:
            os.kill(result["pid"], result["signal"])
        elif fault == "link down":
            hosts[name].down()
        elif fault == "only the group hears":
            hosts.fault(Faults(blocked=True), source=name, target=FRONT)
        else:
            hosts.fault(Faults(blocked=True), source=FRONT, target=name)

    async def _end(self, result: dict[str, Any]) -> None:
        self._cluster.hosts.heal()
        if result["fault"] == "gateway SIGSTOP":
            os.kill(result["pid"], signal.SIGCONT)
        elif result["fault"] == "launcher SIGKILL":
            self._cluster.start_group(result["name"])
        await super()._end(result)


# ---- tables


def _longest(stream: dict[str, Any], before: float) -> tuple[float, float]:
    """Of the gaps that begin by then: where it ends, from the fault, and how long it is beyond the usual one."""
    begin, end = max((gap for gap in stream["gaps"] if gap[0] < before), key=lambda gap: gap[1] - gap[0])
    return end, end - begin - stream["usual"]


def _row(fault: str, rounds: list[dict[str, Any]]) -> list[object]:
    # A network that is cut one way may carry some tokens more: a stall begins anywhere between fault and failover.
    moved = [(r["detected"], *_longest(s, r["detected"] + LATE)) for r in rounds for s in failover.moved_streams(r)]
    stayed = [_longest(s, r["detected"] + failover.WINDOW)[1] for r in rounds for s in failover.other_streams(r)]
    columns = (
        [r["detected"] for r in rounds],
        [goes_on - detected for detected, goes_on, _ in moved],
        [stall for _, _, stall in moved],
        stayed,
    )
    reported = statistics.median(r["record"]["detect_ms"] for r in rounds)
    causes = sorted({r["record"]["cause"].partition(":")[0] for r in rounds})
    recomputed = [s["recomputed"] for r in rounds for s in failover.moved_streams(r)]
    cells = [report.milliseconds(column) for column in columns]
    counts = f"{len(moved)} / {len(rounds)}"
    middle = f"{statistics.median(recomputed):.0f}" if recomputed else "-"
    return [fault, counts, cells[0], f"{reported:.1f}", *cells[1:], middle, ", ".join(causes)]


def table(rounds: list[dict[str, Any]]) -> str:
    head = ["fault", "streams / faults", "fault to failover", "detect_ms", "failover to next token", "stall"]
    head += ["stall in the other group", "tokens recomputed", "cause"]
    by_fault = {fault: [r for r in rounds if r["fault"] == fault] for fault in FAULTS}
    return report.markdown(head, [_row(fault, of_fault) for fault, of_fault in by_fault.items() if of_fault])


async def measure(cluster: Cluster, args: argparse.Namespace, rounds: list[dict[str, Any]]) -> None:
    """Appends to ``rounds``, so that what an interrupted run has measured is there."""
    async with client_session() as session:
        bench = NetworkBench(cluster, session, vocabulary(args.model), args.seed)
        for fault in args.faults:
            for i in range(args.repeats):
                rounds.append(await bench.stall_round(fault, args.streams))
                failover.say(f"{fault}: {i + 1} of {args.repeats}", rounds[-1])


@contextlib.contextmanager
def cluster_of(args: argparse.Namespace) -> Iterator[Cluster]:
    with Hosts(FRONT, *WORKERS, wire=True, seed=args.seed) as hosts:
        # What is started from here on, clients and threads, is on the frontend's host.
        with hosts[FRONT].network(), tempfile.TemporaryDirectory(prefix="kevlar-bench-") as directory:
            with Cluster(hosts, args.model, args.port, args.lease, Path(directory)) as cluster:
                cluster.server.wait_ready()
                yield cluster


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory (default: scripts/make_models.py's float32 Llama)")
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--repeats", type=int, default=6, help="of each fault")
    parser.add_argument("--streams", type=int, default=8, help="at once, over both groups")
    parser.add_argument("--lease", type=float, default=3.0, help="of the server")
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
    with report.keeping("network_failover", args, rounds) as machine, cluster_of(args) as cluster:
        asyncio.run(measure(cluster, args, rounds))
    print(f"{report.describe(machine)}\n\nms, p50 / p99 / max\n\n{table(rounds)}")
    if lost := failover.failed(rounds):
        sys.exit(f"{lost} requests failed or stood still")


if __name__ == "__main__":
    main()
