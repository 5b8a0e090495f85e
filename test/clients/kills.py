"""Programs of clients, run undisturbed and again while a rank of the group that works for them is killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx

#: kills of which none came while a request of the program ran, before the test gives up
TRIES = 6
LOGPROB_TOLERANCE = 1e-3


class Watched:
    """A server, or an Engine with a status of its own, whose groups can be killed."""

    def __init__(self, status: Callable[[], dict[str, Any]]) -> None:
        self.status = status

    @classmethod
    def at(cls, url: str) -> Watched:
        client = httpx.Client(base_url=url, timeout=10)
        return cls(lambda: client.get("/kevlar/status").json())

    def redirected(self) -> int:
        return sum(failover["redirected"] for failover in self.status()["failovers"])

    def busiest(self) -> dict[str, Any]:
        return max(self.status()["groups"], key=lambda group: group["running"])

    def whole(self) -> bool:
        return all(group["state"] == "ready" for group in self.status()["groups"])

    def wait_whole(self, timeout: float = 120.0) -> None:
        deadline = time.monotonic() + timeout
        while not self.whole():
            assert time.monotonic() < deadline, f"a group is not back: {self.status()['groups']}"
            time.sleep(0.05)

    def wait_idle(self, timeout: float = 30.0) -> None:
        deadline = time.monotonic() + timeout
        while any(group["running"] for group in self.status()["groups"]):
            assert time.monotonic() < deadline, f"requests are left: {self.status()['groups']}"
            time.sleep(0.05)


class Killer(threading.Thread):
    """SIGKILLs the rank of the busiest group, ``delay`` seconds after the start or when it next runs something."""

    def __init__(self, watched: Watched, delay: float) -> None:
        super().__init__(daemon=True)
        self._watched, self._delay = watched, delay
        self._end = threading.Event()
        self.killed: int | None = None

    def run(self) -> None:
        self._end.wait(self._delay)
        while not self._end.is_set():
            group = self._watched.busiest()
            if group["running"] and group["pids"]["ranks"]:
                self.killed = group["pids"]["ranks"][0]
                os.kill(self.killed, signal.SIGKILL)
                return
            self._end.wait(0.002)

    def stop(self) -> None:
        self._end.set()
        self.join()


class Kills(threading.Thread):
    """Kill after kill, each ``pause`` seconds (at random, half to one and a half) after all groups were ready."""

    def __init__(self, watched: Watched, pause: float, seed: int) -> None:
        super().__init__(daemon=True)
        self._watched, self._pause, self._random = watched, pause, random.Random(seed)
        self._end = threading.Event()
        self.count = 0

    def run(self) -> None:
        while not self._end.wait(self._pause * self._random.uniform(0.5, 1.5)):
            group = self._watched.busiest()
            if group["running"] and self._watched.whole():
                os.kill(group["pids"]["ranks"][0], signal.SIGKILL)
                self.count += 1

    def __enter__(self) -> Kills:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


def same_through_a_kill(watched: Watched, program: Callable[[], Any], seed: int) -> None:
    """``program`` undisturbed and then through kills until one moved a request of it: one and the same outcome."""
    chance = random.Random(seed)
    started = time.monotonic()
    expected = program()
    seconds = time.monotonic() - started
    for _ in range(TRIES):
        watched.wait_whole()
        before = watched.redirected()
        killer = Killer(watched, seconds * chance.uniform(0.05, 0.8))
        killer.start()
        try:
            outcome = program()
        finally:
            killer.stop()
        assert same(outcome, expected), difference(expected, outcome)
        watched.wait_whole()
        watched.wait_idle()
        if watched.redirected() > before:
            return
    raise AssertionError(f"none of {TRIES} kills came while the program had a request running")


def same(one: Any, other: Any) -> bool:
    """Equal, but for log-probabilities, whose last digits depend on the order of sums."""
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= LOGPROB_TOLERANCE
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def difference(expected: Any, outcome: Any) -> str:
    """Where it begins: both are long."""
    one, other = repr(expected), repr(outcome)
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"at {at} of {len(one)}: {one[max(0, at - 60) : at + 120]!r} != {other[max(0, at - 60) : at + 120]!r}"
