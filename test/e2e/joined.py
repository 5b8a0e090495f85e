"""A worker group on another host: a launch of its own, that joins over loopback, or from a namespace (`net.hosts`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from server import Server, free_port

from net.hosts import Host

#: in front of a command: in a /dev/shm that no other process has
APART = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/shm && exec "$@"', "sh")


def cluster_key(directory: Path) -> Path:
    file = directory / "cluster.key"
    key = subprocess.run(
        [sys.executable, "-m", "sglang_kevlar.cluster.keys"], capture_output=True, text=True, check=True
    )
    file.touch(0o600)
    file.write_text(key.stdout)
    return file


class Cluster:
    """Flags of a server that others join, and of those. The server is to be on ``host``."""

    def __init__(self, directory: Path, host: Host | None = None) -> None:
        self.directory = directory
        self.address = f"{'127.0.0.1' if host is None else host.address}:{free_port()}"
        self._key = ("--cluster-key-file", str(cluster_key(directory)))
        self.listen = ("--listen", self.address, *self._key)

    def join(
        self,
        name: str,
        *flags: str,
        frontends: str | None = None,
        host: Host | None = None,
        log: str | None = None,
        apart: bool = False,
        env: dict[str, str] | None = None,
    ) -> Joined:
        """``apart``: with shared memory of its own, as another host has."""
        command = ["--join", frontends or self.address, "--name", name, *self._key, *flags]
        if host is not None:
            command += ["--host-label", host.name, "--advertise", host.address]
        return Joined(name, command, self.directory / f"{log or name}.log", host, APART if apart else (), env)


class Joined:
    """One `python -m sglang_kevlar.launch_worker_group`."""

    def __init__(
        self,
        name: str,
        flags: list[str],
        log: Path,
        host: Host | None = None,
        within: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.log = log
        self._output = log.open("ab")
        self.process = (subprocess.Popen if host is None else host.popen)(
            [*within, sys.executable, "-m", "sglang_kevlar.launch_worker_group", *flags],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
            start_new_session=True,
        )

    def group(self, server: Server) -> dict[str, Any]:
        """What the server's status says of it; empty when it does not know it."""
        return next((group for group in server.status()["groups"] if group["name"] == self.name), {})

    def wait_ready(self, server: Server) -> None:
        def ready(status: dict[str, Any]) -> bool:
            assert self.process.poll() is None, f"{self.name} ended ({self.process.returncode}):\n{self.log_end()}"
            return any(group["name"] == self.name and group["state"] == "ready" for group in status["groups"])

        server.wait(ready, f"ready group {self.name}")

    def pid(self, server: Server, kind: str) -> int:
        pids = self.group(server)["pids"]
        return pids["ranks"][0] if kind == "rank" else pids[kind]

    def end(self, timeout: float = 90.0) -> int:
        """Its exit status, once it has ended by itself."""
        return self.process.wait(timeout)

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 90.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._output.close()

    def log_end(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
