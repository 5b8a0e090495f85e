"""The example for Ray on a Ray cluster of two nodes on this machine; its children only write down what they see."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="pip install ray")

REPOSITORY = Path(__file__).parents[2]
CHILD = Path(__file__).with_name("ray_child.py")
PATIENCE = 60.0
DRIVER = """
import runpy, sys
address, directory, status = sys.argv[1:]
example = runpy.run_path({example!r})
example["main"](
    ["--address", address, "--groups", "2", "--patience", "50", "--join", "front:31000", "--", "--standby"],
    [sys.executable, {child!r}, directory, status],
)
"""


class Children:
    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def all(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in self.directory.glob("*.json")]

    def alive(self) -> dict[str, dict[str, Any]]:
        """By name."""
        return {flag(c, "--name"): c for c in self.all() if Path(f"/proc/{c['pid']}").exists()}

    def wait(self, condition: Callable[[dict[str, dict[str, Any]]], bool], what: str) -> dict[str, dict[str, Any]]:
        deadline = time.monotonic() + PATIENCE
        while not condition(alive := self.alive()):
            assert time.monotonic() < deadline, f"no {what}: {self.all()}"
            time.sleep(0.1)
        return alive

    def left(self, pid: int) -> bool:
        return any(c["pid"] == pid and c["state"] == "left" for c in self.all())


def flag(child: dict[str, Any], name: str) -> str:
    return child["flags"][child["flags"].index(name) + 1]


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from start_cluster(monkeypatch)


def start_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    from ray.cluster_utils import Cluster

    # Its sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="kv-ray-", ignore_cleanup_errors=True) as directory:
        monkeypatch.setenv("RAY_TMPDIR", directory)
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster()
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, include_dashboard=False)
            cluster.wait_for_nodes()
            yield cluster.address
        finally:
            cluster.shutdown()


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    children = Children(tmp_path)
    yield children
    for child in children.alive().values():
        os.kill(child["pid"], signal.SIGKILL)


def start(cluster: str, children: Children, status: int = 0) -> subprocess.Popen:
    code = DRIVER.format(example=str(REPOSITORY / "docker/ray/worker_groups.py"), child=str(CHILD))
    return subprocess.Popen(
        [sys.executable, "-c", code, cluster, str(children.directory), str(status)], stderr=subprocess.PIPE, text=True
    )


def test_a_group_on_each_node_started_again_and_ended_with_its_actor(cluster: str, children: Children) -> None:
    driver = start(cluster, children)
    try:
        both = children.wait(lambda alive: len(alive) == 2, "two groups")
        assert set(both) == {"ray-0", "ray-1"}
        assert len({flag(child, "--host-label") for child in both.values()}) == 2
        assert all(flag(c, "--join") == "front:31000" and "--standby" in c["flags"] for c in both.values())

        # The group dies.
        killed = both["ray-0"]["pid"]
        os.kill(killed, signal.SIGKILL)
        again = children.wait(lambda alive: len(alive) == 2 and alive["ray-0"]["pid"] != killed, "group started again")

        # Its actor dies: the group leaves, and another actor starts one.
        orphan = again["ray-1"]["pid"]
        os.kill(int(Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGKILL)
        last = children.wait(lambda alive: len(alive) == 2 and alive["ray-1"]["pid"] != orphan, "group of a new actor")
        assert children.left(orphan)

        driver.send_signal(signal.SIGTERM)
        assert driver.wait(PATIENCE) == 0
        children.wait(lambda alive: not alive, "end of the groups")
        assert all(children.left(child["pid"]) for child in last.values())
    finally:
        driver.kill()
        driver.communicate()


def test_a_killed_driver_takes_nobody_with_it_and_the_next_goes_on(cluster: str, children: Children) -> None:
    first = start(cluster, children)
    try:
        both = children.wait(lambda alive: len(alive) == 2, "two groups")
    finally:
        first.kill()
        first.communicate()
    second = start(cluster, children)
    try:
        killed = both["ray-0"]["pid"]
        os.kill(killed, signal.SIGKILL)
        now = children.wait(lambda alive: len(alive) == 2 and alive["ray-0"]["pid"] != killed, "group started again")
        assert now["ray-1"]["pid"] == both["ray-1"]["pid"]
        second.send_signal(signal.SIGTERM)
        assert second.wait(PATIENCE) == 0
        children.wait(lambda alive: not alive, "end of the groups")
        assert all(children.left(child["pid"]) for child in now.values())
    finally:
        second.kill()
        second.communicate()


def test_a_group_that_is_refused_ends_it(cluster: str, children: Children) -> None:
    driver = start(cluster, children, status=78)
    try:
        assert driver.wait(PATIENCE) == 78
    finally:
        driver.kill()
        driver.communicate()
