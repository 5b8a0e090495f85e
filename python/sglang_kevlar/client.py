"""HTTP transports for clients of SGLang-Kevlar: an answer survives the loss of its connection.

    client = openai.OpenAI(http_client=httpx.Client(transport=ResumingTransport()))
    client = openai.AsyncOpenAI(http_client=httpx.AsyncClient(transport=AsyncResumingTransport()))

A POST to a generation endpoint gets an ``Idempotency-Key``. When its connection fails, or the answer is 502, 503 or
504, it is sent again with the same key: the server runs it once, and goes on behind the last event that arrived
(``Last-Event-ID``). The caller sees one uninterrupted response with every event once and in order, or an error: what
was begun is never begun anew. Imports httpx and the standard library only.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

import httpx

#: ends of the paths whose requests are kept
GENERATION_PATHS = (
    "/generate",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/responses",
    "/invocations",
    "/vertex_generate",
    "/api/chat",
)
#: what a server, or a proxy before it, says while it cannot serve
UNAVAILABLE = (502, 503, 504)
RID_HEADER = "X-Kevlar-Request-Id"
#: longest error message of a server that is repeated
_MESSAGE = 500


class ResumeError(httpx.TransportError):
    """The server cannot go on with a response that was begun: ``status`` is what it answered."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class _Options:
    """What both transports take."""

    def __init__(
        self, base_urls: Sequence[str], attempts: int, patience: float, backoff: float, backoff_max: float
    ) -> None:
        self.base_urls = [httpx.URL(url) for url in base_urls]
        self.attempts = attempts
        self.patience = patience
        self.backoff = backoff
        self.backoff_max = backoff_max

    def applies_to(self, request: httpx.Request) -> bool:
        return request.method == "POST" and request.url.path.endswith(GENERATION_PATHS)


class _Exchange:
    """One request over all its connections: decides what is sent, what is given to the caller, and when to give up."""

    def __init__(self, request: httpx.Request, body: bytes, options: _Options) -> None:
        self._original = request
        self._body = body
        self._options = options
        self._headers = request.headers.copy()
        self._headers.setdefault("Idempotency-Key", uuid.uuid4().hex)
        # Compressed by a proxy, events could not be told apart.
        self._headers["Accept-Encoding"] = "identity"
        self._headers.pop("Transfer-Encoding", None)  # the body is known by now
        self._server = 0
        #: the server that began the response
        self._origin: int | None = None
        #: the server's id of the request, once it has begun to answer
        self.rid: str | None = None
        self._events = False
        self._last_id = ""
        self._partial = b""
        #: of a response without events: whole lines that the caller has, and what came behind the last one
        self._lines = 0
        self._lines_to_skip = 0
        self._held: list[bytes] = []
        self._attempts = 0
        self._failing_since = 0.0

    def request(self) -> httpx.Request:
        url, headers = self._original.url, self._headers
        if self._options.base_urls:
            base = self._options.base_urls[self._server]
            url = url.copy_with(scheme=base.scheme, host=base.host, port=base.port)
            headers["Host"] = url.netloc.decode("ascii")
        if self.rid is not None:
            headers[RID_HEADER] = self.rid
        if self._last_id:
            headers["Last-Event-ID"] = self._last_id
        extensions = self._original.extensions
        return httpx.Request(self._original.method, url, headers=headers, content=self._body, extensions=extensions)

    def failed(self, error: httpx.TransportError) -> float:
        """The connection failed. Seconds to wait before the next attempt; raises the error when there is none."""
        if isinstance(error, ResumeError | httpx.UnsupportedProtocol | httpx.LocalProtocolError):
            raise error
        # A host that is off says nothing for as long again.
        delay = self._next(None, silent=isinstance(error, httpx.TimeoutException))
        if delay is None:
            raise error
        return delay

    def begun(self, response: httpx.Response) -> float | None:
        """The first response: None to give it to the caller, or seconds to wait before the next attempt."""
        if response.status_code in UNAVAILABLE:
            return self._next(response.headers.get("Retry-After"))
        rid = response.headers.get(RID_HEADER)
        if response.status_code == 200 and rid and "Content-Encoding" not in response.headers:
            self.rid = rid
            self._events = response.headers.get("Content-Type", "").startswith("text/event-stream")
            self._origin = self._server
            self._attempts = 0
        return None

    def resumed(self, response: httpx.Response, message: str) -> float | None:
        """A later response: None to read on from it, or seconds to wait. Raises ResumeError."""
        status = response.status_code
        if status == 200:
            if response.headers.get(RID_HEADER) != self.rid:
                raise ResumeError(f"the server answered with another request than {self.rid}", status)
            self._partial, self._held = b"", []
            self._lines_to_skip = self._lines
            return None
        elsewhere = status == 404 and self._server != self._origin
        delay = self._next(response.headers.get("Retry-After")) if status in UNAVAILABLE or elsewhere else None
        if delay is None:
            raise ResumeError(f"request {self.rid} was cut and cannot be taken up again: {status}: {message}", status)
        return delay

    def feed(self, chunk: bytes) -> bytes:
        """What of it the caller gets now: whole events, or of a body without events whole lines."""
        if not self._events:
            new = self._new_lines(chunk)
        else:
            whole, separator, self._partial = (self._partial + chunk).rpartition(b"\n\n")
            new = whole + separator
            self._last_id = _last_id(new) or self._last_id
        if new:
            self._attempts = 0
        return new

    def _new_lines(self, chunk: bytes) -> bytes:
        # Not by bytes: a server that took the request over says the same in other times and latencies.
        head, newline, tail = chunk.rpartition(b"\n")
        if not newline:
            self._held.append(chunk)
            return b""
        lines = b"".join((*self._held, head)).split(b"\n")
        self._held = [tail]
        skipped = min(self._lines_to_skip, len(lines))
        self._lines_to_skip -= skipped
        self._lines += len(lines) - skipped
        return b"".join(line + newline for line in lines[skipped:])

    def rest(self) -> bytes:
        """At the end of the response: what was not an event, or not a line."""
        rest, self._partial, self._held = b"".join((self._partial, *self._held)), b"", []
        return rest

    def _next(self, retry_after: str | None, silent: bool = False) -> float | None:
        """Turns to the next server. Seconds until the next attempt, None when it is one too many."""
        options, now = self._options, time.monotonic()
        if self._attempts == 0:
            self._failing_since = now
        self._attempts += 1
        delay = min(options.backoff_max, options.backoff * 2 ** (self._attempts - 1)) * random.uniform(0.5, 1)
        if self._attempts == 1 and self._origin is not None and not silent:
            self._server = self._origin  # the connection may have failed, and the server not
        elif options.base_urls:
            self._server = (self._server + 1) % len(options.base_urls)
        if retry_after is not None and retry_after.isdigit() and len(options.base_urls) < 2:
            delay = max(delay, float(retry_after))
        if self._attempts >= options.attempts or now + delay - self._failing_since > options.patience:
            return None
        return delay


class ResumingTransport(httpx.BaseTransport):
    """``base_urls``: servers to turn to in turn, in place of the scheme, host and port of each request.

    Gives up after ``attempts`` in a row, or ``patience`` seconds of them, that brought nothing; the error is the last
    one's. Between them it waits ``backoff`` seconds and more; with one server, as long as ``Retry-After`` says.
    """

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        *,
        base_urls: Sequence[str] = (),
        attempts: int = 10,
        patience: float = 120.0,
        backoff: float = 0.25,
        backoff_max: float = 10.0,
    ) -> None:
        self._transport = transport or httpx.HTTPTransport()
        self._options = _Options(base_urls, attempts, patience, backoff, backoff_max)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        if not self._options.applies_to(request):
            return self._transport.handle_request(request)
        exchange = _Exchange(request, request.read(), self._options)
        response = self._open(exchange)
        if exchange.rid is None:
            return response
        stream = _Stream(self._open, exchange, response)
        return httpx.Response(response.status_code, headers=response.headers, stream=stream)

    def close(self) -> None:
        self._transport.close()

    def _open(self, exchange: _Exchange) -> httpx.Response:
        """A response that can be given to the caller, or read on from. Raises httpx.TransportError."""
        resume = exchange.rid is not None
        while True:
            try:
                response = self._transport.handle_request(exchange.request())
                message = _message(response.read()) if resume and response.status_code != 200 else ""
            except httpx.TransportError as error:
                delay: float | None = exchange.failed(error)
            else:
                try:
                    delay = exchange.resumed(response, message) if resume else exchange.begun(response)
                except ResumeError:
                    response.close()
                    raise
                if delay is None:
                    return response
                response.close()
            time.sleep(delay or 0)


class _Stream(httpx.SyncByteStream):
    def __init__(
        self, reopen: Callable[[_Exchange], httpx.Response], exchange: _Exchange, response: httpx.Response
    ) -> None:
        self._reopen = reopen
        self._exchange = exchange
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        while True:
            try:
                for chunk in self._response.iter_raw():
                    if new := self._exchange.feed(chunk):
                        yield new
            except httpx.TransportError as error:
                self._response.close()
                time.sleep(self._exchange.failed(error))
                self._response = self._reopen(self._exchange)
            else:
                if rest := self._exchange.rest():
                    yield rest
                return

    def close(self) -> None:
        self._response.close()


class AsyncResumingTransport(httpx.AsyncBaseTransport):
    """`ResumingTransport` for asyncio."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        base_urls: Sequence[str] = (),
        attempts: int = 10,
        patience: float = 120.0,
        backoff: float = 0.25,
        backoff_max: float = 10.0,
    ) -> None:
        self._transport = transport or httpx.AsyncHTTPTransport()
        self._options = _Options(base_urls, attempts, patience, backoff, backoff_max)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not self._options.applies_to(request):
            return await self._transport.handle_async_request(request)
        exchange = _Exchange(request, await request.aread(), self._options)
        response = await self._open(exchange)
        if exchange.rid is None:
            return response
        stream = _AsyncStream(self._open, exchange, response)
        return httpx.Response(response.status_code, headers=response.headers, stream=stream)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def _open(self, exchange: _Exchange) -> httpx.Response:
        resume = exchange.rid is not None
        while True:
            try:
                response = await self._transport.handle_async_request(exchange.request())
                message = _message(await response.aread()) if resume and response.status_code != 200 else ""
            except httpx.TransportError as error:
                delay: float | None = exchange.failed(error)
            else:
                try:
                    delay = exchange.resumed(response, message) if resume else exchange.begun(response)
                except ResumeError:
                    await response.aclose()
                    raise
                if delay is None:
                    return response
                await response.aclose()
            await asyncio.sleep(delay or 0)


class _AsyncStream(httpx.AsyncByteStream):
    def __init__(
        self, reopen: Callable[[_Exchange], Awaitable[httpx.Response]], exchange: _Exchange, response: httpx.Response
    ) -> None:
        self._reopen = reopen
        self._exchange = exchange
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            try:
                async for chunk in self._response.aiter_raw():
                    if new := self._exchange.feed(chunk):
                        yield new
            except httpx.TransportError as error:
                await self._response.aclose()
                await asyncio.sleep(self._exchange.failed(error))
                self._response = await self._reopen(self._exchange)
            else:
                if rest := self._exchange.rest():
                    yield rest
                return

    async def aclose(self) -> None:
        await self._response.aclose()


def _last_id(events: bytes) -> str:
    """Of the last event that has one."""
    for line in reversed(events.split(b"\n")):
        if line.startswith(b"id: "):
            return line[4:].decode()
    return ""


def _message(body: bytes) -> str:
    """Of an error response, whatever its shape."""
    text = body.decode(errors="replace")
    try:
        error = json.loads(text)
        error = error.get("error", error)
        return str(error["message"] if isinstance(error, dict) else error)[:_MESSAGE]
    except (ValueError, KeyError, AttributeError):
        return text[:_MESSAGE]
