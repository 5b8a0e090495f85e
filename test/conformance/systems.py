#!/usr/bin/env python3
"""Start systems on this machine, run the conformance suite against each, and write the table.

    python3 -m venv /tmp/routers && /tmp/routers/bin/pip install sglang-router==0.3.2 smg==1.13.0
    python test/conformance/systems.py --routers /tmp/routers --update docs/conformance.md

The same tiny model and flags everywhere: SGLang-Kevlar with two groups; two workers of plain SGLang behind
sglang-router; the same behind smg. Workers that die are started again, as a process manager would. Results are kept in
``--out``, one JSON file a system: one that is there and not named by ``--run`` goes into the table as it is.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import json
import os
import random
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from run import table
from verdict import Verdict

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
#: package: module. Not by their commands: `smg` is one of both packages, and the later installed one's.
ROUTERS = {"sglang-router": "sglang_router.cli", "smg": "smg.cli"}
SYSTEMS = ("sglang-kevlar", *ROUTERS)
#: A run is a crash loop. What is lost is started again at once, by us and by our supervisors; with the defaults of the
#: routers the readmission of a worker that is back would take up to two minutes. Nothing else follows from these.
OUR_FLAGS = ["--worker-groups", "2", "--restart-backoff-max", "1"]
ROUTER_FLAGS = ["--health-check-interval-secs", "3", "--health-success-threshold", "1"]
ROUTER_FLAGS += ["--health-check-timeout-secs", "10", "--cb-timeout-duration-secs", "3"]
SHARED = Path("/dev/shm")
BEGIN, END = "<!-- generated: conformance -->", "<!-- end of generated -->"


def free_port() -> int:
    """Below the ephemeral ones, which a client that polls could connect to itself."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def server_command(models: Path, port: int, *flags: str) -> list[str]:
    command = [sys.executable, "-m", "sglang_kevlar.launch_server", "--model-path", str(models / "llama-f32")]
    command += ["--port", str(port), "--dtype", "float32", "--random-seed", "7", "--enable-deterministic-inference"]
    # A model with random weights would otherwise pad its JSON with white space for ever.
    command += ["--served-model-name", "tiny", "--constrained-json-disable-any-whitespace"]
    command += ["--reasoning-parser", "qwen3", "--tool-call-parser", "qwen25", "--max-lora-rank", "16"]
    return [*command, "--enable-lora", "--lora-paths", f"adapter={models / 'lora'}", *flags]


class Processes:
    """Process groups of ours, with a log file each; all gone at the end, and what they left in TMPDIR too."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._temporary = tempfile.mkdtemp(prefix="conformance-")
        self._shared_before = set(SHARED.iterdir())
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, command: list[str]) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": self._temporary}
        with (self._logs / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, start_new_session=True
            )
        self._started.append(process)
        return process

    def stop(self) -> None:
        for process in reversed(self._started):
            if process.poll() is None:
                process.terminate()
        for process in self._started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._sweep()

    def _sweep(self) -> None:
        """SGLang that is killed leaves shared memory behind. What another process has mapped is not ours to remove."""
        mapped = set()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mapped |= {
                    line.split()[-1] for line in (process / "maps").read_text().splitlines() if str(SHARED) in line
                }
        for file in set(SHARED.iterdir()) - self._shared_before:
            if str(file) not in mapped and file.name.startswith(("sglang_", "sem.mp-")):
                file.unlink(missing_ok=True)


class Workers:
    """Plain SGLang servers, each started again when it dies. ``file`` says where they are, for the commands."""

    def __init__(self, processes: Processes, models: Path, file: Path, count: int = 2) -> None:
        self._processes, self._models, self.file = processes, models, file
        self.ports = [free_port() for _ in range(count)]
        self._running = [self._start(index) for index in range(count)]
        self._write()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports]

    def stop(self) -> None:
        self._ending.set()
        self._thread.join()

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        return self._processes.start(f"worker{index}", server_command(self._models, self.ports[index], "--stock"))

    def _watch(self) -> None:
        while not self._ending.wait(0.2):
            for index, process in enumerate(self._running):
                if process.poll() is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    self._running[index] = self._start(index)
                    self._write()

    def _write(self) -> None:
        pairs = zip(self.urls(), self._running, strict=True)
        content = json.dumps([{"url": url, "pid": process.pid} for url, process in pairs])
        partial = self.file.with_suffix(".partial")
        partial.write_text(content)
        partial.rename(self.file)


def run_system(name: str, models: Path, routers: Path | None, out: Path, options: list[str]) -> None:
    """Start it, run the suite against it, and end it. Its results are then in ``out``."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    logs = out / name
    logs.mkdir(parents=True, exist_ok=True)
    processes, workers = Processes(logs), None
    try:
        if name not in ROUTERS:
            processes.start("server", server_command(models, port, *OUR_FLAGS))
            target: list[str] = []
        else:
            workers = Workers(processes, models, logs / "workers.json")
            target = ["--workers", str(workers.file)]
            wait_until_served(workers.urls())
            assert routers is not None
            command = [str(routers / "bin" / "python"), "-m", ROUTERS[name], "launch", "--host", "127.0.0.1"]
            command += [
                "--port",
                str(port),
                "--prometheus-port",
                str(free_port()),
                "--worker-urls",
                *workers.urls(),
                *ROUTER_FLAGS,
            ]
            processes.start("router", command)
        fault, recover = (shlex.join([sys.executable, str(HERE / script), *target]) for script in SCRIPTS)
        suite = [sys.executable, str(HERE / "run.py"), "--url", url, "--fault", fault, "--recover", recover]
        subprocess.run(
            [*suite, "--lora", "adapter", "--together", "8", "--json", str(out / f"{name}.json"), *options], check=False
        )
    finally:
        if workers is not None:
            workers.stop()
        processes.stop()


SCRIPTS = ("kill_busiest.py", "wait_whole.py")


def wait_until_served(urls: list[str], timeout: float = 400.0) -> None:
    from wait_whole import get

    deadline = time.monotonic() + timeout
    for url in urls:
        while True:
            with contextlib.suppress(OSError):
                get(url + "/health")
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} does not answer")
            time.sleep(0.5)


# ---- the table


def report(out: Path, routers: Path | None) -> str:
    """All results that are there, side by side: the verdicts, their counts, and why something is not exact."""
    results = {
        name: json.loads((out / f"{name}.json").read_text()) for name in SYSTEMS if (out / f"{name}.json").exists()
    }
    by_feature: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for name, listed in results.items():
        for row in listed:
            key = (row["endpoint"], "stream" if row["stream"] else "whole", row["feature"])
            by_feature.setdefault(key, {})[name] = row
    verdicts = [
        [*key, *(rows[name]["verdict"] if name in rows else "-" for name in results)]
        for key, rows in by_feature.items()
    ]
    counts = {name: collections.Counter(row["verdict"] for row in listed) for name, listed in results.items()}
    totals = [
        [str(v), *(str(counts[name][v]) for name in results)] for v in Verdict if any(c[v] for c in counts.values())
    ]
    parts = [described(list(results), routers), table(["verdict", *results], totals)]
    parts.append(table(["endpoint", "answer", "feature", *results], verdicts))
    for name, listed in results.items():
        examples = {row["verdict"]: row for row in reversed(listed) if row["detail"]}
        lines = [
            f"* {verdict}, {row['endpoint']}, {row['feature']}: `{row['detail'][:240]}`"
            for verdict, row in examples.items()
        ]
        parts += [f"{name}, one example of each verdict:", "\n".join(lines)] if lines else []
    return "\n\n".join(parts)


def described(names: list[str], routers: Path | None) -> str:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    now = datetime.datetime.now(datetime.UTC)
    systems = [f"SGLang {version('sglang')}", f"SGLang-Kevlar {commit.strip()}"]
    if routers is not None:
        code = "import importlib.metadata as m, sys; print(*(p + ' ' + m.version(p) for p in sys.argv[1:]), sep=', ')"
        asked = [str(routers / "bin/python"), "-c", code, *(name for name in names if name in ROUTERS)]
        systems += subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[:1]
    return f"{now:%d %B %Y}, {os.cpu_count()} cores, no GPU: {', '.join(systems)}."


def update(document: Path, text: str) -> None:
    """Put it between the marks."""
    before, rest = document.read_text().split(BEGIN)
    document.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", nargs="*", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--routers", type=Path, help="virtual environment with sglang-router and smg")
    parser.add_argument("--models", type=Path, default=ROOT / "models", help="as scripts/make_models.py makes them")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "conformance-results")
    parser.add_argument("--update", type=Path, help="the document that gets the table; default: print it")
    args, options = parser.parse_known_args()
    # So that everything ends with this process also when it is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if args.routers is None and set(args.run) & set(ROUTERS):
        parser.error("--routers is needed for the routers")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.run:
        run_system(name, args.models.resolve(), args.routers, args.out, options)
    text = report(args.out, args.routers)
    update(args.update, text) if args.update else print(text)


if __name__ == "__main__":
    main()
