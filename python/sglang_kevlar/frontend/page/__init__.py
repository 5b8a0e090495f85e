"""The page ``/kevlar/``: a few files that come with the package. What they show they ask of /kevlar/status and history.

They are answered in front of upstream's key check: a browser that opens a page can send no key, and there is nothing in
them. The page asks for the key when the server wants one, and sends it as a header.
"""

from __future__ import annotations

import hashlib
from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

PATH = "/kevlar/"
FILES = {
    "index.html": "text/html; charset=utf-8",
    "icon.svg": "image/svg+xml",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "server.js": "text/javascript; charset=utf-8",
    "tables.js": "text/javascript; charset=utf-8",
    "timeline.js": "text/javascript; charset=utf-8",
    "charts.js": "text/javascript; charset=utf-8",
    "dom.js": "text/javascript; charset=utf-8",
}
#: the browser itself then sees to it that nothing is loaded from, sent to, or shown inside anything else
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    # Asked for again each time, and only sent when it changed: after an upgrade nobody has a mixture of two pages.
    "cache-control": "no-cache",
}


class PageFiles:
    """ASGI: answers GET and HEAD of the page's files, and passes everything else on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._files: dict[str, tuple[bytes, dict[str, str]]] = {}
        for name, kind in FILES.items():
            content = resources.files(__name__).joinpath(name).read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            path = PATH if name == "index.html" else PATH + name
            self._files[path] = (content, {**HEADERS, "content-type": kind, "etag": etag})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = self._answer(scope) if scope["type"] == "http" and scope["method"] in ("GET", "HEAD") else None
        await (self._app if response is None else response)(scope, receive, send)

    def _answer(self, scope: Scope) -> Response | None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == PATH.rstrip("/"):
            # Relative, so that it is right behind a proxy that serves this under another path.
            return Response(status_code=307, headers={"location": PATH.strip("/") + "/"})
        if path not in self._files:
            return None
        content, headers = self._files[path]
        if headers["etag"].encode() in dict(scope["headers"]).get(b"if-none-match", b""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)


def install(app: FastAPI) -> None:
    """Before the app serves. Around its whole stack, of which upstream's key check is the outermost part."""
    if app.middleware_stack is not None:
        raise RuntimeError("the HTTP app serves already: the page cannot be added")
    build: Any = app.build_middleware_stack
    app.build_middleware_stack = lambda: PageFiles(build())  # type: ignore[method-assign]
