"""What is compared: each on the same machine with the same model, and a worker of it killed."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.request import urlopen

from servers import START_TIMEOUT, Server


class Ours:
    """Two worker groups."""

    def __init__(self, model: Path, port: int, directory: Path, *flags: str) -> None:
        self._server = Server(model, port, directory / "log", *flags, groups=2)
        self.url = self._server.url

    def wait_whole(self, timeout: float = START_TIMEOUT) -> None:
        """Until all workers serve."""
        self._server.wait_ready(timeout)

    def whole(self) -> bool:
        return self._server.ready()

    def kill(self) -> None:
        """SIGKILL the scheduler of the worker with most to do."""
        groups = self._server.status()["groups"]
        os.kill(max(groups, key=lambda group: group["running"])["pids"]["ranks"][0], signal.SIGKILL)

    def detected(self) -> float | None:
        """When the loss was known to whom it concerns, by the wall clock; None where nobody says it."""
        record = self._server.status()["failovers"][-1]
        return datetime.datetime.fromisoformat(record["at"]).timestamp()

    def close(self) -> None:
        self._server.__exit__()


class _Restarted:
    """A stock server that a process manager starts again when it has ended."""

    def __init__(self, start: Callable[[int], Server]) -> None:
        self._start = start
        self._starts = 0
        self.server = start(0)
        self.url = self.server.url
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ending.wait(0.1):
            if self.server.process.poll() is not None:
                self.server.__exit__()
                self._starts += 1
                self.server = self._start(self._starts)

    def kill(self) -> None:
        os.kill(self.server.pids()["scheduler"], signal.SIGKILL)

    def close(self) -> None:
        self._ending.set()
        self._thread.join()
        self.server.__exit__()


class Restarting:
    """One stock server, with all that the machine has."""

    def __init__(self, model: Path, port: int, directory: Path) -> None:
        self._worker = _stock(model, port, directory)
        self.url = self._worker.url

    def wait_whole(self, timeout: float = START_TIMEOUT) -> None:
        _wait(self.whole, timeout)

    def whole(self) -> bool:
        return self._worker.server.ready()

    def kill(self) -> None:
        self._worker.kill()

    def detected(self) -> None:
        return None

    def close(self) -> None:
        self._worker.close()


class Router:
    """Two stock servers behind sglang-router, which is installed for another interpreter."""

    def __init__(self, model: Path, port: int, directory: Path, python: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._workers = [_stock(model, port + 1 + 10 * number, directory) for number in range(2)]
        urls = [worker.url for worker in self._workers]
        command = [python, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-port", str(port + 5), "--worker-urls", *urls]
        self._output = (directory / "router").open("wb")
        self._process = subprocess.Popen(command, stdout=self._output, stderr=subprocess.STDOUT)

    def wait_whole(self, timeout: float = START_TIMEOUT) -> None:
        _wait(self.whole, timeout)

    def whole(self) -> bool:
        if not all(worker.server.ready() for worker in self._workers):
            return False
        with contextlib.suppress(OSError), urlopen(f"{self.url}/health", timeout=5) as response:
            return response.status == 200
        return False

    def kill(self) -> None:
        self._workers[0].kill()

    def detected(self) -> None:
        return None

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()
        for worker in self._workers:
            worker.close()


System = Ours | Restarting | Router


def _stock(model: Path, port: int, directory: Path) -> _Restarted:
    def start(number: int) -> Server:
        return Server(model, port, directory / f"log.{port}.{number}", stock=True)

    return _Restarted(start)


def _wait(condition: Callable[[], bool], timeout: float) -> None:
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError("the system is not ready in time")
        time.sleep(0.2)
