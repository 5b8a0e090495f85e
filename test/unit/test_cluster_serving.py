"""The readiness probe of a group, as a process, against frontends that say this and that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sglang_kevlar.cluster.serving import API_KEY


class Frontend:
    """Answers every request with ``answer``, if it has the key."""

    def __init__(self, answer: bytes) -> None:
        self.key: str | None = None
        frontend = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                right = frontend.key is None or self.headers.get("Authorization") == f"Bearer {frontend.key}"
                self.send_response((200 if right else 401) if self.path == "/kevlar/status" else 404)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def frontends() -> Iterator[list[Frontend]]:
    made: list[Frontend] = []
    yield made
    for frontend in made:
        frontend.close()


def status(**states: str) -> bytes:
    return json.dumps({"groups": [{"name": name, "state": state} for name, state in states.items()]}).encode()


def ask(*urls: str, name: str = "w1", key: str | None = None) -> tuple[int, str]:
    command = [sys.executable, "-m", "sglang_kevlar.cluster.serving", "--frontend", ",".join(urls), "--name", name]
    env = {**os.environ, **({API_KEY: key} if key else {})}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (status(w0="down", w1="ready"), 0, ""),
        (status(w1="suspect"), 0, ""),
        (status(w0="ready", w1="starting"), 1, "w1 is starting"),
        (status(w1="draining"), 1, "w1 is draining"),
        (status(w11="ready"), 1, "knows no group w1"),
        (b"no json", 1, "JSONDecodeError"),
        (b"[]", 1, "TypeError"),
    ],
)
def test_what_a_frontend_says(frontends: list[Frontend], answer: bytes, code: int, said: str) -> None:
    frontends.append(Frontend(answer))
    found, error = ask(frontends[0].url)
    assert found == code and said in error


def test_one_frontend_for_which_it_serves_is_enough(frontends: list[Frontend]) -> None:
    frontends += [Frontend(status(w1="down")), Frontend(status(w1="ready"))]
    nobody = "http://127.0.0.1:1"
    assert ask(nobody, frontends[0].url, frontends[1].url) == (0, "")
    code, error = ask(nobody, frontends[0].url)
    assert code == 1 and "refused" in error and "w1 is down" in error


def test_with_an_api_key(frontends: list[Frontend]) -> None:
    frontends.append(Frontend(status(w1="ready")))
    frontends[0].key = "secret"
    code, error = ask(frontends[0].url)
    assert code == 1 and "401" in error
    assert ask(frontends[0].url, key="secret") == (0, "")
