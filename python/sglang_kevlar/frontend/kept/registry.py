"""The kept requests of this frontend with their runs, and the end of those that nobody comes back for."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Scope

from sglang_kevlar.control.kept_requests import Gone, Kept, KeptRequests
from sglang_kevlar.frontend.kept.progress import Recorder
from sglang_kevlar.frontend.kept.run import ABORT_GRACE, Run

#: seconds between two looks for what has expired
SWEEP = 0.5


class KeptRuns:
    """Lives on one event loop."""

    def __init__(self, retention: float, memory: int, recorder: Recorder | None = None) -> None:
        self.requests = KeptRequests(retention, memory)
        self._recorder = recorder
        self._runs: dict[Kept, Run] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def find(self, principal: str, key: str) -> Run | Gone | None:
        return self._run(self.requests.find(principal, key))

    def find_rid(self, principal: str, rid: str) -> Run | Gone | None:
        return self._run(self.requests.find_rid(principal, rid))

    def _run(self, found: Kept | Gone | None) -> Run | Gone | None:
        return self._runs[found] if isinstance(found, Kept) else found

    def begin(self, principal: str, key: str, rid: str, digest: bytes, body: int) -> Run:
        """A new run, not yet serving; ``body``: the bytes of its request. Raises NoRoom, RidTaken."""
        now = asyncio.get_running_loop().time()
        kept = self.requests.add(principal, key, rid, digest, body, now)
        run = self._runs[kept] = Run(kept, self.requests)
        if self._sweeper is None:
            self._sweep()
        return run

    def serve(self, run: Run, app: ASGIApp, scope: Scope, body: bytes) -> None:
        run.task = asyncio.create_task(run.serve(app, scope, body, self._recorder))

    def drain(self) -> None:
        """The server shuts down."""
        self.requests.drain()

    def status(self) -> dict[str, Any]:
        requests = self.requests
        return {"running": len(requests) - requests.ended, "ended": requests.ended, "bytes": requests.used}

    def expires_in(self, run: Run) -> float | None:
        """Seconds; None while it runs for a client."""
        due = self.requests.expires(run.kept)
        return None if due is None else max(0.0, due - asyncio.get_running_loop().time())

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        for kept in self.requests.expire(loop.time()):
            run = self._runs[kept]
            run.abandon()
            if run.task is not None:
                loop.call_later(ABORT_GRACE, run.task.cancel)
        for run in [run for run in self._runs.values() if run.kept.gone is not None and run.through]:
            del self._runs[run.kept]
        self._sweeper = loop.call_later(SWEEP, self._sweep) if self._runs else None
