"""A small endpoint of our own under the middleware that keeps requests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.middleware import Middleware

from asgi_exchange import Exchange
from sglang_kevlar.frontend.kept import endpoints
from sglang_kevlar.frontend.kept.middleware import KeptMiddleware
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.kept.run import Run
from sglang_kevlar.frontend.middleware import OutcomeMiddleware
from sglang_kevlar.frontend.outcome import Failure, outcome_of

KEY = {"Idempotency-Key": "k"}
MIB = 1 << 20


class World:
    """An endpoint ``/generate`` that streams what it is given with `put`, and the app around it."""

    def __init__(self, retention: float = 60.0, memory: int = MIB) -> None:
        self.runs = KeptRuns(retention, memory)
        self.started = 0
        self.aborted = 0
        self.ended = 0
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        #: events that the endpoint got rid of
        self.taken = 0
        self.app = FastAPI()
        self.app.user_middleware.append(
            Middleware(KeptMiddleware, runs=self.runs, routes=[self._route("/generate", self._generate)])
        )
        self.app.user_middleware.append(Middleware(OutcomeMiddleware))
        endpoints.install(self.app, self.runs)

    def _route(self, path: str, endpoint: Any) -> Any:
        self.app.add_api_route(path, endpoint, methods=["POST"])
        return self.app.router.routes[-1]

    async def _generate(self, request: Request) -> Any:
        self.started += 1
        body = await request.json()
        outcome = outcome_of(request)
        assert outcome is not None
        if not body.get("stream", True):
            output = await self.queue.get()
            outcome.first_token = True
            return JSONResponse({"text": output}, headers={"x-own": "1"})
        return StreamingResponse(self._events(request, outcome), media_type=body.get("type", "text/event-stream"))

    async def _outputs(self) -> Any:
        while (item := await self.queue.get()) is not None:
            yield item

    async def _events(self, request: Request, outcome: Any) -> Any:
        try:
            outputs = self._outputs()
            tokens = 0
            async for item in outcome.kept.watch(self._counted(outputs)) if outcome.kept else self._counted(outputs):
                outcome.first_token = True
                if isinstance(item["value"], Failure):
                    outcome.fail(item["value"])
                elif isinstance(item["value"], Exception):
                    raise item["value"]
                tokens += 1
                for part in range(1 + tokens % 2):
                    yield f"data: {item['value']} {part}\n\n"
                    self.taken += 1
            yield "data: [DONE]\n\n"
            self.ended += 1
        except BaseException:
            self.aborted += 1
            raise

    async def _counted(self, outputs: Any) -> Any:
        tokens = 0
        async for value in outputs:
            tokens += 1
            yield {"value": value, "meta_info": {"completion_tokens": tokens}}

    def put(self, *items: Any) -> None:
        for item in items:
            self.queue.put_nowait(item)

    def post(self, body: bytes = b"{}", headers: dict[str, str] = KEY, read: int | None = None) -> Exchange:
        return Exchange(self.app, "POST", "/generate", body, headers, read)

    def closed(self) -> bool:
        """Whether request r runs and cannot be taken up."""
        run = self.runs.find_rid("", "r")
        return isinstance(run, Run) and run.kept.closed is not None

    def get(self, path: str, **headers: str) -> Exchange:
        return Exchange(
            self.app, "GET", f"/kevlar/requests/{path}", b"", {k.replace("_", "-"): v for k, v in headers.items()}
        )


def play(test: Callable[[World], Coroutine[Any, Any, None]], **bounds: Any) -> None:
    async def run() -> None:
        world = World(**bounds)
        try:
            await asyncio.wait_for(test(world), 30)
        finally:
            for run in list(world.runs._runs.values()):
                run.abandon()

    asyncio.run(run())


def events(count: int) -> Callable[[Exchange], bool]:
    return lambda exchange: len(exchange.events) >= count


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)
