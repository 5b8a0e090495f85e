"""What is the operator's is answered on the operator's port, and on no other."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from frontend_fakes import plan
from sglang_kevlar.platform import torchvision_shim

torchvision_shim.install()
pytest.importorskip("sglang")
from fastapi import FastAPI  # noqa: E402
from sglang.srt.utils.auth import add_api_key_middleware  # noqa: E402

from sglang_kevlar.frontend import page  # noqa: E402
from sglang_kevlar.frontend.admin_port import AdminPort, is_operators  # noqa: E402
from sglang_kevlar.protocol.launch import KevlarArgs  # noqa: E402

ARGS = SimpleNamespace(
    log_level="error", log_level_http=None, ssl_keyfile=None, ssl_certfile=None, ssl_ca_certs=None,
    ssl_keyfile_password=None,
)  # fmt: skip


def made(port: int) -> tuple[FastAPI, AdminPort]:
    app = FastAPI()
    page.install(app)
    for path in ("/kevlar/status", "/metrics", "/kevlar/requests/{rid}", "/health", "/generate"):
        app.add_api_route(path, lambda: "here", methods=["GET"])
    add_api_key_middleware(app, api_key="user", admin_api_key=None)
    return app, AdminPort(app, plan(KevlarArgs(admin_port=port)), ARGS)


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize(
    "path", ["/kevlar", "/kevlar/", "/kevlar/status", "/kevlar/groups/0/drain", "/metrics", "/metrics/x"]
)
def test_operators_paths(path: str) -> None:
    assert is_operators(path) and is_operators(f"/root{path}", "/root")


@pytest.mark.parametrize("path", ["/", "/generate", "/kevlar/requests/r", "/kevlar/requests/r/stream", "/health"])
def test_clients_paths(path: str) -> None:
    assert not is_operators(path)


def test_two_ports() -> None:
    async def run() -> None:
        port = free()
        app, admin = made(port)
        admin.start()
        key = {"authorization": "Bearer user"}
        public: Any = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", headers=key)
        private = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=key)
        async with public, private:
            for path in ("/kevlar/status", "/metrics"):
                assert (await public.get(path)).status_code == 404
                assert (await private.get(path)).json() == "here"
            for path in ("/kevlar/requests/r", "/health", "/generate"):
                assert (await public.get(path)).status_code == 200
            assert (await public.get("/kevlar/")).status_code == 404
            assert (await private.get("/kevlar/")).headers["content-type"].startswith("text/html")
            assert (await private.get("/kevlar/status", headers={"authorization": "none"})).status_code == 401
        await admin.close()
        with socket.socket() as gone:
            assert gone.connect_ex(("127.0.0.1", port)) != 0

    asyncio.run(asyncio.wait_for(run(), 30))


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match=r"--admin-port: cannot listen on 127\.0\.0\.1"):
            made(taken.getsockname()[1])
