"""Frontends with HTTP servers of their own, whose endpoint says what it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import uvicorn
from cluster_world import eventually, made_key
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from peer_frontends import Frontend
from starlette.middleware import Middleware

from sglang_kevlar.frontend.kept import endpoints
from sglang_kevlar.frontend.kept.middleware import KeptMiddleware
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.middleware import OutcomeMiddleware
from sglang_kevlar.frontend.outcome import Failure, outcome_of
from sglang_kevlar.frontend.peers.kept import KeptPeers
from sglang_kevlar.frontend.peers.records import PeerRecords

KEY = made_key()


class Node:
    def __init__(self, name: str, names: str, instance: str = "1", retention: float = 60.0) -> None:
        self.name = name
        self.runs = KeptRuns(retention, 1 << 24)
        #: what the endpoint is to say, by the "prompt" of the request; None: the end
        self.say: dict[str, asyncio.Queue[str | None]] = defaultdict(asyncio.Queue)
        self.started: list[str] = []
        self.gone = False
        self.app = FastAPI()
        routes = []
        for path in ("/generate", "/v1/responses"):
            self.app.add_api_route(path, self._generate, methods=["POST"])
            routes.append(self.app.router.routes[-1])
        self.app.user_middleware.append(Middleware(KeptMiddleware, runs=self.runs, routes=routes))
        self.app.user_middleware.append(Middleware(OutcomeMiddleware))
        endpoints.install(self.app, self.runs)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        others = [other for other in names if other != name]
        self.records = PeerRecords(name, f"{name}{instance}", others, 1 << 24, retention)
        self.frontend = Frontend(name, KEY, handler=self.records, url=self.url, instance=f"{name}{instance}")
        self.peers: KeptPeers
        config = uvicorn.Config(self.app, log_level="critical", lifespan="on", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.serving = asyncio.ensure_future(self.server._serve([self.socket]))

    def link(self, addresses: dict[str, str]) -> None:
        self.frontend.link(addresses)
        assert self.frontend.links is not None
        self.records.links = self.frontend.links
        self.peers = KeptPeers(self.runs, self.records, self.frontend.links, self.app)
        self.records.take_up, self.records.abandon = self.peers.take_up_all, self.runs.abandon
        self.runs.recorder, self.runs.elsewhere = self.records, self.peers

    def hangs(self) -> None:
        """For its peers it is gone, and its connections stay open and say nothing."""
        self.gone = True
        self.frontend.close()

    async def close(self) -> None:
        for run in list(self.runs._runs.values()):
            run.abandon()
        if hasattr(self, "peers"):
            await self.peers.close()
        if not self.gone:
            self.frontend.close()
        await self.stop_http()

    async def dies(self) -> None:
        """Without a farewell: connections of clients are cut first."""
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        self.records.close()
        self.frontend.close()
        await self.stop_http()

    async def stop_http(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        with contextlib.suppress(asyncio.CancelledError):
            await self.serving

    # ---- the endpoint

    async def _generate(self, request: Request) -> Any:
        body = await request.json()
        self.started.append(body["prompt"])
        outcome = outcome_of(request)
        assert outcome is not None and outcome.kept is not None
        for _ in range(body.get("n", 1)):
            outcome.kept.made_a_request()
        outputs = outcome.kept.watch(self._outputs(body["prompt"], outcome))
        if body.get("stream", True):
            return StreamingResponse(self._events(outputs, outcome), media_type="text/event-stream")
        text = ""
        async for output in outputs:
            outcome.first_token, text = True, output["text"]
        return JSONResponse({"text": text})

    async def _events(self, outputs: Any, outcome: Any) -> AsyncIterator[str]:
        async for output in outputs:
            outcome.first_token = True
            yield f"data: {json.dumps(output['text'])}\n\n"
        yield "data: [DONE]\n\n"

    async def _outputs(self, prompt: str, outcome: Any) -> AsyncGenerator[Any]:
        words: list[str] = []

        def output(word: str) -> dict[str, Any]:
            words.append(word)
            outcome.kept.messages.append(word.encode())
            return {"text": " ".join(words), "meta_info": {"completion_tokens": len(words)}}

        recorded = outcome.kept.recorded
        for (message,) in recorded.outputs if recorded is not None else ():
            yield output(message.decode())
        if recorded is not None and recorded.failure is not None:
            outcome.fail(Failure(*recorded.failure))
        if recorded is not None and recorded.ended:
            return
        while (word := await self.say[prompt].get()) is not None:
            yield output(word)


class Cluster:
    def __init__(self, names: str, **options: Any) -> None:
        self.names = names
        self.nodes = {name: Node(name, names, **options) for name in names}
        self.client = httpx.AsyncClient(timeout=20)

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    async def start(self) -> None:
        addresses = {name: node.frontend.address for name, node in self.nodes.items()}
        for node in self.nodes.values():
            node.link(addresses)
        # As it is when the lifespan of the application begins.
        await eventually(lambda: all(node.runs.endpoints is not None for node in self.nodes.values()))
        await self.whole()

    async def whole(self) -> None:
        await eventually(
            lambda: all(
                len(states := [each["state"] for each in node.records.status()]) == len(self.nodes) - 1
                and set(states) <= {"current"}
                and not node.records.directory._missing
                for node in self.nodes.values()
            )
        )

    async def lose(self, name: str) -> Node:
        node = self.nodes.pop(name)
        await node.dies()
        await eventually(lambda: all(name not in each.records.urls for each in self.nodes.values()))
        return node

    def post(
        self, name: str, prompt: str = "p", key: str = "k", path: str = "/generate", body: Any = None, **headers: str
    ) -> Any:
        """A response as it comes; to be used as a context."""
        named = {each.replace("_", "-"): value for each, value in headers.items()}
        return self.client.stream(
            "POST",
            f"{self.nodes[name].url}{path}",
            json={"prompt": prompt, **(body or {})},
            headers={"Idempotency-Key": key, **named},
        )

    async def answer(self, *args: Any, **more: Any) -> httpx.Response:
        async with self.post(*args, **more) as response:
            await response.aread()
            return response

    async def close(self) -> None:
        await self.client.aclose()
        for node in self.nodes.values():
            await node.close()


def play(script: Callable[[Cluster], Awaitable[None]], names: str = "ab", **options: Any) -> None:
    async def main() -> None:
        cluster = Cluster(names, **options)
        try:
            async with asyncio.timeout(50):
                await cluster.start()
                await script(cluster)
        finally:
            await cluster.close()

    asyncio.run(main())


class Events:
    """Of a response, one after the other."""

    def __init__(self, response: httpx.Response) -> None:
        self._chunks = response.aiter_raw()
        self._rest = b""
        self.got: list[bytes] = []

    async def next(self) -> bytes:
        while b"\n\n" not in self._rest:
            self._rest += await anext(self._chunks)
        event, _, self._rest = self._rest.partition(b"\n\n")
        self.got.append(event)
        return event

    async def some(self, count: int) -> list[bytes]:
        return [await self.next() for _ in range(count)]

    async def all(self) -> list[bytes]:
        async for chunk in self._chunks:
            self._rest += chunk
        *events, rest = self._rest.split(b"\n\n")
        assert rest == b""
        self.got += events
        return self.got

    @property
    def last_id(self) -> str:
        return self.got[-1].split(b"\n")[0].removeprefix(b"id: ").decode()


def ids(events: list[bytes]) -> list[str]:
    return [event.split(b"\n")[0].removeprefix(b"id: ").decode() for event in events]
