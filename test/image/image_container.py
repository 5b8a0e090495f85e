"""Processes in a container of the CPU image, made by buildah without a daemon (as root, `--isolation chroot`).

Such a container has the image's files, user and environment, and the network and process ids of this host.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

IMAGE = os.environ.get("KEVLAR_IMAGE", "localhost/sglang-kevlar:0.1.0-cpu")
ENVIRONMENT = {**os.environ, "BUILDAH_ISOLATION": "chroot"}


def buildah(*arguments: str, timeout: float = 600) -> str:
    done = subprocess.run(["buildah", *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        raise RuntimeError(f"buildah {' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout.strip()


def missing() -> str | None:
    """Why there is nothing to test; None: there is."""
    if os.geteuid() != 0 or shutil.which("buildah") is None:
        return "needs root and buildah (Debian: apt-get install buildah)"
    try:
        buildah("inspect", "--type", "image", IMAGE)
    except RuntimeError as error:
        return f"no image {IMAGE}: docker/build_cpu.sh ({error})"
    return None


def configuration() -> dict[str, Any]:
    return json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]


class Container:
    def __init__(self, models: Path, user: str | None) -> None:
        self._options = ["--volume", f"{models}:/models:ro"] + ([] if user is None else ["--user", user])
        self._mark = f"KEVLAR_TEST_IMAGE={os.getpid()}.{time.monotonic_ns()}"
        self.name = buildah("from", "--pull-never", IMAGE)

    def command(self, command: Sequence[str], **environment: str) -> list[str]:
        variables = [f"{name}={value}" for name, value in environment.items()]
        options = [option for variable in (self._mark, *variables) for option in ("--env", variable)]
        return ["buildah", "run", *self._options, *options, self.name, "--", *command]

    def run(self, *command: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
        line = self.command(command, **environment)
        return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout)

    def start(self, log: Path, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            line = self.command(command, **environment)
            return subprocess.Popen(line, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True)

    def pids(self) -> list[int]:
        """Of everything that runs in it."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if self._mark.encode() in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
        return found

    def remove(self) -> None:
        self.end()
        buildah("rm", self.name)

    def end(self) -> None:
        """End all of it. Not by SIGKILL alone: who puts shared memory in order, which is this host's, would die too."""
        for sig, spared, patience in (
            (signal.SIGTERM, (), 20),
            (signal.SIGKILL, (b"launcher.janitor", b"resource_tracker"), 15),
            (signal.SIGKILL, (), 15),
        ):
            for pid in self.pids():
                with contextlib.suppress(OSError):
                    command = Path(f"/proc/{pid}/cmdline").read_bytes()
                    if not any(name in command for name in spared):
                        os.kill(pid, sig)
            deadline = time.monotonic() + patience
            while self.pids() and time.monotonic() < deadline:
                time.sleep(0.1)
