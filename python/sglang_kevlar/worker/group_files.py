"""Files of one worker group: its epoch counter, and what its epochs leave behind."""

from __future__ import annotations

import contextlib
import glob
import os

from sglang_kevlar.launcher.rundir import remove_shared_memory
from sglang_kevlar.protocol.launch import Paths


def read_epoch(paths: Paths, group: int) -> int:
    """The last epoch that was started; 0 before the first."""
    try:
        with open(paths.epoch_file(group)) as file:
            return int(file.read())
    except FileNotFoundError:
        return 0


def next_epoch(paths: Paths, group: int) -> int:
    """The next epoch, counted before anything of it exists: two incarnations never share a number."""
    epoch = read_epoch(paths, group) + 1
    temporary = f"{paths.epoch_file(group)}.new"
    with open(temporary, "w") as file:
        file.write(str(epoch))
    os.replace(temporary, paths.epoch_file(group))
    return epoch


def remove_of_process(launch_id: str, group: int, pid: int) -> None:
    """Shared memory that a dead member had for longer than an epoch."""
    remove_shared_memory(launch_id, f"-g{group}p{pid}-")


def remove_of_all_processes(launch_id: str, group: int) -> None:
    remove_shared_memory(launch_id, f"-g{group}p")


def remove(paths: Paths, launch_id: str, group: int) -> None:
    """Sockets, heartbeat pages and shared memory of all epochs of the group. None of its members may be alive."""
    for file in glob.glob(f"{glob.escape(paths.run_dir)}/g{group}e[0-9]*.*"):
        try:
            os.unlink(file)
        except FileNotFoundError:
            pass
    remove_shared_memory(launch_id, f"-g{group}e")


def remove_metrics(paths: Paths, pid: int, counted: bool) -> None:
    """What a dead process said in Prometheus' multi-process files.

    Its gauges state what no longer is. Its counters stay if it ever ``counted`` anything: sums must not go back.
    """
    pattern = "gauge_*" if counted else "*"
    for file in glob.glob(f"{glob.escape(paths.prometheus)}/{pattern}_{pid}.db"):
        # The frontend tidies up too.
        with contextlib.suppress(FileNotFoundError):
            os.unlink(file)
