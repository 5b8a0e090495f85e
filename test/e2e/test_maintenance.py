"""Maintenance under load: drain, rolling restart, another version of the software, other weights in all groups.

Nothing is lost, doubled or changed, and no answer is of two weight versions. With ``-s`` it says what each request had
to suffer.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cases import native
from joined import Cluster, Joined
from measured_load import MeasuredLoad
from server import Server, free_port

NEWER = Path(__file__).parent / "newer"
STREAMS = 6
CASES = [
    native(
        f"stream {i}",
        prompt=f"class Node{i}:\n    def __init__(self, value={i * 37}):",
        sampling={"max_new_tokens": 250},
    )
    for i in range(STREAMS)
]


class World:
    def __init__(self, models: Path, directory: Path) -> None:
        self.cluster = Cluster(directory)
        admin = ("--admin-port", str(free_port()))
        flags = (*self.cluster.listen, *admin, "--allow-version-skew", "--enable-metrics")
        self.server = Server(models / "llama-f32", directory / "log", *flags, groups=1)
        self.joined: list[Joined] = []

    def join(self, name: str, **env: str) -> Joined:
        self.joined.append(self.cluster.join(name, env=env))
        self.joined[-1].wait_ready(self.server)
        return self.joined[-1]

    def ctl(self, *words: str) -> str:
        command = [sys.executable, "-m", "sglang_kevlar.ctl", words[0], "--url", self.server.admin_url, *words[1:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def answers(self) -> list[list[list[int]]]:
        with ThreadPoolExecutor(STREAMS) as pool:
            answers = list(pool.map(lambda case: case.run(self.server.url), CASES))
        assert all(answer.status == 200 and answer.done and not answer.error for answer in answers)
        return [answer.token_ids for answer in answers]

    def update(self, path: Path, version: str) -> None:
        body = {"model_path": str(path), "weight_version": version}
        answer = httpx.post(f"{self.server.url}/update_weights_from_disk", json=body, timeout=180)
        assert answer.status_code == 200, answer.text

    def stop(self) -> None:
        try:
            for joined in self.joined:
                joined.stop()
        finally:
            self.server.stop()


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(models, tmp_path_factory.mktemp("maintenance"))
    try:
        world.server.wait_ready(1)
        world.join("old")
        yield world
    finally:
        world.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_doubled_or_changed_by_maintenance(world: World, models: Path, other_weights: Path) -> None:
    before = world.answers()
    world.update(other_weights, "two")
    after = world.answers()
    world.update(models / "llama-f32", "one")
    assert world.answers() == before and before != after
    expected = [(case, {"one": old, "two": new}) for case, old, new in zip(CASES, before, after, strict=True)]
    lines = []
    with MeasuredLoad(world.server, expected) as load:
        load.more(STREAMS)
        lines.append(load.take().line("nothing"))

        for group in ("0", "1"):
            world.ctl("drain", group, "--grace", "0.3")
            assert world.server.group(int(group))["state"] == "draining"
            world.ctl("undrain", group)
            load.more(STREAMS)
        drained = load.take()
        lines.append(drained.line("drain of each group"))

        epochs = {group["id"]: group["epoch"] for group in world.server.status()["groups"]}
        world.ctl("restart", "--all", "--grace", "0.3")
        load.more(STREAMS)
        restarted = load.take()
        lines.append(restarted.line("rolling restart"))
        assert all(group["epoch"] > epochs[group["id"]] for group in world.server.status()["groups"])

        old = world.joined[0]
        new = world.join("new", PYTHONPATH=f"{NEWER}:{os.environ.get('PYTHONPATH', '')}")
        known = {group["name"]: group for group in world.server.status()["groups"]}
        assert known["new"]["version"] == "9.9.9" != known["old"]["version"]
        load.more(STREAMS)
        assert new.group(world.server)["shadow"]["to"] is None, "KV goes to another version"
        world.ctl("drain", str(known["old"]["id"]), "--grace", "0.3")
        assert old.stop() == 0
        # All of it on the newer one, and back.
        world.ctl("drain", "0", "--grace", "0.3")
        load.more(STREAMS)
        world.ctl("undrain", "0")
        load.more(STREAMS)
        upgraded = load.take()
        lines.append(upgraded.line("another version"))
        store = (new.group(world.server)["shadow"] or {}).get("store", {})
        assert not store.get("tokens") and not store.get("hits"), store

        assert load.versions.keys() == {"one"}
        world.ctl("weights", str(other_weights), "--version", "two")
        load.more(STREAMS)
        lines.append(load.take().line("weights, group by group"))
        assert load.versions["two"]
        world.update(models / "llama-f32", "one")
        load.more(STREAMS)
        lines.append(load.take().line("weights, all groups at once"))
    print("\n" + "\n".join(lines))
    assert drained.moved and restarted.moved and upgraded.moved
    print(world.ctl("status"), world.ctl("failovers"), sep="\n\n")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_the_operators_is_on_the_operators_port(world: World) -> None:
    world.server.wait(lambda s: any(g["state"] == "ready" for g in s["groups"]), "a group")
    for path in ("/kevlar/status", "/kevlar/groups/0/drain", "/metrics"):
        assert httpx.request("POST" if "drain" in path else "GET", world.server.url + path).status_code == 404
    assert "sglang_kevlar_group_ready" in httpx.get(f"{world.server.admin_url}/metrics").text
    assert httpx.get(f"{world.server.url}/kevlar/requests/none").status_code == 404
    assert CASES[0].run(world.server.url).status == 200
