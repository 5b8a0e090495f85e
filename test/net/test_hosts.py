"""Each fault does what it says, to real sockets of real processes; and nothing of the hosts is left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from net import hosts as hosts_module
from net.hosts import Host, Hosts, unavailable
from net.link_faults import NONE, Faults

pytestmark = pytest.mark.skipif(bool(reason := unavailable(wire=True)), reason=str(reason))

ECHO = str(Path(__file__).with_name("echo.py"))
#: seconds for what has to happen at some time
PATIENCE = 20.0


def namespaces() -> set[str]:
    return {name for name in os.listdir("/run/netns") if name.startswith(f"kv-{os.getpid()}-")}


def start(host: Host, *arguments: str) -> tuple[str, int]:
    process = host.popen([sys.executable, ECHO, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return host.address, int(process.stdout.readline())


def connect(host: Host, address: tuple[str, int], timeout: float = PATIENCE) -> socket.socket:
    with host.network():
        return socket.create_connection(address, timeout=timeout)


def datagrams(host: Host, timeout: float = PATIENCE) -> socket.socket:
    with host.network():
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.settimeout(timeout)
    return udp


def exchange(connection: socket.socket, data: bytes = b"ping") -> None:
    connection.sendall(data)
    received = b""
    while len(received) < len(data):
        more = connection.recv(1 << 20)
        assert more, "the connection was closed"
        received += more
    assert received == data


def silent(connection: socket.socket, seconds: float = 0.15) -> bool:
    """Whether nothing comes back: neither an answer nor an end."""
    before = connection.gettimeout()
    connection.settimeout(seconds)
    try:
        connection.sendall(b"ping")
        return not connection.recv(100) and False
    except TimeoutError:
        return True
    finally:
        connection.settimeout(before)


def ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(100) == b""
    except ConnectionError:
        return True


def kill(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def arrived(sender: Host, sink: tuple[str, int], numbers: int) -> list[int]:
    """Which of so many numbered datagrams come, in their order."""
    with datagrams(sender) as udp:
        for number in range(numbers):
            udp.sendto(str(number).encode(), sink)
            if number % 50 == 49:
                time.sleep(0.005)
        time.sleep(0.1)
        udp.sendto(b"report", sink)
        return json.loads(udp.recv(65_536))


@pytest.fixture(params=[False, True], ids=["kernel", "wire"])
def pair(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    with Hosts("a", "b", wire=request.param) as hosts:
        yield hosts
    assert not namespaces()


@pytest.fixture
def wired() -> Iterator[Hosts]:
    with Hosts("a", "b", "c", wire=True, seed=7) as hosts:
        yield hosts
    assert not namespaces()


def test_hosts_are_apart_and_reach_each_other(pair: Hosts) -> None:
    address = start(pair["a"])
    with connect(pair["b"], address) as connection:
        exchange(connection, os.urandom(1_000_000))
    with connect(pair["a"], ("127.0.0.1", address[1])) as connection:
        exchange(connection)
    with pytest.raises(ConnectionRefusedError):
        connect(pair["b"], ("127.0.0.1", address[1]))
    assert len(pair["a"].pids()) == 1 and not pair["b"].pids()


def test_a_pulled_cable_is_silence_and_the_connection_outlives_it(pair: Hosts) -> None:
    address = start(pair["a"])
    with connect(pair["b"], address) as connection:
        exchange(connection)
        for host in pair:
            host.down()
            assert silent(connection)
            with pytest.raises(TimeoutError):
                connect(pair["b"], address, timeout=0.15)
            pair.heal()
            assert connection.recv(4) == b"ping"
            exchange(connection)


def test_the_end_of_a_process_is_seen_at_once_but_not_behind_a_pulled_cable(pair: Hosts) -> None:
    first, second = start(pair["a"]), start(pair["a"])
    with connect(pair["b"], first) as seen, connect(pair["b"], second) as unseen:
        exchange(seen)
        exchange(unseen)
        kill(pair.children[0])
        assert ended(seen)
        pair["a"].down()
        kill(pair.children[1])
        assert silent(unseen)
        # The kernel of a still says it, once it can.
        pair["a"].up()
        assert ended(unseen)


def test_a_limited_rate(pair: Hosts) -> None:
    address = start(pair["a"], "sink")
    pair["b"].limit(1_000_000)
    began = time.monotonic()
    with connect(pair["b"], address) as connection:
        connection.sendall(bytes(500_000))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(20) == b"500000"
    assert time.monotonic() - began > 0.4
    pair["b"].limit(None)


def test_one_way_partition(wired: Hosts) -> None:
    sink, sink_c = start(wired["a"], "sink"), start(wired["c"], "sink")
    wired.fault(Faults(blocked=True), source="b", target="a")
    assert arrived(wired["b"], sink_c, 10) == list(range(10))
    with datagrams(wired["b"], 0.2) as udp, pytest.raises(TimeoutError):
        udp.sendto(b"report", sink)
        udp.recv(100)
    wired.fault(NONE, source="b", target="a")
    wired.fault(Faults(blocked=True), source="a", target="b")
    with datagrams(wired["b"], 0.2) as udp:
        for number in range(10):
            udp.sendto(str(number).encode(), sink)
        udp.sendto(b"report", sink)
        with pytest.raises(TimeoutError):
            udp.recv(100)
    assert wired.count("a", "b")["lost"]
    wired.heal()
    # They came, though nobody answered.
    assert arrived(wired["b"], sink, 0) == list(range(10))


def test_dropped_frames_are_the_same_ones_with_the_same_seed() -> None:
    came = []
    for _ in range(2):
        with Hosts("a", "b", wire=True, seed=3) as hosts:
            sink = start(hosts["a"], "sink")
            hosts.fault(Faults(drop=0.2), source="b", target="a")
            with datagrams(hosts["b"]) as udp:
                for number in range(300):
                    udp.sendto(str(number).encode(), sink)
            wait_for(lambda hosts=hosts: sum(hosts.count("b", "a").values()) == 300, "all frames to pass")
            hosts.heal()
            came.append(arrived(hosts["b"], sink, 0))
    assert came[0] == came[1]
    assert 200 < len(came[0]) < 280


def test_tcp_gets_through_loss_reordering_jitter_and_outages(wired: Hosts) -> None:
    address = start(wired["a"])
    faults = Faults(drop=0.02, delay=0.002, jitter=0.002, reorder=0.05, outage=0.02, outage_every=0.2)
    wired.fault(faults, target="a")
    with connect(wired["b"], address) as connection:
        exchange(connection, os.urandom(100_000))
    assert wired.count("b", "a")["lost"]


def test_delay_and_order(wired: Hosts) -> None:
    address, sink = start(wired["a"]), start(wired["a"], "sink")
    wired.fault(Faults(delay=0.1), source="a")
    began = time.monotonic()
    with connect(wired["b"], address) as connection:
        exchange(connection)
    assert time.monotonic() - began >= 0.2
    wired.fault(Faults(reorder=0.3), target="a")
    came = arrived(wired["b"], sink, 100)
    assert sorted(came) == list(range(100)) and came != sorted(came)


def test_a_path_with_a_rate(wired: Hosts) -> None:
    address = start(wired["a"], "sink")
    wired.fault(Faults(rate=1_000_000), source="b", target="a")
    began = time.monotonic()
    with connect(wired["b"], address) as connection:
        connection.sendall(bytes(500_000))
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(20) == b"500000"
    assert time.monotonic() - began > 0.4


def test_what_cannot_be_is_refused(pair: Hosts) -> None:
    with pytest.raises(KeyError, match="nobody"):
        pair.fault(NONE, source="nobody")
    with pytest.raises(ValueError, match="differ"):
        Hosts("a", "a")


def test_faults_need_the_wire() -> None:
    with Hosts("a", "b") as hosts, pytest.raises(ValueError, match="wire=True"):
        hosts.fault(Faults(drop=0.5))


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


OTHER_TEST = """
import sys, time
from net.hosts import Hosts
with Hosts("a", "b", wire=True, grace=0.1) as hosts:
    child = hosts["a"].popen(["sh", "-c", "sleep 1000 & echo $!; wait"])
    while len(hosts["a"].pids()) < 2: time.sleep(0.01)
    print("\\n", hosts.prefix, hosts._wire.pid, flush=True)
    {then}
"""


def other_test(then: str) -> tuple[subprocess.Popen, str, int]:
    process = subprocess.Popen(
        [sys.executable, "-c", OTHER_TEST.format(then=then)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    while len(words := process.stdout.readline().split()) != 2:
        assert process.poll() is None
    return process, words[0], int(words[1])


def left_of(prefix: str) -> list[str]:
    return [name for name in os.listdir("/run/netns") if name.startswith(prefix)]


@pytest.mark.parametrize("then", ["raise RuntimeError", "time.sleep(1000)"], ids=["failure", "ctrl-c"])
def test_nothing_is_left_of_a_test_that_fails_or_is_interrupted(then: str) -> None:
    process, prefix, wire = other_test(then)
    if "sleep" in then:
        process.send_signal(signal.SIGINT)
    process.wait(PATIENCE)
    assert not left_of(prefix)
    wait_for(lambda: not alive(wire), "the end of the wire")


def test_the_next_test_removes_what_a_killed_one_left() -> None:
    process, prefix, wire = other_test("time.sleep(1000)")
    left = left_of(prefix)
    assert len(left) == 2
    with Hosts("a"):
        assert left_of(prefix) == left, "somebody else's, who lives"
    inside = hosts_module._inside(left)
    assert len(inside) == 2
    kill(process)
    wait_for(lambda: not alive(wire), "the end of the wire")
    with Hosts("a"):
        assert not left_of(prefix)
    assert not any(alive(pid) for pid in inside)
