"""A request that another frontend has: it is asked, and what it answers is passed on as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable

import aiohttp
from starlette.types import Receive, Scope, Send
from yarl import URL

#: in a request that a frontend passes on: its name. Whoever gets it answers itself, or says that it cannot
FORWARDED = "x-kevlar-forwarded"
#: statuses that say that a frontend cannot go on with a request: another may
CANNOT = (404, 409, 410)
CONNECT_TIMEOUT = 2.0
#: of a refusal, at most, and the seconds that it may take
MESSAGE_BYTES, MESSAGE_TIMEOUT = 65_536, 5.0
#: of one hop, or made anew
_NOT_PASSED = frozenset(
    (b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"host", b"content-length")
)


class Unreachable(Exception):
    """The other frontend does not answer."""


class CutOff(Exception):
    """Its answer broke off: the connection to the client is closed, and the client comes back."""


class Forwarder:
    def __init__(self, name: str) -> None:
        self._name = name
        self._session: aiohttp.ClientSession | None = None

    async def ask(self, url: str, scope: Scope, body: bytes, gone: asyncio.Future[None]) -> aiohttp.ClientResponse:
        """``gone``: done when nothing is to be expected of it any more. Raises Unreachable."""
        asking = asyncio.ensure_future(self._ask(url, scope, body))
        try:
            await asyncio.wait((asking, gone), return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
        finally:
            # One that answers at this very moment is closed when it is collected.
            asking.cancel()
        raise Unreachable("it has just gone")

    async def _ask(self, url: str, scope: Scope, body: bytes) -> aiohttp.ClientResponse:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT, sock_connect=CONNECT_TIMEOUT)
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(timeout=timeout, connector=connector, auto_decompress=False)
        query = scope.get("query_string", b"").decode("latin-1")
        target = URL(f"{url}{_path(scope)}{'?' if query else ''}{query}", encoded=True)
        headers = [
            (name.decode("latin-1"), value.decode("latin-1"))
            for name, value in scope["headers"]
            if name not in _NOT_PASSED
        ]
        try:
            return await self._session.request(
                scope["method"], target, data=body, headers=[*headers, (FORWARDED, self._name)], allow_redirects=False
            )
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise Unreachable(str(error)) from error

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


async def message_of(response: aiohttp.ClientResponse) -> str:
    """What a refusal says. Raises Unreachable."""
    body = b""
    try:
        async with asyncio.timeout(MESSAGE_TIMEOUT):
            while len(body) < MESSAGE_BYTES and (piece := await response.content.read(MESSAGE_BYTES)):
                body += piece
        answer = json.loads(body)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise Unreachable(str(error)) from error
    except ValueError:
        answer = None
    finally:
        response.close()
    answer = answer.get("error", answer) if isinstance(answer, dict) else answer
    message = answer.get("message") if isinstance(answer, dict) else answer
    return str(message or f"status {response.status}")


async def relay(response: aiohttp.ClientResponse, receive: Receive, send: Send, gone: asyncio.Future[None]) -> None:
    """Pass ``response`` on, until its end or the client's leaving. Raises CutOff, also when the peer is ``gone``: one
    that hangs, or whose host is off, leaves its connections open."""
    copying = asyncio.ensure_future(_copy(response, send))
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((copying, leaving, gone), return_when=asyncio.FIRST_COMPLETED)
        if copying.done():
            copying.result()
        elif not leaving.done():
            raise CutOff("the frontend that it came from has gone")
    finally:
        response.close()
        for task in (copying, leaving):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _copy(response: aiohttp.ClientResponse, send: Send) -> None:
    await send({"type": "http.response.start", "status": response.status, "headers": list(_passed(response))})
    try:
        async for chunk in response.content.iter_any():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise CutOff(str(error)) from error
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def _path(scope: Scope) -> str:
    """As the client sent it, with its escapes: decoded, it could be another request. What its server put before that
    the peer's will, too."""
    raw, root = bytes(scope["raw_path"]).decode("latin-1"), scope.get("root_path", "")
    return raw.removeprefix(root) if raw.startswith(f"{root}/") else raw


def _passed(response: aiohttp.ClientResponse) -> Iterable[tuple[bytes, bytes]]:
    return ((name.lower(), value) for name, value in response.raw_headers if name.lower() not in _NOT_PASSED)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
