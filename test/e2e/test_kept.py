"""Requests that outlive their connection, on real worker groups: cut anywhere, moved meanwhile, the same answer."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cases import PROMPT, Answer, Case, catalogue
from server import Server

from sglang_kevlar.client import ResumingTransport

FLAGS = (
    "--stream-retention",
    "5",
    "--enable-metrics",
    "--chunked-prefill-size",
    "256",
    "--max-running-requests",
    "16",
    "--reasoning-parser",
    "qwen3",
    "--tool-call-parser",
    "qwen25",
)


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(models / "llama-f32", tmp_path_factory.mktemp("server") / "log", *FLAGS)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


class Cutting(httpx.BaseTransport):
    """A network that fails: before a request arrives, after it did, or in the middle of the answer."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self.cuts = 0

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        fate = self._chance.random()
        if fate < 0.15:
            self.cuts += 1
            raise httpx.ConnectError("cut")
        # A connection of its own, which is closed with the response: the server sees its client go.
        connection = httpx.HTTPTransport()
        response = connection.handle_request(request)
        if fate < 0.3:
            self._cut(response, connection)
        most = int(self._chance.expovariate(1 / 12_000)) if fate < 0.95 else 1 << 40
        return httpx.Response(
            response.status_code, headers=response.headers, stream=_Part(self, response, connection, most)
        )

    def _cut(self, response: httpx.Response, connection: httpx.HTTPTransport) -> None:
        self.cuts += 1
        response.close()
        connection.close()
        raise httpx.ReadError("cut")


class _Part(httpx.SyncByteStream):
    def __init__(self, network: Cutting, response: httpx.Response, connection: httpx.HTTPTransport, most: int) -> None:
        self._network, self._response, self._connection, self._most = network, response, connection, most

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._response.iter_raw():
            yield chunk[: self._most]
            self._most -= len(chunk)
            if self._most < 0:
                self._network._cut(self._response, self._connection)

    def close(self) -> None:
        self._response.close()
        self._connection.close()


#: seconds from the first request to the kill: one has to come while requests run, of which all may take a second or so
DELAYS = (0.5, 0.2, 0.1, 0.0, 0.0)


def cut_run(case: Case, url: str, seed: int) -> tuple[Answer, int]:
    network = Cutting(seed)
    transport = ResumingTransport(network, attempts=200, backoff=0.01, backoff_max=0.05)
    with httpx.Client(transport=transport, timeout=180) as client:
        return case.run(url, client=client), network.cuts


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[tuple[Case, Answer]]:
    cases = [case for case in catalogue(server.url, seeded=False) if case.path != "/v1/score"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: case.run(server.url), cases))
    for case, answer in zip(cases, answers, strict=True):
        assert answer.status == 200 and not answer.error and answer.done, f"{case.name}: {answer}"
    return list(zip(cases, answers, strict=True))


def redirected_since(server: Server, failovers: int) -> int:
    records = server.wait(lambda s: len(s["failovers"]) > failovers, "failover record", 30)["failovers"]
    return sum(record["redirected"] for record in records[failovers:])


@pytest.mark.parametrize("kill", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.timeout(600)
def test_cut_anywhere_every_endpoint_gives_the_undisturbed_answer(server: Server, undisturbed: Any, kill: bool) -> None:
    for delay in DELAYS if kill else (0.0,):
        server.wait_ready()
        failovers = len(server.status()["failovers"])
        with ThreadPoolExecutor(16) as pool:
            runs = [pool.submit(cut_run, case, server.url, number) for number, (case, _) in enumerate(undisturbed)]
            if kill:
                time.sleep(delay)
                server.kill(server.serving_group())
            results = [run.result() for run in runs]
        differences = [
            f"{case.name}: {difference}"
            for (case, expected), (answer, _) in zip(undisturbed, results, strict=True)
            if (difference := expected.difference(answer)) is not None
        ]
        assert not differences, "\n".join(differences)
        assert sum(cuts for _, cuts in results) > len(results) / 2
        if kill and redirected_since(server, failovers):
            return
    assert not kill, "no kill came while something ran"


def streamed(server: Server, key: str, tokens: int) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    body = {"text": PROMPT, "sampling_params": sampling, "stream": True}
    return httpx.stream("POST", f"{server.url}/generate", json=body, headers={"Idempotency-Key": key}, timeout=120)


@pytest.mark.timeout(300)
def test_the_same_request_twice_at_once_runs_once(server: Server) -> None:
    server.wait_ready()

    def events() -> tuple[str, list[str]]:
        with streamed(server, "twice", 400) as response:
            assert response.status_code == 200
            return response.headers["x-kevlar-request-id"], list(response.iter_lines())

    before = counted(server, "num_requests_total")
    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: events(), range(3)))
    assert answers[0] == answers[1] == answers[2]
    rid, lines = answers[0]
    assert lines[0].startswith(f"id: {rid}:") and "data: [DONE]" in lines
    assert counted(server, "num_requests_total") == before + 1
    state = httpx.get(f"{server.url}/kevlar/requests/{rid}").json()
    assert (state["state"], state["tokens"], state["clients"]) == ("ended", 400, 0)


def counted(server: Server, name: str) -> float:
    """One of upstream's counters, over all its labels."""
    metrics = httpx.get(f"{server.url}/metrics", timeout=30).text
    lines = [line for line in metrics.splitlines() if line.startswith(f"sglang:{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


@pytest.mark.timeout(300)
def test_what_nobody_comes_back_for_is_aborted(server: Server) -> None:
    server.wait_ready()
    aborted = counted(server, "num_aborted_requests_total")
    with streamed(server, "left", 20_000) as response:
        rid = response.headers["x-kevlar-request-id"]
        next(response.iter_lines())
    state = httpx.get(f"{server.url}/kevlar/requests/{rid}").json()
    assert state["state"] == "running" and state["expires_in_s"] is not None
    assert any(group["running"] for group in server.status()["groups"])
    server.wait(lambda s: s["kept"]["running"] == 0 and not any(g["running"] for g in s["groups"]), "abort", 60)
    assert counted(server, "num_aborted_requests_total") == aborted + 1
    gone = httpx.get(f"{server.url}/kevlar/requests/{rid}/stream")
    assert gone.status_code == 410 and "--stream-retention" in gone.json()["error"]["message"]
    with streamed(server, "left", 20_000) as again:
        assert again.status_code == 410


@pytest.mark.timeout(300)
def test_a_shutdown_lets_clients_finish_and_does_not_wait_for_those_that_left(server: Server) -> None:
    """The last test: the server is gone after it."""
    server.wait_ready()
    with streamed(server, "goes", 20_000) as response:
        assert response.status_code == 200
    with streamed(server, "stays", 600) as response:
        lines = response.iter_lines()
        first = next(lines)
        stopped = threading.Thread(target=server.stop)
        stopped.start()
        rest = list(lines)
    stopped.join()
    assert first.startswith("id: ") and "data: [DONE]" in rest
    last = json.loads([line for line in rest if line.startswith("data: {")][-1][6:])
    assert last["meta_info"]["completion_tokens"] == 600
    assert server.process.returncode == 0
