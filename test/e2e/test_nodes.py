"""A worker group on several hosts (`--nnodes`): its ranks meet, die and come back together, and every token is right.

Each host is a network namespace (`net.hosts`), the second node's with shared memory of its own: the frontend's, with
the clients, and two with a rank each.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cases import Answer, Case, native
from joined import Cluster, Joined
from server import Server, free_port

from net.hosts import Hosts, unavailable

pytestmark = pytest.mark.skipif(bool(reason := unavailable()), reason=str(reason))

FRONT, NODES = "front", ("n0", "n1")
PATIENCE = 90.0
CASES = [
    native(f"count {count}", prompt=f"for i in range({count}):", sampling={"max_new_tokens": 300}) for count in range(3)
]


class World:
    def __init__(
        self, hosts: Hosts, models: Path, directory: Path, *flags: str, standby: bool = False, ranks: str = "tp"
    ) -> None:
        self.hosts = hosts
        self.directory = directory
        self.cluster = Cluster(directory, hosts[FRONT])
        flags = (*self.cluster.listen, f"--{ranks}-size", "2", *flags)
        self.server = Server(models / "llama-f32", directory / "log", *flags, groups=0, host=hosts[FRONT])
        self.meeting = f"{hosts[NODES[0]].address}:{free_port()}"
        role = ["--standby"] if standby else []
        self.nodes = [self.node(rank, *role) for rank in range(len(NODES))]

    def node(self, rank: int, *flags: str, log: str | None = None) -> Joined:
        log = log or f"node{rank}"
        where = ["--nnodes", "2", "--dist-init-addr", self.meeting, "--node-rank", str(rank)]
        where += ["--run-dir", str(self.directory / f"{log}.run")]
        host = self.hosts[NODES[rank]]
        return self.cluster.join("two", *where, *flags, host=host, log=log, apart=rank > 0)

    def wait_up(self) -> None:
        self.nodes[0].wait_ready(self.server)
        self.server.wait_ready(1)

    def group(self) -> dict[str, Any]:
        return self.nodes[0].group(self.server)

    def process_of(self, rank: int, name: str) -> int:
        """Of the second node the server knows no pids: as its own run directory has them."""
        records = self.directory / f"node{rank}.run" / "processes"
        of_members = sorted(records.glob(f"{name}.*"), key=lambda path: path.stat().st_mtime_ns)
        return int([records / name, *of_members][-1].read_text().split()[0])

    def answers(self, cases: list[Case] = CASES) -> list[Any]:
        def run(case: Case) -> Answer:
            with self.server.network():
                return case.run(self.server.url)

        with ThreadPoolExecutor(len(cases)) as pool:
            answers = list(pool.map(run, cases))
        assert all(answer.status == 200 and not answer.error and answer.done for answer in answers), answers
        return [(answer.token_ids, answer.texts, answer.finish) for answer in answers]

    def answers_while(self, hit: Callable[[], None], cases: list[Case] = CASES) -> list[Any]:
        """With all of the requests under way when ``hit`` is called."""

        def later() -> None:
            self.server.wait(lambda s: any(g["running"] == len(cases) for g in s["groups"]), "running requests", 30)
            time.sleep(0.3)
            hit()

        thread = threading.Thread(target=later)
        thread.start()
        try:
            return self.answers(cases)
        finally:
            thread.join()

    def stop(self) -> list[int]:
        self.hosts.heal()
        return [process.stop() for process in (*reversed(self.nodes), self.server)]


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Hosts(FRONT, *NODES) as hosts:
        world = World(hosts, models, tmp_path_factory.mktemp("nodes"), "--hold-timeout", "120")
        try:
            world.wait_up()
            yield world
        finally:
            statuses = world.stop()
        assert statuses == [0, 0, 0]
        deadline = time.monotonic() + PATIENCE
        while left := [pid for host in hosts for pid in host.pids()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert not list(world.directory.glob("*.run"))


@pytest.fixture(scope="module")
def undisturbed(world: World) -> list[Any]:
    return world.answers()


@pytest.mark.timeout(400)
def test_a_rank_on_the_second_host_is_killed(world: World, undisturbed: list[Any]) -> None:
    before = world.group()["epoch"]
    assert len(world.group()["pids"]["ranks"]) == 1, "the other rank is on the other host"
    assert world.answers_while(lambda: os.kill(world.process_of(1, "g0.rank1"), signal.SIGKILL)) == undisturbed
    assert world.group()["epoch"] > before
    assert len(world.server.status()["failovers"]) == 1


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("process", ["rank0", "supervisor"])
def test_processes_of_the_first_host_are_killed(world: World, undisturbed: list[Any], process: str) -> None:
    before = world.group()["epoch"]
    assert world.answers_while(lambda: os.kill(world.process_of(0, f"g0.{process}"), signal.SIGKILL)) == undisturbed
    assert world.group()["epoch"] > before


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_supervisor_of_the_second_host_is_killed(world: World, undisturbed: list[Any]) -> None:
    old = world.process_of(1, "g0.rank1")
    assert world.answers_while(lambda: os.kill(world.process_of(1, "g0.supervisor"), signal.SIGKILL)) == undisturbed
    assert world.process_of(1, "g0.rank1") != old


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_rank_on_the_second_host_is_stopped(world: World, undisturbed: list[Any]) -> None:
    assert world.answers_while(lambda: os.kill(world.process_of(1, "g0.rank1"), signal.SIGSTOP)) == undisturbed
    assert "rank1 stopped" in world.server.status()["failovers"][-1]["cause"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_second_host_is_cut_off_and_comes_back(world: World, undisturbed: list[Any]) -> None:
    before, count = world.group()["epoch"], len(world.server.status()["failovers"])
    ranks = [world.process_of(rank, f"g0.rank{rank}") for rank in (0, 1)]

    def cut() -> None:
        world.hosts[NODES[1]].down()
        world.server.wait(lambda s: len(s["failovers"]) > count, "loss of the group", PATIENCE)
        # Nothing of it goes on for nobody, on either host.
        deadline = time.monotonic() + PATIENCE
        while left := [pid for pid in ranks if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        world.server.wait(
            lambda s: any("node 1: " in g["cause"] for g in s["groups"]), "who is waited for, in the status", PATIENCE
        )
        world.hosts[NODES[1]].up()

    assert world.answers_while(cut) == undisturbed
    assert world.group()["epoch"] > before
    failover = world.server.status()["failovers"][-1]
    assert "node 1" in failover["cause"], failover


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_second_node_is_restarted_on_purpose(world: World, undisturbed: list[Any]) -> None:
    def restart() -> None:
        assert world.nodes[1].stop() == 0
        world.nodes[1] = world.node(1)

    assert world.answers_while(restart) == undisturbed
    failover = world.server.status()["failovers"][-1]
    assert "node 1" in failover["cause"], failover


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_nodes_that_do_not_fit_are_refused_by_name(world: World) -> None:
    epoch = world.group()["epoch"]
    other = world.node(1, "--max-running-requests", "7", log="other")
    second = world.node(1, log="second")
    try:
        assert other.end() == 78
        assert "max_running_requests" in other.log_end() and "the first node (here)" in other.log_end()
        said = "a node named node1 is joined already, from host n1"
        deadline = time.monotonic() + PATIENCE
        while said not in second.log_end():
            assert time.monotonic() < deadline, second.log_end()
            time.sleep(0.2)
    finally:
        for process in (other, second):
            process.stop()
    assert world.group()["epoch"] == epoch and world.group()["state"] == "ready"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_pipeline_over_two_hosts(models: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Hosts(FRONT, *NODES) as hosts:
        world = World(hosts, models, tmp_path_factory.mktemp("pipeline"), "--hold-timeout", "120", ranks="pp")
        try:
            world.wait_up()
            expected = world.answers()
            assert world.answers_while(lambda: os.kill(world.process_of(1, "g0.rank1"), signal.SIGKILL)) == expected
        finally:
            world.stop()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lost", ["one", "two"])
def test_shadows_between_a_group_on_one_host_and_one_on_two(
    models: Path, tmp_path_factory: pytest.TempPathFactory, lost: str
) -> None:
    """A request of either goes on where the KV of all its ranks is; the other one stands by."""
    directory = tmp_path_factory.mktemp("shadows")
    with Hosts(FRONT, *NODES, "n2") as hosts:
        world = World(hosts, models, directory, standby=lost == "one")
        flags = ["--run-dir", str(directory / "one.run"), *(["--standby"] if lost == "two" else [])]
        one = world.cluster.join("one", *flags, host=hosts["n2"])
        try:
            world.wait_up()
            one.wait_ready(world.server)

            def linked(status: dict[str, Any]) -> bool:
                return all((group["shadow"] or {}).get("to") is not None for group in status["groups"])

            world.server.wait(linked, "shadow links", PATIENCE)
            run = directory / ("one.run" if lost == "one" else "node1.run")
            (record,) = (run / "processes").glob("g0.rank1.*")
            victim = int(record.read_text().split()[0])
            case = native("long", prompt="x = 1\n" * 200, sampling={"max_new_tokens": 300})
            [expected] = world.answers([case])
            assert world.answers_while(lambda: os.kill(victim, signal.SIGKILL), [case]) == [expected]
            record = world.server.status()["failovers"][-1]
            assert record["redirected"] == 1 and record["restored_tokens"] > 300, record
        finally:
            one.stop()
            world.stop()
