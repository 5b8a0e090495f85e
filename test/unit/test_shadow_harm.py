"""Harm on the line from a source to a store: it recovers, and nothing wrong is ever found."""

from __future__ import annotations

import os
import random
import time

import msgspec
import pytest
from shadow_line import TRANSPORTS, WINDOW, make_world
from shadow_world import LAYOUT, Proxy, Source, Store, eventually, sequence

from sglang_kevlar.protocol.shadow import (
    Accept,
    Ack,
    Parcel,
    Refuse,
    Resync,
)
from sglang_kevlar.shadow import sender as sender_module
from sglang_kevlar.shadow.sockets import frame
from sglang_kevlar.transport import TransportError
from sglang_kevlar.transport import mooncake as mooncake_module
from sglang_kevlar.transport import shared_memory as shm_module


@pytest.fixture(params=TRANSPORTS)
def world(request, tmp_path, monkeypatch):
    yield from make_world(request.param, tmp_path, monkeypatch)


def flip_window(source: Source, store: Store, proxy: Proxy):
    """Of the memory of both, or of the target, or what comes along with the message."""

    def flip(along: bytes) -> list[bytes]:
        proxy.harm_along = lambda along: [along]
        return [bytes([along[0] ^ 1]) + along[1:]]

    def harm(parcel: Parcel, data: bytes) -> list[bytes]:
        proxy.harm_along = flip
        windows = [session.window for session in list(store.server._sessions.values())]
        if isinstance(source.sender._window, shm_module.OutgoingWindow):
            windows = [source.sender._window]  # the same memory; there it may be written
        for window in windows:
            memory = getattr(window, "bytes", None)
            if memory is not None:  # it may just begin anew
                memory[parcel.offset + 5] ^= 1
        return [data]

    return harm


class Swap:
    """Passes a message on behind the next one."""

    def __init__(self) -> None:
        self.held: bytes | None = None

    def __call__(self, message, data: bytes) -> list[bytes]:
        if self.held is None:
            self.held = data
            return []
        held, self.held = self.held, None
        return [data, held]


def change(**changes):
    return lambda message, data: [frame(msgspec.structs.replace(message, **changes))]


HARMS = {
    "truncated": lambda message, data: [data[:-3]],
    "garbage": lambda message, data: [os.urandom(50)],
    "empty": lambda message, data: [b""],
    "not of the union": lambda message, data: [frame({"type": "parcels", "session": "x"})],
    "twice": lambda message, data: [data, data],
    "lost": lambda message, data: [],
    "of another session": change(session="another"),
    "a wrong checksum": lambda message, data: change(crcs=[crc ^ 1 for crc in message.crcs])(message, data),
    "fewer checksums": change(crcs=[]),
    "no blocks": change(keys=[], crcs=[], digests=[]),
    "fewer tokens": lambda message, data: change(tokens=message.tokens[8:])(message, data),
    "other tokens": lambda message, data: change(tokens=message.tokens[:-1] + b"\xff")(message, data),
    "behind the window": change(offset=WINDOW - 1),
    "before the window": change(offset=-1),
    "other bytes": lambda message, data: change(offset=(message.offset + 1) % LAYOUT.block_bytes)(message, data),
}


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("harm", HARMS)
def test_whatever_happens_to_a_parcel_the_link_recovers_and_no_wrong_byte_is_found(world, monkeypatch, harm, after):
    if harm == "other bytes" and world.transport_name == "tcp":
        pytest.skip("they come along with it: see below")
    monkeypatch.setattr(sender_module, "SILENCE", 1.0)
    store = world.store()
    proxy = world.proxy(store)
    source = world.source().to(proxy).linked()
    keys = sequence(1, 16)
    done = proxy.once(Parcel, HARMS[harm], after)
    eventually(lambda: source.offer(keys, b"request") and done.is_set())
    eventually(lambda: source.counters.resyncs == 1)
    assert store.has(keys) <= 16
    source.send(keys, b"request")
    assert store.has(keys) == 16 and store.live(keys[0]) == 1
    if harm != "lost" or after == 0:
        assert store.counters.rejected_frames >= 1
    assert source.counters.linked and source.counters.resyncs == 1


def test_bytes_that_change_in_the_window_are_noticed(world):
    store = world.store()
    proxy = world.proxy(store)
    source = world.source().to(proxy).linked()
    keys = sequence(1, 16)
    done = proxy.once(Parcel, flip_window(source, store, proxy), after=2)
    eventually(lambda: source.offer(keys) and done.is_set())
    eventually(lambda: source.counters.resyncs == 1)
    assert store.counters.rejected_frames >= 1
    source.send(keys)
    assert store.has(keys) == 16


ALONG = {
    "nothing": lambda along, before: [],
    "too little": lambda along, before: [along[:-1]],
    "too much": lambda along, before: [along + b"x"],
    "twice": lambda along, before: [along, along],
    "of the parcel before": lambda along, before: [before],
}


@pytest.mark.parametrize("world", ["tcp"], indirect=True)
@pytest.mark.parametrize("harm", ALONG)
def test_other_bytes_along_with_a_parcel(world, harm):
    store = world.store()
    proxy = world.proxy(store)
    source = world.source().to(proxy).linked()
    keys = sequence(1, 16)
    seen: list[bytes] = []

    def harmed(along: bytes) -> list[bytes]:
        seen.append(along)
        return ALONG[harm](along, seen[-2]) if len(seen) == 3 else [along]

    proxy.harm_along = harmed
    eventually(lambda: source.offer(keys, b"request") and source.counters.resyncs == 1)
    source.send(keys, b"request")
    assert store.has(keys) == 16 and store.counters.rejected_frames >= 1


@pytest.mark.parametrize("world", ["shm", "mooncake"], indirect=True)
def test_bytes_along_with_a_parcel_whose_own_are_elsewhere(world):
    store = world.store()
    peer = world.peer(store)
    assert isinstance(peer.ask(peer.hello), Accept)
    peer.raw(frame(peer.parcel(sequence(1, 1), 0)), b"x" * LAYOUT.block_bytes)
    assert isinstance(peer.hears(), Resync)
    assert len(store.store) == 0


def test_parcels_that_overtake_each_other(world):
    store = world.store()
    proxy = world.proxy(store)
    source = world.source().to(proxy).linked()
    swap = Swap()
    proxy.harm = lambda message, data: swap(message, data) if isinstance(message, Parcel) else [data]
    keys = sequence(1, 8)
    eventually(lambda: source.offer(keys) or source.counters.resyncs >= 1)
    eventually(lambda: source.counters.resyncs >= 1)
    assert store.counters.rejected_frames >= 1
    proxy.harm = lambda message, data: [data]
    source.send(keys)
    assert store.has(keys) == 8


def test_a_parcel_of_an_older_session_is_of_no_effect(world):
    store = world.store()
    proxy = world.proxy(store)
    source = world.source().to(proxy).linked()
    source.send(sequence(1, 2))
    old = next(message for message in proxy.seen if isinstance(message, Parcel))
    source.to(None)
    eventually(lambda: source.sender.link is None)
    source.to(proxy).linked()
    lies = msgspec.structs.replace(old, keys=[b"lie"] * len(old.keys))
    done = proxy.once(Parcel, lambda message, data: [frame(lies), data])
    source.send(sequence(2, 4))
    assert done.is_set()
    assert store.counters.rejected_frames == 1 and source.counters.resyncs == 0
    assert store.has(sequence(2, 4)) == 4 and store.has([b"lie"]) == 0


def test_what_goes_wrong_every_time_is_not_tried_all_the_time(world, monkeypatch):
    monkeypatch.setattr(sender_module, "PAUSE", 0.2)
    store = world.store()
    proxy = world.proxy(store)
    source = world.source()
    harm = flip_window(source, store, proxy)
    proxy.harm = lambda message, data: harm(message, data) if isinstance(message, Parcel) else [data]
    source.to(proxy)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        source.offer(sequence(1, 4))
        time.sleep(0.002)
    assert 2 <= source.counters.resyncs <= 6
    assert store.has(sequence(1, 4)) == 0
    proxy.harm = lambda message, data: [data]
    source.send(sequence(1, 4))
    assert store.has(sequence(1, 4)) == 4


@pytest.mark.parametrize("seed", range(3))
def test_a_line_that_harms_every_few_messages(world, monkeypatch, seed):
    monkeypatch.setattr(sender_module, "SILENCE", 0.15)
    dice = random.Random(seed)
    store = world.store(capacity=48)
    proxy = world.proxy(store)
    source = world.source()
    harms = list(HARMS.values())
    count = 0

    def harm(message, data: bytes) -> list[bytes]:
        nonlocal count
        if isinstance(message, Parcel) and dice.random() < 0.08:
            count += 1
            if dice.random() < 0.3:
                return flip_window(source, store, proxy)(message, data)
            return dice.choice(harms)(message, data)
        if not isinstance(message, Parcel) and dice.random() < 0.05:
            count += 1
            return dice.choice([[], [data, data], [data[:-1]]])
        return [data]

    proxy.harm = harm
    monkeypatch.setattr(sender_module, "RETRY", 0.1)
    source.to(proxy)
    running = [(sequence(name, dice.randint(1, 20), shared=1), b"%d" % name) for name in range(1, 9)]
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        keys, request = dice.choice(running)
        source.offer(keys, request)
        if dice.random() < 0.02 and source.sender.link is not None:
            source.sender.ended(request, source.sender.link)
        if dice.random() < 0.1:
            store.has(dice.choice(running)[0])
        time.sleep(0.0005)
    assert count > 3
    proxy.harm = lambda message, data: [data]
    keys, request = max(running, key=lambda item: len(item[0]))
    eventually(lambda: source.offer(keys, request) and store.has(keys) == len(keys))
    for keys, _ in running:
        store.has(keys)


@pytest.mark.parametrize("world", ["mooncake"], indirect=True)
def test_what_an_older_session_still_writes_is_noticed_by_the_one_that_has_its_window_now(world):
    """A one-sided write that has begun cannot be called back."""
    store = world.store()
    old, between, new = [world.peer(store) for _ in range(3)]
    for peer in (old, between, new):
        assert isinstance(peer.ask(peer.hello), Accept)
    parcel = new.parcel(sequence(1, 3), 0)
    assert old.window._address == new.window._address
    old.parcel(sequence(2, 3), 0)
    answer = new.ask(parcel)
    assert isinstance(answer, Resync) and "checksum" in answer.reason
    assert store.has(sequence(1, 3)) == store.has(sequence(2, 3)) == 0
    assert isinstance(new.ask(new.hello), Accept)
    assert isinstance(new.ask(new.parcel(sequence(1, 3), 0)), Ack)
    assert store.has(sequence(1, 3)) == 3


@pytest.mark.parametrize("world", ["mooncake"], indirect=True)
@pytest.mark.parametrize("harm", ["refused by the target", "of no such target"])
def test_a_write_that_fails_ends_the_session_and_the_next_is_whole(world, harm):
    store = world.store()
    source = world.source()
    source.to(store).linked()
    outgoing = source.sender._window
    if harm == "refused by the target":
        outgoing._address -= 1 << 40
    else:
        outgoing._target = "127.0.0.1:1"
    keys = sequence(1, 16)
    eventually(lambda: source.offer(keys, b"request") and source.counters.resyncs == 1)
    source.send(keys, b"request")
    assert store.has(keys) == 16 and store.counters.rejected_frames == 0
    assert source.counters.resyncs == 1 and source.sender._staged == 0


@pytest.mark.parametrize("world", ["mooncake"], indirect=True)
def test_writes_that_always_fail_are_not_tried_all_the_time(world, monkeypatch):
    monkeypatch.setattr(sender_module, "RETRY", 0.2)

    def fail(*_):
        raise TransportError("no route")

    store, source = world.store(), world.source()
    with monkeypatch.context() as patch:
        patch.setattr(mooncake_module.OutgoingWindow, "push", fail)
        source.to(store)
        end = time.monotonic() + 1
        while time.monotonic() < end:
            source.offer(sequence(1, 4))
            time.sleep(0.002)
    assert 2 <= source.counters.resyncs <= 6 and source.slowest < 0.1
    source.send(sequence(1, 4))
    assert store.has(sequence(1, 4)) == 4


def test_a_source_with_another_transport_is_refused(world):
    store = world.store()
    peer = world.peer(store)
    for name in {*TRANSPORTS, "", "x" * 1000} - {world.transport_name}:
        answer = peer.ask(msgspec.structs.replace(peer.hello, transport=name))
        assert isinstance(answer, Refuse) and "not taken here" in answer.reason
    assert isinstance(peer.ask(peer.hello), Accept)
