"""A group that starts again after an update that only live processes received: it serves the updated weights, and
never the old ones in between."""

from __future__ import annotations

import base64
import json
import os
import pickle
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from cases import Answer, native
from measured_load import MeasuredLoad
from server import Server

CASE = native("greedy", stream=False, return_logprob=True, top_logprobs_num=3, sampling={"max_new_tokens": 12})


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)], ids=["tp1", "tp2"])
def server(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory):
    log = tmp_path_factory.mktemp("weights") / "log"
    flags = ("--tp-size", str(request.param), "--restart-backoff", "0.1", "--restart-backoff-max", "1")
    server = Server(models / "llama-f32", log, *flags)
    server.tp_size = request.param
    server.hidden_size = json.loads((models / "llama-f32" / "config.json").read_text())["hidden_size"]
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def post(server: Server, path: str, **body: object) -> Any:
    response = httpx.post(server.url + path, json=body, timeout=180)
    assert response.status_code // 100 == 2, response.text
    return response


def update(server: Server, tensors: list[tuple[str, torch.Tensor]], version: str) -> None:
    payload = base64.b64encode(pickle.dumps(tensors)).decode()
    post(server, "/begin_weight_update")
    body = {"serialized_named_tensors": [payload] * server.tp_size, "weight_version": version}
    post(server, "/update_weights_from_tensor", **body)
    post(server, "/end_weight_update")


class Asking:
    """A client that asks all the time; every answer must be ``expected``."""

    def __init__(self, server: Server, expected: Answer) -> None:
        self.wrong: list[str] = []
        self.answers = 0
        self._server, self._expected = server, expected
        self._end = threading.Event()
        self._pool = ThreadPoolExecutor(2)

    def __enter__(self) -> Asking:
        self._running = [self._pool.submit(self._run) for _ in range(2)]
        return self

    def _run(self) -> None:
        while not self._end.is_set():
            if (difference := self._expected.difference(CASE.run(self._server.url))) is not None:
                self.wrong.append(difference)
            self.answers += 1

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._pool.shutdown()
        if not _[0]:
            for one in self._running:
                one.result()


@pytest.mark.timeout(300)
def test_a_restarted_group_serves_what_only_live_processes_received(server: Server) -> None:
    old = CASE.run(server.url)
    torch.manual_seed(3)
    norm = torch.rand(server.hidden_size) + 0.5
    update(server, [("model.norm.weight", norm)], "live")
    new = CASE.run(server.url)
    assert old.difference(new) is not None

    with Asking(server, new) as asking:
        for group in (1, 0):
            epoch = server.group(group)["epoch"]
            server.kill(group)
            server.wait(
                lambda s, g=group, e=epoch: s["groups"][g]["state"] == "ready" and s["groups"][g]["epoch"] > e,
                "return",
                90,
            )
    assert not asking.wrong and asking.answers
    assert [group["weight_version"] for group in server.status()["groups"]] == ["live", "live"]
    assert "has the weights of worker group" in server.log.read_text(errors="replace")
    # The group that came from one that had come from another, by itself.
    post(server, "/kevlar/groups/1/drain")
    assert new.difference(CASE.run(server.url)) is None
    post(server, "/kevlar/groups/1/restart")
    server.wait_ready()


def roll(server: Server, path: Path, version: str) -> None:
    post(server, "/kevlar/weights", model_path=str(path), weight_version=version)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_group_that_dies_while_weights_go_around(server: Server, models: Path, other_weights: Path) -> None:
    """Whichever and whenever: with the old weights, with the new, or the last one that has the old."""
    server.wait_ready()
    where = {"one": models / "llama-f32", "two": other_weights}
    cases = [native(f"stream {i}", prompt=f"def f{i}(x):", sampling={"max_new_tokens": 400}) for i in range(4)]
    answers: dict[str, list[list[list[int]]]] = {}
    for version in ("two", "one"):
        roll(server, where[version], version)
        server.wait(lambda s: s["weights"]["state"] == "done", "the update", 90)
        with ThreadPoolExecutor(len(cases)) as pool:
            answers[version] = [answer.token_ids for answer in pool.map(lambda case: case.run(server.url), cases)]
    expected = [(case, {version: answers[version][i] for version in answers}) for i, case in enumerate(cases)]
    with MeasuredLoad(server, expected) as load:
        for round, version in enumerate(["two", "one"] * 4):
            load.more(2)
            roll(server, where[version], version)
            time.sleep([0.0, 0.02, 0.1, 0.05, 0.2, 0.3, 0.6, 1.0][round])
            # The last group with the old weights, half of the time.
            server.kill(round // 2 % 2)
            server.wait(lambda s: s["weights"]["state"] == "done", f"the end of round {round}", 90)
            server.wait(lambda s: all(g["weight_version"] == version for g in s["groups"]), "the group", 90)  # noqa: B023
            load.more(len(cases))
    assert load.versions.keys() == {"one", "two"}

    # A frontend that dies in the middle, too: the next one gives all groups the same.
    for round, version in enumerate(["two", "one"] * 2):
        roll(server, where[version], version)
        time.sleep([0.0, 0.03, 0.08, 0.2][round])
        before = server.frontend_pid()
        os.kill(before, signal.SIGKILL)
        server.wait(lambda s: s["weights"] is None and all(g["state"] == "ready" for g in s["groups"]), "return", 90)
        (served,) = {group["weight_version"] for group in server.status()["groups"]}
        with ThreadPoolExecutor(len(cases)) as pool:
            again = [answer.token_ids for answer in pool.map(lambda case: case.run(server.url), cases * 2)]
        assert again == answers[served] * 2, f"round {round}: not the weights of {served}"
