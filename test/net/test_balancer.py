"""What the balancer in front of servers does when one dies, freezes, or is unwell."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from net import balancer as balancer_module
from net import hosts as hosts_module
from net.balancer import Balancer
from net.hosts import Hosts

SERVER = str(Path(__file__).with_name("http_server.py"))
pytestmark = pytest.mark.skipif(bool(reason := balancer_module.unavailable()), reason=str(reason))
NGINX = pytest.param(
    "nginx",
    "http",
    marks=pytest.mark.skipif(bool(no := balancer_module.unavailable("nginx")), reason=str(no)),
)
UP = {"a": "UP", "b": "UP"}


class Servers:
    """Two of ``http_server.py``, and a file for each that makes it unwell."""

    def __init__(self, directory: Path) -> None:
        self.processes: dict[str, subprocess.Popen] = {}
        self.unwell = {name: directory / name for name in "ab"}
        self.addresses: dict[str, tuple[str, int]] = {}

    def start(self, name: str, start=subprocess.Popen, address: str = "127.0.0.1", port: int = 0) -> None:
        command = [sys.executable, SERVER, name, address, str(port), str(self.unwell[name])]
        process = start(command, stdout=subprocess.PIPE, text=True)
        self.processes[name] = process
        self.addresses[name] = (address, int(process.stdout.readline()))

    def kill(self, name: str) -> None:
        self.processes[name].kill()
        self.processes[name].wait()


@pytest.fixture
def servers() -> Iterator[Servers]:
    with tempfile.TemporaryDirectory() as directory:
        servers = Servers(Path(directory))
        try:
            for name in "ab":
                servers.start(name)
            yield servers
        finally:
            for name in servers.processes:
                servers.kill(name)


def who(balancer: Balancer, requests: int = 6) -> set[str]:
    """Which servers answer, each request on a connection of its own."""
    answers = [httpx.get(balancer.url, timeout=20) for _ in range(requests)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.text for answer in answers}


@pytest.mark.parametrize(("kind", "mode"), [("haproxy", "http"), ("haproxy", "tcp"), NGINX])
def test_new_requests_go_to_the_server_that_lives(servers: Servers, kind: str, mode: str) -> None:
    with Balancer(servers.addresses, kind=kind, mode=mode) as balancer:
        assert who(balancer) == {"a", "b"}
        servers.kill("a")
        # Also before any check has failed: no byte of these was sent.
        assert who(balancer) == {"b"}
        port = servers.addresses["a"][1]
        servers.start("a", port=port)
        if kind == "haproxy":
            balancer.wait(UP)
            assert who(balancer) == {"a", "b"}
    with pytest.raises(httpx.ConnectError):
        httpx.get(balancer.url)


@pytest.mark.parametrize(("kind", "mode"), [("haproxy", "http"), ("haproxy", "tcp"), NGINX])
def test_a_stream_comes_as_it_is_made_is_cut_with_its_server_and_not_repeated(
    servers: Servers, kind: str, mode: str
) -> None:
    with Balancer(servers.addresses, kind=kind, mode=mode) as balancer:
        with httpx.stream("POST", f"{balancer.url}/stream", content=b"go", timeout=20) as stream:
            lines = stream.iter_lines()
            name = next(lines).split()[0]
            # The server makes the next line only when this is asked for: nobody in between waits for more.
            servers.processes[name].send_signal(signal.SIGUSR1)
            assert next(lines) == f"{name} 1"
            servers.kill(name)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        other = "b" if name == "a" else "a"
        assert httpx.get(f"http://127.0.0.1:{servers.addresses[other][1]}/streams", timeout=20).text == "0"


def test_a_server_that_is_unwell_gets_nothing_new_and_keeps_what_it_has(servers: Servers) -> None:
    with Balancer(servers.addresses) as balancer:
        with httpx.stream("POST", f"{balancer.url}/stream", timeout=20) as stream:
            lines = stream.iter_lines()
            name = next(lines).split()[0]
            servers.unwell[name].touch()
            balancer.wait({**UP, name: "DOWN"})
            assert who(balancer) == set(UP) - {name}
            servers.processes[name].send_signal(signal.SIGUSR1)
            assert next(lines) == f"{name} 1"
        servers.unwell[name].unlink()
        balancer.wait(UP)


def test_a_frozen_server_is_found_by_its_checks_and_its_streams_are_cut_if_wanted(servers: Servers) -> None:
    with Balancer(servers.addresses, cut_when_down=True) as balancer:
        with httpx.stream("POST", f"{balancer.url}/stream", timeout=20) as stream:
            lines = stream.iter_lines()
            name = next(lines).split()[0]
            servers.processes[name].send_signal(signal.SIGSTOP)
            with pytest.raises(httpx.HTTPError):
                list(lines)
        balancer.wait({**UP, name: "DOWN"})
        assert who(balancer) == set(UP) - {name}


@pytest.mark.skipif(bool(reason := hosts_module.unavailable()), reason=str(reason))
def test_on_a_host_of_its_own_in_front_of_two_others(servers: Servers) -> None:
    with Hosts("a", "b", "front") as hosts:
        for name in "ab":
            servers.kill(name)
            servers.start(name, hosts[name].popen, hosts[name].address)
        front = hosts["front"]
        with Balancer(servers.addresses, address=front.address, start=front.popen, network=front.network) as balancer:
            with front.network():
                assert who(balancer) == {"a", "b"}
            hosts["a"].down()
            balancer.wait({**UP, "a": "DOWN"})
            with front.network():
                assert who(balancer) == {"b"}


def test_a_balancer_that_cannot_start_says_why(servers: Servers) -> None:
    with pytest.raises(RuntimeError, match="nowhere"):
        Balancer({"a": ("nowhere.invalid", 1)}).__enter__()
    assert socket.create_connection(servers.addresses["a"], timeout=20).close() is None
