"""Streams without end from several clients: each answer is compared, and how long it stood still is noted."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
from cases import Case
from server import Server


@dataclass
class Phase:
    """What the answers that ended in it had to suffer."""

    #: longest pause of each answer, from its request to its end; ms
    stalls: list[float] = field(default_factory=list)
    moved: int = 0

    def line(self, name: str) -> str:
        ordered = sorted(self.stalls)
        at = {"p50": 0.5, "p99": 0.99, "max": 1.0}
        shown = " / ".join(f"{ordered[min(len(ordered) - 1, int(q * len(ordered)))]:.0f}" for q in at.values())
        return f"{name}: {len(ordered)} answers, {self.moved} moved, longest pause {' / '.join(at)} {shown} ms"


class MeasuredLoad:
    """``expected``: cases with their possible answers, by weight version: token ids of each part (n > 1). As a context
    manager."""

    def __init__(self, server: Server, expected: list[tuple[Case, dict[str, list[list[int]]]]]) -> None:
        self._server = server
        self._expected = expected
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self.phase = Phase()
        #: of the answers, by weight version
        self.versions: dict[str, int] = {}
        self._problems: list[str] = []
        self._threads = [threading.Thread(target=self._client, args=each) for each in expected]

    def __enter__(self) -> MeasuredLoad:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()
        if kind is None:
            self.check()

    def check(self) -> None:
        assert not self._problems, "\n".join(self._problems)

    def take(self) -> Phase:
        """What was measured since the last time."""
        with self._lock:
            taken, self.phase = self.phase, Phase()
        return taken

    def more(self, answers: int, timeout: float = 120.0) -> None:
        """Wait until so many more have ended."""
        wanted, deadline = sum(self.versions.values()) + answers, time.monotonic() + timeout
        while sum(self.versions.values()) < wanted:
            self.check()
            assert time.monotonic() < deadline, f"no {answers} answers within {timeout:g} s"
            time.sleep(0.05)

    def _client(self, case: Case, answers: dict[str, list[list[int]]]) -> None:
        try:
            while not self._ending.is_set():
                self._one(case, answers)
        except Exception as error:
            self._problems.append(f"{case.name}: {error!r}")

    def _one(self, case: Case, answers: dict[str, list[list[int]]]) -> None:
        last, pause = time.monotonic(), 0.0
        #: the last event of each part
        parts: dict[int, dict[str, Any]] = {}
        with httpx.stream("POST", self._server.url + case.path, json=case.body, timeout=120) as response:
            assert response.status_code == 200, response.read()[:500]
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.monotonic()
                pause, last = max(pause, now - last), now
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                parts[event.get("index", 0)] = event
        (version,) = {event["meta_info"]["weight_version"] for event in parts.values()}
        tokens = [event["output_ids"] for _, event in sorted(parts.items())]
        assert tokens == answers[version], f"not the answer of weights {version}"
        with self._lock:
            self.versions[version] = self.versions.get(version, 0) + 1
            self.phase.stalls.append(pause * 1e3)
            self.phase.moved += any("kevlar" in event["meta_info"] for event in parts.values())
