"""``python -m sglang_kevlar.chaos.burden``: a child that takes CPU time or memory, and ends with its parent."""

from __future__ import annotations

from sglang_kevlar.launcher.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()

import argparse
import mmap
import os
import time
from pathlib import Path

#: bytes taken at once
CHUNK = 64 << 20


def available() -> int:
    """Bytes of the host that processes can still have."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/meminfo has no MemAvailable")


def use_cpu(cpus: list[int]) -> None:
    os.sched_setaffinity(0, cpus)
    while True:
        pass


def use_memory(leave: int) -> None:
    """Until ``leave`` bytes are available, and as long as this process lives."""
    # When it is too much, this process goes, and not the server.
    Path("/proc/self/oom_score_adj").write_text("1000")
    taken: list[mmap.mmap] = []
    while True:
        if available() > leave + CHUNK:
            memory = mmap.mmap(-1, CHUNK)
            for page in range(0, CHUNK, mmap.PAGESIZE):
                memory[page] = 1
            taken.append(memory)
        elif available() < leave and taken:
            taken.pop().close()
        else:
            time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpus", help="a busy loop on these, such as 0,1")
    parser.add_argument("--leave", type=int, help="memory, until this many bytes are available")
    args = parser.parse_args()
    if args.cpus:
        use_cpu([int(cpu) for cpu in args.cpus.split(",")])
    if args.leave:
        use_memory(args.leave)


if __name__ == "__main__":
    main()
