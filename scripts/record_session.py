#!/usr/bin/env python3
"""Record a terminal in which a worker is killed under load: `docs/img/kill.cast`, and its picture `docs/img/kill.svg`.

    pip install 'sglang-kevlar[record]'; apt-get install tmux curl jq
    python scripts/record_session.py [--output docs/img/kill]

A real server with two groups, six real streams, a real `kill -9`. What is typed is sent to shells in a tmux, whose
client runs in a pseudo-terminal; everything that comes out of that is recorded with its time (asciicast v2). Waits
inside `Recording.cut` take no time in the recording, and a comment typed at their place says how long they were.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import fcntl
import json
import os
import pty
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

import cast_to_svg

ROOT = Path(__file__).resolve().parents[1]
PORT = 30000  # the default of the server and of ctl
COLUMNS, LINES, SHELL_LINES = 120, 38, 24
#: of each answer: enough that they run until the killed group is back, and a little longer, on two cores
TOKENS = 1000
#: seconds in which one reads what was printed
READING = 1.5
START_TIMEOUT, ANSWER_TIMEOUT = 300.0, 120.0
PROMPTS = ("def main():", "Return the", "class Server:", "import threading", "Raised when", "The path of the")
ASK = """\
curl -sN localhost:30000/v1/completions -H 'Content-Type: application/json' -d @requests/$1 |
  sed -un 's/^data: {/{/p' | jq -rj --unbuffered '.choices[0].text'
"""
SERVE = """\
python -m sglang_kevlar.launch_server --model-path model --served-model-name demo --dtype float32 \\
  --enable-deterministic-inference --worker-groups 2 --host-label here > server.log 2>&1 &
"""
TMUX_CONF = """\
set -g status off
set -g escape-time 0
set -g pane-border-style fg=brightblack
set -g pane-active-border-style fg=brightblack
"""


class Recording:
    """What comes out of a command in a pseudo-terminal, and when."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.events: list[tuple[float, str, str]] = []
        self._begin = time.monotonic()
        self._removed = 0.0
        self._frozen: float | None = None
        master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        self._process = subprocess.Popen(
            command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment, start_new_session=True
        )
        os.close(terminal)
        self._master = master
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Linux: EIO when the last process of the terminal has gone.
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 1 << 16):
                self.events.append((self._now(), "o", decoder.decode(data)))

    def _now(self) -> float:
        frozen = self._frozen
        return frozen if frozen is not None else time.monotonic() - self._begin - self._removed

    @contextlib.contextmanager
    def cut(self, what: str) -> Iterator[Callable[[], str]]:
        """What happens inside takes no time. Yields what says afterwards how long it was."""
        began = time.monotonic()
        self._frozen = self._now()
        self.events.append((self._frozen, "m", f"cut: {what}"))
        try:
            yield lambda: f"# {what}: {time.monotonic() - began:.0f} s, cut"
        finally:
            self._removed += time.monotonic() - began
            self._frozen = None

    def stop(self) -> None:
        """What the terminal says about its end is not recorded."""
        recorded = len(self.events)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(10)
        self._reader.join(10)
        del self.events[recorded:]
        os.close(self._master)

    def write(self, path: Path) -> None:
        header = {"version": 2, "width": COLUMNS, "height": LINES, "title": "A worker is killed under load"}
        lines = [json.dumps(header), *(json.dumps([round(at, 4), kind, data]) for at, kind, data in self.events)]
        path.write_text("\n".join(lines) + "\n")


class Tmux:
    """Six shells for streams, three beside each other, above one that is typed in. A context manager."""

    def __init__(self, directory: Path) -> None:
        self._base = ["tmux", "-S", str(directory / "tmux.sock"), "-f", str(directory / "tmux.conf")]
        (directory / "tmux.conf").write_text(TMUX_CONF)
        self._home = directory / "session"
        # Only what a shell needs: nothing of who records.
        self._inside = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT / "python"),
            "HOME": str(self._home),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PS1": r"\[\e[32m\]$\[\e[0m\] ",
        }
        self.environment = {**self._inside, "TERM": "linux"}
        self.streams: list[str] = []
        self.shell = ""

    def __call__(self, *command: str) -> str:
        done = subprocess.run(
            [*self._base, *command], env=self.environment, capture_output=True, text=True, timeout=20, check=True
        )
        return done.stdout.strip()

    def attach(self) -> list[str]:
        return [*self._base, "attach"]

    def __enter__(self) -> Tmux:
        try:
            self._split()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _split(self) -> None:
        variables = [f"{name}={value}" for name, value in self._inside.items()]
        shell = ["env", "-i", "TERM=screen", *variables, "bash", "--noprofile", "--norc"]
        new = ["-P", "-F", "#{pane_id}", "-c", str(self._home)]
        first = self("new-session", "-d", "-x", str(COLUMNS), "-y", str(LINES), *new, *shell)
        self.shell = self("split-window", "-v", "-l", str(SHELL_LINES), "-t", first, *new, *shell)
        rows = [first, self("split-window", "-v", "-t", first, *new, *shell)]
        for row in rows:
            second = self("split-window", "-h", "-l", "66%", "-t", row, *new, *shell)
            third = self("split-window", "-h", "-t", second, *new, *shell)
            self.streams += [row, second, third]
        self("select-pane", "-t", self.shell)

    def __exit__(self, *_: object) -> None:
        """SIGTERM to the server, so that it cleans up; SIGKILL for whatever is left."""
        try:
            server = psutil.Process(int(self("display-message", "-p", "#{pid}")))
        except (subprocess.SubprocessError, psutil.NoSuchProcess):
            return  # it was never there
        family = server.children(recursive=True)
        launchers = [each for each in family if "sglang_kevlar.launch_server" in _command(each)]
        for launcher in launchers:
            with contextlib.suppress(psutil.NoSuchProcess):
                launcher.terminate()
        psutil.wait_procs(launchers, timeout=40)
        with contextlib.suppress(subprocess.SubprocessError):
            self("kill-server")
        for left in psutil.wait_procs([*family, server], timeout=10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()

    def type(self, text: str) -> None:
        """As fast as somebody who knows what they want."""
        for i in range(0, len(text), 3):
            self("send-keys", "-t", self.shell, "-l", "--", text[i : i + 3])
            time.sleep(0.02)
        self("send-keys", "-t", self.shell, "Enter")

    def idle(self, pane: str = "") -> bool:
        """The prompt is there again."""
        pane = pane or self.shell
        alone = self("display-message", "-p", "-t", pane, "#{pane_current_command}") == "bash"
        return alone and self("capture-pane", "-p", "-t", pane).endswith("$")

    def run(self, text: str, timeout: float = ANSWER_TIMEOUT) -> None:
        self.type(text)
        time.sleep(0.3)
        until(self.idle, timeout, text)


def until(ready: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not ready():
        if time.monotonic() > deadline:
            raise SystemExit(f"not within {timeout:g} s: {what}")
        time.sleep(0.05)


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def groups() -> list[dict[str, Any]]:
    """Of the server's status; none while it does not answer."""
    with contextlib.suppress(OSError):
        with urlopen(f"http://127.0.0.1:{PORT}/kevlar/status", timeout=5) as response:
            return json.load(response)["groups"]
    return []


def all_ready() -> bool:
    return [each["state"] for each in groups()] == ["ready", "ready"]


def play(tmux: Tmux, recording: Recording, home: Path) -> None:
    tmux.run(SERVE.strip())
    with recording.cut("until both groups serve") as said:
        until(all_ready, START_TIMEOUT, "the server is ready")
        time.sleep(1)  # the shadows find each other
    tmux.run(said())
    tmux.run("cat ask")
    tmux.type(f"seq {len(PROMPTS)} | xargs -P {len(PROMPTS)} -I N sh -c './ask N > undisturbed/N'")
    with recording.cut("six answers that nothing disturbs, to compare with") as said:
        until(tmux.idle, ANSWER_TIMEOUT, "the answers that nothing disturbs")
    tmux.run(said())
    time.sleep(0.5)
    for number, pane in enumerate(tmux.streams, 1):
        tmux("send-keys", "-t", pane, f"./ask {number} | tee killed/{number}", "Enter")
    time.sleep(0.5)
    tmux.run("python -m sglang_kevlar.ctl status")
    time.sleep(READING)
    victim = max(groups(), key=lambda each: each["running"])
    if not victim["running"]:
        raise SystemExit("nothing runs any more: more --tokens")
    tmux.run(f"kill -9 {victim['pids']['ranks'][0]}")
    time.sleep(1)
    tmux.run("python -m sglang_kevlar.ctl failovers")
    time.sleep(READING)
    until(all_ready, START_TIMEOUT, "the killed group is back")
    tmux.run("python -m sglang_kevlar.ctl status")
    if not any(each["running"] for each in groups()):
        raise SystemExit("the streams ended before they were to: more --tokens")
    for pane in tmux.streams:
        until(lambda pane=pane: tmux.idle(pane), ANSWER_TIMEOUT, "the streams end")
    tmux.run("diff -rs undisturbed killed")
    for number in map(str, range(1, len(PROMPTS) + 1)):
        before, after = (home / folder / number for folder in ("undisturbed", "killed"))
        if not before.stat().st_size or before.read_bytes() != after.read_bytes():
            raise SystemExit(f"answer {number} is empty, or not what it was")
    time.sleep(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of each answer; more on a faster machine")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/img/kill", help="without .cast and .svg")
    arguments = parser.parse_args()
    output: Path = arguments.output
    for tool in ("tmux", "curl", "jq"):
        if not shutil.which(tool):
            raise SystemExit(f"no {tool} (Debian: apt-get install {tool})")
    with contextlib.closing(socket.socket()) as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            raise SystemExit(f"somebody listens on port {PORT}, which is that of the recorded server")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="kevlar-session-") as name:
        home = Path(name) / "session"
        for folder in ("undisturbed", "killed", "requests"):
            (home / folder).mkdir(parents=True)
        (home / "model").symlink_to(ROOT / "python/sglang_kevlar/demo/model")
        (home / "ask").write_text(ASK)
        (home / "ask").chmod(0o755)
        for number, prompt in enumerate(PROMPTS, 1):
            body = {
                "model": "demo",
                "prompt": prompt,
                "stream": True,
                "max_tokens": arguments.tokens,
                "ignore_eos": True,
            }
            (home / f"requests/{number}").write_text(json.dumps({**body, "temperature": 0.8, "seed": number}))
        with Tmux(Path(name)) as tmux:
            recording = Recording(tmux.attach(), tmux.environment)
            try:
                play(tmux, recording, home)
            finally:
                recording.stop()
    recording.write(output.with_suffix(".cast"))
    output.with_suffix(".svg").write_text(cast_to_svg.render(output.with_suffix(".cast")))


if __name__ == "__main__":
    main()
