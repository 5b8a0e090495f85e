"""A shadow of another host: who may send to it, and connections that break, stop or are slow."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import zlib
from collections.abc import Iterator

import msgspec
import pytest
import zmq
from shadow_line import World, make_world
from shadow_world import LAYOUT, content, eventually, sequence

from forged import with_the_same_crc
from sglang_kevlar.cluster import keys
from sglang_kevlar.protocol.shadow import Accept, Ack, Ended, Lookup, Refuse, Release, Resync
from sglang_kevlar.shadow import sender as sender_module
from sglang_kevlar.shadow import sockets as sockets_module
from sglang_kevlar.shadow.sockets import Network
from sglang_kevlar.transport import TransportError
from sglang_kevlar.transport.shared_memory import SharedMemory


def new_key() -> keys.ClusterKey:
    secret = keys.generate().encode()
    return keys.ClusterKey(secret, zmq.curve_public(secret))


@pytest.fixture(params=["tcp", "mooncake"])
def world(request, tmp_path, monkeypatch) -> Iterator[World]:
    monkeypatch.setattr(sender_module, "SILENCE", 2.0)
    monkeypatch.setattr(sender_module, "STILL", 0.2)
    yield from make_world(request.param, tmp_path, monkeypatch)


only_tcp = pytest.mark.parametrize("world", ["tcp"], indirect=True)


@pytest.fixture
def networks(world) -> Iterator[Networks]:
    """Of one cluster. Sockets are closed by now when it ends."""
    made = Networks()
    yield made
    world.end()
    made.close()


class Networks:
    def __init__(self) -> None:
        self.key = new_key()
        self._made: list[Network] = []

    def one(self, key: keys.ClusterKey | str | None = "") -> Network:
        self._made.append(Network(self.key if isinstance(key, str) else key))
        return self._made[-1]

    def close(self) -> None:
        for network in self._made:
            network.close()


def test_blocks_arrive(world, networks):
    store = world.store(network=networks.one())
    assert store.endpoint.startswith("tcp://127.0.0.1:")
    source = world.source(network=networks.one()).to(store).linked()
    source.send(sequence(1, 20), b"request")
    assert store.has(sequence(1, 20)) == 20
    assert source.counters.resyncs == store.counters.rejected_frames == 0
    # One of its own launch, through the file.
    beside = world.source(group=1).to(store, endpoint=store.file).linked()
    beside.send(sequence(2, 20))
    assert store.has(sequence(2, 20)) == 20


@only_tcp
@pytest.mark.parametrize("whose", ["nobody's", "another cluster's"])
def test_without_the_key_nobody_gets_in(world, networks, whose, monkeypatch):
    monkeypatch.setattr(sender_module, "SILENCE", 0.1)
    store = world.store(network=networks.one())
    stranger = world.source(network=networks.one(None if whose == "nobody's" else new_key()))
    stranger.to(store)
    eventually(lambda: stranger.counters.resyncs >= 3)
    assert stranger.sender.link is None and not store.server._sessions
    assert store.counters.rejected_frames == 0, "its frames do not even come so far"
    world.source(group=1, network=networks.one()).to(store).linked().send(sequence(1, 3))


def test_without_a_key_there_is_loopback_only():
    network = Network(None)
    for host in ("0.0.0.0", "192.0.2.1", "a.host.invalid"):
        with pytest.raises(TransportError, match="without a cluster key"):
            network.listen(host, 1)
        with pytest.raises(TransportError, match="without a cluster key"):
            network.dial(f"tcp://{host}:1")
    for host in ("127.0.0.1", "localhost", "::1"):
        with contextlib.suppress(TransportError):  # there may be no IPv6
            listening, endpoint = network.listen(host, 1)
            network.dial(endpoint).close()
            listening.close()
    network.close()


def test_an_address_that_is_not_ours_is_said():
    network = Network(new_key())
    for host in ("192.0.2.1", "a.host.invalid"):
        with pytest.raises(TransportError, match=f"cannot listen on {host}"):
            network.listen(host, 1)
    network.close()


@only_tcp
def test_other_hosts_do_not_ask_the_store_nor_name_files(world, networks):
    store = world.store(network=networks.one())
    peer = world.peer(store, network=networks.one())
    assert isinstance(peer.ask(peer.hello), Accept)
    assert isinstance(peer.ask(peer.parcel(sequence(1, 2), 0)), Ack)
    for question in (Lookup(ticket="t", keys=sequence(1, 2)), Release(ticket="t")):
        assert isinstance(peer.ask(question), Resync)
        assert isinstance(peer.ask(peer.hello), Accept)
    assert not store.store._tickets
    refused = peer.ask(msgspec.structs.replace(peer.hello, transport="shm", window=peer.session))
    assert isinstance(refused, Refuse) and "not taken here" in refused.reason


@only_tcp
def test_groups_of_two_launches_may_have_one_name(world, networks):
    store = world.store(network=networks.one())
    one, other = (world.peer(store, network=networks.one(), epoch=epoch) for epoch in (5, 1))
    other.hello = msgspec.structs.replace(other.hello, launch="another")
    for number in range(2):
        for peer in (one, other):
            if not number:
                assert isinstance(peer.ask(peer.hello), Accept)
            assert isinstance(peer.ask(peer.parcel(sequence(1, 2), number)), Ack)
    assert len(store.server._sessions) == 2


@only_tcp
def test_who_sends_more_than_there_may_be_is_cut_off(world, networks, monkeypatch):
    monkeypatch.setattr(sockets_module, "MAX_FRAME_BYTES", 1 << 20)
    store = world.store(network=networks.one())
    peer, good = (world.peer(store, network=networks.one(), group=group) for group in range(2))
    for each in (peer, good):
        assert isinstance(each.ask(each.hello), Accept)
    peer.raw(b"x" * (2 << 20))
    heard = None
    for _ in range(20):
        # What is said before the cut is noticed goes with the connection that is cut.
        peer.say(Ended(session=peer.session, sequence=0, request=b"r"))
        if (heard := peer.hears(0.5)) is not None:
            break
    assert isinstance(heard, Resync), "it has another connection"
    assert isinstance(good.ask(good.parcel(sequence(1, 2), 0)), Ack)


@only_tcp
def test_garbage_on_the_port_is_nobodys_business(world, networks):
    store = world.store(network=networks.one())
    source = world.source(network=networks.one()).to(store).linked()
    host, _, port = store.endpoint.removeprefix("tcp://").rpartition(":")
    for data in (b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), b"\xff" + b"\0" * 8 + b"\x7f\3\0CURVE" + b"\0" * 60):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(data)
    source.send(sequence(1, 20))
    assert store.has(sequence(1, 20)) == 20
    assert source.counters.resyncs == store.counters.rejected_frames == 0


class Cable:
    """Between a source and a store: cut, held or slow, to the byte."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
        self._there = (host, int(port))
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        #: bytes to the store that pass before the connection ends; None: all
        self.cut_after: int | None = None
        self.passes = threading.Event()
        self.passes.set()
        self.connections = 0
        self._pairs: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._there)
                self._pairs += [near, far]
                self.connections += 1
                for source, target, forth in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=(source, target, forth), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, forth: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                self.passes.wait()
                if forth and self.cut_after is not None:
                    data, left = data[: self.cut_after], self.cut_after - len(data)
                    self.cut_after = max(0, left)
                    target.sendall(data)
                    if left <= 0:
                        self.cut_after = None
                        break
                    continue
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self.passes.set()
        self._listening.close()
        for end in self._pairs:
            end.close()


@pytest.fixture
def cable(world, networks) -> Iterator[tuple]:
    store = world.store(network=networks.one())
    cable = Cable(store.endpoint)
    source = world.source(network=networks.one())
    source.to(store, endpoint=cable.endpoint).linked()
    yield store, cable, source
    cable.close()


@only_tcp
@pytest.mark.parametrize("after", [1, 200, 777, 1500])
def test_a_connection_that_breaks_in_the_middle_of_a_parcel(cable, after):
    store, cable, source = cable
    source.send(sequence(1, 5))
    cable.cut_after = after
    keys = sequence(2, 30)
    eventually(lambda: source.offer(keys, b"request") and source.counters.resyncs >= 1, 10)
    source.send(keys, b"request", 10)
    assert store.has(keys) == 30 and store.has(sequence(1, 5)) == 5
    assert cable.connections >= 2


@only_tcp
def test_a_connection_that_breaks_while_there_is_nothing_to_send(cable):
    """What the store says meanwhile is lost."""
    store, cable, source = cable
    keys = sequence(1, 6)
    source.send(keys)
    link = source.sender.link
    cable.cut_after = 0
    eventually(lambda: source.sender.link not in (None, link), 10)
    assert source.counters.resyncs >= 1
    source.send(keys)
    assert store.has(keys) == 6


@only_tcp
@pytest.mark.parametrize("busy", [True, False])
def test_a_line_that_is_dead_and_not_closed(cable, busy, monkeypatch):
    monkeypatch.setattr(sender_module, "SILENCE", 0.5)
    store, cable, source = cable
    keys = sequence(1, 60)
    cable.passes.clear()
    for _ in range(400):
        if busy:
            source.offer(keys, b"request")
        time.sleep(0.005)
    assert source.counters.resyncs >= 1 and not source.counters.linked
    assert source.slowest < 0.1 and source.most_staged <= source.sender.window_bytes
    assert source.sender.room() == 0, "nothing is copied for nobody"
    cable.passes.set()
    eventually(lambda: source.sender.link is not None, 20)
    source.send(keys, b"request", 10)
    assert store.has(keys) == 60


# -- bytes that somebody else wrote


class Anybodys(SharedMemory):
    """Shared memory that others may write to, as Mooncake's windows."""

    authentic = False


@pytest.mark.parametrize("transport", [Anybodys, SharedMemory])
@pytest.mark.parametrize("world", ["tcp"], indirect=True)
def test_other_bytes_with_the_same_crc_are_found_out_where_they_can_be_written(world, transport, monkeypatch):
    monkeypatch.setattr(World, "transport", lambda self: transport())
    store = world.store()
    peer = world.peer(store)
    assert isinstance(peer.ask(peer.hello), Accept)
    keys = sequence(1, 2)
    parcel = peer.parcel(keys, 0)
    true = content(keys[1]).tobytes()
    forged = with_the_same_crc(true, 7)
    assert zlib.crc32(forged) == zlib.crc32(true) == parcel.crcs[1] and forged != true
    peer.window.bytes[LAYOUT.block_bytes : 2 * LAYOUT.block_bytes] = list(forged)
    answer = peer.ask(parcel)
    if transport is Anybodys:
        assert isinstance(answer, Resync) and "digest" in answer.reason
        assert store.has(keys) == 1
    else:
        assert isinstance(answer, Ack), "a checksum is against accident"


@pytest.mark.parametrize("transport", [Anybodys, SharedMemory])
@pytest.mark.parametrize("world", ["tcp"], indirect=True)
def test_digests_are_there_where_they_have_to_be(world, transport, monkeypatch):
    monkeypatch.setattr(World, "transport", lambda self: transport())
    store = world.store()
    wrong = [[], [b"x" * 16]] if transport is Anybodys else [[b"x" * 16] * 2]
    for digests in [*wrong, [b""] * 2, [b"x" * 15] * 2]:
        peer = world.peer(store)
        assert isinstance(peer.ask(peer.hello), Accept)
        assert isinstance(peer.ask(peer.parcel(sequence(1, 2), 0, digests=digests)), Resync)
    assert len(store.store) == 0
