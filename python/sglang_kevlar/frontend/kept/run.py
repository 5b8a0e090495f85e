"""One kept request at work: its endpoint in a task of its own, and clients that read what it sends."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang_kevlar.control.event_log import Discarded, Position
from sglang_kevlar.control.kept_requests import Kept, KeptRequests
from sglang_kevlar.control.lineage import Lineage
from sglang_kevlar.frontend.kept.events import BadId, Splitter, event_id, parse_id, with_id
from sglang_kevlar.frontend.kept.progress import Progress, Recorded, Recorder, RunRecord
from sglang_kevlar.frontend.outcome import OFFSET_KEY, SCOPE_KEY, RequestOutcome
from sglang_kevlar.protocol.records import HttpRequest

logger = logging.getLogger(__name__)

RID_HEADER = b"x-kevlar-request-id"
#: bytes of events that a client that is behind gets in one piece
PIECE = 64 << 10
#: seconds that an endpoint has to notice that nobody wants its response
ABORT_GRACE = 10.0


class BrokenOff(Exception):
    """The response cannot be completed: the server closes the connection, and the client sees that it was cut."""


class Moved(Exception):
    """Another frontend has the request: this client, which was sent nothing, is to be answered from there."""


class Run:
    """``changed`` wakes whoever waits for the next event."""

    def __init__(self, kept: Kept, requests: KeptRequests, lineage: Lineage | None = None) -> None:
        self.kept = kept
        #: through whose hands it went, where there are other frontends: its events are named by it
        self.lineage = lineage
        self.record: RunRecord | None = None
        #: tokens up to which another frontend made it
        self._base = -1
        self._requests = requests
        #: status and headers, once they are there
        self.start: Message | None = None
        #: its events have ids
        self.numbered = False
        #: what the endpoint raised, or that it left its response incomplete
        self.failure: Exception | None = None
        self._splitter = Splitter()
        self._abandoned = asyncio.Event()
        self._waiting: set[asyncio.Future[None]] = set()
        self._readers: set[Reader] = set()
        self._body: bytes | None = None
        self._progress: Progress | None = None
        #: of the last event
        self._position = Position(0, -1)
        self.task: asyncio.Task[None] | None = None

    # ---- the endpoint's side

    def begin(self, scope: Scope, body: bytes, recorder: Recorder | None, recorded: Recorded | None = None) -> None:
        """Before `serve`. ``recorded``: of a run that another frontend began."""
        self._body = body
        if recorder is not None:
            request = HttpRequest(
                method=scope["method"],
                path=scope["path"],
                query=scope.get("query_string", b""),
                headers=list(scope["headers"]),
                body=body,
                root_path=scope.get("root_path", ""),
            )
            identity = (self.kept.principal, self.kept.key)
            self.record = recorder.begin(self.kept.rid, identity, self.lineage, request)
            self.lineage = self.record.lineage
        self._progress = Progress(self.kept.rid, self.record, recorded)
        if recorded is not None and self.lineage is not None and self.lineage.before:
            self._base = self.lineage.before[-1][1]

    async def serve(self, app: ASGIApp, scope: Scope) -> None:
        """Lets the endpoint answer, to the end of all it does. Does not raise; ``failure`` says what went wrong."""
        outcome = scope[SCOPE_KEY] = RequestOutcome(kept=self._progress)
        try:
            # Towards the endpoint we are the server: one that tells of a client's leaving by `receive`, and only there.
            scope["asgi"] = {**scope.get("asgi", {}), "spec_version": "2.3"}
            await app(scope, self._receive, self._send)
            if not self.kept.ended:
                raise BrokenOff("the endpoint did not complete its response")
        except Exception as error:
            self._failed(error)
        except asyncio.CancelledError:
            self._failed(BrokenOff("the endpoint was cancelled"))
        finally:
            if self.record is not None and not self._abandoned.is_set():
                failure = outcome.failure
                self.record.end(
                    None if failure is None else (failure.status, failure.message, failure.kind, failure.retry_after)
                )

    @property
    def through(self) -> bool:
        """The endpoint has ended, with whatever it does after its response."""
        return self.task is not None and self.task.done()

    def abandon(self) -> None:
        """Nobody will read it: the endpoint is told that its client has gone."""
        self._abandoned.set()
        self.wake()

    def _failed(self, error: Exception) -> None:
        if self.kept.ended:
            # The response is out; what an endpoint does after it is its own affair.
            logger.error("kept request %s: its endpoint failed after its response", self.kept.rid, exc_info=error)
            return
        if self._abandoned.is_set():
            return
        self.failure = error
        if self.start is None:
            self._requests.forget(self.kept, "its endpoint failed")
        else:
            self._requests.drop(self.kept, f"its endpoint broke off: {type(error).__name__}")
        self.wake()

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            self._requests.body_taken(self.kept)
            return {"type": "http.request", "body": body, "more_body": False}
        await self._abandoned.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self._abandoned.is_set():
            return
        if message["type"] == "http.response.start":
            self._begin(message)
        elif message["type"] == "http.response.body":
            offset = message.get(OFFSET_KEY, self.offset())
            chunk, last = message.get("body", b""), not message.get("more_body", False)
            await self._append(self._splitter.feed(chunk) if self.numbered else [chunk] if chunk else [], offset)
            if last:
                rest = self._splitter.rest()
                await self._append([rest] if rest else [], offset)
                self._end()
        self.wake()

    def id_of(self, position: Position) -> str:
        """Of the event there."""
        return event_id(self.kept.rid, position, None if self.lineage is None else self.lineage.tag_at(position.tokens))

    def offset(self) -> int:
        """Output tokens so far."""
        return self._progress.offset if self._progress is not None else 0

    def _begin(self, message: Message) -> None:
        headers = [(name.lower(), value) for name, value in message.get("headers", ())]
        self.numbered = any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
        self.start = {**message, "headers": [*headers, (RID_HEADER, self.kept.rid.encode())]}

    def _end(self) -> None:
        self._requests.end(self.kept, asyncio.get_running_loop().time())
        if self.start is not None and self.start["status"] >= 400:
            # Nothing was generated that could be lost, and who sends the same again shall not get the same refusal.
            self._requests.forget(self.kept, "it was refused")

    async def _append(self, events: list[bytes], tokens: int) -> None:
        kept = self.kept
        for event in events:
            if kept.closed is not None and not await self._caught_up():
                return
            last = self._position
            self._position = position = Position(tokens, last.number + 1 if last.tokens == tokens else 0)
            if self.numbered:
                event = with_id(event, self.id_of(position))
            self._requests.append(kept, event, position)

    async def _caught_up(self) -> bool:
        """Waits until the slowest client has what there is: a closed request holds no more than one event.

        False when no client is left, and so none can come.
        """
        while any(reader.index < self.kept.log.end for reader in self._readers):
            self.wake()
            await self.changed()
        if not self._readers:
            self._requests.drop(self.kept, self.kept.closed or "")
            self.abandon()
        return not self._abandoned.is_set()

    # ---- the clients' side

    async def come_to(self, last_id: str | None) -> None:
        """Of a run that another frontend began: wait until it has made again what its client has."""
        with contextlib.suppress(BadId):
            position = None if last_id is None else parse_id(last_id, self.kept.rid)
            while position is not None and position.tokens <= self._base and not self._is_at(position):
                await self.changed()

    def _is_at(self, position: Position) -> bool:
        log = self.kept.log
        has_come = log.last is not None and log.last >= position
        return has_come or log.complete or self.failure is not None or self.kept.gone is not None

    async def changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def attach(self, reader: Reader) -> None:
        self._readers.add(reader)
        self._requests.attach(self.kept)

    def detach(self, reader: Reader) -> None:
        self._readers.discard(reader)
        self._requests.detach(self.kept, asyncio.get_running_loop().time())
        self.moved()

    def given(self) -> None:
        """A client is about to get something of it."""
        if self.record is not None:
            self.record.read()

    def moved(self) -> None:
        """A client has read, or left."""
        self.kept.touched = asyncio.get_running_loop().time()
        if self.kept.closed is not None:
            self._requests.discard(self.kept, min((reader.index for reader in self._readers), default=0))
            self.wake()


class Reader(Response):
    """The response to one client: what the run has sent from ``index`` on, and what it sends."""

    def __init__(self, run: Run, index: int) -> None:
        super().__init__()
        self._run = run
        self.index = index

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = self._run
        run.attach(self)
        listener = asyncio.create_task(_disconnected(receive))
        listener.add_done_callback(lambda _: run.wake())
        try:
            await self._copy(listener, send)
        finally:
            listener.cancel()
            run.detach(self)

    async def _copy(self, listener: asyncio.Task[None], send: Send) -> None:
        run, log, started = self._run, self._run.kept.log, False
        while not listener.done():
            if not started and run.failure is None and run.kept.gone is not None and not log.complete:
                raise Moved
            if run.start is None:
                if run.failure is not None:
                    raise run.failure
                await run.changed()
                continue
            if not started:
                run.given()
                await send(run.start)
                started = True
            try:
                piece, behind = log.read(self.index, PIECE)
            except Discarded:
                raise BrokenOff(f"request {run.kept.rid}: {run.kept.gone}") from None
            if piece:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                self.index = behind
                run.moved()
            elif log.complete:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            elif run.kept.gone is not None:
                raise BrokenOff(f"request {run.kept.rid}: {run.kept.gone}")
            else:
                await run.changed()


async def _disconnected(receive: Receive) -> None:
    with contextlib.suppress(Exception):  # then it is gone, too
        while (await receive())["type"] != "http.disconnect":
            pass
