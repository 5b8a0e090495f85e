"""A real server under test: started as a user would, watched through its own status, killed for real."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from net.hosts import Host

START_TIMEOUT = 300.0
#: Tests kill far more often than the default, up to 30 s of wait after repeated deaths, is made for.
RESTART = ("--restart-backoff-max", "2")


_given: set[int] = set()


def free_port() -> int:
    """A free port below the ephemeral ones: polling one of those while nobody listens can connect to itself. Each is
    given once: who asks for two uses neither before it has both."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port


class Server:
    """One `python -m sglang_kevlar.launch_server`; its address is of ``host``, if there is one."""

    def __init__(
        self,
        model: Path,
        log: Path,
        *flags: str,
        groups: int = 2,
        env: dict[str, str] | None = None,
        host: Host | None = None,
    ) -> None:
        self.port = free_port()
        #: in which it can be asked
        self.network = contextlib.nullcontext if host is None else host.network
        self.url = f"http://127.0.0.1:{self.port}"
        self._admin_port = flags[flags.index("--admin-port") + 1] if "--admin-port" in flags else None
        self.groups = groups
        self.log = log
        command = [sys.executable, "-m", "sglang_kevlar.launch_server", "--model-path", str(model)]
        command += ["--port", str(self.port), "--worker-groups", str(groups), "--random-seed", "7"]
        command += ["--dtype", "float32", *flags]
        if not any(flag.startswith("--restart-backoff") for flag in flags):
            command += RESTART
        self._output = log.open("wb")
        self.process = (subprocess.Popen if host is None else host.popen)(
            command,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "KEVLAR_TEST_SERVER": str(self.port), **(env or {})},
            start_new_session=True,
        )

    @property
    def admin_url(self) -> str:
        """Where the operator asks."""
        return self.url if self._admin_port is None else f"http://127.0.0.1:{self._admin_port}"

    # ---- state

    def get(self, path: str, timeout: float = 10) -> httpx.Response:
        with self.network():
            return httpx.get(self.url + path, timeout=timeout)

    def status(self) -> dict[str, Any]:
        with self.network():
            return httpx.get(f"{self.admin_url}/kevlar/status", timeout=10).json()

    def group(self, group: int) -> dict[str, Any]:
        return self.status()["groups"][group]

    def wait(self, condition: Callable[[dict[str, Any]], bool], what: str, timeout: float = START_TIMEOUT) -> dict:
        """Poll the status until ``condition``. Fails with the end of the log."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended ({self.process.returncode}) before {what}:\n{self.log_end()}")
            with contextlib.suppress(httpx.HTTPError, json.JSONDecodeError):
                status = self.status()
                if condition(status):
                    return status
            time.sleep(0.1)
        raise AssertionError(f"no {what} within {timeout:g} s:\n{self.log_end()}")

    def wait_ready(self, groups: int | None = None) -> None:
        """All groups (or ``groups`` of them) serve and the warm-up is over."""
        wanted = self.groups if groups is None else groups
        self.wait(lambda s: sum(g["state"] == "ready" for g in s["groups"]) >= wanted, f"{wanted} ready groups")
        self.wait(lambda _: self.get("/health", timeout=30).status_code == 200, "health")

    def log_end(self, lines: int = 60) -> str:
        written = self.log.read_text(errors="replace").splitlines()
        return "\n".join([line for line in written if "GET /kevlar/status" not in line][-lines:])

    # ---- faults

    def pid(self, group: int, kind: str) -> int:
        pids = self.group(group)["pids"]
        return pids["ranks"][0] if kind == "rank" else pids[kind]

    def kill(self, group: int, kind: str = "rank", sig: int = signal.SIGKILL) -> int:
        pid = self.pid(group, kind)
        os.kill(pid, sig)
        return pid

    def kill_all_at_once(self) -> None:
        """SIGKILL a rank of every group, with none of them running in between.

        Stopped first: between two kills the survivor could begin a moved request, and its death would then rightly
        be held against that request (the poison rule).
        """
        pids = [self.pid(group, "rank") for group in range(self.groups)]
        for sig in (signal.SIGSTOP, signal.SIGKILL):
            for pid in pids:
                os.kill(pid, sig)

    def frontend_pid(self) -> int:
        return next(pid for pid in self.descendants() if b"frontend.main" in Path(f"/proc/{pid}/cmdline").read_bytes())

    def serving_group(self) -> int:
        """A group that is running requests."""
        status = self.wait(lambda s: any(g["running"] for g in s["groups"]), "running request", 30)
        return max(status["groups"], key=lambda g: g["running"])["id"]

    # ---- end

    def launch_id(self) -> str:
        """What its shared memory is named after; it is part of the default run directory's name too."""
        for pid in self.descendants():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
                if found := re.search(r"kevlar-\d+-([0-9a-f]{8})", command):
                    return found[1]
        raise AssertionError("no process of the server names its run directory")

    def descendants(self) -> list[int]:
        """Every process this server started, by the environment they all inherit."""
        return [pid for pid in _pids() if pid != os.getpid() and self._is_ours(pid)]

    def _is_ours(self, pid: int) -> bool:
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            port = f"{self.port}".encode()
            return port in command or f"KEVLAR_TEST_SERVER={self.port}".encode() in environment
        return False

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 60.0) -> int:
        """Signal the launcher and wait for its end. Its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        try:
            return self.process.wait(timeout)
        finally:
            if self.process.poll() is None:
                self.process.kill()
                self.process.wait()
            self._output.close()


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())
