"""Listener and dialler over loopback: what ends is seen at once, what is sent arrives, nothing waits."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster_world import LEASE, SAME, dialling, eventually, listening, made_key, sessions, turn

from sglang_kevlar.cluster import router as router_module
from sglang_kevlar.cluster.keys import ClusterKey, KeyProblem
from sglang_kevlar.cluster.listener import Listener
from sglang_kevlar.cluster.router import Router
from sglang_kevlar.cluster.sockets import split_address
from sglang_kevlar.control.session import (
    Admitted,
    Ended,
    Joined,
    KillArrived,
    NotJoined,
    OutputsArrived,
    RequestsArrived,
    StateChanged,
    Suspect,
    Trusted,
)
from sglang_kevlar.protocol.cluster import GroupState

PEER = """
import sys, time
from cluster_world import dialling
from sglang_kevlar.cluster.keys import ClusterKey
address, name, secret, public = sys.argv[1:]
key = ClusterKey(secret.encode(), public.encode()) if secret else None
with dialling(address, key, name) as (dialler, heard):
    while True:
        dialler.poll(0.02)
"""


FRONTEND = """
import sys
from cluster_world import listening
from sglang_kevlar.control.session import Joined, OutputsArrived
with listening(None, lease=1.0) as (listener, heard):
    print(listener.address, flush=True)
    while True:
        heard.events.clear()
        listener.poll(0.02)
        for joined in heard.of(Joined):
            listener.requests(joined.session, 1, joined.session.encode())
        for output in heard.of(OutputsArrived):
            print(output.session, output.payload.decode(), flush=True)
"""


@pytest.fixture
def peers() -> Iterator[list[subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []
    yield running
    for peer in running:
        peer.kill()
        peer.wait()


def test_a_stopped_frontend_believes_in_a_session_until_it_reads_that_it_ended(
    peers: list[subprocess.Popen[bytes]],
) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    peer = subprocess.Popen([sys.executable, "-c", FRONTEND], env=environment, stdout=subprocess.PIPE)
    peers.append(peer)
    assert peer.stdout is not None
    with peer.stdout, dialling(peer.stdout.readline().decode().strip(), None) as (dialler, heard):
        turn(dialler, until=lambda: heard.of(RequestsArrived))
        first = heard.of(Admitted)[0].session
        os.kill(peer.pid, signal.SIGSTOP)
        dialler.outputs(1, b"before the end")
        turn(dialler, until=lambda: heard.of(Ended))
        assert heard.of(Ended)[0].kind == "silent"
        dialler.outputs(1, b"between")
        os.kill(peer.pid, signal.SIGCONT)
        turn(dialler, until=lambda: len(heard.of(Admitted)) == 2)
        second = heard.of(Admitted)[1].session
        turn(dialler, until=lambda: len(heard.of(RequestsArrived)) == 2)
        assert [event.payload.decode() for event in heard.of(RequestsArrived)] == [first, second]
        dialler.outputs(1, b"after")
        assert peer.stdout.readline().decode() == f"{first} before the end\n"
        assert peer.stdout.readline().decode() == f"{second} after\n"


def start(peers: list[subprocess.Popen[bytes]], listener: Listener, name: str, key: ClusterKey | None = None) -> int:
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    secret, public = (key.secret.decode(), key.public.decode()) if key else ("", "")
    arguments = [sys.executable, "-c", PEER, listener.address, name, secret, public]
    peers.append(subprocess.Popen(arguments, env=environment))
    return peers[-1].pid


def test_both_ways_in_order_on_an_event_loop() -> None:
    async def run() -> None:
        key = made_key()
        with listening(key) as (listener, at_frontend), dialling(listener.address, key) as (dialler, at_group):
            listener.start()
            dialler.start()
            await eventually(lambda: at_frontend.of(Joined) and at_group.of(Admitted))
            session = at_frontend.of(Joined)[0].session
            for number in range(3000):
                listener.requests(session, 1, b"request %d" % number)
                dialler.outputs(1, b"output %d" % number)
            dialler.change_state(GroupState(epoch=1, phase="down", cause="it fell"))
            listener.kill(session, 1, "slow", planned=True)
            await eventually(lambda: at_group.of(KillArrived) and len(at_frontend.of(StateChanged)) == 2)
            assert [e.payload for e in at_group.of(RequestsArrived)] == [b"request %d" % i for i in range(3000)]
            assert [e.payload for e in at_frontend.of(OutputsArrived)] == [b"output %d" % i for i in range(3000)]
            assert at_frontend.of(StateChanged)[-1].state.cause == "it fell"
            assert not at_frontend.of(Ended)

    asyncio.run(run())


def test_a_frontend_polls_before_it_has_an_event_loop() -> None:
    async def run() -> None:
        key = made_key()
        with listening(key) as (listener, at_frontend), dialling(listener.address, key) as (dialler, _):
            turn(listener, dialler, until=lambda: at_frontend.of(Joined))
            listener.start()
            dialler.start()
            dialler.outputs(1, b"x")
            await eventually(lambda: at_frontend.of(OutputsArrived))

    asyncio.run(run())


def test_a_killed_process_is_known_long_before_its_lease(peers: list[subprocess.Popen[bytes]]) -> None:
    key = made_key()
    with listening(key, lease=500.0) as (listener, heard):
        pid = start(peers, listener, "group", key)
        turn(listener, until=lambda: heard.of(Joined))
        os.kill(pid, signal.SIGKILL)
        turn(listener, until=lambda: heard.of(Ended))
        assert heard.of(Ended)[0].kind == "closed"


def test_a_stopped_process_is_suspect_then_over_and_joins_again(peers: list[subprocess.Popen[bytes]]) -> None:
    with listening(None, lease=1.0) as (listener, heard):
        pid = start(peers, listener, "group")
        turn(listener, until=lambda: heard.of(Joined))
        os.kill(pid, signal.SIGSTOP)
        turn(listener, until=lambda: heard.of(Ended))
        assert heard.of(Suspect) and heard.of(Ended)[0].kind == "silent"
        os.kill(pid, signal.SIGCONT)
        turn(listener, until=lambda: len(heard.of(Joined)) == 2)
        first, second = (joined.session for joined in heard.of(Joined))
        assert first != second and listener.sessions.session(first) is None


def test_our_own_pause_ends_nothing(peers: list[subprocess.Popen[bytes]]) -> None:
    with listening(None, lease=1.0) as (listener, heard):
        start(peers, listener, "group")
        turn(listener, until=lambda: heard.of(Joined))
        time.sleep(0.4)
        listener.poll(0.0)
        time.sleep(0.4)
        for _ in range(20):
            listener.poll(0.01)
        assert not heard.of(Ended) and not heard.of(Trusted)


def test_what_was_sent_before_an_end_comes_before_it() -> None:
    with listening(None) as (listener, at_frontend):
        with dialling(listener.address, None) as (dialler, at_group):
            turn(listener, dialler, until=lambda: at_group.of(Admitted))
            for number in range(500):
                dialler.outputs(1, b"%d" % number)
        # It has left and closed its socket; here nothing of that was read yet.
        turn(listener, until=lambda: at_frontend.of(Ended))
        assert len(at_frontend.of(OutputsArrived)) == 500
        assert at_frontend.of(Ended)[0].kind == "left"


def test_a_connection_whose_file_number_is_used_again_is_not_taken_for_the_old_one(
    peers: list[subprocess.Popen[bytes]],
) -> None:
    with listening(None, lease=500.0) as (listener, heard):
        numbers = []
        for name in ("first", "second", "third"):
            pid = start(peers, listener, name)
            if len(peers) > 1:
                # Nothing is read here meanwhile: the end of the one and the beginning of the other come together.
                os.kill(peers[-2].pid, signal.SIGKILL)
                peers[-2].wait()
                time.sleep(1.5)
            turn(listener, until=lambda: len(heard.of(Joined)) == len(peers))
            turn(listener, until=lambda: len(heard.of(Ended)) == len(peers) - 1)
            (end,) = listener.sessions
            assert end.identity.name == name and pid == peers[-1].pid
            numbers.append(listener._router._senders[end.sender].fd)
        assert len(set(numbers)) < 3, "no number was used again"


def test_a_frontend_that_is_not_there_yet_is_joined_when_it_is() -> None:
    router = Router("127.0.0.1:0", None)
    address = router.address
    router.close()
    with dialling(address, None) as (dialler, at_group):
        turn(dialler, until=lambda: len(at_group.of(NotJoined)) >= 2)
        assert at_group.of(NotJoined)[0].reason == "cannot connect"
        listener = Listener(address, None, sessions(), lambda event: None)
        try:
            turn(listener, dialler, until=lambda: at_group.of(Admitted))
        finally:
            listener.close("over", 1.0)
        turn(dialler, until=lambda: at_group.of(Ended))
        assert at_group.of(Ended)[0].reason == "over"


def test_a_group_that_does_not_read_is_given_up_and_nothing_waits(
    monkeypatch: pytest.MonkeyPatch, peers: list[subprocess.Popen[bytes]]
) -> None:
    monkeypatch.setattr(router_module, "SEND_HWM", 50)
    with listening(None, lease=500.0) as (listener, heard):
        pid = start(peers, listener, "group")
        turn(listener, until=lambda: heard.of(Joined))
        os.kill(pid, signal.SIGSTOP)
        session = heard.of(Joined)[0].session
        for _ in range(300):
            listener.requests(session, 1, bytes(1 << 20))
            if heard.of(Ended):
                break
        assert heard.of(Ended)[0].kind == "unread"
        listener.requests(session, 1, b"to nobody")


def test_another_host_needs_a_key() -> None:
    with pytest.raises(KeyProblem, match=r"only a loopback address can be listened on, not 0\.0\.0\.0"):
        Router("0.0.0.0:0", None)
    with dialling("10.1.2.3:5", None) as (dialler, _), pytest.raises(KeyProblem, match="only a loopback address"):
        turn(dialler, until=lambda: False)


def test_a_name_is_listened_on_by_its_address() -> None:
    router = Router("localhost:0", None)
    assert router.address.startswith("127.0.0.1:")
    router.close()
    with pytest.raises(ValueError, match=r"cannot listen on 'no\.such\.host\.invalid'"):
        Router("no.such.host.invalid:0", None)
    with dialling("no.such.host.invalid:5", made_key()) as (dialler, heard):
        turn(dialler, until=lambda: heard.of(NotJoined))
        assert heard.of(NotJoined)[0].reason == "cannot connect"


def test_tries_leave_nothing_open() -> None:
    with dialling("127.0.0.1:1", None) as (dialler, heard):
        turn(dialler, until=lambda: heard.of(NotJoined))
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(50):
            dialler.end._retry_at = 0.0
            count = len(heard.of(NotJoined))
            turn(dialler, until=lambda n=count: len(heard.of(NotJoined)) > n)
        # ZMQ closes in its own time.
        turn(dialler, until=lambda: len(os.listdir("/proc/self/fd")) <= before + 10)


@pytest.mark.parametrize("address", ["", "host", ":5", "host:", "host:x", "host:70000", "host:-1"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ValueError, match="is not HOST:PORT"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("host:5") == ("host", 5) and split_address("[::1]:5") == ("[::1]", 5)
    assert SAME.differences(SAME) == [] and LEASE > 0
