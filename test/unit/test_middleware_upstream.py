"""OutcomeMiddleware on upstream's own HTTP app and endpoint code, with a stub in place of the tokenizer manager.

What upstream makes of an aborted request differs per endpoint (error chunk and [DONE], HTTPException in the middle of
a stream, 500 "Internal server error", ...); what the client gets must not.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from upstream_app import FAILURE, REGULAR_END, REQUESTS, StubManager, serving

from sglang_kevlar.frontend.kept.registry import KeptRuns


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Any, StubManager]]:
    manager = StubManager()
    with serving(manager, KeptRuns(60, 1 << 20)) as app:
        yield app, manager


def post(served: tuple[Any, StubManager], path: str, stream: bool, fail_after: int | None) -> httpx.Response:
    app, manager = served
    manager.fail_after = fail_after

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post(path, json={**REQUESTS[path], "stream": stream})

    return asyncio.run(request())


def regular_end(path: str) -> str:
    return next((end for prefix, end in REGULAR_END.items() if path.startswith(prefix)), "[DONE]")


def message_of(body: Any) -> str:
    error = body.get("error", body)
    return str(error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
def test_success_is_complete(served: Any, path: str, stream: bool) -> None:
    response = post(served, path, stream, fail_after=None)
    assert response.status_code == 200, response.text
    assert "world" in response.text or path.startswith("/api")
    assert not stream or regular_end(path) in response.text


@pytest.mark.parametrize("path", REQUESTS)
@pytest.mark.parametrize(("stream", "fail_after"), [(False, 0), (False, 2), (True, 0)])
def test_failure_before_anything_was_delivered(served: Any, path: str, stream: bool, fail_after: int) -> None:
    response = post(served, path, stream, fail_after)
    assert response.status_code == 503, response.text
    assert response.headers["retry-after"] == "5"
    assert response.headers["content-type"] == "application/json"
    assert message_of(response.json()) == FAILURE.message
    assert regular_end(path) not in response.text


@pytest.mark.parametrize("path", REQUESTS)
def test_failure_in_the_middle_of_a_stream(served: Any, path: str) -> None:
    response = post(served, path, stream=True, fail_after=2)
    assert response.status_code == 200
    assert "Hello" in response.text
    assert response.text.count(FAILURE.message) == 1
    assert regular_end(path) not in response.text and "[DONE]" not in response.text
    last = response.text.strip().rpartition("\n")[2].removeprefix("data: ")
    event = json.loads(last)
    if path == "/v1/responses":
        numbers = [
            json.loads(line[6:])["sequence_number"] for line in response.text.splitlines() if line.startswith("data: ")
        ]
        assert event["type"] == "response.failed" and event["response"]["status"] == "failed"
        assert event["response"]["id"].startswith("resp_")
        assert numbers == list(range(len(numbers)))
        event = event["response"]
    assert message_of(event) == FAILURE.message


def test_error_response_has_cors_headers(served: Any) -> None:
    app, manager = served
    manager.fail_after = 0

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/generate", json=REQUESTS["/generate"], headers={"origin": "http://site"})

    response = asyncio.run(request())
    assert response.status_code == 503
    assert response.headers["access-control-allow-origin"]


def test_other_errors_of_upstream_are_untouched(served: Any) -> None:
    app, _ = served

    async def request() -> tuple[httpx.Response, httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/v1/chat/completions", json={"model": 1}), await client.get("/nothing")

    malformed, missing = asyncio.run(request())
    assert malformed.status_code == 400 and "retry-after" not in malformed.headers
    assert missing.status_code == 404
