"""Two servers without groups of their own share one that joined both; each has its clients' exact answers."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cases import Answer, Case, native
from joined import Cluster, Joined
from server import Server

CASES = [
    native(f"count {count}", prompt=f"for i in range({count}):", sampling={"max_new_tokens": 300}) for count in range(6)
]


class World:
    def __init__(self, models: Path, directory: Path) -> None:
        self.first, self.second = Cluster(directory), Cluster(directory)
        self.servers = [
            Server(models / "llama-f32", directory / f"{at}.log", *cluster.listen, groups=0)
            for at, cluster in enumerate((self.first, self.second))
        ]
        self.group: Joined | None = None

    def join(self) -> Joined:
        both = f"{self.first.address},{self.second.address}"
        self.group = self.first.join("shared", frontends=both)
        for server in self.servers:
            self.group.wait_ready(server)
            server.wait_ready(1)
        return self.group

    def stop(self) -> None:
        try:
            if self.group is not None:
                self.group.stop()
        finally:
            for server in self.servers:
                server.stop()


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(models, tmp_path_factory.mktemp("shared"))
    try:
        world.join()
        yield world
    finally:
        world.stop()


@pytest.fixture(scope="module")
def undisturbed(world: World) -> list[tuple[Case, Answer]]:
    answers = [case.run(world.servers[0].url) for case in CASES]
    assert all(answer.status == 200 and not answer.error for answer in answers)
    return list(zip(CASES, answers, strict=True))


def run(server: Server, undisturbed: list[tuple[Case, Answer]]) -> list[str]:
    with ThreadPoolExecutor(len(undisturbed)) as pool:
        answers = list(pool.map(lambda pair: pair[0].run(server.url), undisturbed))
    return [
        f"{case.name}: {difference}"
        for (case, reference), answer in zip(undisturbed, answers, strict=True)
        if (difference := reference.difference(answer)) is not None
    ]


@pytest.mark.timeout(300)
def test_each_server_has_its_own_answers(world, undisturbed) -> None:
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda server: run(server, undisturbed), world.servers)) == [[], []]
    for server in world.servers:
        assert httpx.get(f"{server.url}/get_server_info", timeout=30).json()["internal_states"]
        assert httpx.get(f"{server.url}/v1/loads", timeout=30).json()["loads"]


@pytest.mark.timeout(300)
def test_a_rank_dies_under_requests_of_both(world, undisturbed) -> None:
    pid = world.group.pid(world.servers[1], "rank")

    def hit() -> None:
        for server in world.servers:
            server.wait(lambda s: any(g["running"] for g in s["groups"]), "running requests", 30)
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=hit)
    thread.start()
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda server: run(server, undisturbed), world.servers)) == [[], []]
    thread.join()
    for server in world.servers:
        assert server.status()["failovers"][-1]["redirected"] > 0


@pytest.mark.timeout(300)
def test_the_first_server_alone_may_change_the_group(world) -> None:
    first, second = world.servers
    assert httpx.post(f"{first.url}/flush_cache", timeout=30).status_code == 200
    refused = httpx.post(f"{second.url}/flush_cache", timeout=30)
    assert refused.status_code == 400 and "only from the first frontend" in refused.text
    path = {"model_path": str(Path(first.process.args[4])), "weight_version": "two"}
    assert httpx.post(f"{first.url}/update_weights_from_disk", json=path, timeout=60).json()["success"]
    # The second one cannot know what it would be answered with.
    down = second.wait(lambda s: s["groups"][0]["state"] == "down", "that it is down for the second", 30)
    assert "changed at run time" in down["groups"][0]["cause"]
    # Also when it comes back: the first one has its change replayed before it serves.
    assert httpx.post(f"{first.url}/kevlar/groups/0/restart", timeout=30).status_code == 202
    first.wait(lambda s: s["groups"][0]["weight_version"] == "two", "the change in the next incarnation")
    assert second.status()["groups"][0]["state"] != "ready"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_when_the_first_server_dies_the_second_gets_the_group_without_its_changes(world, undisturbed) -> None:
    first, second = world.servers
    first.stop(signal.SIGKILL)
    second.wait_ready(1)
    assert run(second, undisturbed) == []
    assert httpx.post(f"{second.url}/flush_cache", timeout=30).status_code == 200, "it is the first now"
