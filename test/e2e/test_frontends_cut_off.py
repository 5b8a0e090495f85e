"""Two frontends on hosts of their own that lose each other, or everything: their clients go on, token for token.

Each host is a network namespace (`net.hosts`): the frontends', that of the group which they share, and the clients'.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from joined import Joined, cluster_key
from server import Server, free_port

from net.hosts import Hosts, unavailable
from net.link_faults import Faults
from sglang_kevlar.client import ResumingTransport

pytestmark = pytest.mark.skipif(bool(reason := unavailable(wire=True)), reason=str(reason))

NAMES, WORKER, CLIENTS = ("a", "b"), "w", "clients"
LEASE = 1.5
#: seconds of silence after which a client turns to the other frontend
SILENCE = 2.5
#: seconds for what has to happen at some time
PATIENCE = 60.0
STREAMS, TOKENS = 4, 900


class World:
    def __init__(self, hosts: Hosts, models: Path, directory: Path, stack: ExitStack) -> None:
        self.hosts = hosts
        key = ("--cluster-key-file", str(cluster_key(directory)), "--lease", str(LEASE))
        listen = {name: f"{hosts[name].address}:{free_port()}" for name in NAMES}
        peers = ",".join(f"{name}={at}" for name, at in listen.items())
        self.frontends: dict[str, Server] = {}
        for name, at in listen.items():
            flags = (*key, "--host", "0.0.0.0", "--listen", at, "--peers", peers, "--frontend-name", name)
            log = directory / f"{name}.log"
            self.frontends[name] = server = Server(models / "llama-f32", log, *flags, groups=0, host=hosts[name])
            server.url = f"http://{hosts[name].address}:{server.port}"
            server.network = hosts[CLIENTS].network
            stack.callback(server.stop)
        join = ["--join", ",".join(listen.values()), "--name", WORKER, "--advertise", hosts[WORKER].address]
        group = Joined(WORKER, [*join, *key[:2]], directory / "w.log", hosts[WORKER])
        stack.callback(group.stop)

    def wait_whole(self) -> None:
        """Both serve, and have what the other one has."""
        for server in self.frontends.values():
            server.wait(
                lambda s: (
                    [group["state"] for group in s["groups"]] == ["ready"]
                    and [peer["state"] for peer in s["frontends"]] == ["current"]
                ),
                "the group and the other frontend",
                120,
            )
            server.wait(lambda _, server=server: server.get("/ready").status_code == 200, "ready", PATIENCE)

    def wait_lost(self, *names: str) -> None:
        """These frontends have given the other one up."""
        for name in names:
            self.frontends[name].wait(lambda s: not s["frontends"], "loss of the other frontend", PATIENCE)

    def ask(self, number: int, home: str, on_token: Callable[[], None] = lambda: None) -> list[int]:
        """All tokens of a stream that begins at ``home``; each came once, and in order."""
        away = next(name for name in NAMES if name != home)
        urls = [self.frontends[name].url for name in (home, away)]
        transport = ResumingTransport(base_urls=urls, attempts=60, patience=PATIENCE)
        tokens: list[int] = []
        ended = False
        with self.hosts[CLIENTS].network():
            timeout = httpx.Timeout(SILENCE, connect=1.0)
            with httpx.Client(transport=transport, timeout=timeout) as client:
                with client.stream("POST", f"{urls[0]}/generate", json=body(number)) as response:
                    assert response.status_code == 200, response.read()
                    for line in response.iter_lines():
                        if line.startswith("data: {"):
                            event = json.loads(line.removeprefix("data: "))
                            assert "error" not in event, event
                            assert event["output_ids"][: len(tokens)] == tokens, "another token"
                            assert len(event["output_ids"]) > len(tokens), "an output twice"
                            tokens = event["output_ids"]
                            on_token()
                        ended |= line == "data: [DONE]"
        assert ended, "no end"
        return tokens


def body(number: int) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    return {"text": f"class Node{number}:", "stream": True, "sampling_params": sampling}


class Running:
    """Streams at both frontends, in threads; ``wait_tokens`` until each has so many more."""

    def __init__(self, world: World, expected: list[list[int]]) -> None:
        self._world, self._expected = world, expected
        self._counts = [0] * STREAMS
        self._pool = ThreadPoolExecutor(STREAMS)
        self._answers = [self._pool.submit(self._ask, number) for number in range(STREAMS)]

    def _ask(self, number: int) -> list[int]:
        def on_token() -> None:
            self._counts[number] += 1

        return self._world.ask(number, NAMES[number % 2], on_token)

    def wait_tokens(self, more: int = 20) -> None:
        wanted = [min(count + more, TOKENS) for count in self._counts]
        deadline = time.monotonic() + PATIENCE
        while any(count < enough for count, enough in zip(self._counts, wanted, strict=True)):
            for answer in self._answers:
                if answer.done():
                    answer.result()  # raises what went wrong
            assert time.monotonic() < deadline, f"streams stand still: {self._counts}, not {wanted}"
            time.sleep(0.02)

    def check(self) -> None:
        assert [answer.result(PATIENCE) for answer in self._answers] == self._expected


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with Hosts(*NAMES, WORKER, CLIENTS, wire=True, seed=1) as hosts, ExitStack() as stack:
        yield World(hosts, models, tmp_path_factory.mktemp("frontends"), stack)
        hosts.heal()


@pytest.fixture(scope="module")
def expected(world: World) -> list[list[int]]:
    world.wait_whole()
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(lambda number: world.ask(number, NAMES[number % 2]), range(STREAMS)))


@pytest.fixture
def running(world: World, expected: list[list[int]]) -> Iterator[Running]:
    world.wait_whole()
    yield Running(world, expected)
    world.hosts.heal()


def part(hosts: Hosts, *, both_ways: bool = True) -> None:
    hosts.fault(Faults(blocked=True), source="a", target="b")
    if both_ways:
        hosts.fault(Faults(blocked=True), source="b", target="a")


@pytest.mark.timeout(240)
@pytest.mark.parametrize("both_ways", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["both ways", "one way"])
def test_frontends_that_lose_each_other_keep_their_clients(world: World, running: Running, both_ways: bool) -> None:
    running.wait_tokens()
    part(world.hosts, both_ways=both_ways)
    world.wait_lost(*NAMES)
    running.wait_tokens()
    world.hosts.heal()
    world.wait_whole()
    running.check()


@pytest.mark.timeout(240)
def test_clients_of_a_frontend_that_is_cut_off_go_on_at_the_other(world: World, running: Running) -> None:
    running.wait_tokens()
    world.hosts["a"].down()
    world.wait_lost("b")
    running.wait_tokens()
    running.check()
    world.hosts["a"].up()
    world.wait_whole()
    assert world.ask(0, "a") == running._expected[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_frontends_that_lose_each_other_again_and_again(world: World, running: Running) -> None:
    """Each goes on with what the other one has, again and again; the clients get what their own frontend makes."""
    running.wait_tokens()
    for _ in range(3):  # the streams may end before the last
        part(world.hosts)
        world.wait_lost(*NAMES)
        world.hosts.heal()
        world.wait_whole()
    running.check()
