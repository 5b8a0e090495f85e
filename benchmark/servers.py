"""Real servers under measurement: started as a user starts them, and gone at the end whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.request import Request, urlopen

if TYPE_CHECKING:
    from net.hosts import Host

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT = 300.0
#: how the processes of a server are called on their command lines
_ROLES = {
    "frontend": "sglang_kevlar.frontend.main",
    "scheduler": "sglang::scheduler",
    "detokenizer": "sglang::detokenizer",
}


class Launch:
    """A launcher and what it starts, on this host or another (`test/net`). A context manager."""

    def __init__(self, command: list[str], log: Path, host: Host | None = None) -> None:
        self.log = log
        self._output = log.open("wb")
        # Engines with tiny models: more threads than one each only get in each other's way.
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        self.process = (subprocess.Popen if host is None else host.popen)(
            command, stdout=self._output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """SIGTERM, then SIGKILL for whatever is left."""
        family = self._family()
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        # The last of ours cleans up after the others.
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and any(_start_ticks(pid) == started for pid, started in family.items()):
            self.process.poll()
            time.sleep(0.1)
        for pid, started in family.items():
            if _start_ticks(pid) == started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._output.close()

    def _log_end(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:])

    def _family(self) -> dict[int, int]:
        """The process and all its descendants: pid -> start ticks."""
        parents = {int(name): _parent(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        family = {self.process.pid: _start_ticks(self.process.pid)}
        while children := [pid for pid, parent in parents.items() if parent in family and pid not in family]:
            family.update({pid: _start_ticks(pid) for pid in children})
        return family


class WorkerGroup(Launch):
    """One ``python -m sglang_kevlar.launch_worker_group``."""

    def __init__(self, log: Path, *flags: str, host: Host | None = None) -> None:
        super().__init__([sys.executable, "-m", "sglang_kevlar.launch_worker_group", *flags], log, host)


class Server(Launch):
    """One ``python -m sglang_kevlar.launch_server``, ours or (``stock``) upstream's."""

    def __init__(
        self,
        model: Path,
        port: int,
        log: Path,
        *flags: str,
        groups: int = 2,
        stock: bool = False,
        joined: int = 0,
        host: Host | None = None,
    ) -> None:
        """``groups``: of its own; ``joined``: that it is to have beside them before it is ready."""
        self.url = f"http://127.0.0.1:{port}"
        self.stock = stock
        self._groups = groups + joined
        command = [sys.executable, "-m", "sglang_kevlar.launch_server", "--model-path", str(model)]
        # On a CPU float16 is what `auto` makes of a float32 model, and slower.
        command += ["--port", str(port), "--dtype", "float32", "--random-seed", "7", *flags]
        command += ["--stock"] if stock else ["--worker-groups", str(groups)]
        super().__init__(command, log, host)

    # ---- state

    def get(self, path: str, timeout: float = 10.0) -> bytes:
        """Raises OSError when there is no 200."""
        with urlopen(self.url + path, timeout=timeout) as response:
            return response.read()

    def post(self, path: str) -> None:
        with urlopen(Request(self.url + path, method="POST"), timeout=30):
            pass

    def status(self) -> dict[str, Any]:
        """``/kevlar/status``; not for stock servers."""
        return json.loads(self.get("/kevlar/status"))

    def ready(self) -> bool:
        """All groups serve."""
        try:
            self.get("/health")
            return self.stock or [group["state"] for group in self.status()["groups"]] == ["ready"] * self._groups
        except OSError:
            return False

    def wait_ready(self, timeout: float = START_TIMEOUT) -> None:
        """Raises RuntimeError, with the end of the log, when it ends or is not ready in time."""
        deadline = time.monotonic() + timeout
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server is not ready; the end of {self.log}:\n{self._log_end()}")
            time.sleep(0.2)

    # ---- processes

    def pids(self) -> dict[str, int]:
        """Of frontend, scheduler and detokenizer of a server with one group."""
        found: dict[str, int] = {"frontend": self.process.pid} if self.stock else {}
        for pid in self._family():
            with contextlib.suppress(OSError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
                found.update({role: pid for role, name in _ROLES.items() if name in command})
        return found

    def _family(self) -> dict[int, int]:
        """The process and all its descendants: pid -> start ticks."""
        parents = {int(name): _parent(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        family = {self.process.pid: _start_ticks(self.process.pid)}
        while children := [pid for pid, parent in parents.items() if parent in family and pid not in family]:
            family.update({pid: _start_ticks(pid) for pid in children})
        return family


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[1]) if fields else -1


def _start_ticks(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[19]) if fields else -1


def cpu_seconds(pid: int) -> float:
    """CPU time of all threads of a process, to the nanosecond; /proc/PID/stat has the same in ticks of 10 ms."""
    # What clock_getcpuclockid(3) returns on Linux: the scheduler's clock of the process.
    return time.clock_gettime((~pid << 3) | 2)


def make_model() -> Path:
    """The random-weight float32 Llama of scripts/make_models.py, made if it is not there."""
    script = [sys.executable, str(ROOT / "scripts/make_models.py"), str(ROOT / "models"), "--kind", "llama"]
    made = subprocess.run(script, check=True, capture_output=True, text=True)
    return Path(made.stdout.split()[-1])


def vocabulary(model: Path) -> int:
    return json.loads((model / "config.json").read_text())["vocab_size"]


def exit_on_sigterm() -> None:
    """So that ``with Server(...)`` ends its server also when the benchmark is told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
