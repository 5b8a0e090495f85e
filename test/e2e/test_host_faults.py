"""Hosts of one server that lose each other: no client notices more than a pause, and every token is the right one.

Each host is a network namespace (`net.hosts`): the frontend's, with the clients, and two with a worker group each.
"""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from joined import Cluster
from server import Server
from steady_load import PATIENCE, Expected, SteadyLoad, undisturbed

from net.hosts import Hosts, unavailable
from net.link_faults import Faults
from sglang_kevlar.protocol.heartbeat import Phase
from sglang_kevlar.worker.heartbeat import HeartbeatReader

pytestmark = pytest.mark.skipif(bool(reason := unavailable(wire=True)), reason=str(reason))

FLAGS = (
    "--enable-deterministic-inference",
    "--chunked-prefill-size",
    "256",
    "--max-running-requests",
    "16",
    "--reasoning-parser",
    "qwen3",
    "--tool-call-parser",
    "qwen25",
)
FRONT, WORKERS = "front", ("w1", "w2")
#: of silence, in seconds: the default
LEASE = 3.0


class World:
    """A frontend without groups of its own, and one group on each of the other hosts."""

    def __init__(self, hosts: Hosts, models: Path, directory: Path, flags: tuple[str, ...]) -> None:
        self.hosts = hosts
        self._directory = directory
        front = hosts[FRONT]
        cluster = Cluster(directory, front)
        flags = (*FLAGS, *flags, *cluster.listen, "--lease", str(LEASE))
        self.server = Server(models / "llama-f32", directory / "log", *flags, groups=0, host=front)
        self.groups = {name: cluster.join(name, "--run-dir", self._run_dir(name), host=hosts[name]) for name in WORKERS}
        self._seeds = itertools.count()

    def _run_dir(self, name: str) -> str:
        return str(self._directory / f"{name}.run")

    def wait_up(self) -> None:
        for group in self.groups.values():
            group.wait_ready(self.server)
        self.server.wait_ready(len(self.groups))

    def stop(self) -> list[int]:
        """Exit statuses."""
        self.hosts.heal()
        statuses = []
        try:
            for group in self.groups.values():
                statuses.append(group.stop())
        finally:
            statuses.append(self.server.stop())
        return statuses

    def wait_nothing_left(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while left := [pid for host in self.hosts for pid in host.pids()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert not [name for name in self.groups if Path(self._run_dir(name)).exists()]

    # ---- what is known

    def status(self, name: str) -> dict[str, Any]:
        return self.groups[name].group(self.server)

    def busiest(self) -> dict[str, Any]:
        """Status of the group that runs most."""
        return max(self.server.status()["groups"], key=lambda group: group["running"])

    def failovers(self) -> int:
        return len(self.server.status()["failovers"])

    def rank_works(self, name: str) -> bool:
        """As its host sees it, joined or not: whether a rank of this group has had anything to do for half a second."""
        pages = Path(self._run_dir(name)).glob("g0e*.rank0.hb")
        reader = HeartbeatReader(str(max(pages, key=lambda page: int(page.name.removeprefix("g0e").split(".")[0]))))
        try:
            for _ in range(5):
                beat = reader.read()
                # None: it was read while it was written, and that again and again
                if beat is None or beat.phase is not Phase.IDLE:
                    return True
                time.sleep(0.1)
            return False
        finally:
            reader.close()

    # ---- what has to happen

    def load(self, expected: Expected) -> SteadyLoad:
        return SteadyLoad(self.server, expected, seed=next(self._seeds))

    def wait_given_up(self, names: set[str], before: int) -> list[dict[str, Any]]:
        """These groups, each once, and no other, have been given up since there were ``before`` failovers."""
        status = self.server.wait(lambda s: len(s["failovers"]) >= before + len(names), f"loss of {names}", PATIENCE)
        records = status["failovers"][before:]
        by_id = {group["id"]: group["name"] for group in status["groups"]}
        assert sorted(by_id[record["group"]] for record in records) == sorted(names), records
        assert all(record["cause"] for record in records), records
        return records

    def wait_nothing_runs(self, name: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.rank_works(name):
            assert time.monotonic() < deadline, f"{name} still works for nobody:\n{self.groups[name].log_end()}"
            time.sleep(0.1)

    def wait_back(self, known: dict[str, Any]) -> None:
        """It serves again: the same processes, as another incarnation."""
        name = known["name"]
        self.groups[name].wait_ready(self.server)
        back = self.status(name)
        assert (back["id"], back["pids"], back["link"]) == (known["id"], known["pids"], "up")
        assert back["epoch"] > known["epoch"]


@contextmanager
def world_of(models: Path, directory: Path, *flags: str) -> Iterator[World]:
    with Hosts(FRONT, *WORKERS, wire=True, seed=1) as hosts:
        world = World(hosts, models, directory, flags)
        try:
            world.wait_up()
            yield world
        finally:
            statuses = world.stop()
        assert statuses == [0, 0, 0]
        world.wait_nothing_left()


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world_of(models, tmp_path_factory.mktemp("hosts")) as world:
        yield world


@pytest.fixture(scope="module")
def expected(world: World) -> Expected:
    return undisturbed(world.server)


@pytest.fixture(autouse=True)
def healed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that failed leaves no fault to the next one."""
    yield
    if "world" in request.fixturenames:
        request.getfixturevalue("world").hosts.heal()


def pull_cable(hosts: Hosts, victim: str) -> None:
    hosts[victim].down()


def mute(hosts: Hosts, victim: str) -> None:
    hosts.fault(Faults(blocked=True), source=victim, target=FRONT)


def deafen(hosts: Hosts, victim: str) -> None:
    hosts.fault(Faults(blocked=True), source=FRONT, target=victim)


Cut = Callable[[Hosts, str], None]


def cut_off_and_take_back(world: World, expected: Expected, cut: Cut) -> None:
    with world.load(expected) as load:
        known, before = world.busiest(), world.failovers()
        victim = known["name"]
        cut(world.hosts, victim)
        [record] = world.wait_given_up({victim}, before)
        assert record["redirected"] > 0
        load.goes_on()
        # Its requests are aborted on its own host, which nobody can tell it to.
        world.wait_nothing_runs(victim)
        load.goes_on()
    assert world.failovers() == before + 1
    assert load.answered > 0
    world.hosts.heal()
    world.wait_back(known)
    with world.load(expected) as load:  # which begins when both run some of it
        load.goes_on()
    assert world.failovers() == before + 1


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "cut", [pull_cable, pytest.param(mute, marks=pytest.mark.slow), pytest.param(deafen, marks=pytest.mark.slow)]
)
def test_a_host_that_is_cut_off_is_given_up_and_taken_back(world: World, expected: Expected, cut: Cut) -> None:
    cut_off_and_take_back(world, expected, cut)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("fault", "seconds"),
    [
        (Faults(drop=0.3), 1.0),
        (Faults(delay=0.2, jitter=0.2), LEASE + 2),
        (Faults(blocked=True), LEASE / 3),
    ],
    ids=["loss", "delay", "outage"],
)
def test_what_passes_within_the_lease_changes_nothing(
    world: World, expected: Expected, fault: Faults, seconds: float
) -> None:
    with world.load(expected) as load:
        known, before = world.busiest(), world.failovers()
        victim = known["name"]
        world.hosts.fault(fault, source=victim, target=FRONT)
        world.hosts.fault(fault, source=FRONT, target=victim)
        time.sleep(seconds)
        world.hosts.heal()
        load.goes_on()
    assert world.failovers() == before
    assert world.status(victim)["epoch"] == known["epoch"]


@pytest.mark.timeout(300)
def test_a_group_comes_back_under_load_after_an_outage_longer_than_the_lease(world: World, expected: Expected) -> None:
    with world.load(expected) as load:
        known, before = world.busiest(), world.failovers()
        world.hosts[known["name"]].down()
        world.wait_given_up({known["name"]}, before)
        world.hosts[known["name"]].up()
        world.wait_back(known)
        load.goes_on()
    assert world.failovers() == before + 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_frontend_that_is_cut_off_holds_its_requests_until_groups_are_back(world: World, expected: Expected) -> None:
    with world.load(expected) as load:
        known, before = [world.status(name) for name in WORKERS], world.failovers()
        world.hosts[FRONT].down()
        world.wait_given_up(set(WORKERS), before)
        for name in WORKERS:
            world.wait_nothing_runs(name)
        assert world.server.status()["held"] > 0
        world.hosts[FRONT].up()
        for group in known:
            world.wait_back(group)
        load.goes_on()
    assert world.failovers() == before + len(WORKERS)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_frontend_that_stood_still_finds_its_groups_gone_and_gets_them_back(world: World, expected: Expected) -> None:
    with world.load(expected) as load:
        known, before = [world.status(name) for name in WORKERS], world.failovers()
        frontend = world.server.frontend_pid()
        os.kill(frontend, signal.SIGSTOP)
        try:
            for name in WORKERS:
                world.wait_nothing_runs(name)
        finally:
            os.kill(frontend, signal.SIGCONT)
        world.wait_given_up(set(WORKERS), before)
        for group in known:
            world.wait_back(group)
        load.goes_on()
    assert world.failovers() == before + len(WORKERS)


@pytest.mark.timeout(300)
def test_a_gateway_that_stood_still_goes_on_with_nothing_of_before(world: World, expected: Expected) -> None:
    with world.load(expected) as load:
        known, before = world.busiest(), world.failovers()
        gateway = known["pids"]["gateway"]
        os.kill(gateway, signal.SIGSTOP)
        try:
            world.wait_given_up({known["name"]}, before)
            load.goes_on()
            # Its ranks know nothing of it, and have answers for the session that is over.
            assert world.rank_works(known["name"])
        finally:
            os.kill(gateway, signal.SIGCONT)
        world.wait_back(known)
        load.goes_on()
    assert world.failovers() == before + 1
    # What they had then never ends by itself.
    world.wait_nothing_runs(known["name"])


@pytest.mark.timeout(300)
def test_groups_that_lose_each_other_lose_their_shadows_and_nothing_else(world: World, expected: Expected) -> None:
    def linked(status: dict[str, Any]) -> list[bool]:
        return [group["shadow"]["to"] is not None for group in status["groups"]]

    one, other = WORKERS
    with world.load(expected) as load:
        before = world.failovers()
        world.server.wait(lambda s: all(linked(s)), "shadow links", PATIENCE)
        world.hosts.fault(Faults(blocked=True), source=one, target=other)
        world.hosts.fault(Faults(blocked=True), source=other, target=one)
        world.server.wait(lambda s: not any(linked(s)), "loss of the shadow links", PATIENCE)
        load.goes_on()
        assert world.failovers() == before
        # Without a shadow: all of the context is computed again.
        known = world.busiest()
        world.hosts[known["name"]].down()
        world.wait_given_up({known["name"]}, before)
        load.goes_on()
        world.hosts.heal()
        world.wait_back(known)
        world.server.wait(lambda s: all(linked(s)), "shadow links", PATIENCE)
        load.goes_on()
    assert world.failovers() == before + 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_groups_of_several_ranks(models: Path, tmp_path: Path) -> None:
    with world_of(models, tmp_path, "--tp-size", "2") as world:
        cut_off_and_take_back(world, undisturbed(world.server), pull_cable)
