"""Kept requests where there are several frontends: where each of them is, and how one is taken up."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.types import Receive, Scope, Send

from sglang_kevlar.control.directory import Here, Identity, Nowhere, Refused, TakeUp, There, Unsure, Where
from sglang_kevlar.control.kept_requests import NoRoom, RidTaken
from sglang_kevlar.control.lineage import LAST_K, EventId, Point
from sglang_kevlar.frontend.kept.events import BadId, parse_position, request_digest, tag_of
from sglang_kevlar.frontend.kept.progress import Recorded
from sglang_kevlar.frontend.kept.registry import KeptRuns
from sglang_kevlar.frontend.kept.run import Run
from sglang_kevlar.frontend.outcome import Failure
from sglang_kevlar.frontend.peers.forward import CANNOT, FORWARDED, Forwarder, Unreachable, message_of, relay
from sglang_kevlar.frontend.peers.links import PeerLinks
from sglang_kevlar.frontend.peers.records import PeerRecords
from sglang_kevlar.protocol.records import HttpRequest, name_of

logger = logging.getLogger(__name__)

#: end of the path of the Responses API
RESPONSES_PATH = "/v1/responses"


class KeptPeers:
    """``app``: the HTTP application, which endpoints find in their scope."""

    def __init__(self, runs: KeptRuns, records: PeerRecords, links: PeerLinks, app: Any) -> None:
        self._runs = runs
        self.records = records
        self._links = links
        self._app = app
        self._forwarder = Forwarder(records.directory.name)
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        self.records.close()
        for task in self._tasks:
            task.cancel()
        self._links.close()
        await self._forwarder.close()

    # -- requests that come in (kept.elsewhere.Elsewhere)

    def may_go_on(self, run: Run, last_id: str) -> bool:
        behind = _event(last_id)
        return run.lineage is None or behind is None or run.lineage.shares(behind.tag, behind.point)

    async def answer(
        self,
        identity: Identity | None,
        rid: str | None,
        principal: str,
        last_id: str | None,
        begun: bool,
        scope: Scope,
        body: bytes,
        receive: Receive,
        send: Send,
    ) -> Run | Failure | bool:
        behind = _event(last_id)
        # One that another frontend passed on is answered here, or not at all.
        passed_on = any(name == FORWARDED.encode() for name, _ in scope["headers"])
        alone, refused = False, None
        while True:
            where = self.records.directory.find(identity, rid, principal, behind, time.monotonic(), alone, begun)
            if isinstance(where, Here):
                found = self._runs.find_rid(principal, where.rid)
                return found if isinstance(found, Run) else _NOT_YET
            if isinstance(where, TakeUp):
                return self.take_up(where) or _NO_ROOM
            if isinstance(where, Unsure):
                missing = ", ".join(where.missing)
                return Failure(
                    503, f"frontend {missing} may have this request and is not there: try again", "no_group", 1
                )
            is_new = isinstance(where, Nowhere) and not begun
            if is_new and not passed_on:
                return False
            if passed_on or alone:
                return refused if refused is not None and isinstance(where, Nowhere) else _refusal(where)
            # One may have more of it, or may just have taken it up, or may not know yet that it should.
            names = [where.name] if isinstance(where, There) else self.records.directory.peers
            try:
                answered, refused = await self._forward(names, scope, body, receive, send)
                if answered:
                    return True
            except Unreachable as problem:
                return Failure(503, f"a frontend that may have this request does not answer ({problem})", "no_group", 1)
            if not isinstance(where, There):
                return _refusal(where)
            alone = True

    async def _forward(
        self, names: list[str], scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> tuple[bool, Failure | None]:
        """Let a peer answer that can go on with it. Without one, what the first of them said. Raises Unreachable,
        CutOff."""
        refused: Failure | None = None
        for name in names:
            url = self.records.urls.get(name)
            if url is None:
                raise Unreachable(f"frontend {name} has just gone")
            gone = self.records.leaving(name)
            response = await self._forwarder.ask(url, scope, body, gone)
            if response.status in CANNOT:
                refused = refused or Failure(response.status, await message_of(response), "invalid")
                continue
            await relay(response, receive, send, gone)
            return True, None
        return False, refused

    # -- requests of lost frontends

    def take_up_all(self, taken: list[TakeUp]) -> None:
        """Of a lost frontend, one after the other: each costs its tokenization."""
        if taken:
            task = asyncio.get_running_loop().create_task(self._take_up_all(taken))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _take_up_all(self, taken: list[TakeUp]) -> None:
        for found in taken:
            if self.records.directory.may_be_taken_up(found):
                self.take_up(found)
                await asyncio.sleep(0)

    def take_up(self, found: TakeUp) -> Run | None:
        """Go on with a request of a lost frontend. None when there is no room, or it is here by now."""
        opened, record, runs = found.record.opened, found.record, self._runs
        if isinstance(here := runs.find(opened.principal, opened.key), Run):
            return here  # its client was back before its turn had come
        request = opened.request
        assert runs.endpoints is not None, "the application has begun to serve before there are sessions"
        failure = None if record.ended is None else record.ended.failure
        if request.path.endswith(RESPONSES_PATH) and record.yields:
            # Its events name what they belong to by ids that are drawn when it is made.
            failure = (500, f"request {opened.rid}: its frontend was lost, and its answer cannot be continued by "
                       "another one", "not_continuable", None)  # fmt: skip
        try:
            digest = request_digest(request.path, request.query, request.body)
            run = runs.begin(opened.principal, opened.key, opened.rid, digest, len(request.body), found.lineage)
        except (NoRoom, RidTaken) as problem:
            logger.error("request %s of a lost frontend is not taken up: %s", opened.rid, problem or "its id is taken")
            return None
        self.records.directory.taken_up(name_of(opened))
        outputs = [each.messages for each in record.yields]
        recorded = Recorded(outputs, record.ended is not None or failure is not None, failure)
        runs.serve(run, runs.endpoints, _scope(request, self._app), request.body, recorded)
        return run


def _refusal(where: Where) -> Failure:
    if isinstance(where, Refused):
        return Failure(409, where.why, "not_continuable")
    if isinstance(where, There):
        return Failure(503, f"frontend {where.name} has this request: ask it", "no_group", 1)
    return Failure(404, "no frontend keeps such a request: it cannot be taken up again", "invalid")


#: it ended a moment ago, say
_NOT_YET = Failure(503, "this request has just failed, or is gone: try again", "no_group", 1)
_NO_ROOM = Failure(503, "its frontend was lost, and there is no room to go on with it here", "queue_full", 1)


def _event(last_id: str | None) -> EventId | None:
    """None for what is no id of ours: whoever has the request says so."""
    if last_id is None:
        return None
    text, tag = tag_of(last_id)
    rid, _, position = text.rpartition(":")
    try:
        at = parse_position(position)
    except BadId:
        return None
    return None if tag is None else EventId(rid, Point(at.tokens, at.number if "." in position else LAST_K), tag)


def _scope(request: HttpRequest, app: Any) -> Scope:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.path,
        "raw_path": request.path.encode(),
        "query_string": request.query,
        "root_path": request.root_path,
        "headers": list(request.headers),
        "client": None,
        "server": None,
        "state": {},
        "app": app,
    }
