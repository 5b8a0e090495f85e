#!/usr/bin/env python3
"""SIGKILL what runs the most requests: the fault command of the conformance run.

    kill_busiest.py [--url URL]           SGLang-Kevlar: rank 0 of the busiest group
    kill_busiest.py --workers FILE        workers behind a router, from the file that systems.py keeps:
                                          the busiest of them, with all of its processes

Returns when it is dead. Fails when nothing runs a request, or when several requests are not all in one place.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from urllib.request import urlopen

#: seconds over which CPU time is measured
WINDOW = 0.08


def busiest_rank(url: str) -> int | None:
    with urlopen(f"{url}/kevlar/status", timeout=10) as response:
        working = [group for group in json.load(response)["groups"] if group["running"]]
    if len(working) > 1 and int(os.environ.get("KEVLAR_FAULT_REQUESTS", "1")) > 1:
        return None
    return max(working, key=lambda group: group["running"])["pids"]["ranks"][0] if working else None


def busiest_worker(file: Path) -> int | None:
    """The process group of the SGLang server that works: by its CPU time, for what `/v1/loads` says is a second old.

    Looked at until one clearly does, for the router's health checks make tokens too.
    """
    groups = [worker["pid"] for worker in json.loads(file.read_text())]
    members = {group: members_of(group) for group in groups}
    for _ in range(20):
        before = {group: cpu_seconds(members[group]) for group in groups}
        time.sleep(WINDOW)
        used = sorted((cpu_seconds(members[group]) - before[group], group) for group in groups)
        if used[-1][0] > WINDOW / 5 and used[-1][0] > 4 * used[-2][0]:
            return used[-1][1]
    return None


def members_of(group: int) -> list[int]:
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if stat(pid)[2:3] == [str(group)]]


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent, process group, ...; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def cpu_seconds(pids: list[int]) -> float:
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            # What clock_getcpuclockid(3) returns on Linux: to the nanosecond, where /proc has ticks of 10 ms.
            total += time.clock_gettime((~pid << 3) | 2)
    return total


def wait_gone(pid: int) -> None:
    """Until it is a zombie or gone."""
    while stat(pid)[:1] not in ([], ["Z"]):
        time.sleep(0.005)


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=os.environ.get("KEVLAR_FAULT_URL", "http://127.0.0.1:30000"))
    parser.add_argument("--workers", type=Path)
    args = parser.parse_args()
    pid = busiest_worker(args.workers) if args.workers else busiest_rank(args.url)
    if pid is None:
        return "no request is running, or they are not all in one place"
    (os.killpg if args.workers else os.kill)(pid, signal.SIGKILL)
    wait_gone(pid)
    return None


if __name__ == "__main__":
    sys.exit(main())
