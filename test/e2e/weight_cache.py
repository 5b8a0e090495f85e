"""Groups whose weights are a weight cache daemon's, the same on CPUs (test_weight_cache.py) and on GPUs (test/gpu)."""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from losing_ranks import CASES, World
from server import START_TIMEOUT, Server

#: in which a daemon that was killed is started again, and a group behind it
FLAGS = ["--weight-cache-mode", "client", "--hold-timeout", "120"]
MAPPED, FROM_DISK = "Weights are those of the weight cache daemon", "falling back to disk load"


class Daemon:
    """Upstream's, started by ``command`` as its users would. It can be ended and started again."""

    def __init__(self, command: list[str], directory: Path, env: dict[str, str]) -> None:
        """``directory``: of its log, and of its files in a directory of their own."""
        self.sockets = directory / "sockets"
        self.sockets.mkdir()
        self._command, self._log, self._env = command, directory / "log", env
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        for old in self.sockets.glob("*.ready"):
            old.unlink()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **self._env}
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not list(self.sockets.glob("*.ready")):  # it writes that once it serves
            assert self._process.poll() is None, self._log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, "the daemon does not get ready"
            time.sleep(0.1)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for left in Path("/dev/shm").glob(f"torch_{self._process.pid}_*"):
                left.unlink()

    def forget(self) -> None:
        """What it leaves when it is killed; it removes these itself when it ends otherwise, or is started again."""
        for left in self.sockets.iterdir():
            left.unlink()


def attach(world: World, daemon: Daemon) -> None:
    """Without a daemon, groups have loaded the weights from disk; those that start anew map the same ones of it."""
    server = world.server
    _wait_said(server, FROM_DISK, 2 * server.groups)
    daemon.start()
    for group in range(server.groups):
        epoch, supervisor = server.group(group)["epoch"], server.kill(group, "supervisor")
        assert world.wait_epoch(group, epoch)["pids"]["supervisor"] != supervisor
        _wait_said(server, MAPPED, 2 * (group + 1))


def check_who_maps(world: World) -> None:
    """Groups answer as they did with weights from disk; a spare has mapped them beside the rank that serves."""
    server = world.server
    world.check(world.ask())
    mapped = _said(server, MAPPED)
    world.spare_takes_over(0)
    _wait_said(server, MAPPED, mapped + 1)
    assert _said(server, FROM_DISK) == 2 * server.groups  # as before there was a daemon


def check_changes(world: World) -> None:
    """Nothing is written to what is not the groups' own, and nothing that runs is lost to the attempt."""
    server = world.server
    with ThreadPoolExecutor(len(CASES)) as pool:
        running = [pool.submit(case.run, server.url) for case in CASES]
        time.sleep(0.1)
        for path, body in (
            ("/update_weights_from_disk", {"model_path": "anything", "abort_all_requests": True}),
            ("/kevlar/weights", {"model_path": "anything"}),
            ("/weights_checker", {"action": "reset_tensors"}),
            ("/release_memory_occupation", {}),
        ):
            answer = httpx.post(server.url + path, json=body, timeout=30)
            assert answer.status_code == 400 and "weight cache daemons" in answer.text, (path, answer.text)
        world.check([one.result() for one in running])


def check_death_of_the_daemon(world: World, daemon: Daemon) -> None:
    """All ranks end with it at once, and what they ran goes on when it is there again, however long that takes."""
    server = world.server
    from_disk = _said(server, FROM_DISK)
    before = [group["pids"]["ranks"] for group in server.status()["groups"]]
    with ThreadPoolExecutor(len(CASES)) as pool:
        running = [pool.submit(case.run, server.url) for case in CASES]
        time.sleep(0.3)
        daemon.kill()
        daemon.forget()
        server.wait(lambda status: all(group["state"] != "ready" for group in status["groups"]), "no group serves", 30)
        _wait_said(server, "Waiting for the weight cache daemon", server.groups)
        daemon.start()
        world.check([one.result() for one in running])
    server.wait_ready()
    now = [group["pids"]["ranks"] for group in server.status()["groups"]]
    assert all(one != other for one, other in zip(before, now, strict=True))
    assert _said(server, "the weights are its memory: this rank ends") >= server.groups
    assert _said(server, "ended because the weight cache daemon died, whose memory its weights were") >= server.groups
    assert _said(server, FROM_DISK) == from_disk


def _said(server: Server, words: str) -> int:
    return server.log.read_text(errors="replace").count(words)


def _wait_said(server: Server, words: str, times: int) -> None:
    """By whatever process of the server: a spare says nothing that its status shows."""
    server.wait(lambda _: _said(server, words) >= times, f"{times} times {words!r}", 120)
