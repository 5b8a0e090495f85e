"""Two frontends of the same groups behind a load balancer: whichever dies, with whatever group, nobody notices."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cases import PROMPT, Answer, Case, catalogue
from joined import Joined, cluster_key
from server import Server, free_port

from sglang_kevlar.client import ResumingTransport

sys.path.insert(0, str(Path(__file__).parents[1] / "net"))
from balancer import Balancer, unavailable

FLAGS = (
    "--enable-deterministic-inference",
    "--chunked-prefill-size",
    "256",
    "--max-running-requests",
    "16",
    "--max-total-tokens",
    "20000",
    "--reasoning-parser",
    "qwen3",
    "--tool-call-parser",
    "qwen25",
    "--restart-backoff",
    "0.1",
    "--restart-backoff-max",
    "1",
    "--poison-deaths",
    "5",
)
NAMES = ("a", "b")


class Cluster:
    def __init__(self, models: Path, directory: Path, groups: int) -> None:
        addresses = {name: f"127.0.0.1:{free_port()}" for name in NAMES}
        key = ("--cluster-key-file", str(cluster_key(directory)))
        peers = ",".join(f"{name}={at}" for name, at in addresses.items())
        self.frontends: dict[str, Server] = {}
        self.groups: list[Joined] = []
        try:
            for name, at in addresses.items():
                flags = (*FLAGS, *key, "--listen", at, "--peers", peers, "--frontend-name", name)
                self.frontends[name] = Server(models / "llama-f32", directory / f"{name}.log", *flags, groups=0)
            for number in range(groups):
                command = ["--join", ",".join(addresses.values()), "--name", f"g{number}", *key]
                self.groups.append(Joined(f"g{number}", command, directory / f"g{number}.log"))
            self.wait_whole()
        except BaseException:
            self.stop()
            raise

    def wait_whole(self) -> None:
        """Every frontend serves with every group, and has what the other one has."""
        for server in self.frontends.values():
            server.wait_ready(len(self.groups))
            server.wait(
                lambda s: (
                    sum(group["state"] == "ready" for group in s["groups"]) == len(self.groups)
                    and [peer["state"] for peer in s["frontends"]] == ["current"]
                ),
                "all groups and the other frontend",
            )

    def kill_frontend(self, name: str) -> None:
        os.kill(self.frontends[name].frontend_pid(), signal.SIGKILL)

    def kill_group(self, name: str) -> None:
        """As a frontend that is there knows it."""
        for server in self.frontends.values():
            try:
                pids = next(group["pids"] for group in server.status()["groups"] if group["name"] == name)
            except (httpx.HTTPError, StopIteration):
                continue
            os.kill(pids["ranks"][0], signal.SIGKILL)
            return

    def stop(self) -> None:
        for each in (*self.groups, *self.frontends.values()):
            each.process.send_signal(signal.SIGTERM)
        for each in (*self.groups, *self.frontends.values()):
            each.stop()


@pytest.fixture(scope="module")
def cluster(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(models, tmp_path_factory.mktemp("frontends"), groups=2)
    yield cluster
    cluster.stop()


@pytest.fixture
def whole(cluster: Cluster) -> Cluster:
    cluster.wait_whole()
    return cluster


@pytest.fixture(scope="module")
def balancer(cluster: Cluster) -> Iterator[Balancer]:
    if reason := unavailable("haproxy"):
        pytest.skip(reason)
    servers = {name: ("127.0.0.1", server.port) for name, server in cluster.frontends.items()}
    with Balancer(servers, check="/ready") as balancer:
        yield balancer


def resuming(**options: Any) -> httpx.Client:
    return httpx.Client(transport=ResumingTransport(attempts=60, patience=90.0, **options), timeout=120)


def greedy(number: int, tokens: int) -> dict[str, Any]:
    return {
        "text": f"{PROMPT} {number}",
        "stream": True,
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
    }


def outputs(client: httpx.Client, url: str, body: dict[str, Any], on_event: Any = None) -> dict[str, Any]:
    """The last output, after every one was the continuation of the one before."""
    last: dict[str, Any] = {"text": "", "output_ids": []}
    ended = False
    with client.stream("POST", f"{url}/generate", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                ended = True
                continue
            output = json.loads(line.removeprefix("data: "))
            assert "error" not in output, output
            assert output["output_ids"][: len(last["output_ids"])] == last["output_ids"], "another token"
            assert output["text"].startswith(last["text"]), "another text"
            assert len(output["output_ids"]) > len(last["output_ids"]), "an output twice"
            last = output
            if on_event is not None:
                on_event(last)
    assert ended, "no end"
    return last


def test_a_stream_goes_on_at_the_other_frontend(whole: Cluster) -> None:
    """Sampled without a seed: whoever made a token anew would make another."""
    body = greedy(0, 200)
    body["sampling_params"]["temperature"] = 1.0
    urls = [whole.frontends[name].url for name in NAMES]
    killed = threading.Event()

    def on_event(output: dict[str, Any]) -> None:
        if len(output["output_ids"]) > 60 and not killed.is_set():
            killed.set()
            whole.kill_frontend("a")

    with resuming(base_urls=urls) as client:
        last = outputs(client, urls[0], body, on_event)
    assert killed.is_set() and len(last["output_ids"]) == 200
    assert last["meta_info"]["kevlar"]["redirects"] == 1


@pytest.mark.timeout(400)
def test_every_feature_through_the_death_of_its_frontend(whole: Cluster, balancer: Balancer) -> None:
    balancer.wait({"a": "UP", "b": "UP"})
    cases = [case for case in catalogue(balancer.url, seeded=True) if continued(case)]
    with ThreadPoolExecutor(8) as pool:
        expected = list(pool.map(lambda case: case.run(balancer.url), cases))
    chance = random.Random(1)

    def kill() -> None:
        time.sleep(chance.uniform(0.3, 1.0))
        whole.kill_frontend("b")

    with ThreadPoolExecutor(len(cases)) as pool:
        thread = threading.Thread(target=kill)
        thread.start()
        answers = list(pool.map(lambda case: run(case, balancer.url), cases))
        thread.join()
    differences = [
        f"{case.name}: {difference}"
        for case, reference, answer in zip(cases, expected, answers, strict=True)
        if (difference := reference.difference(answer)) is not None
    ]
    assert not differences, "\n".join(differences)


def continued(case: Case) -> bool:
    """Of a batch, or several choices, another frontend has no part; and nothing that is not generated is kept."""
    several = case.body.get("n", 1) > 1 or isinstance(case.body.get("text", case.body.get("prompt")), list)
    several |= case.body.get("sampling_params", {}).get("n", 1) > 1
    return case.path in ("/generate", "/v1/completions", "/v1/chat/completions", "/v1/messages") and not several


def run(case: Case, url: str) -> Answer:
    with resuming() as client:
        return case.run(url, client=client)


@pytest.mark.timeout(500)
def test_frontends_and_groups_that_die_together(whole: Cluster, balancer: Balancer) -> None:
    die(whole, balancer, streams=24, rounds=2, seed=7, groups_too=lambda number: True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_streams_and_twenty_dead_frontends(whole: Cluster, balancer: Balancer) -> None:
    die(whole, balancer, streams=200, rounds=20, seed=8, groups_too=lambda number: number % 2 == 1)


def die(
    whole: Cluster, balancer: Balancer, streams: int, rounds: int, seed: int, groups_too: Callable[[int], bool]
) -> None:
    """In each round a frontend is killed, and in some a rank with it, while all streams run."""
    with httpx.Client(timeout=120) as plain, ThreadPoolExecutor(8) as pool:
        url = balancer.url
        bodies = [greedy(number, 40 + 20 * (number % 5)) for number in range(streams)]
        reference = list(pool.map(lambda body: outputs(plain, url, body)["output_ids"], bodies))
    chance = random.Random(seed)
    for number in range(rounds):
        whole.wait_whole()
        balancer.wait({"a": "UP", "b": "UP"})
        frontend, group = NAMES[number % 2], f"g{chance.randrange(2)}"

        def kill(frontend: str = frontend, group: str | None = group if groups_too(number) else None) -> None:
            time.sleep(chance.uniform(0.2, 1.5))
            if group is not None:
                whole.kill_group(group)
            whole.kill_frontend(frontend)

        def ask(body: dict[str, Any]) -> list[int]:
            with resuming() as client:
                return outputs(client, balancer.url, body)["output_ids"]

        thread = threading.Thread(target=kill)
        with ThreadPoolExecutor(streams) as pool:
            thread.start()
            answers = list(pool.map(ask, bodies))
        thread.join()
        assert answers == reference
        print(f"round {number}: frontend {frontend}{f' and {group}' if groups_too(number) else ''}, all answers exact")


def test_the_same_request_at_both_frontends_runs_once(whole: Cluster) -> None:
    body = greedy(1, 150)
    body["sampling_params"]["temperature"] = 1.0
    headers = {"Idempotency-Key": uuid.uuid4().hex}

    def ask(name: str) -> tuple[str, list[int]]:
        with httpx.Client(headers=headers, timeout=60) as client:
            response = client.post(f"{whole.frontends[name].url}/generate", json={**body, "stream": False})
            assert response.status_code == 200, response.text
            return response.headers["x-kevlar-request-id"], response.json()["output_ids"]

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, [*NAMES, *NAMES]))
    assert all(answer == answers[0] for answer in answers)


def test_a_request_of_one_frontend_is_read_at_the_other(whole: Cluster) -> None:
    with httpx.Client(headers={"Idempotency-Key": uuid.uuid4().hex}, timeout=60) as client:
        first = client.post(f"{whole.frontends['a'].url}/generate", json=greedy(2, 50))
        rid = first.headers["x-kevlar-request-id"]
        url = f"{whole.frontends['b'].url}/kevlar/requests/{rid}"
        assert client.get(url).json()["state"] == "ended"
        assert client.get(f"{url}/stream").content == first.content
        events = first.content.split(b"\n\n")
        last = events[10].split(b"\n")[0].removeprefix(b"id: ").decode()
        rest = client.get(f"{url}/stream", headers={"Last-Event-ID": last})
        assert rest.content == b"\n\n".join(events[11:])
        ahead = client.get(f"{url}/stream", headers={"Last-Event-ID": last.replace(":", ":9", 1)})
        assert ahead.status_code == 409, ahead.text
        assert client.get(f"{whole.frontends['b'].url}/kevlar/requests/unknown").status_code == 404


def test_what_would_change_one_frontend_only_is_refused(whole: Cluster) -> None:
    response = httpx.post(f"{whole.frontends['a'].url}/update_weights_from_disk", json={"model_path": "x"}, timeout=60)
    assert response.status_code == 400 and "--peers" in response.text
