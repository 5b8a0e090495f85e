"""OutcomeMiddleware under uvicorn: the connection's own behaviour, which no in-process client has."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from sglang_kevlar.frontend.middleware import OutcomeMiddleware
from sglang_kevlar.frontend.outcome import Failure, outcome_of


class Endpoint:
    """Streams until it is stopped; fails its request after ``fail_after`` chunks but does not stop by itself."""

    def __init__(self) -> None:
        self.fail_after: int | None = None
        self.ended = threading.Event()

    async def __call__(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self._chunks(request), media_type="text/event-stream")

    async def _chunks(self, request: Request) -> AsyncIterator[bytes]:
        outcome = outcome_of(request)
        assert outcome is not None
        try:
            for i in range(10_000):
                if i == self.fail_after:
                    outcome.fail(Failure(503, "no worker group", "no_group", retry_after=1))
                outcome.first_token = self.fail_after != 0
                yield b"data: %d\n\n" % i
                await asyncio.sleep(0.01)
        finally:
            self.ended.set()


@pytest.fixture
def served() -> Iterator[tuple[str, Endpoint]]:
    endpoint = Endpoint()

    async def stream(request: Request) -> StreamingResponse:
        return await endpoint(request)

    app = Starlette(routes=[Route("/", stream)], middleware=[Middleware(OutcomeMiddleware)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}/", endpoint
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def wait_until(condition: Callable[[], Any], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("fail_after", [0, 3])
def test_the_endpoint_of_a_failed_request_is_ended_and_the_connection_goes_on(served: Any, fail_after: int) -> None:
    url, endpoint = served
    endpoint.fail_after = fail_after
    with httpx.Client() as client:
        response = client.get(url)
        assert endpoint.ended.wait(30)
        assert client.get(url).status_code == response.status_code
    assert response.status_code == (200 if fail_after else 503)
    assert response.headers.get("retry-after") == (None if fail_after else "1")
    assert response.text.count("data: ") == (4 if fail_after else 0)
    assert response.text.count("no worker group") == 1


def test_a_client_that_leaves_is_noticed(served: Any) -> None:
    url, endpoint = served
    with httpx.Client() as client, client.stream("GET", url) as response:
        assert next(response.iter_bytes()) == b"data: 0\n\n"
    assert endpoint.ended.wait(30)
