"""One HTTP request to an ASGI app, of which the client can be slow, and can leave at any moment."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class Exchange:
    """``read`` bounds how many body messages are taken before the server has to wait; None: no bound."""

    def __init__(
        self,
        app: Any,
        method: str,
        path: str,
        body: bytes = b"",
        headers: dict[str, str] | None = None,
        read: int | None = None,
    ) -> None:
        path, _, query = path.partition("?")
        self.sent: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        self._request: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]
        self._changed = asyncio.Event()
        self._may = asyncio.Semaphore(1 << 30 if read is None else read)
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(b"host", b"x"), (b"content-type", b"application/json")]
            + [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(app(scope, self._receive, self._send))
        self.task.add_done_callback(lambda _: self._changed.set())

    async def _receive(self) -> dict[str, Any]:
        if self._request:
            return self._request.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body" and message.get("body"):
            await self._may.acquire()
        if not self.left.is_set():
            self.sent.append(message)
            self._changed.set()

    def read(self, messages: int) -> None:
        for _ in range(messages):
            self._may.release()

    async def until(self, condition: Any, timeout: float = 20.0) -> Exchange:
        """Waits until ``condition(self)``, which must come true before the response ends or with its end."""
        async with asyncio.timeout(timeout):
            while not condition(self):
                assert not self.task.done(), f"it ended first: {self.status} {self.body!r} {self.task}"
                self._changed.clear()
                await self._changed.wait()
        return self

    async def end(self, timeout: float = 20.0) -> Exchange:
        """Raises what the app raised: a server would close the connection."""
        await asyncio.wait_for(asyncio.shield(self.task), timeout)
        return self

    async def leave(self) -> Exchange:
        self.left.set()
        self.read(1 << 20)
        await asyncio.wait([self.task], timeout=20)
        assert self.task.done()
        return self

    # ---- the response

    @property
    def status(self) -> int:
        return self.sent[0]["status"] if self.sent else 0

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def complete(self) -> bool:
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)

    @property
    def rid(self) -> str:
        return self.headers["x-kevlar-request-id"]

    @property
    def events(self) -> list[bytes]:
        """Whole events so far."""
        return [event + b"\n\n" for event in self.body.split(b"\n\n")[:-1]]

    @property
    def ids(self) -> list[str]:
        return [id_of(event) for event in self.events]

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        """Of an error."""
        body = self.json()
        error = body.get("error", body)
        return error if isinstance(error, str) else error["message"]


def id_of(event: bytes) -> str:
    (line,) = (line for line in event.split(b"\n") if line.startswith(b"id: "))
    return line[4:].decode()
