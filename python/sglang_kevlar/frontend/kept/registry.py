"""The kept requests of this frontend with their runs, and the end of those that nobody comes back for."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Scope

from sglang_kevlar.control.kept_requests import Gone, Kept, KeptRequests
from sglang_kevlar.control.lineage import Lineage
from sglang_kevlar.frontend.kept.elsewhere import Elsewhere
from sglang_kevlar.frontend.kept.progress import Recorded, Recorder
from sglang_kevlar.frontend.kept.run import ABORT_GRACE, Run

#: seconds between two looks for what has expired
SWEEP = 0.5


class KeptRuns:
    """Lives on one event loop."""

    def __init__(self, retention: float, memory: int, recorder: Recorder | None = None) -> None:
        self.requests = KeptRequests(retention, memory)
        #: what answers a request that is kept
        self.endpoints: ASGIApp | None = None
        #: where there are other frontends
        self.elsewhere: Elsewhere | None = None
        self.recorder = recorder
        self._runs: dict[Kept, Run] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    def find(self, principal: str, key: str) -> Run | Gone | None:
        return self._run(self.requests.find(principal, key))

    def find_rid(self, principal: str, rid: str) -> Run | Gone | None:
        return self._run(self.requests.find_rid(principal, rid))

    def _run(self, found: Kept | Gone | None) -> Run | Gone | None:
        return self._runs[found] if isinstance(found, Kept) else found

    def begin(
        self, principal: str, key: str, rid: str, digest: bytes, body: int, lineage: Lineage | None = None
    ) -> Run:
        """A new run, not yet serving; ``body``: the bytes of its request. Raises NoRoom, RidTaken."""
        now = asyncio.get_running_loop().time()
        kept = self.requests.add(principal, key, rid, digest, body, now)
        run = self._runs[kept] = Run(kept, self.requests, lineage)
        if self._sweeper is None:
            self._sweep()
        return run

    def serve(self, run: Run, app: ASGIApp, scope: Scope, body: bytes, recorded: Recorded | None = None) -> None:
        run.begin(scope, body, self.recorder, recorded)
        run.task = asyncio.create_task(run.serve(app, scope))

    def abandon(self, principal: str, rid: str, why: str) -> None:
        """Another frontend has it: whoever comes for it is sent there."""
        kept = self.requests.find_rid(principal, rid)
        if isinstance(kept, Kept):
            run = self._runs[kept]
            self.requests.forget(kept, why)
            self._end(run)
            self._drop_record(run, why)

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
            self._end(self._runs[kept])
        for run in [run for run in self._runs.values() if run.kept.gone is not None]:
            self._drop_record(run, run.kept.gone or "")
            if run.through:
                del self._runs[run.kept]
        self._sweeper = loop.call_later(SWEEP, self._sweep) if self._runs else None

    def _end(self, run: Run) -> None:
        run.abandon()
        if run.task is not None:
            asyncio.get_running_loop().call_later(ABORT_GRACE, run.task.cancel)

    @staticmethod
    def _drop_record(run: Run, why: str) -> None:
        record, run.record = run.record, None
        if record is not None:
            record.drop(why)
