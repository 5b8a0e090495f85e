"""A real server, load, a killed rank: what somebody sees who watches the page meanwhile.

`KEVLAR_SCREENSHOT=docs/img/page-failover.png ./scripts/test test/browser/test_page.py` takes the picture of the docs,
after half a minute of load.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import chromium
import httpx
import pytest
from cases import Answer, native
from server import Server

STREAMS = 6
PATIENCE = 60.0


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if reason := chromium.why_not():
        pytest.skip(reason)
    server = Server(models / "llama-f32", tmp_path_factory.mktemp("server") / "log", "--restart-backoff", "0.5")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop(signal.SIGKILL)


class Load:
    """So many streams at a time, until it is told to end."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ending = threading.Event()
        self.answers: list[Answer] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(STREAMS)]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        turn = 0
        while not self._ending.is_set():
            prompt = f"class Node{number}_{turn}:\n    def __init__(self):"
            try:
                self.answers.append(
                    native("load", prompt=prompt, sampling={"max_new_tokens": 150}).run(self._server.url)
                )
            except httpx.HTTPError as error:
                self.answers.append(Answer(error=repr(error)))
                return
            turn += 1


def state_of(group: int) -> str:
    return f"document.querySelector('#groups tbody tr[data-key=\"{group}\"] .pill').innerText"


@pytest.mark.timeout(300)
def test_a_killed_rank_as_the_page_shows_it(server: Server, page: chromium.Page, tmp_path: Path) -> None:
    page.size(1200, 1070)
    page.go(f"{server.url}/kevlar/")
    page.wait("document.querySelector('#connection').innerText === 'live'")
    page.wait(f"{state_of(0)} === 'ready' && {state_of(1)} === 'ready'")
    page.js("document.querySelector('#span input[value=\"60\"]').click()")
    with Load(server) as load:
        # Both latencies are drawn, and both groups have something to lose.
        page.wait("document.querySelectorAll('#first polyline.p50, #inter polyline.p50').length >= 2", PATIENCE)
        time.sleep(25 if "KEVLAR_SCREENSHOT" in os.environ else 1)
        server.wait(lambda s: all(group["running"] >= 2 for group in s["groups"]), "requests on both groups", PATIENCE)
        group = server.serving_group()
        epoch = server.group(group)["epoch"]
        server.kill(group)

        page.wait(f"['down', 'starting'].includes({state_of(group)})", PATIENCE)
        page.wait("document.querySelector('#failovers tbody tr') !== null", PATIENCE)
        page.wait("document.querySelector('#news').innerText !== ''", PATIENCE)
        failover = server.status()["failovers"][0]
        assert failover["redirected"] > 0 and failover["stall_ms"]["max"] >= failover["stall_ms"]["p50"] > 0
        cells = page.js("[...document.querySelector('#failovers tbody tr').cells].map((cell) => cell.innerText)")
        assert cells[1:4] == [str(group), str(epoch), failover["cause"]]
        assert cells[5] == str(failover["redirected"]) and cells[6].endswith((" ms", " s"))
        assert f"{failover['redirected']} moved, stood still" in page.text("#news")

        page.js("document.querySelector('.mark').click()")
        assert f"requests moved\n{failover['redirected']}" in page.text("#detail")
        picture = Path(os.environ.get("KEVLAR_SCREENSHOT", tmp_path / "page-failover.png"))
        page.screenshot(picture)
        assert picture.stat().st_size > 20_000

        page.wait(f"{state_of(group)} === 'ready'", PATIENCE)
        shown = page.js(f"document.querySelector('#groups tbody tr[data-key=\"{group}\"]').cells[3].innerText")
        assert int(shown) == server.group(group)["epoch"] > epoch
        page.wait("/after [\\d.]+ s/.test(document.querySelector('#detail').innerText)")
        states = f"[...document.querySelectorAll('#timeline .row')[{group}].querySelectorAll('.span')]"
        shown_states = page.js(f"{states}.map((span) => span.className.split(' ')[1])")
        assert shown_states[-1] == "ready" and {"down", "starting"} & set(shown_states)
    assert load.answers and all(answer.status == 200 and answer.done and not answer.error for answer in load.answers)
    assert any(answer.redirects for answer in load.answers)


@pytest.mark.timeout(120)
def test_a_frontend_that_dies_is_said_and_the_next_one_shown(server: Server, page: chromium.Page) -> None:
    page.go(f"{server.url}/kevlar/")
    page.wait("document.querySelector('#connection').innerText === 'live'")
    os.kill(server.frontend_pid(), signal.SIGKILL)
    page.wait("document.querySelector('#connection').innerText.startsWith('server not answering since ')", PATIENCE)
    page.wait("document.querySelector('#connection').innerText === 'live'", PATIENCE)
    page.wait(f"{state_of(0)} === 'ready' && {state_of(1)} === 'ready'", PATIENCE)
