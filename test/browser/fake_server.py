"""The real HTTP endpoints and page over groups that are made up: whatever is to be shown can be."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import UTC, datetime
from typing import Any

import uvicorn
from fastapi import FastAPI

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
from sglang.srt.managers.tokenizer_manager import ServerStatus  # noqa: E402
from sglang.srt.utils.auth import add_api_key_middleware  # noqa: E402

from sglang_kevlar.frontend.endpoints import install  # noqa: E402
from sglang_kevlar.frontend.history import History  # noqa: E402
from sglang_kevlar.observability.events import FailoverEvents  # noqa: E402
from sglang_kevlar.observability.latency import RollingLatency  # noqa: E402
from sglang_kevlar.observability.metrics import NoMetrics  # noqa: E402


class FakeGroups:
    """What a frontend with two groups would say. Group 0 can be lost, and come back."""

    gracefully_exit = False

    def __init__(self, cause: str = "rank0 killed by SIGKILL", name: str = "0") -> None:
        self.server_status = ServerStatus.Up
        self.cause, self.name = cause, name
        self.states = {0: "ready", 1: "ready"}
        self.epochs = {0: 1, 1: 1}
        self.latency = RollingLatency()
        self.events = FailoverEvents(NoMetrics())
        self.history = History(self.latency, self._states)
        self.history.look()
        now = time.monotonic()
        for i in range(1200):
            self.latency.tokens(now - 60 + i / 20, 0.02 + 0.004 * (i % 7), 1, first=i % 40 == 0)

    def lose(self) -> None:
        rids = ["a", "b", "c"]
        epoch = self.epochs[0]
        self.events.failover(group=0, epoch=epoch, cause=self.cause, kind="exit", detect_ms=0.4, rids=rids)
        for rid in rids:
            self.events.redirected(rid, group=1, epoch=self.epochs[1], delivered_tokens=30)
            self.events.resumed(rid, 14, 500)
        self._become("down", 0)
        self._become("starting", 1)

    def come_back(self) -> None:
        self._become("ready", 0)

    def _become(self, state: str, epochs: int) -> None:
        self.states[0] = state
        self.epochs[0] += epochs
        self.history.look()

    def _states(self) -> list[tuple[int, str, int]]:
        return [(group, state, self.epochs[group]) for group, state in self.states.items()]

    def kevlar_status(self) -> dict[str, Any]:
        shadow = {"to": 1, "lag_tokens": 12, "lag_ms": 3.2}
        groups = [
            {
                "id": group,
                "role": "active",
                "state": state,
                "epoch": self.epochs[group],
                "pids": {"supervisor": 10, "ranks": [11, 12], "detokenizer": 13},
                "cause": self.cause if state != "ready" else "",
                "retry_in": 0.0,
                "name": self.name if group == 0 else "1",
                "host": "",
                "link": "local",
                "shadow": shadow if group == 0 and state == "ready" else None,
                "weight_version": "default",
                "running": 3,
                "queued": 0,
            }
            for group, state in self.states.items()
        ]
        return {
            "version": "0.1.0",
            "upstream": "0.5.21",
            "uptime_s": 4000.0,
            "held": 0,
            "groups": groups,
            "kept": {"running": 0, "ended": 0, "bytes": 0},
            "frontends": [{"name": "b", "state": "current", "url": "http://10.0.0.2:30000"}],
            "failovers": self.events.history(),
        }

    def kevlar_history(self, instance: str, after: int) -> dict[str, Any]:
        return self.history.json(instance, after)

    def serves(self) -> bool:
        return True

    async def drain_group(self, group: int) -> None:
        raise AssertionError("the page only looks")

    restart_group = drain_group

    async def probe_groups(self, timeout: float) -> dict[int, bool]:
        return {0: True}


class FakeServer:
    def __init__(self, groups: FakeGroups, port: int, api_key: str | None = None) -> None:
        self.url = f"http://127.0.0.1:{port}"
        app = FastAPI()
        app.get("/health")(health_generate)
        app.get("/health_generate")(health_generate)
        app.get("/ready")(ready)
        install(app, groups, 1.0)  # type: ignore[arg-type]
        if api_key is not None:
            add_api_key_middleware(app, api_key=api_key, admin_api_key=None)
        config = uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)

    def __enter__(self) -> FakeServer:
        self._thread.start()
        deadline = time.monotonic() + 20
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the HTTP server does not start"
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(20)


async def health_generate() -> None:
    """Upstream's, which is replaced."""


async def ready() -> None:
    """Upstream's, which is replaced."""


if __name__ == "__main__":
    # To look at the page: `PYTHONPATH=python:test/browser python test/browser/fake_server.py`.
    groups = FakeGroups()
    with FakeServer(groups, 8080) as server, contextlib.suppress(KeyboardInterrupt):
        print(server.url + "/kevlar/", datetime.now(UTC))
        while True:
            time.sleep(10)
            groups.lose()
            time.sleep(2)
            groups.come_back()
