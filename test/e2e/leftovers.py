"""What a server leaves behind when it ends, which is to be nothing: no process, socket, shared memory."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cases import native
from server import Server


class Leftovers:
    """Of one server, with ``flags`` beside its own. Made before the server is started."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.flags = ("--run-dir", str(run_dir))
        self._before = set(os.listdir("/dev/shm"))

    def check_end(self, server: Server, how: signal.Signals) -> None:
        """End it with a request in flight, and just after a rank was killed, which cannot clean up itself."""
        case = native("left", sampling={"max_new_tokens": 400})
        server.wait_ready(1)
        failovers = len(server.status()["failovers"])
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(case.run, server.url)
            group = server.serving_group()
            launch_id = json.loads((self._run_dir / "plan.json").read_text())["launch_id"]
            pids = server.descendants()
            groups = [group["pids"] for group in server.status()["groups"]]
            pids += [
                pid for group in groups for pid in (group["supervisor"], group["detokenizer"], *group["ranks"]) if pid
            ]
            server.kill(group)
            server.wait(lambda s: len(s["failovers"]) > failovers, "failover", 30)
            status = server.stop(how)
            with contextlib.suppress(Exception):
                running.result()
        assert status == (0 if how == signal.SIGINT else -signal.SIGKILL)
        deadline = time.monotonic() + 20
        while left := self._left(pids, launch_id):
            assert time.monotonic() < deadline, left
            time.sleep(0.1)

    def _left(self, pids: list[int], launch_id: str) -> list[object]:
        alive: list[object] = [pid for pid in pids if _cmdline(pid)]
        new = set(os.listdir("/dev/shm")) - self._before
        shared = [name for name in new if launch_id in name]
        # Of these not all have names of ours; those of others are in use.
        semaphores, used = [name for name in new if name.startswith("sem.")], _mapped_inodes()
        for name in semaphores:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(f"/dev/shm/{name}").st_ino not in used:
                    shared.append(name)
        return [*alive, *glob.glob(f"{self._run_dir}*"), *shared]


def _mapped_inodes() -> set[int]:
    """Of /dev/shm, by any process. A semaphore is mapped under the name that it had before it was complete."""
    inodes = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            lines = maps.read_text(errors="replace").splitlines()
            inodes.update(int(line.split()[4]) for line in lines if "/dev/shm/" in line)
    return inodes


def _cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
