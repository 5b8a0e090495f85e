"""``/kevlar/requests/{rid}``: a kept request by its id."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from sglang_kevlar.frontend.kept.events import BadId, parse_position
from sglang_kevlar.frontend.kept.middleware import Refused, attachable, index_behind, principal_of
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.kept.run import Reader, Run
from sglang_kevlar.frontend.outcome import outcome_of


def install(app: FastAPI, runs: KeptRuns) -> None:
    def found(request: Request, rid: str) -> Run:
        run = runs.find_rid(principal_of(request.headers), rid)
        if run is None:
            raise Refused(404, f"no request {rid[:128]} is kept here")
        return attachable(run)

    async def state(request: Request, rid: str) -> Response:
        try:
            run = found(request, rid)
        except Refused as refused:
            return _refusal(refused)
        expires, last = runs.expires_in(run), run.kept.log.last
        return JSONResponse(
            {
                "rid": rid,
                "state": "ended" if run.kept.ended else "running",
                "clients": run.kept.clients,
                "tokens": run.offset(),
                "last_event": None if last is None or not run.numbered else f"{rid}:{last.tokens}.{last.number}",
                "expires_in_s": None if expires is None else round(expires, 1),
            }
        )

    async def stream(request: Request, rid: str) -> Response:
        try:
            run = found(request, rid)
            index = _index(run, request)
        except Refused as refused:
            return _refusal(refused)
        if (outcome := outcome_of(request)) is not None:
            # Its first token was waited for when it was made: nothing is to be held back.
            outcome.first_token = True
        return Reader(run, index)

    app.add_api_route("/kevlar/requests/{rid}", state, methods=["GET"])
    app.add_api_route("/kevlar/requests/{rid}/stream", stream, methods=["GET"])


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
