"""Our endpoints, and upstream's health endpoints replaced by ones that tell the truth about several groups."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any, Protocol, TypeAlias

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from sglang.srt.environ import envs
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.utils.auth import AuthLevel, auth_level

from sglang_kevlar.frontend import page
from sglang_kevlar.frontend.drains import DEFAULT_DEADLINE, MAX_DEADLINE
from sglang_kevlar.frontend.rolling_weights import DEFAULT_DEADLINE as ROLLING_DEADLINE

logger = logging.getLogger(__name__)

#: upstream's routes that we replace: path -> name of the endpoint function
HEALTH_ROUTES = {"/ready": "ready", "/health": "health_generate", "/health_generate": "health_generate"}


class UnknownGroup(Exception):
    """There is no worker group of that id. Its message, if any, is the client's."""


class GroupStateConflict(Exception):
    """The group is in a state in which this cannot be done; the message says which."""


class StatusSource(Protocol):
    """What the endpoints need of the tokenizer manager."""

    gracefully_exit: bool
    server_status: Any

    def kevlar_status(self) -> dict[str, Any]:
        """The JSON of GET /kevlar/status."""

    def kevlar_history(self, instance: str, after: int) -> dict[str, Any]:
        """The JSON of GET /kevlar/history."""

    def serves(self) -> bool:
        """Whether a group takes requests now."""

    async def drain_group(self, group: int, deadline: float) -> None:
        """``deadline``: seconds after which what still runs there is moved. Raises UnknownGroup, GroupStateConflict."""

    async def undrain_group(self, group: int) -> None:
        """Raises UnknownGroup, GroupStateConflict."""

    async def restart_group(self, group: int) -> None:
        """Raises UnknownGroup, GroupStateConflict."""

    async def roll_weights(self, request: UpdateWeightFromDiskReqInput, deadline: float) -> None:
        """Begin to give all groups other weights, one after the other. Raises HTTPException."""

    async def probe_groups(self, timeout: float) -> dict[int, bool]:
        """Lets every group that serves generate a token, or sees one it is making anyway.

        Returns when the first has done so (see `first_answer`), or after `timeout` seconds.
        """


async def first_answer(probes: Mapping[int, Awaitable[bool]], timeout: float) -> dict[int, bool]:
    """Runs one probe per group until one returns True, at most `timeout` seconds, and cancels the others.

    A group whose probe failed, raised or was not through is False: one hung group must not delay the answer that
    another one serves.
    """
    tasks = {asyncio.ensure_future(probe): group for group, probe in probes.items()}
    answered = dict.fromkeys(probes, False)
    pending = set(tasks)
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        while pending and not any(answered.values()):
            left = deadline - asyncio.get_running_loop().time()
            done, pending = await asyncio.wait(pending, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                break
            for task in done:
                answered[tasks[task]] = task.exception() is None and task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
    return answered


class HealthCheck:
    """Answers /ready, /health and /health_generate for one source.

    ``timeout`` in seconds bounds a generating check. Requests that come while one runs share it, so that probing
    from many sides does not load the groups.
    """

    def __init__(self, source: StatusSource, timeout: float) -> None:
        self._source = source
        self._timeout = timeout
        self._probe: asyncio.Task[bool] | None = None

    def serving(self) -> bool:
        """False while starting or shutting down, and with no group to take requests."""
        if self._source.gracefully_exit or self._source.server_status == ServerStatus.Starting:
            return False
        return self._source.serves()

    async def generates(self) -> bool:
        """Whether a group makes a token within the timeout.

        ``server_status`` is left alone: upstream drops all requests at SIGTERM once it is UnHealthy.
        """
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._run_probe())
        return await asyncio.shield(self._probe)

    async def _run_probe(self) -> bool:
        try:
            # The source keeps the deadline; the second one is for a source that does not.
            answers = await asyncio.wait_for(self._source.probe_groups(self._timeout), self._timeout + 1)
        except Exception as error:
            logger.error("health check failed: %s: %s", type(error).__name__, error)
            return False
        if not any(answers.values()):
            logger.error("health check failed: no group made a token within %.0f s: %s", self._timeout, answers)
            return False
        return True


def install(app: FastAPI, source: StatusSource, health_timeout: float) -> None:
    """Adds our routes to upstream's app and replaces its health routes.

    ``health_timeout`` is upstream's ``HEALTH_CHECK_TIMEOUT``. Raises RuntimeError when the routes to replace are
    not those we know. Routes are added one by one, not as a router: upstream's key check looks for the auth level
    on the app's own routes.
    """
    remove_routes(app, HEALTH_ROUTES)
    check = HealthCheck(source, health_timeout)

    async def ready() -> Response:
        return Response(status_code=HTTPStatus.OK if check.serving() else HTTPStatus.SERVICE_UNAVAILABLE)

    async def health(request: Request) -> Response:
        if not check.serving():
            return Response(status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        generate = request.url.path.endswith("/health_generate") or envs.SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION.get()
        if not generate or envs.SGLANG_DIAG_BYPASS_HEALTH_GENERATE.get():
            return Response(status_code=HTTPStatus.OK)
        healthy = await check.generates()
        return Response(status_code=HTTPStatus.OK if healthy else HTTPStatus.SERVICE_UNAVAILABLE)

    async def kevlar_status() -> Response:
        return JSONResponse(source.kevlar_status())

    async def kevlar_history(instance: str = "", after: int = -1) -> Response:
        return JSONResponse(source.kevlar_history(instance, after))

    for path in HEALTH_ROUTES:
        app.add_api_route(path, ready if path == "/ready" else health, methods=["GET"])
    app.add_api_route("/kevlar/status", kevlar_status, methods=["GET"])
    app.add_api_route("/kevlar/history", kevlar_history, methods=["GET"])
    page.install(app)

    async def drain(group: int, query: Mapping[str, str]) -> None:
        await source.drain_group(group, _deadline(query.get("deadline")))

    async def undrain(group: int, query: Mapping[str, str]) -> None:
        await source.undrain_group(group)

    async def restart(group: int, query: Mapping[str, str]) -> None:
        await source.restart_group(group)

    for act in (drain, undrain, restart):
        maintain = auth_level(AuthLevel.ADMIN_OPTIONAL)(_maintenance(act.__name__, act))
        app.add_api_route(f"/kevlar/groups/{{group}}/{act.__name__}", maintain, methods=["POST"])

    async def weights(request: Request) -> Response:
        try:
            update, deadline = _weight_update(await request.body())
            await source.roll_weights(update, deadline)
        except _BadValue as error:
            return _error(HTTPStatus.BAD_REQUEST, str(error))
        except HTTPException as error:
            return _error(HTTPStatus(error.status_code), str(error.detail))
        return JSONResponse({"action": "weights", "model_path": update.model_path}, HTTPStatus.ACCEPTED)

    app.add_api_route("/kevlar/weights", auth_level(AuthLevel.ADMIN_OPTIONAL)(weights), methods=["POST"])


def remove_routes(app: FastAPI, endpoints: Mapping[str, str]) -> None:
    """Removes the routes ``path -> name of the endpoint function`` from the app.

    Raises RuntimeError, and removes nothing, when one of them is not there exactly once.
    """
    routes = app.router.routes
    found = []
    for path, name in endpoints.items():
        matching = [route for route in routes if getattr(route, "path", None) == path]
        names = [getattr(route, "name", "") for route in matching]
        if names != [name]:
            raise RuntimeError(f"upstream's HTTP app serves {path} by {names or 'nothing'}, expected {name!r}")
        found += matching
    for route in found:
        routes.remove(route)


class _BadValue(Exception):
    """Of a parameter; the message is the client's."""


def _deadline(value: Any, default: float = DEFAULT_DEADLINE) -> float:
    """Raises _BadValue."""
    try:
        seconds = default if value is None else float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if not 0 <= seconds <= MAX_DEADLINE:
        raise _BadValue(f"deadline: must be 0 to {MAX_DEADLINE:g} seconds, got {str(value)[:64]!r}")
    return seconds


def _weight_update(body: bytes) -> tuple[UpdateWeightFromDiskReqInput, float]:
    """Of POST /kevlar/weights: the update, and the seconds for which requests may end on the old weights.

    Raises _BadValue.
    """
    try:
        fields = json.loads(body)
    except ValueError as error:
        raise _BadValue(f"the body is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _BadValue("the body must be a JSON object")
    deadline = _deadline(fields.pop("deadline", None), ROLLING_DEADLINE)
    known = ("model_path", "load_format", "weight_version")
    if unknown := sorted(fields.keys() - set(known)):
        raise _BadValue(f"{unknown[0][:64]!r} is not known; there are {', '.join(known)} and deadline")
    if not fields.get("model_path"):
        raise _BadValue("model_path is missing: where the weights are")
    for name, value in fields.items():
        if not isinstance(value, str) and (value is not None or name == "model_path"):
            raise _BadValue(f"{name}: must be a string, got {str(value)[:64]!r}")
    return UpdateWeightFromDiskReqInput(**fields), deadline


_Act: TypeAlias = Callable[[int, Mapping[str, str]], Awaitable[None]]


def _maintenance(action: str, act: _Act) -> Callable[[str, Request], Awaitable[Response]]:
    async def maintain(group: str, request: Request) -> Response:
        try:
            if not (group.isascii() and group.isdigit() and len(group) < 10):
                raise UnknownGroup
            await act(int(group), request.query_params)
        except _BadValue as error:
            return _error(HTTPStatus.BAD_REQUEST, str(error))
        except UnknownGroup as error:
            return _error(HTTPStatus.NOT_FOUND, str(error) or f"there is no worker group {group[:64]!r}")
        except GroupStateConflict as error:
            return _error(HTTPStatus.CONFLICT, str(error))
        return JSONResponse({"group": int(group), "action": action}, HTTPStatus.ACCEPTED)

    return maintain


def _error(status: HTTPStatus, message: str) -> Response:
    return JSONResponse({"error": {"message": message, "code": int(status)}}, status)
