"""``/kevlar/requests/{rid}``: a kept request by its id."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sglang_kevlar.frontend.kept.events import BadId, parse_position
from sglang_kevlar.frontend.kept.middleware import Refused, attachable, index_behind, principal_of
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.kept.run import Moved, Reader, Run
from sglang_kevlar.frontend.outcome import Failure, outcome_of


def install(app: FastAPI, runs: KeptRuns) -> None:
    async def state(request: Request, rid: str) -> Response:
        def describe(run: Run) -> Response:
            expires, last = runs.expires_in(run), run.kept.log.last
            return JSONResponse(
                {
                    "rid": rid,
                    "state": "ended" if run.kept.ended else "running",
                    "clients": run.kept.clients,
                    "tokens": run.offset(),
                    "last_event": None if last is None or not run.numbered else run.id_of(last),
                    "expires_in_s": None if expires is None else round(expires, 1),
                }
            )

        return _Answer(runs, request, rid, describe)

    async def stream(request: Request, rid: str) -> Response:
        if (outcome := outcome_of(request)) is not None:
            # Its first token was waited for when it was made: nothing is to be held back.
            outcome.first_token = True
        return _Answer(runs, request, rid, lambda run: Reader(run, _index(run, request)))

    app.add_api_route("/kevlar/requests/{rid}", state, methods=["GET"])
    app.add_api_route("/kevlar/requests/{rid}/stream", stream, methods=["GET"])


class _Answer(Response):
    """Of the run with this id, here or at another frontend. ``respond`` raises Refused."""

    def __init__(self, runs: KeptRuns, request: Request, rid: str, respond: Callable[[Run], Response]) -> None:
        super().__init__()
        self._runs = runs
        self._principal = principal_of(request.headers)
        self._last_id = request.headers.get("last-event-id")
        self._rid = rid
        self._respond = respond

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while True:
            try:
                run = await self._run(scope, receive, send)
                response = None if run is None else self._respond(run)
            except Refused as refused:
                response = _refusal(refused)
            with contextlib.suppress(Moved):
                if response is not None:
                    await response(scope, receive, send)
                return

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> Run | None:
        """None when another frontend has answered. Raises Refused."""
        elsewhere, last_id = self._runs.elsewhere, self._last_id
        run = self._runs.find_rid(self._principal, self._rid)
        here = isinstance(run, Run) and (last_id is None or elsewhere is None or elsewhere.may_go_on(run, last_id))
        if elsewhere is not None and not here:
            answer = await elsewhere.answer(None, self._rid, self._principal, last_id, True, scope, b"", receive, send)
            if answer is True:
                return None
            if isinstance(answer, Failure):
                raise Refused(answer.status, answer.message, answer.retry_after)
            run = answer or run
        if run is None:
            raise Refused(404, f"no request {self._rid[:128]} is kept here")
        run = attachable(run)
        await run.come_to(last_id)
        return run


def _index(run: Run, request: Request) -> int:
    """``Last-Event-ID``, which a browser sends when it connects again, comes before ``from``. Raises Refused."""
    last_id, start = request.headers.get("last-event-id"), request.query_params.get("from")
    if last_id is not None:
        return index_behind(run, last_id)
    if start is None:
        return 0
    try:
        position = parse_position(start)
    except BadId as error:
        raise Refused(400, f"from: {error}") from None
    last = run.kept.log.last
    if position > (0, 0) and not (run.numbered or run.start is None):
        raise Refused(400, f"the response of request {run.kept.rid} has no events: it can only be read from the start")
    if position > (0, 0) and (last is None or position > last):
        raise Refused(409, f"from: request {run.kept.rid} has not come to {start}")
    return run.kept.log.from_position(position)


def _refusal(refused: Refused) -> Response:
    failure = refused.failure
    return JSONResponse({"error": {"message": failure.message, "code": failure.status}}, failure.status)
