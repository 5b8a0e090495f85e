"""Ends failed requests the way their client expects, on every endpoint, in one place.

Upstream's endpoints begin a stream before there is a token (some with whole events) and close it with their
regular end whatever happened: a client would see a 200, or a complete answer, where there is none. This middleware
sits between the endpoints and everything else and

* holds a stream back, bounded, until ``RequestOutcome.first_token``, so that a failure before it is a real error
  response with ``Retry-After`` (a client therefore also sees the headers of a stream with its first token);
* puts one error event in place of the rest of a stream that fails later: no ``[DONE]``, ``message_stop``, ``done``;
* lets everything else through as it is. ``receive`` is not touched: upstream detects disconnects with it.

Once the error is out, the server reports `http.disconnect` to the endpoint, whose own handling ends it.
"""

from __future__ import annotations

import logging
from typing import Any

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang_kevlar.frontend.framing import FRAMING_OF_ENDPOINT, OPENAI_ENDPOINTS, error_body, error_event, framing_of
from sglang_kevlar.frontend.kept.middleware import KeptMiddleware
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.outcome import OFFSET_KEY, SCOPE_KEY, RequestOutcome

logger = logging.getLogger(__name__)

#: bounds of what is held back per request. The largest event before the first token is `response.created`, which
#: repeats the request's instructions and tools
HOLD_BYTES = 1 << 20
HOLD_MESSAGES = 64

STREAM_TYPES = (b"text/event-stream", b"application/x-ndjson")


class OutcomeMiddleware:
    """Pure ASGI; one RequestOutcome per HTTP request in ``scope["kevlar"]``."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # A kept request comes with its own.
        outcome = scope.setdefault(SCOPE_KEY, RequestOutcome())
        response = _GuardedResponse(scope, outcome, send)
        try:
            await self.app(scope, receive, response.send)
        except Exception as error:
            if outcome.failure is None:
                await response.release()
                raise
            # The manager's own way out through the endpoint; what the client gets is the failure it recorded.
            logger.debug("endpoint ended with %s after its request failed", type(error).__name__)
        await response.finish()


class _GuardedResponse:
    """The `send` of one request."""

    __slots__ = (
        "_complete",
        "_failed",
        "_first",
        "_held",
        "_held_bytes",
        "_last",
        "_outcome",
        "_scope",
        "_send",
        "_streams",
    )

    def __init__(self, scope: Scope, outcome: RequestOutcome, send: Send) -> None:
        self._scope = scope
        self._outcome = outcome
        self._send = send
        self._held: list[Message] = []
        self._held_bytes = 0
        self._streams = False
        self._complete = False
        self._failed = False
        self._first = b""
        self._last = b""

    async def send(self, message: Message) -> None:
        outcome = self._outcome
        if self._failed or self._can_fail():
            await self._fail()
            return
        kind = message["type"]
        if kind == "http.response.start":
            self._streams = _is_stream(message)
        elif kind == "http.response.body":
            if self._streams:
                self._last = message.get("body", b"")
                self._first = self._first or self._last
            self._complete = not message.get("more_body", False)
            if outcome.kept is not None:
                # It may be held back while there is a further output.
                message[OFFSET_KEY] = outcome.kept.offset
        if outcome.delivered:
            await self._send(message)
            return
        self._held.append(message)
        self._held_bytes += len(message.get("body", b""))
        if not self._streams or outcome.first_token or self._complete or self._hold_is_full():
            await self.release()

    async def release(self) -> None:
        """Sends what is held; from now on messages go straight through."""
        held, self._held = self._held, []
        if held:
            self._outcome.delivered = True
        for message in held:
            await self._send(message)

    async def finish(self) -> None:
        """The endpoint is through: a response that is neither complete nor failed is its own affair."""
        if self._can_fail():
            await self._fail()
        else:
            await self.release()

    def _can_fail(self) -> bool:
        """Whether there is a failure that the client can still be told of."""
        outcome = self._outcome
        return outcome.failure is not None and not self._complete and (self._streams or not outcome.delivered)

    def _hold_is_full(self) -> bool:
        return self._held_bytes > HOLD_BYTES or len(self._held) > HOLD_MESSAGES

    async def _fail(self) -> None:
        """Ends the response; what the endpoint still sends afterwards is swallowed."""
        failure = self._outcome.failure
        if self._failed or failure is None:
            return
        self._failed = self._complete = True
        self._held = []
        framing = framing_of(self._scope)
        if self._outcome.delivered:
            body = error_event(framing, failure, self._first, self._last)
        else:
            self._outcome.delivered = True
            body = error_body(framing, failure)
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            if failure.retry_after is not None:
                headers.append((b"retry-after", str(failure.retry_after).encode()))
            await self._send({"type": "http.response.start", "status": failure.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


def _is_stream(start: Message) -> bool:
    for name, value in start.get("headers", ()):
        if name.lower() == b"content-type":
            return bool(value.startswith(STREAM_TYPES))
    return False


def install(app: Any, kept: KeptRuns) -> None:
    """Puts the middleware innermost, so that CORS headers, keys and upstream's metrics see its responses.

    Around it, what keeps requests: a kept response is one whose failures are as clients expect them.
    Before the app serves. Raises RuntimeError, naming it, when an endpoint whose framing we know is not there.
    """
    generating = {*FRAMING_OF_ENDPOINT, *OPENAI_ENDPOINTS}
    routes = [route for route in app.router.routes if getattr(route, "name", "") in generating]
    missing = sorted(generating - {route.name for route in routes})
    if missing:
        raise RuntimeError(f"upstream's HTTP app has no endpoint {', '.join(missing)}")
    if app.middleware_stack is not None:
        raise RuntimeError("the HTTP app serves already: no middleware can be added")
    app.user_middleware.append(Middleware(KeptMiddleware, runs=kept, routes=routes))
    app.user_middleware.append(Middleware(OutcomeMiddleware))
