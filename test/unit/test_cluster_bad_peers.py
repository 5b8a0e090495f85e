"""Peers that are not ours, or not well: each is refused by name, costs little, and leaves a good one undisturbed."""

from __future__ import annotations

import contextlib
import os
import socket as tcp
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import zmq
from cluster_world import LEASE, PATIENCE, READY, SAME, Heard, dialling, listening, made_key, turn
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.cluster import keys, router, sockets
from sglang_kevlar.cluster.dialler import Dialler
from sglang_kevlar.cluster.keys import ClusterKey, KeyProblem
from sglang_kevlar.cluster.listener import Listener
from sglang_kevlar.cluster.sockets import split_address
from sglang_kevlar.control.session import Admitted, Ended, Joined, NotJoined, OutputsArrived, RequestsArrived
from sglang_kevlar.protocol.cluster import (
    CLUSTER_VERSION,
    BadFrame,
    Beat,
    Identity,
    Join,
    Outputs,
    Over,
    Refused,
    Welcome,
    decode,
    encode,
    from_group,
    to_group,
    version_of,
)


class World:
    """A frontend with a good peer, and whoever else comes."""

    def __init__(self, listener: Listener, heard: Heard, key: ClusterKey) -> None:
        self.listener, self.heard, self.key = listener, heard, key
        self.good: Dialler
        self.at_good: Heard
        self._echoes = 0

    @property
    def session(self) -> str:
        return self.heard.of(Joined)[0].session

    def turn(self, until: Callable[[], object]) -> None:
        turn(self.listener, self.good, until=until)

    def is_served(self) -> None:
        """The good peer gets a request and answers it, under the session that it has had from the beginning."""
        self._echoes += 1
        payload = b"echo %d" % self._echoes
        self.listener.requests(self.session, 1, payload)
        self.turn(lambda: any(event.payload == payload for event in self.at_good.of(RequestsArrived)))
        self.good.outputs(1, payload)
        self.turn(lambda: any(event.payload == payload for event in self.heard.of(OutputsArrived)))
        assert not [ended for ended in self.heard.of(Ended) if ended.session == self.session]


@pytest.fixture
def world() -> Iterator[World]:
    key = made_key()
    with listening(key, LEASE) as (listener, heard):
        world = World(listener, heard, key)
        with dialling(listener.address, key, "good") as (world.good, world.at_good):
            world.turn(lambda: world.at_good.of(Admitted))
            yield world


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    context = zmq.Context()
    context.linger = 0
    yield context
    context.destroy(linger=0)


def raw(context: zmq.Context, world: World) -> zmq.Socket[bytes]:
    """Who has the key, and says what it likes."""
    peer = context.socket(zmq.DEALER)
    keys.secure_client(peer, world.key)
    peer.setsockopt(zmq.RECONNECT_IVL, sockets.NEVER)
    peer.connect(f"tcp://{world.listener.address}")
    return peer


def answer(peer: zmq.Socket[bytes], world: World) -> Any:
    world.turn(lambda: peer.poll(0))
    return to_group.decode(peer.recv())


def join(name: str = "bad", session: str = "bad-1", **changes: Any) -> Join:
    return Join(
        session=session,
        identity=Identity(name=name, host="host", instance="bad"),
        configuration=msgspec.structs.replace(SAME, **changes),
        state=READY,
    )


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("which", ["another key", "no key"])
def test_who_has_not_the_key_is_told_so_and_gets_nowhere(world: World, which: str) -> None:
    key = made_key() if which == "another key" else None
    with dialling(world.listener.address, key, "stranger") as (stranger, heard):
        turn(world.listener, world.good, stranger, until=lambda: heard.of(NotJoined))
        assert "before it was set up, with" in heard.of(NotJoined)[0].reason
        assert ("with the cluster key" in heard.of(NotJoined)[0].reason) is (key is not None)
    world.is_served()
    assert len(world.heard.of(Joined)) == 1


def test_a_group_with_a_key_at_a_frontend_without_one_is_told_so() -> None:
    with listening(None) as (listener, _), dialling(listener.address, made_key()) as (dialler, heard):
        turn(listener, dialler, until=lambda: heard.of(NotJoined))
        assert "the cluster key" in heard.of(NotJoined)[0].reason


GARBAGE = {
    "nothing": b"",
    "noise": bytes(range(256)),
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "truncated": encode(join())[:-5],
    "trailing": encode(join()) + b"x",
    "unknown tag": msgspec.msgpack.encode({"type": "obey", "session": "s"}),
    "unknown field": msgspec.msgpack.encode({"type": "over", "session": "s", "reason": "", "more": 1}),
    "of the other direction": encode(Welcome(session="s", frontend="f", lease=3.0)),
    "negative": msgspec.msgpack.encode({"type": "beat", "session": "s", "number": -1, "seen": 0}),
    "huge text": msgspec.msgpack.encode({"type": "over", "session": "s", "reason": "x" * 100_000}),
    "a name of another shape": msgspec.msgpack.encode({"type": "over", "session": "a\nb", "reason": ""}),
    "nested": b"\x91" * 100_000,
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_of_a_holder_of_the_key_is_answered_once_and_hung_up_on(
    world: World, context: zmq.Context, data: bytes
) -> None:
    before = world.listener.connections
    peer = raw(context, world)
    for _ in range(5):
        peer.send(data)
    over = answer(peer, world)
    assert isinstance(over, Over) and "not a message of this protocol" in over.reason
    world.is_served()
    world.turn(lambda: world.listener.connections == before)
    assert not peer.poll(100), "told twice"


def test_several_frames_are_no_message(world: World, context: zmq.Context) -> None:
    peer = raw(context, world)
    peer.send_multipart([b"a", b"b", b"c"])
    assert "a message of 3 frames" in answer(peer, world).reason
    world.is_served()


def test_garbage_of_a_joined_group_ends_its_session_only(world: World, context: zmq.Context) -> None:
    peer = raw(context, world)
    peer.send(encode(join()))
    assert isinstance(answer(peer, world), Welcome)
    peer.send(b"garbage")
    world.turn(lambda: world.heard.of(Ended))
    assert (world.heard.of(Ended)[0].session, world.heard.of(Ended)[0].kind) == ("bad-1", "protocol")
    world.is_served()


def test_a_frame_that_is_too_large_ends_its_connection(
    world: World, context: zmq.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "MAX_FRAME_BYTES", 1 << 16)
    with listening(world.key) as (small, heard):
        peer = context.socket(zmq.DEALER)
        keys.secure_client(peer, world.key)
        peer.setsockopt(zmq.RECONNECT_IVL, sockets.NEVER)
        peer.connect(f"tcp://{small.address}")
        peer.send(encode(join()))
        turn(small, until=lambda: heard.of(Joined))
        peer.send(bytes(1 << 17))
        turn(small, until=lambda: heard.of(Ended))
        assert heard.of(Ended)[0].kind == "closed"


@pytest.mark.parametrize("version", [0, CLUSTER_VERSION + 1])
def test_another_version_is_named_whatever_else_it_says(world: World, context: zmq.Context, version: int) -> None:
    peer = raw(context, world)
    peer.send(msgspec.msgpack.encode({"type": "join", "session": "s-1", "version": version, "what": ["else"]}))
    refused = answer(peer, world)
    assert isinstance(refused, Refused) and refused.session == "s-1" and refused.retry_s is None
    assert f"version {CLUSTER_VERSION} of the cluster's protocol, the group {version}" in refused.reason
    world.is_served()


def test_another_model_is_refused_by_name_and_for_good(world: World) -> None:
    with dialling(world.listener.address, world.key, "other", model_digest="xyz") as (other, heard):
        turn(world.listener, world.good, other, until=lambda: heard.of(NotJoined))
        assert heard.of(NotJoined)[0].retry_s is None
        assert "model_digest: 'abc' here, 'xyz' there" in heard.of(NotJoined)[0].reason
    world.is_served()


def test_a_name_that_is_taken_is_refused_as_long_as_it_is(world: World) -> None:
    with dialling(world.listener.address, world.key, "good", instance="second") as (other, heard):
        turn(world.listener, world.good, other, until=lambda: heard.of(NotJoined))
        assert "a group named good is joined already" in heard.of(NotJoined)[0].reason
        world.is_served()


def test_frames_of_another_session_and_those_of_an_earlier_connection_are_nothing(
    world: World, context: zmq.Context
) -> None:
    stolen = world.session
    frames = [
        encode(Outputs(session=stolen, number=0, epoch=1, payload=b"forged")),
        encode(Outputs(session=stolen, number=1, epoch=1, payload=b"forged")),
        encode(Over(session=stolen, reason="forged")),
        encode(Beat(session=stolen, number=7, seen=7)),
    ]
    for data in frames:
        peer = raw(context, world)
        peer.send(data)
        if data is not frames[2]:
            over = answer(peer, world)
            assert isinstance(over, Over) and over.session == stolen
        world.is_served()
    peer = raw(context, world)
    peer.send(encode(join()))
    assert isinstance(answer(peer, world), Welcome)
    peer.send(frames[0])
    world.turn(lambda: world.heard.of(Ended))
    assert world.heard.of(Ended)[0].session == "bad-1"
    # All of it once more, from the beginning, while its session has ended: it is another, that begins anew.
    again = raw(context, world)
    again.send(encode(join("good", stolen)))
    assert isinstance(answer(again, world), Refused)
    assert not [event for event in world.heard.of(OutputsArrived) if event.payload == b"forged"]
    world.is_served()


def connect(world: World) -> tcp.socket:
    host, port = split_address(world.listener.address)
    return tcp.create_connection((host, port), timeout=PATIENCE)


@pytest.fixture
def strangers() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("says", ["nothing", "a byte at a time"])
def test_half_open_connections_are_bounded_and_do_not_stay(
    monkeypatch: pytest.MonkeyPatch, strangers: contextlib.ExitStack, says: str
) -> None:
    monkeypatch.setattr(keys, "_HANDSHAKE", 1_500)
    monkeypatch.setattr(router, "MAX_CONNECTIONS", 100)
    key = made_key()
    with listening(key) as (listener, heard):
        world = World(listener, heard, key)
        with dialling(listener.address, key, "good") as (world.good, world.at_good):
            world.turn(lambda: world.at_good.of(Admitted))
            before = open_files()
            held: list[tcp.socket] = []
            for number in range(500):
                stranger = strangers.enter_context(connect(world))
                held.append(stranger)
                if says != "nothing":
                    with contextlib.suppress(OSError):
                        stranger.send(b"\xff"[:1])
                if number % 20 == 0:
                    world.listener.poll(0.0)
                    world.good.poll(0.0)
                    assert listener.connections <= 100
            world.is_served()
            # Those of the strangers themselves are in this process, too.
            assert open_files() - before - len(held) < 150
            with dialling(listener.address, key, "another") as (another, at_another):
                turn(listener, world.good, another, until=lambda: at_another.of(Admitted))
                end = time.monotonic() + PATIENCE
                while listener.connections > 2:
                    assert time.monotonic() < end, "they stay"
                    if says != "nothing":
                        for stranger in held:
                            with contextlib.suppress(OSError):
                                stranger.send(b"\0")
                    turn(listener, world.good, another, until=lambda: True)
                    for each in (listener, world.good, another):
                        each.poll(0.01)
            world.is_served()


def test_holders_of_the_key_that_do_not_join_are_bounded_and_do_not_stay(
    monkeypatch: pytest.MonkeyPatch, world: World, context: zmq.Context
) -> None:
    monkeypatch.setattr(router, "MAX_CONNECTIONS", 30)
    monkeypatch.setattr(router, "UNJOINED_TIME", 3.0)
    peers = [raw(context, world) for _ in range(100)]
    world.turn(lambda: world.listener.connections > 20)
    world.is_served()
    assert world.listener.connections <= 100
    world.turn(lambda: world.listener.connections <= 31)
    world.turn(lambda: world.listener.connections == 1)
    assert len(peers) == 100
    world.is_served()


def test_a_flood_of_connections_leaves_the_good_one_undisturbed(world: World) -> None:
    over = threading.Event()
    made = [0]

    def flood() -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), connect(world) as stranger:
                stranger.send(b"GET / HTTP/1.1\r\n\r\n")
                made[0] += 1

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        world.turn(lambda: made[0] > 50)
        for _ in range(50):
            world.is_served()
        with dialling(world.listener.address, world.key, "another") as (another, heard):
            turn(world.listener, world.good, another, until=lambda: heard.of(Admitted))
    finally:
        over.set()
        thread.join()
    world.turn(lambda: world.listener.connections == 1)
    world.is_served()


def test_a_flood_of_garbage_of_a_holder_of_the_key_costs_no_memory(world: World) -> None:
    over = threading.Event()
    sent = [0]

    def flood() -> None:
        context = zmq.Context()
        while not over.is_set():
            peer = raw(context, world)
            peer.setsockopt(zmq.SNDTIMEO, 100)
            peer.setsockopt(zmq.LINGER, 0)
            for _ in range(200):
                with contextlib.suppress(zmq.Again):
                    peer.send(bytes(1 << 18))
                    sent[0] += 1 << 18
            peer.close()
        context.term()

    before = resident()
    thread = threading.Thread(target=flood)
    thread.start()
    try:
        world.turn(lambda: sent[0] > 512 << 20)
        for _ in range(20):
            world.is_served()
    finally:
        over.set()
        thread.join()
    # The flood's own sockets are in this process, too.
    assert resident() - before < 256 << 20
    world.turn(lambda: world.listener.connections == 1)
    world.is_served()


def test_a_name_that_a_peer_gives_itself_is_nobodys(world: World, context: zmq.Context) -> None:
    peer = context.socket(zmq.DEALER)
    peer.setsockopt(zmq.ROUTING_ID, b"me")
    keys.secure_client(peer, world.key)
    peer.connect(f"tcp://{world.listener.address}")
    peer.send(encode(join()))
    world.is_served()
    assert not peer.poll(100) and len(world.heard.of(Joined)) == 1


def test_a_frontend_that_talks_garbage_is_left(context: zmq.Context) -> None:
    bad = context.socket(zmq.ROUTER)
    port = bad.bind_to_random_port("tcp://127.0.0.1")
    with dialling(f"127.0.0.1:{port}", None) as (dialler, heard):
        turn(dialler, until=lambda: bad.poll(0))
        bad.send_multipart([bad.recv_multipart()[0], b"garbage"])
        turn(dialler, until=lambda: heard.of(NotJoined))
        assert "not a message of this protocol" in heard.of(NotJoined)[0].reason
        # The next try, answered, and then spoilt.
        turn(dialler, until=lambda: bad.poll(0))
        sender, data = bad.recv_multipart()
        session = from_group.decode(data).session
        bad.send_multipart([sender, encode(Welcome(session=session, frontend="bad", lease=3.0))])
        turn(dialler, until=lambda: heard.of(Admitted))
        bad.send_multipart([sender, b"two", b"frames"])
        turn(dialler, until=lambda: heard.of(Ended))
        assert heard.of(Ended)[0].kind == "protocol"


# Of frames alone.

GOOD = [
    encode(join()),
    encode(Outputs(session="s", number=3, epoch=1, payload=b"abc")),
    encode(Beat(session="s", number=3, seen=2)),
    encode(Over(session="s", reason="r")),
]


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_no_frame_does_anything_but_decode_or_be_named_bad(data: bytes) -> None:
    for decoder in (from_group, to_group):
        with contextlib.suppress(BadFrame):
            decode(decoder, data)
    version_of(data)


@given(st.sampled_from(GOOD), st.data())
@settings(max_examples=500)
def test_a_damaged_frame_is_bad_or_still_within_all_limits(frame: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(frame) - 1))
    damaged = frame[:at] + data.draw(st.binary(max_size=3)) + frame[at + data.draw(st.integers(0, 3)) :]
    try:
        message = decode(from_group, damaged)
    except BadFrame as problem:
        assert 0 < len(str(problem)) <= 200
        return
    assert encode(decode(from_group, encode(message))) == encode(message)


def test_a_key_is_needed_for_other_hosts_only() -> None:
    with pytest.raises(KeyProblem):
        sockets.Dealer(zmq.Context.instance(), "10.0.0.1:1", None)
