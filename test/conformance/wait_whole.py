#!/usr/bin/env python3
"""Wait until a system is whole again: the recover command of the conformance run.

wait_whole.py [--url URL]                 SGLang-Kevlar: all groups ready
wait_whole.py [--url URL] --workers FILE  a router: all its workers answer, and it says that they are healthy
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from pathlib import Path
from urllib.request import urlopen


def get(url: str) -> bytes:
    with urlopen(url, timeout=20) as response:
        return response.read()


def groups_ready(url: str) -> bool:
    get(f"{url}/health")
    return all(group["state"] == "ready" for group in json.loads(get(f"{url}/kevlar/status"))["groups"])


def workers_ready(url: str, file: Path) -> bool:
    workers = json.loads(file.read_text())
    for worker in workers:
        get(worker["url"] + "/health")
    # Read again: one that was killed answered above if it was not yet restarted then.
    seen = json.loads(get(f"{url}/workers"))["workers"]
    return workers == json.loads(file.read_text()) and sum(worker["is_healthy"] for worker in seen) >= len(workers)


def main() -> str | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default=os.environ.get("KEVLAR_FAULT_URL", "http://127.0.0.1:30000"))
    parser.add_argument("--workers", type=Path)
    parser.add_argument("--timeout", type=float, default=400.0)
    args = parser.parse_args()
    deadline = time.monotonic() + args.timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError):
            if workers_ready(args.url, args.workers) if args.workers else groups_ready(args.url):
                return None
        time.sleep(0.3)
    return "not whole in time"


if __name__ == "__main__":
    sys.exit(main())
