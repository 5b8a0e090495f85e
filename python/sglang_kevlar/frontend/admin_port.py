"""--admin-port: what operators and scrapers ask, on another port than clients, and there only.

The same HTTP application behind both ports, so that keys, page and endpoints are the same. The second port marks what
comes in by it; a request without the mark does not find what is the operator's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_kevlar.protocol.launch import LaunchPlan

logger = logging.getLogger(__name__)

_MARK = "kevlar.admin"
#: the clients' part of ours: requests with an Idempotency-Key are taken up again there
_CLIENTS = "/kevlar/requests/"
_OPERATORS = ("/kevlar", "/metrics")


def is_operators(path: str, root: str = "") -> bool:
    """``root``: what --fastapi-root-path puts in front of each path."""
    return any(
        each.startswith(_OPERATORS) and not each.startswith(_CLIENTS) for each in (path, path.removeprefix(root))
    )


class AdminGate:
    """Middleware: 404 for the operator's paths, unless they were asked for at the operator's port."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _MARK not in scope and is_operators(scope["path"], scope.get("root_path", "")):
            # As for a path that does not exist: that there is another port is nobody's business here.
            await JSONResponse({"detail": "Not Found"}, 404)(scope, receive, send)
            return
        await self.app(scope, receive, send)


class _Server(uvicorn.Server):
    """One that leaves signals alone: they are upstream's server's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class AdminPort:
    """Made before the application serves, so that a port that is taken stops the start. Raises OSError."""

    def __init__(self, app: Any, plan: LaunchPlan, server_args: Any) -> None:
        host, port = plan.kevlar.admin_host, plan.kevlar.admin_port
        self._app = app
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
        except OSError as error:
            self._socket.close()
            raise OSError(f"--admin-port: cannot listen on {host} port {port}: {error.strerror or error}") from error
        # Around the whole stack: the page is answered in front of all middleware.
        build = app.build_middleware_stack
        app.build_middleware_stack = lambda: AdminGate(build())
        config = uvicorn.Config(
            self._marked,
            interface="asgi3",
            lifespan="off",
            log_level=server_args.log_level_http or server_args.log_level,
            ssl_keyfile=server_args.ssl_keyfile,
            ssl_certfile=server_args.ssl_certfile,
            ssl_ca_certs=server_args.ssl_ca_certs,
            ssl_keyfile_password=server_args.ssl_keyfile_password,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def _marked(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[_MARK] = True
        await self._app(scope, receive, send)

    def start(self) -> None:
        """On the event loop."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))
        self._task.add_done_callback(_log_end)

    async def close(self) -> None:
        """Whoever is being answered has a second for the rest."""
        self._server.should_exit = True
        if self._task is not None:
            await asyncio.wait([self._task], timeout=1.0)
            self._task.cancel()
        self._socket.close()


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("the admin port serves no more: %s: %s", type(error).__name__, error)
