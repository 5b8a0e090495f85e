"""Our endpoints and the replaced health endpoints, with upstream's own key check in front."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")
from fastapi import FastAPI, HTTPException  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.managers.tokenizer_manager import ServerStatus  # noqa: E402
from sglang.srt.utils.auth import add_api_key_middleware  # noqa: E402

from sglang_kevlar.frontend.endpoints import (  # noqa: E402
    GroupStateConflict,
    UnknownGroup,
    first_answer,
    install,
    remove_routes,
)

TIMEOUT = 0.3


class Source:
    """Two groups, of which 0 can be drained."""

    def __init__(self, *states: str) -> None:
        self.gracefully_exit = False
        self.server_status = ServerStatus.Up
        self.states = states or ("ready", "ready")
        self.answers: dict[int, bool] | BaseException | None = {0: True}
        self.probes = 0
        self.actions: list[tuple[str, int]] = []
        self.deadline: float | None = None
        self.updates: list[tuple[Any, float]] = []
        self.conflict: str | None = None

    def kevlar_status(self) -> dict[str, Any]:
        return {"groups": [{"id": i, "state": state} for i, state in enumerate(self.states)], "failovers": []}

    def kevlar_history(self, instance: str, after: int) -> dict[str, Any]:
        return {"instance": instance, "seconds": [[after]]}

    def serves(self) -> bool:
        return "ready" in self.states

    async def drain_group(self, group: int, deadline: float) -> None:
        if group >= len(self.states):
            raise UnknownGroup
        if group != 0:
            raise GroupStateConflict(f"worker group {group} is down")
        self.actions.append(("drain", group))
        self.deadline = deadline

    async def undrain_group(self, group: int) -> None:
        self.actions.append(("undrain", group))

    async def restart_group(self, group: int) -> None:
        self.actions.append(("restart", group))

    async def roll_weights(self, request: Any, deadline: float) -> None:
        if self.conflict is not None:
            raise HTTPException(409, self.conflict)
        self.updates.append((request, deadline))

    async def probe_groups(self, timeout: float) -> dict[int, bool]:
        self.probes += 1
        await asyncio.sleep(0.02)
        if self.answers is None:
            await asyncio.sleep(3600)
        if isinstance(self.answers, BaseException):
            raise self.answers
        return self.answers or {}


def upstream_app() -> FastAPI:
    """The routes of upstream's app that matter here."""
    app = FastAPI()

    @app.get("/health")
    @app.get("/health_generate")
    async def health_generate() -> str:
        raise AssertionError("upstream's health endpoint is still there")

    @app.get("/ready")
    async def ready() -> str:
        raise AssertionError("upstream's ready endpoint is still there")

    return app


def serve(source: Source, **keys: str | None) -> FastAPI:
    app = upstream_app()
    install(app, source, TIMEOUT)
    if keys:
        add_api_key_middleware(app, api_key=keys.get("api_key"), admin_api_key=keys.get("admin_api_key"))
    return app


def call(app: FastAPI, *requests: tuple[str, str], key: str = "") -> list[httpx.Response]:
    """All at the same time."""

    async def run() -> list[httpx.Response]:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return list(await asyncio.gather(*(client.request(*request, headers=headers) for request in requests)))

    return asyncio.run(run())


def status(app: FastAPI, path: str) -> int:
    return call(app, ("GET", path))[0].status_code


def test_history_is_asked_for_by_instance_and_second() -> None:
    [known, new, wrong] = call(
        serve(Source()),
        ("GET", "/kevlar/history?instance=abc&after=12"),
        ("GET", "/kevlar/history"),
        ("GET", "/kevlar/history?after=soon"),
    )
    assert known.json() == {"instance": "abc", "seconds": [[12]]}
    assert new.json() == {"instance": "", "seconds": [[-1]]}
    assert wrong.status_code == 422


HEALTH = ("/ready", "/health", "/health_generate")


@pytest.mark.parametrize("path", HEALTH)
@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (("ready", "ready"), 200),
        (("down", "ready"), 200),
        (("starting", "ready"), 200),
        (("down", "down"), 503),
        (("starting", "starting"), 503),
        (("draining", "suspect"), 503),
    ],
)
def test_health_is_whether_a_group_is_ready(path: str, states: tuple[str, ...], expected: int) -> None:
    assert status(serve(Source(*states)), path) == expected


@pytest.mark.parametrize("path", HEALTH)
def test_health_while_starting_and_shutting_down(path: str) -> None:
    source = Source()
    app = serve(source)
    source.server_status = ServerStatus.Starting
    assert status(app, path) == 503
    source.server_status = ServerStatus.Up
    source.gracefully_exit = True
    assert status(app, path) == 503


@pytest.mark.parametrize("answers", [{0: False, 1: False}, {}, RuntimeError("probe"), None])
def test_groups_that_hang_do_not_make_it_green(answers: Any) -> None:
    source = Source()
    source.answers = answers
    app = serve(source)
    assert status(app, "/health_generate") == 503
    source.answers = {0: False, 1: True}
    assert status(app, "/health_generate") == 200
    assert source.server_status == ServerStatus.Up


def test_health_generates_unless_told_not_to() -> None:
    source = Source()
    source.answers = {0: False}
    app = serve(source)
    assert status(app, "/health") == 503
    with envs.SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION.override(False):
        assert status(app, "/health") == 200
        assert status(app, "/health_generate") == 503
    with envs.SGLANG_DIAG_BYPASS_HEALTH_GENERATE.override(True):
        assert status(app, "/health_generate") == 200


def test_checks_at_the_same_time_share_one_probe() -> None:
    source = Source()
    responses = call(serve(source), *[("GET", "/health_generate")] * 50)
    assert {response.status_code for response in responses} == {200}
    assert source.probes == 1


def test_first_answer_does_not_wait_for_a_hung_group() -> None:
    cancelled = []

    async def probe(delay: float, answer: Any) -> bool:
        try:
            await asyncio.sleep(delay)
        except asyncio.CancelledError:
            cancelled.append(delay)
            raise
        if isinstance(answer, BaseException):
            raise answer
        return bool(answer)

    async def run(timeout: float, **probes: Any) -> dict[str, bool]:
        return await first_answer({name: probe(*args) for name, args in probes.items()}, timeout)  # type: ignore

    before = time.monotonic()
    assert asyncio.run(run(600, hung=(500, True), failed=(0, OSError()), no=(0.01, False), yes=(0.02, True))) == {
        "hung": False,
        "failed": False,
        "no": False,
        "yes": True,
    }
    assert asyncio.run(run(0.05, hung=(400, True), no=(0, False))) == {"hung": False, "no": False}
    assert asyncio.run(run(1)) == {}
    assert time.monotonic() - before < 60
    assert cancelled == [500, 400]


def test_status_is_the_sources() -> None:
    source = Source("ready", "down")
    assert call(serve(source), ("GET", "/kevlar/status"))[0].json() == source.kevlar_status()


def test_drain_and_restart() -> None:
    source = Source()
    requests = [
        ("POST", f"/kevlar/groups/{path}") for path in ("0/drain", "1/restart", "1/drain", "7/drain", "x/drain")
    ]
    drained, restarted, conflict, unknown, malformed = call(serve(source), *requests)
    assert drained.json() == {"group": 0, "action": "drain"}
    assert (drained.status_code, restarted.status_code) == (202, 202)
    assert source.actions == [("drain", 0), ("restart", 1)]
    assert (conflict.status_code, conflict.json()["error"]["message"]) == (409, "worker group 1 is down")
    assert (unknown.status_code, malformed.status_code) == (404, 404)
    assert "'7'" in unknown.json()["error"]["message"] and "'x'" in malformed.json()["error"]["message"]


def test_the_deadline_of_a_drain_and_its_end() -> None:
    source = Source()
    app = serve(source)
    assert call(app, ("POST", "/kevlar/groups/0/drain"))[0].status_code == 202
    assert source.deadline == 60.0
    assert call(app, ("POST", "/kevlar/groups/0/drain?deadline=2.5"))[0].status_code == 202
    assert source.deadline == 2.5
    for bad in ("-1", "x", "nan", "inf", "1e9", ""):
        response = call(app, ("POST", f"/kevlar/groups/0/drain?deadline={bad}"))[0]
        assert response.status_code == 400 and "deadline: must be" in response.json()["error"]["message"]
    assert call(app, ("POST", "/kevlar/groups/0/undrain"))[0].status_code == 202
    assert source.actions == [("drain", 0), ("drain", 0), ("undrain", 0)]


def roll(source: Source, body: bytes, key: str = "", **keys: str) -> httpx.Response:
    app = serve(source, **keys)

    async def run() -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/kevlar/weights", content=body, headers=headers)

    return asyncio.run(run())


def test_weights_for_all_groups_one_after_the_other() -> None:
    source = Source()
    answer = roll(source, b'{"model_path": "/new", "weight_version": "two", "deadline": 5}')
    assert answer.status_code == 202 and answer.json() == {"action": "weights", "model_path": "/new"}
    [(request, deadline)] = source.updates
    assert (request.model_path, request.weight_version, request.load_format, deadline) == ("/new", "two", None, 5.0)
    assert roll(source, b'{"model_path": "/new", "load_format": null}').status_code == 202
    assert source.updates[1][1] == 600.0
    source.conflict = "generation is paused"
    refused = roll(source, b'{"model_path": "/new"}')
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, "generation is paused")
    keys = {"api_key": "client", "admin_api_key": "admin"}
    assert roll(source, b'{"model_path": "/new"}', key="client", **keys).status_code in (401, 403)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{}", "model_path is missing"),
        (b'{"model_path": ""}', "model_path is missing"),
        (b'{"model_path": 3}', "model_path: must be a string, got '3'"),
        (b'{"model_path": "/x", "weight_version": ["a"]}', "weight_version: must be a string"),
        (b'{"model_path": "/x", "flush_cache": false}', "'flush_cache' is not known"),
        (b'{"model_path": "/x", "deadline": -1}', "deadline: must be 0 to"),
        (b'{"model_path": "/x", "deadline": NaN}', "deadline: must be 0 to"),
        (b'{"model_path": "/x", "deadline": {}}', "deadline: must be 0 to"),
        (b'\xff{"model_path": "/x"}', "not JSON"),
    ],
)
def test_a_weight_update_that_is_none(body: bytes, said: str) -> None:
    source = Source()
    answer = roll(source, body)
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]
    assert not source.updates


@pytest.mark.parametrize("group", ["-1", "9" * 5000, "%C2%B2", "0%0a"])
def test_group_ids_that_are_none(group: str) -> None:
    source = Source()
    response = call(serve(source), ("POST", f"/kevlar/groups/{group}/restart"))[0]
    assert response.status_code == 404 and len(response.content) < 500
    assert not source.actions


@pytest.mark.parametrize("action", ["drain", "undrain", "restart"])
def test_maintenance_needs_the_admin_key_where_there_is_one(action: str) -> None:
    source = Source()
    request = ("POST", f"/kevlar/groups/0/{action}")
    app = serve(source, api_key="user", admin_api_key="admin")
    assert [call(app, request, key=key)[0].status_code for key in ("", "user")] == [401, 401]
    assert not source.actions
    assert call(app, request, key="admin")[0].status_code == 202
    only_admin = serve(source, admin_api_key="admin")
    assert call(only_admin, request)[0].status_code == 401
    only_user = serve(source, api_key="user")
    assert [call(only_user, request, key=key)[0].status_code for key in ("", "user")] == [401, 202]


def test_keys_of_the_other_endpoints() -> None:
    app = serve(Source(), api_key="user", admin_api_key="admin")
    assert {status(app, path) for path in HEALTH} == {200}
    assert status(app, "/kevlar/status") == 401
    assert call(app, ("GET", "/kevlar/status"), key="user")[0].status_code == 200


def test_routes_that_moved_stop_the_start_and_nothing_is_removed() -> None:
    app = upstream_app()
    routes = list(app.router.routes)
    for endpoints in ({"/health": "health"}, {"/ready": "ready", "/healthz": "health_generate"}):
        with pytest.raises(RuntimeError, match="/health"):
            remove_routes(app, endpoints)
    assert app.router.routes == routes
    app.add_api_route("/health", lambda: "", methods=["GET"])
    with pytest.raises(RuntimeError, match="/health"):
        install(app, Source(), TIMEOUT)


def test_upstreams_own_app_has_the_routes_we_replace() -> None:
    from sglang.srt.entrypoints import http_server

    copy = SimpleNamespace(router=SimpleNamespace(routes=list(http_server.app.router.routes)))
    remove_routes(copy, {"/ready": "ready", "/health": "health_generate", "/health_generate": "health_generate"})  # type: ignore[arg-type]
    assert len(copy.router.routes) == len(http_server.app.router.routes) - 3
