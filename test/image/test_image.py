"""The CPU image, run for real: it serves, survives a kill inside its container, and drains. Build it before:

docker/build_cpu.sh && ./scripts/test test/image -m slow
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import image_container
import pytest
from cases import PROMPT
from image_container import Container
from server import free_port

import sglang_kevlar

DOCKERFILE = Path(__file__).parents[2] / "docker/Dockerfile.cpu"
#: of SGLang
PINNED = re.findall(r"^ARG UPSTREAM=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)[0]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((reason := image_container.missing()) is not None, reason=reason or ""),
    pytest.mark.timeout(900),
]
TOKENS = 400


class Served:
    """A server in a container, by the command that upstream's image is given."""

    def __init__(self, container: Container, log: Path, *flags: str, **environment: str) -> None:
        self.container, self.log, port = container, log, free_port()
        self.url = f"http://127.0.0.1:{port}"
        model = ["--model-path", "/models/llama-f32", "--dtype", "float32", "--random-seed", "7"]
        command = ["python3", "-m", "sglang.launch_server", *model, "--port", str(port), *flags]
        self.process = container.start(log, *command, OMP_NUM_THREADS="1", **environment)

    def wait(self, path: str, condition: Any, timeout: float = 300) -> httpx.Response:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(httpx.HTTPError, ValueError):
                if condition(answer := httpx.get(self.url + path, timeout=30)):
                    return answer
            time.sleep(0.2)
        raise AssertionError(f"{path} did not become as wanted:\n{self.log.read_text(errors='replace')[-5000:]}")

    def groups(self) -> list[dict[str, Any]]:
        return httpx.get(self.url + "/kevlar/status", timeout=10).json()["groups"]

    def launcher(self) -> int:
        """What a container's runtime would signal."""
        for pid in self.container.pids():
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if arguments[1:3] == [b"-m", b"sglang_kevlar.launch_server"]:
                return pid
        raise AssertionError("no launcher")


class Stream:
    """A greedy answer of 400 tokens, read in a thread of its own."""

    def __init__(self, url: str) -> None:
        self.ids: list[int] = []
        self.redirects, self.done = 0, False
        self.begun = threading.Event()
        self._url = url
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
        body = {"text": PROMPT, "stream": True, "sampling_params": sampling}
        with httpx.stream("POST", self._url + "/generate", json=body, timeout=120) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    self.done = True
                elif line.startswith("data: "):
                    event = json.loads(line.removeprefix("data: "))
                    self.ids = event["output_ids"] if len(event["output_ids"]) >= len(self.ids) else self.ids
                    self.redirects = event["meta_info"].get("kevlar", {}).get("redirects", 0)
                    if len(self.ids) >= 20:
                        self.begun.set()

    def finish(self) -> list[int]:
        self._thread.join(120)
        assert self.done and len(self.ids) == TOKENS, f"{len(self.ids)} tokens, done: {self.done}"
        return self.ids


@pytest.fixture(scope="module")
def readable(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, readable by whoever the server runs as: files of weights are made for their owner only."""
    directory = tmp_path_factory.mktemp("models")
    shutil.copytree(models / "llama-f32", directory / "llama-f32")
    for path in directory.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    directory.chmod(0o755)
    return directory


@pytest.fixture(params=[None, "4711:4711"], ids=["user of the image", "another user"])
def container(request: pytest.FixtureRequest, readable: Path) -> Iterator[Container]:
    container = Container(readable, request.param)
    try:
        yield container
    finally:
        container.remove()


def test_it_serves_survives_a_kill_and_drains(container: Container, tmp_path: Path) -> None:
    server = Served(container, tmp_path / "log", "--worker-groups", "2", SGLANG_KEVLAR_REPLACE="1")

    def whole(answer: httpx.Response) -> bool:
        return [group["state"] for group in answer.json()["groups"]] == ["ready"] * 2

    server.wait("/kevlar/status", whole)
    server.wait("/ready", lambda answer: answer.status_code == 200)
    assert {os.stat(f"/proc/{pid}").st_uid for pid in server.groups()[0]["pids"]["ranks"]} <= {1000, 4711}

    kind, *check = image_container.configuration()["Healthcheck"]["Test"]
    assert kind == "CMD"
    health = container.run(*check, SGLANG_KEVLAR_HEALTH_URL=server.url + "/health")
    assert health.returncode == 0, health.stderr
    elsewhere = f"http://127.0.0.1:{free_port()}/health"
    assert container.run(*check, SGLANG_KEVLAR_HEALTH_URL=elsewhere).returncode == 1

    expected = Stream(server.url).finish()
    stream = Stream(server.url)
    assert stream.begun.wait(60)
    busiest = max(server.groups(), key=lambda group: group["running"])
    killed = container.run("sh", "-c", f"kill -KILL {busiest['pids']['ranks'][0]}")
    assert killed.returncode == 0, killed.stderr
    assert stream.finish() == expected and stream.redirects == 1
    server.wait("/kevlar/status", whole)

    last = Stream(server.url)
    assert last.begun.wait(60)
    os.kill(server.launcher(), signal.SIGTERM)
    assert last.finish() == expected, "it drains"
    assert server.process.wait(120) == 0
    deadline = time.monotonic() + 10
    while (left := container.pids()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.fixture
def plain(readable: Path) -> Iterator[Container]:
    container = Container(readable, None)
    try:
        yield container
    finally:
        container.remove()


def test_upstreams_command_is_upstreams_server(plain: Container, tmp_path: Path) -> None:
    server = Served(plain, tmp_path / "log")
    server.wait("/health_generate", lambda answer: answer.status_code == 200)
    assert httpx.get(server.url + "/kevlar/status", timeout=10).status_code == 404


def test_what_is_in_it(plain: Container) -> None:
    labels = image_container.configuration()["Labels"]
    version = plain.run("python3", "-m", "sglang_kevlar.launch_server", "--version").stdout
    assert version == f"sglang-kevlar {sglang_kevlar.__version__} (sglang {PINNED})\n"
    assert plain.run("sglang", "serve", "--version", SGLANG_KEVLAR_REPLACE="1").stdout == version
    assert plain.run("sglang", "serve", "M", SGLANG_KEVLAR_REPLACE="yes").returncode == 78
    assert labels["org.opencontainers.image.version"] == sglang_kevlar.__version__
    assert labels["sglang.version"] == PINNED
    assert plain.run("sh", "-c", "echo $(id -u):$(id -g) $HOME $(command -v python)").stdout == (
        "1000:0 /home/kevlar /opt/venv/bin/python\n"
    )
    packages = plain.run("python3", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    applied = plain.run("python3", "-m", "sglang_kevlar.upstream.patches", "apply", packages)
    assert applied.stdout == "nothing to change\n", applied


def test_a_build_that_does_not_fit_is_no_image(plain: Container) -> None:
    """The step that makes images, once more, over a file of upstream's that is not what its patch was made for."""
    files = subprocess.check_output(
        ["buildah", "mount", plain.name], text=True, env=image_container.ENVIRONMENT
    ).strip()
    (patched,) = Path(files).glob("opt/venv/lib/python3.*/site-packages/sglang/srt/entrypoints/ollama/serving.py")
    patched.write_text("# another version\n" + patched.read_text())
    steps = [
        "buildah",
        "run",
        "--user",
        "0",
        plain.name,
        "--",
        "/opt/sglang-kevlar/docker/install.sh",
        "/opt/sglang-kevlar",
    ]
    done = subprocess.run(steps, capture_output=True, text=True, timeout=300, env=image_container.ENVIRONMENT)
    assert done.returncode != 0 and "0001-ollama-last-text" in done.stdout + done.stderr
