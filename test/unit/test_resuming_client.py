"""The resuming transports against a real HTTP server behind a proxy that cuts connections wherever it likes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from sglang_kevlar.client import AsyncResumingTransport, ResumeError, ResumingTransport
from sglang_kevlar.frontend.kept.middleware import KeptMiddleware
from sglang_kevlar.frontend.kept.registry import KeptRuns

URL = "http://127.0.0.1:{}/v1/chat/completions"
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 0\r\ncontent-length: 2\r\n\r\nno"
FAST = {"backoff": 0.001, "backoff_max": 0.01}


class Service:
    """A server of kept requests, which can be replaced by one that knows nothing, behind a faulty proxy."""

    def __init__(self) -> None:
        self.started = 0
        #: what becomes of the next connections: bytes of the answer that pass (None: all), or what is answered instead
        self.faults: list[int | bytes | None] = []
        self.then: Callable[[], int | bytes | None] = lambda: None
        self.connections = 0
        self.port = self.direct_port = 0
        self._connections: set[asyncio.Task[None]] = set()
        self.forget()

    # ---- the server

    def forget(self) -> None:
        inner = FastAPI()
        inner.add_api_route("/v1/chat/completions", self._chat, methods=["POST"])
        self._inner = KeptMiddleware(inner, KeptRuns(60, 64 << 20), [inner.router.routes[-1]])

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await self._inner(scope, receive, send)

    async def _chat(self, request: Request) -> Any:
        self.started += 1
        body = await request.json()
        if not body.get("stream"):
            content = "".join(f"word{i} " for i in range(body["max_tokens"]))
            message = {"role": "assistant", "content": content}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            return JSONResponse(
                {"id": "r", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice]}
            )
        return StreamingResponse(self._events(body["max_tokens"]), media_type="text/event-stream")

    async def _events(self, count: int) -> Any:
        for i in range(count):
            delta = {"index": 0, "delta": {"content": f"word{i} "}, "finish_reason": None}
            chunk = {"id": "r", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [delta]}
            yield f"data: {json.dumps(chunk)}\n\n"
            await asyncio.sleep(0.001)
        yield "data: [DONE]\n\n"

    # ---- the proxy

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.connections += 1
        fault = self.faults.pop(0) if self.faults else self.then()
        try:
            if isinstance(fault, bytes):
                head = await reader.readuntil(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                assert length is not None
                await reader.readexactly(int(length[1]))
                writer.write(fault)
                await writer.drain()
                writer.close()
            else:
                await self._forward(reader, writer, fault)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            if not isinstance(fault, bytes):
                writer.transport.abort()
            self._connections.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, most: int | None) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.direct_port)

        async def requests() -> None:
            while data := await reader.read(1 << 16):
                up_writer.write(data)

        sender = asyncio.create_task(requests())
        try:
            while data := await up_reader.read(4096):
                writer.write(data if most is None else data[:most])
                await writer.drain()
                if most is not None and (most := most - len(data)) <= 0:
                    return
        finally:
            sender.cancel()
            up_writer.transport.abort()

    async def serve(self, ready: threading.Event, stop: asyncio.Event) -> None:
        config = uvicorn.Config(self.app, port=0, log_level="error", lifespan="off", loop="asyncio", interface="asgi3")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.01)
        self.direct_port = server.servers[0].sockets[0].getsockname()[1]
        proxy = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = proxy.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        proxy.close()
        for task in self._connections:
            task.cancel()
        server.should_exit = server.force_exit = True
        await serving


@pytest.fixture(scope="module")
def one_service() -> Iterator[Service]:
    service, ready = Service(), threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(service.serve(ready, stop)), daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        yield service
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture
def service(one_service: Service) -> Service:
    one_service.faults, one_service.then = [], lambda: None
    one_service.started = one_service.connections = 0
    one_service.forget()
    return one_service


def body(count: int = 50, stream: bool = True, **changes: Any) -> dict[str, Any]:
    return {
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": count,
        "stream": stream,
        **changes,
    }


def answer(url: str, request: dict[str, Any], **options: Any) -> bytes:
    with httpx.Client(transport=ResumingTransport(**FAST | options), timeout=10) as client:
        with client.stream("POST", url, json=request) as response:
            assert response.status_code == 200
            return b"".join(response.iter_raw())


async def async_answer(url: str, request: dict[str, Any], **options: Any) -> bytes:
    async with httpx.AsyncClient(transport=AsyncResumingTransport(**FAST | options), timeout=10) as client:
        async with client.stream("POST", url, json=request) as response:
            assert response.status_code == 200
            return b"".join([chunk async for chunk in response.aiter_raw()])


def words(events: bytes) -> list[str]:
    lines = [line[6:] for line in events.decode().split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line)["choices"][0]["delta"]["content"] for line in lines[:-1]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_cut_anywhere_every_event_comes_once(service: Service, seed: int, mode: str) -> None:
    chance = random.Random(seed)
    service.then = lambda: chance.choice([0, chance.randrange(1, 400), chance.randrange(300, 4000), UNAVAILABLE])
    url, request = URL.format(service.port), body(60, seed=seed)
    run = answer if mode == "sync" else lambda *args, **options: asyncio.run(async_answer(*args, **options))
    events = run(url, request, attempts=60)
    assert words(events) == [f"word{i} " for i in range(60)]
    assert service.started == 1 and service.connections > 1


@pytest.mark.parametrize("seed", range(4))
def test_a_response_without_events_is_put_together(service: Service, seed: int) -> None:
    chance = random.Random(seed)
    service.faults = [chance.randrange(8_000) for _ in range(5)]
    got = json.loads(answer(URL.format(service.port), body(1000, stream=False)))
    assert got["choices"][0]["message"]["content"] == "".join(f"word{i} " for i in range(1000))
    assert service.started == 1 and service.connections == 6


def test_under_openais_client(service: Service) -> None:
    service.faults = [0, 1500, UNAVAILABLE, 2500]
    url = f"http://127.0.0.1:{service.port}/v1"
    http = httpx.Client(transport=ResumingTransport(**FAST))
    with openai.OpenAI(base_url=url, api_key="k", http_client=http, max_retries=0) as client:
        stream = client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "x"}], max_tokens=40, stream=True
        )
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "".join(
            f"word{i} " for i in range(40)
        )
    assert service.started == 1

    async def run() -> str:
        service.faults = [0, 1500, UNAVAILABLE, 2500]
        http = httpx.AsyncClient(transport=AsyncResumingTransport(**FAST))
        async with openai.AsyncOpenAI(base_url=url, api_key="k", http_client=http, max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "x"}], max_tokens=40, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(run()) == "".join(f"word{i} " for i in range(40))
    assert service.started == 2


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_server_that_forgot_it_is_an_error_and_nothing_begins_anew(service: Service, mode: str) -> None:
    url, request = URL.format(service.port), body(50)
    service.faults = [2500]
    got: list[bytes] = []

    def sync() -> None:
        with httpx.Client(transport=ResumingTransport(**FAST), timeout=10) as client:
            with client.stream("POST", url, json=request) as response:
                for chunk in response.iter_raw():
                    service.forget()
                    got.append(chunk)

    async def in_loop() -> None:
        async with httpx.AsyncClient(transport=AsyncResumingTransport(**FAST), timeout=10) as client:
            async with client.stream("POST", url, json=request) as response:
                async for chunk in response.aiter_raw():
                    service.forget()
                    got.append(chunk)

    with pytest.raises(ResumeError, match=r"404.*no request with this Idempotency-Key") as raised:
        sync() if mode == "sync" else asyncio.run(in_loop())
    assert raised.value.status == 404
    assert got and service.started == 1


def test_it_gives_up_with_the_last_error(service: Service) -> None:
    service.then = lambda: 0
    with pytest.raises(httpx.TransportError):
        answer(URL.format(service.port), body(), attempts=4)
    assert service.connections == 4
    service.then = lambda: UNAVAILABLE
    with httpx.Client(transport=ResumingTransport(**FAST, attempts=3)) as client:
        response = client.post(URL.format(service.port), json=body())
    assert response.status_code == 503 and response.read() == b"no"
    assert service.connections == 7


def test_patience_bounds_the_time_as_well(service: Service) -> None:
    service.then = lambda: UNAVAILABLE.replace(b"retry-after: 0", b"retry-after: 9")
    with httpx.Client(transport=ResumingTransport(**FAST, patience=5)) as client:
        assert client.post(URL.format(service.port), json=body()).status_code == 503
    assert service.connections == 1


def test_the_next_server_is_asked(service: Service) -> None:
    """One that refuses connections, and one that lets them fall: the request goes where it is served."""
    service.faults = [700, 1500]
    urls = ["http://127.0.0.1:9", f"http://127.0.0.1:{service.port}"]
    events = answer("http://nowhere.invalid/v1/chat/completions", body(30), base_urls=urls)
    assert words(events) == [f"word{i} " for i in range(30)]
    assert service.started == 1


def test_a_server_that_falls_silent_is_not_waited_for_again() -> None:
    asked: list[str] = []

    class Silent(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"id: r:1.0\ndata: a\n\n"
            raise httpx.ReadTimeout("silence")

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        headers = {"X-Kevlar-Request-Id": "r", "Content-Type": "text/event-stream"}
        if len(asked) == 1:
            return httpx.Response(200, headers=headers, stream=Silent())
        assert request.headers["last-event-id"] == "r:1.0"
        return httpx.Response(200, headers=headers, stream=httpx.ByteStream(b"id: r:2.0\ndata: b\n\n"))

    transport = ResumingTransport(httpx.MockTransport(handle), base_urls=["http://a", "http://b"], backoff=0.001)
    with httpx.Client(transport=transport) as client:
        answer = client.post("http://x/generate", json={}).text
    assert answer == "id: r:1.0\ndata: a\n\nid: r:2.0\ndata: b\n\n"
    assert asked == ["a", "b"]


def test_other_requests_are_left_alone(service: Service) -> None:
    seen: list[httpx.Request] = []

    def handle(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(503)

    with httpx.Client(transport=ResumingTransport(httpx.MockTransport(handle), attempts=5)) as client:
        client.get("http://x/v1/chat/completions")
        client.post("http://x/v1/embeddings", json={})
        client.post("http://x/v1/messages/count_tokens", json={})
    assert len(seen) == 3 and not any("idempotency-key" in request.headers for request in seen)


def test_a_server_that_keeps_nothing_is_passed_through() -> None:
    """Plain SGLang: its error before an answer is tried again, a cut is the caller's."""
    answers: list[Any] = [httpx.ConnectError("x"), httpx.Response(502), None]

    class Cut(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"data: a\n\n"
            raise httpx.ReadError("cut")

    def handle(request: httpx.Request) -> httpx.Response:
        assert request.headers["idempotency-key"] == "mine" and request.read() == b"{}"
        assert request.headers["content-length"] == "2" and "transfer-encoding" not in request.headers
        got = answers.pop(0)
        if isinstance(got, Exception):
            raise got
        return got or httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=Cut())

    got, key = [], {"Idempotency-Key": "mine"}
    with httpx.Client(transport=ResumingTransport(httpx.MockTransport(handle), **FAST)) as client:
        with pytest.raises(httpx.ReadError, match="cut"):
            with client.stream("POST", "http://x/generate", content=iter([b"{", b"}"]), headers=key) as response:
                for chunk in response.iter_raw():
                    got.append(chunk)
    assert got == [b"data: a\n\n"] and not answers


def test_an_answer_of_another_request_is_an_error() -> None:
    class Cut(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"id: a:1.0\ndata: a\n\nid: a:2.0\nda"
            raise httpx.ReadError("cut")

    rids = ["a", "b"]

    def handle(request: httpx.Request) -> httpx.Response:
        headers = {"content-type": "text/event-stream", "x-kevlar-request-id": rids.pop(0)}
        if not rids:
            assert request.headers["last-event-id"] == "a:1.0" and request.headers["x-kevlar-request-id"] == "a"
        return httpx.Response(200, headers=headers, stream=Cut())

    with httpx.Client(transport=ResumingTransport(httpx.MockTransport(handle), **FAST)) as client:
        with contextlib.ExitStack() as stack:
            response = stack.enter_context(client.stream("POST", "http://x/generate"))
            with pytest.raises(ResumeError, match="another request than a"):
                list(response.iter_raw())


@pytest.mark.parametrize("lines", [0, 1, 2, 3])
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_response_that_another_server_goes_on_with_says_the_same_in_other_bytes(lines: int, mode: str) -> None:
    """Latencies and times differ, and so do lengths: of a response without events the caller gets whole lines."""
    words = [f'{{"word": {number}, "latency": %s}}' for number in range(3)]
    first = "".join(f"{word % 0.25}\n" for word in words).encode()
    second = "".join(f"{word % 0.123456789}\n" for word in words).encode()
    if lines == 0:
        first, second = first.split(b"\n")[0], second.split(b"\n")[0]
    cut_at = sum(len(line) + 1 for line in first.split(b"\n")[: max(0, lines - 1)]) + 5
    answers = [first[:cut_at], second]

    class Cut(httpx.SyncByteStream, httpx.AsyncByteStream):
        def __init__(self, data: bytes) -> None:
            self._data = data

        def __iter__(self) -> Iterator[bytes]:
            yield from (self._data[at : at + 7] for at in range(0, len(self._data), 7))
            if self._data is not second:
                raise httpx.ReadError("cut")

        async def __aiter__(self) -> Any:
            for piece in self:
                yield piece

    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"X-Kevlar-Request-Id": "r"}, stream=Cut(answers.pop(0)))

    url, inner = "http://x/v1/chat/completions", httpx.MockTransport(handle)
    if mode == "sync":
        with httpx.Client(transport=ResumingTransport(inner, **FAST)) as client:
            got = client.post(url, json={}).content
    else:

        async def run() -> bytes:
            async with httpx.AsyncClient(transport=AsyncResumingTransport(inner, **FAST)) as client:
                return (await client.post(url, json={})).content

        got = asyncio.run(run())
    whole = max(0, lines - 1) if lines else 0
    assert got == b"".join(first.splitlines(True)[:whole] + second.splitlines(True)[whole:])
    assert [json.loads(line)["word"] for line in got.splitlines()] == list(range(len(first.splitlines())))


def test_ids_of_events_are_handed_back_as_they_came() -> None:
    """Also those with a number and the tag of a frontend."""
    asked: list[str | None] = []
    name = "r~1:x:7.2~a1b2"

    class Stream(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"id: r~1:x:6.0~a1b2\ndata: 1\n\n" + f"id: {name}\ndata: 2\n\nid: not".encode()
            if len(asked) < 2:
                raise httpx.ReadError("cut")

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers.get("Last-Event-ID"))
        headers = {"X-Kevlar-Request-Id": "r~1:x", "Content-Type": "text/event-stream"}
        return httpx.Response(200, headers=headers, stream=Stream())

    with httpx.Client(transport=ResumingTransport(httpx.MockTransport(handle), **FAST)) as client:
        client.post("http://x/generate", json={})
    assert asked == [None, name]
