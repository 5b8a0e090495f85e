#!/usr/bin/env python3
"""SIGKILL what runs the most requests: the fault command of the conformance run.

    kill_busiest.py [--url URL]           SGLang-Kevlar: rank 0 of the busiest group
    kill_busiest.py --workers FILE        workers behind a router, from the file that systems.py keeps:
                                          the busiest of them, with all of its processes

Returns when it is dead. Fails when nothing runs a request.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from urllib.request import urlopen


def get(url: str) -> object:
    with urlopen(url, timeout=10) as response:
        return json.load(response)


def busiest_rank(url: str) -> tuple[int, int]:
    """(running requests, pid)."""
    group = max(get(f"{url}/kevlar/status")["groups"], key=lambda group: group["running"])
    return group["running"], (group["pids"]["ranks"] or [0])[0]


def busiest_worker(file: Path) -> tuple[int, int]:
    """(requests, process group) of SGLang servers."""
    loads = []
    for worker in json.loads(file.read_text()):
        load = get(worker["url"] + "/get_load")
        loads.append((sum(rank["num_reqs"] for rank in load), worker["pid"]))
    return max(loads)


def wait_gone(pid: int) -> None:
    """Until it is a zombie or gone."""
    while True:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z"):
                return
        except OSError:
            return
        time.sleep(0.005)


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=os.environ.get("KEVLAR_FAULT_URL", "http://127.0.0.1:30000"))
    parser.add_argument("--workers", type=Path)
    args = parser.parse_args()
    running, pid = busiest_worker(args.workers) if args.workers else busiest_rank(args.url)
    if not running:
        return "no request is running anywhere"
    (os.killpg if args.workers else os.kill)(pid, signal.SIGKILL)
    wait_gone(pid)
    return None


if __name__ == "__main__":
    sys.exit(main())
