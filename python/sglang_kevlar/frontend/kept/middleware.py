"""Requests with an ``Idempotency-Key`` outlive their connection, and are served once however often they are sent.

The endpoint of such a request runs in a task of its own (`kept.run`), and the HTTP response is a reader of what it
sends. Who sends the same request again reads it from the start, or behind the event that ``Last-Event-ID`` names.
All other requests pass, at the cost of a look at their headers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import uuid
from collections.abc import Sequence
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_kevlar.control.kept_requests import NO_ROOM, REQUEST_OVERHEAD, Gone, NoRoom, RidTaken
from sglang_kevlar.frontend.framing import error_body, framing_of
from sglang_kevlar.frontend.kept.elsewhere import Elsewhere
from sglang_kevlar.frontend.kept.events import RID, BadId, digest_of, parse_id
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.kept.run import RID_HEADER, Moved, Reader, Run
from sglang_kevlar.frontend.outcome import Failure

KEY_HEADER = b"idempotency-key"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")
#: seconds after which it is worth trying again when there is no room
RETRY_AFTER = 5


class Refused(Exception):
    def __init__(self, status: int, message: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.failure = Failure(status, message, "queue_full" if retry_after else "invalid", retry_after)


class KeptMiddleware:
    """Pure ASGI. ``routes`` are those of the endpoints that generate."""

    def __init__(self, app: ASGIApp, runs: KeptRuns, routes: Sequence[BaseRoute]) -> None:
        self.app = runs.endpoints = app
        self._runs = runs
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or KEY_HEADER not in dict(scope["headers"]):
            await self.app(scope, receive, send)
            return
        endpoint = self._endpoint(scope)
        if endpoint is None:
            await self.app(scope, receive, send)
            return
        body = _Body(scope)
        try:
            if not await self._read(receive, body, scope):
                return
            while (reader := await self._reader(scope, body, receive, send)) is not None:
                with contextlib.suppress(Moved):
                    await reader(scope, receive, send)
                    return
        except Refused as refused:
            await _refusal(refused.failure, endpoint)(scope, receive, send)

    def _endpoint(self, scope: Scope) -> Scope | None:
        for route in self._routes:
            match, child = route.matches(scope)
            if match is Match.FULL:
                return {**scope, **child}
        return None

    async def _reader(self, scope: Scope, body: _Body, receive: Receive, send: Send) -> Reader | None:
        """Raises Refused. None when another frontend answered."""
        headers, elsewhere = Headers(scope=scope), self._runs.elsewhere
        key, principal = headers["idempotency-key"], principal_of(headers)
        wanted, last_id = headers.get(RID_HEADER.decode()), headers.get("last-event-id")
        # From here to the run's beginning nothing is awaited: of two that come at once one finds the other's.
        found = self._runs.find(principal, key)
        if elsewhere is not None and (found is None or not self._may_go_on(elsewhere, found, last_id)):
            identity, begun = (principal, key), wanted is not None or last_id is not None
            answer = await elsewhere.answer(
                identity, None, principal, last_id, begun, scope, body.whole(), receive, send
            )
            if answer is True:
                return None
            if isinstance(answer, Failure):
                raise Refused(answer.status, answer.message, answer.retry_after)
            # Nobody has it. Meanwhile it may have been sent here again.
            found = self._runs.find(principal, key) if answer is False else answer
        if found is None:
            if wanted is not None or last_id is not None:
                raise Refused(404, "no request with this Idempotency-Key is kept here: it cannot be taken up again")
            if not body.is_kept:
                raise Refused(503, "the request with this Idempotency-Key has just failed: try again", 1)
            run = self._begin(principal, key, body)
            self._runs.serve(run, self.app, dict(scope), body.whole())
            return Reader(run, 0)
        run = attachable(found)
        await run.come_to(last_id)
        if run.kept.digest != body.digest():
            raise Refused(422, "this Idempotency-Key was used with another request: path, query or body differ")
        if wanted is not None and wanted != run.kept.rid:
            raise Refused(409, f"this Idempotency-Key belongs to request {run.kept.rid}, not {wanted[:128]}")
        return Reader(run, 0 if last_id is None else index_behind(run, last_id))

    @staticmethod
    def _may_go_on(elsewhere: Elsewhere, found: Run | Gone, last_id: str | None) -> bool:
        return last_id is None or isinstance(found, Gone) or elsewhere.may_go_on(found, last_id)

    def _begin(self, principal: str, key: str, body: _Body) -> Run:
        rid = _rid(body.whole())
        try:
            return self._runs.begin(principal, key, rid, body.digest(), body.size)
        except NoRoom as error:
            raise Refused(503, f"cannot keep this request: {error}", RETRY_AFTER) from None
        except RidTaken:
            raise Refused(409, f"request {rid} is kept under another Idempotency-Key") from None

    async def _read(self, receive: Receive, body: _Body, scope: Scope) -> bool:
        """False when the client left. Raises Refused, also when it is too large to be kept."""
        headers = Headers(scope=scope)
        if not _KEY.fullmatch(key := headers["idempotency-key"]):
            raise Refused(400, "Idempotency-Key: 1 to 255 visible ASCII characters")
        # The body of a request that is here already is only compared: taking up again needs no room.
        keep = self._runs.elsewhere is not None or self._runs.find(principal_of(headers), key) is None
        body.is_kept = keep
        requests, reserved = self._runs.requests, 0
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    return False
                piece = message.get("body", b"")
                if body.size + len(piece) > requests.memory - REQUEST_OVERHEAD:
                    raise Refused(413, "the request is larger than --stream-memory: send it without Idempotency-Key")
                if keep and not requests.reserve(len(piece)):
                    raise Refused(503, f"cannot keep this request: {NO_ROOM}", RETRY_AFTER)
                reserved += len(piece) if keep else 0
                body.add(piece, keep)
                if not message.get("more_body", False):
                    return True
        finally:
            # Whoever keeps the request takes the room for its body without a wait in between.
            requests.release(reserved)


class _Body:
    """A request as it arrives: what it is, by its digest, and its bytes if they are to be kept."""

    def __init__(self, scope: Scope) -> None:
        self._digest = digest_of(scope["path"], scope.get("query_string", b""))
        self._pieces: list[bytes] = []
        self.is_kept = False
        self.size = 0

    def add(self, piece: bytes, keep: bool) -> None:
        self._digest.update(piece)
        self.size += len(piece)
        if keep:
            self._pieces.append(piece)

    def digest(self) -> bytes:
        return self._digest.digest()

    def whole(self) -> bytes:
        if len(self._pieces) > 1:
            self._pieces = [b"".join(self._pieces)]
        return self._pieces[0]


def attachable(found: Run | Gone) -> Run:
    """Raises Refused when it is gone."""
    if isinstance(found, Gone):
        raise Refused(410, f"request {found.rid} is not kept any more: {found.reason}")
    if found.kept.closed is not None:
        raise Refused(410, f"request {found.kept.rid} cannot be taken up again: {found.kept.closed}")
    return found


def index_behind(run: Run, last_id: str) -> int:
    """Index behind the event that a client had last. Raises Refused."""
    log, rid = run.kept.log, run.kept.rid
    if run.start is not None and not run.numbered:
        raise Refused(400, f"the response of request {rid} has no events with ids: it can only be read from the start")
    try:
        position = parse_id(last_id, rid)
    except BadId as error:
        raise Refused(400, f"Last-Event-ID: {error}") from None
    if log.last is None or position > log.last:
        raise Refused(409, f"Last-Event-ID: request {rid} has not come to event {last_id[:200]}")
    index = log.behind(position)
    if index is None:
        raise Refused(409, f"Last-Event-ID: request {rid} has no event {last_id[:200]}")
    return index


def principal_of(headers: Headers) -> str:
    """Whose request it is: of the bearer of a key (as upstream reads it), or nobody's in particular."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return hashlib.sha256(key.encode()).hexdigest() if scheme.lower() == "bearer" and key else ""


def _rid(body: bytes) -> str:
    """The id that the client chose, or a new one. Raises Refused. What is no JSON is for the endpoint to refuse."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        request = None
    rid = request.get("rid") if isinstance(request, dict) else None
    if not isinstance(rid, str):
        return uuid.uuid4().hex
    if not RID.fullmatch(rid):
        raise Refused(400, "rid: to be kept, 1 to 128 of the characters A-Z a-z 0-9 . _ : ~ @ + = -")
    return rid


def _refusal(failure: Failure, endpoint: Scope) -> Response:
    headers = {} if failure.retry_after is None else {"retry-after": str(failure.retry_after)}
    body = error_body(framing_of(endpoint), failure)
    return Response(body, HTTPStatus(failure.status), headers, "application/json")
