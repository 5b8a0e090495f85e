"""A stream from rank to rank, over its real sockets and window: what arrives, and who may send."""

from __future__ import annotations

import os
import random
import threading
import time

import msgspec
import numpy as np
import pytest
from shadow_line import TRANSPORTS, WINDOW, make_world
from shadow_world import LAYOUT, TOKENS, content, eventually, sequence

from sglang_kevlar.protocol.shadow import (
    Accept,
    Ack,
    Ended,
    Forget,
    Held,
    Lookup,
    Refuse,
    Resync,
    ShadowCounters,
)
from sglang_kevlar.shadow import sender as sender_module
from sglang_kevlar.shadow import server as server_module
from sglang_kevlar.shadow.shelf import SharedStore
from sglang_kevlar.shadow.sockets import frame
from sglang_kevlar.transport import TransportError
from sglang_kevlar.transport import shared_memory as shm_module


@pytest.fixture(params=TRANSPORTS)
def world(request, tmp_path, monkeypatch):
    yield from make_world(request.param, tmp_path, monkeypatch)


# -- what arrives


def test_blocks_arrive_with_their_bytes_and_shared_ones_travel_once(world):
    store, source = world.store(), world.source()
    source.to(store).linked()
    assert world.windows() == [], "both have it mapped: its name is gone"
    one, other = sequence(1, 20, shared=6), sequence(2, 12, shared=6)
    source.send(one).send(other, b"request")
    assert store.has(one) == 20 and store.has(other) == 12
    assert source.counters.sent_bytes == (20 + 6) * LAYOUT.block_bytes
    assert source.counters.shadowed_tokens == source.counters.sent_tokens == 26 * LAYOUT.block_tokens
    assert (source.counters.to, source.counters.linked, source.counters.resyncs) == (("9", 1), True, 0)
    assert store.counters.rejected_frames == 0
    eventually(lambda: store.counters.store_tokens == 26 * LAYOUT.block_tokens)

    assert [store.live(other[block]) for block in (0, 5, 11)] == [1, 1, 1] and store.live(one[19]) == 0
    source.sender.ended(b"request", source.sender.link)
    source.sender.wake()
    eventually(lambda: store.live(other[0]) == 0)

    def written() -> ShadowCounters:
        with open(source.counters_file, "rb") as file:
            return msgspec.json.decode(file.read(), type=ShadowCounters)

    eventually(lambda: os.path.exists(source.counters_file) and written().shadowed_tokens == 26 * LAYOUT.block_tokens)


def test_a_flush_empties_the_store_and_what_comes_after_it_is_kept(world):
    store, source = world.store(), world.source()
    old, new = sequence(1, 6), sequence(2, 6)
    source.to(store).linked().send(old, b"request")
    source.sender.flushed()
    source.send(new)
    assert store.has(old) == 0 and store.has(new) == 6
    source.send(old)
    assert store.has(old) == 6
    assert source.counters.resyncs == store.counters.rejected_frames == 0


def test_bandwidth_is_a_limit(world):
    store, source = world.store(), world.source(bandwidth=40 * LAYOUT.block_bytes)
    source.to(store).linked()
    started = time.monotonic()
    source.send(sequence(1, 20))
    # All but the last parcel, of two blocks, is waited for.
    assert time.monotonic() - started >= 18 / 40
    assert store.has(sequence(1, 20)) == 20


def test_a_source_pauses_for_longer_than_a_store_may_be_silent(world, monkeypatch):
    monkeypatch.setattr(sender_module, "SILENCE", 0.3)
    store, source = world.store(), world.source()
    source.to(store).linked().send(sequence(1, 2))
    time.sleep(0.5)
    source.send(sequence(2, 2))
    assert source.counters.resyncs == 0 and source.windows == 1
    assert store.has(sequence(1, 2)) == 2


def test_what_the_target_holds_from_before_is_not_sent_again(world):
    store, first = world.store(), world.source(group=0)
    keys = sequence(1, 10)
    first.to(store).linked().send(keys[:6])
    first.to(None)
    eventually(lambda: first.sender.link is None)
    first.to(store).linked().send(keys)
    assert first.counters.sent_tokens == 10 * TOKENS and store.has(keys) == 10
    other = world.source(group=1).to(store).linked()
    other.send(keys, b"request")
    assert other.counters.sent_tokens == 0
    # What it was told of and is there no longer, it hears of.
    store.store._memory[store.store._index.get(keys[3]).slot, 0] ^= 1
    assert store.has(keys) == 3
    eventually(lambda: other.sender.link.missing(keys, 0) == 3)
    other.send(keys, b"request")
    assert other.counters.sent_tokens == 7 * TOKENS and store.has(keys) == 10


def test_a_source_that_is_not_told_of_everything_sends_the_rest(world, monkeypatch):
    monkeypatch.setattr(server_module, "HELD_KEYS", 4)
    store, first, other = world.store(), world.source(group=0), world.source(group=1)
    keys = sequence(1, 10)
    first.to(store).linked().send(keys)
    other.to(store).linked().send(keys)
    assert store.has(keys) == 10 and other.counters.linked and other.counters.resyncs == 0


# -- a store that is slow, stopped, or somewhere else


def test_a_stopped_store_never_holds_up_the_scheduler_and_costs_bounded_memory(world, monkeypatch):
    monkeypatch.setattr(sender_module, "SILENCE", 0.4)
    store, source = world.store(start=False), world.source()
    source.to(store)
    keys = sequence(1, 60)
    for _ in range(20):
        assert not source.offer(keys), "it has not even accepted"
    assert source.sender.room() == 0 and source.sender.waiting_tokens == 0
    store.start()
    source.linked()
    with store.store._lock:  # it stops in the middle of everything
        for turn in range(600):
            source.offer(keys)
            source.sender.ended(b"%d" % turn, source.sender.link or object())
            time.sleep(0.001)
        assert source.counters.resyncs >= 1
        assert len(world.windows()) <= 1
        assert source.sender._staged <= WINDOW
        assert len(source.sender._queue) < 1000
    assert source.most_staged <= WINDOW
    assert source.slowest < 0.1
    source.send(keys)
    assert store.has(keys) == 60
    assert source.counters.linked


def test_a_sender_ends_and_begins_anew_when_nobody_reads_what_it_says(world):
    store, source = world.store(), world.source()
    keys = sequence(1, 2)
    source.to(store).linked().send(keys, b"request")
    with store.store._lock:
        link = source.sender.link
        for turn in range(60_000):
            source.sender.ended(b"%d" % turn, link)
        source.sender.wake()
        eventually(lambda: source.counters.resyncs >= 1 and not source.sender._queue)
        started = time.monotonic()
        source.sender.stop()
        assert time.monotonic() - started < 2


def test_another_target_in_the_middle_of_everything(world):
    first, second = world.store("first"), world.store("second")
    source = world.source().to(first).linked()
    keys = sequence(1, 40)
    with first.store._lock:
        eventually(lambda: source.offer(keys) or source.sender.waiting_tokens >= 8 * LAYOUT.block_tokens)
        link = source.sender.link
        source.to(second, epoch=2)
        eventually(lambda: source.sender.link not in (None, link))
        source.send(keys)
    assert second.has(keys) == 40
    assert source.counters.to == ("9", 2)
    assert source.counters.resyncs == 0
    # Only what was wholly sent is there, and it is right.
    assert first.has(keys) < 40
    source.to(None)
    eventually(lambda: source.counters.to is None and not source.counters.linked)
    assert source.sender.link is None and source.sender.room() == 0
    assert not source.offer(keys)


def test_a_store_dies_and_another_comes_back_elsewhere(world, monkeypatch):
    monkeypatch.setattr(sender_module, "SILENCE", 0.2)
    first, source = world.store("first"), world.source()
    keys = sequence(1, 30)
    source.to(first).linked().send(keys[:10])
    first.stop()
    eventually(lambda: source.offer(keys) or source.counters.resyncs >= 2)
    assert not source.counters.linked and source.counters.to is None
    second = world.store("second")
    source.to(second, epoch=2).linked().send(keys)
    assert second.has(keys) == 30
    assert source.sender._staged == 0


def test_what_a_target_refuses_is_asked_again_later(world, monkeypatch):
    monkeypatch.setattr(sender_module, "RETRY", 0.2)
    store, source = world.store(), world.source(epoch=1)
    newer = world.peer(store, epoch=2)
    assert isinstance(newer.ask(newer.hello), Accept)
    source.to(store)
    eventually(lambda: source.windows >= 3)
    assert not source.counters.linked and source.sender.link is None
    assert store.counters.rejected_frames >= 2


@pytest.mark.parametrize("world", ["shm"], indirect=True)
def test_without_shared_memory_there_is_no_shadow_until_there_is(world, monkeypatch):
    """A container has 64 MiB of it by default, and writing to more would end the process."""
    monkeypatch.setattr(sender_module, "RETRY", 0.2)
    free = os.statvfs(shm_module.DIRECTORY)
    with pytest.raises(TransportError, match="No space"):
        world.transport().offer(f"kevlar-{world.launch}-g0e0.window0.0", free.f_blocks * free.f_frsize + (1 << 20))
    assert world.windows() == []

    def full(*_):
        raise OSError(28, "No space left on device")

    store, source = world.store(), world.source()
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        source.to(store)
        eventually(lambda: source.windows >= 2)
        assert source.sender.link is None and world.windows() == []
    source.linked().send(sequence(1, 3))
    assert store.has(sequence(1, 3)) == 3


def test_counters_that_cannot_be_written_cost_nothing_else(world):
    source = world.source()
    source.sender._counters_file = str(world.directory / "gone" / "file")
    store = world.store()
    source.to(store).linked().send(sequence(1, 3))
    time.sleep(0.1)
    source.send(sequence(2, 3))
    assert store.has(sequence(2, 3)) == 3


# -- several sources


def test_sources_learn_what_others_blocks_evicted(world):
    store = world.store(capacity=12)
    one, other = world.source(group=0), world.source(group=1)
    one.to(store).linked()
    other.to(store).linked()
    mine, theirs = sequence(1, 10), sequence(2, 8)
    one.send(mine)
    other.send(theirs)
    eventually(lambda: one.sender.link.missing(mine, 0) == 4)
    assert store.has(mine) == 4 and store.has(theirs) == 8
    other.sender.flushed()  # which empties the store of both: so the first begins again
    one.send(mine)
    eventually(lambda: one.offer(mine) and store.has(mine) == 10)
    assert one.counters.resyncs == 1 and other.counters.resyncs == 0


def test_sources_learn_that_the_store_was_emptied_or_a_block_of_it_damaged(world):
    store = world.store()
    source = world.source().to(store).linked()
    keys = sequence(1, 6)
    source.send(keys, b"request")
    store.store._memory[store.store._index.get(keys[3]).slot, 0] ^= 1
    assert store.has(keys) == 3
    eventually(lambda: source.sender.link.missing(keys, 0) == 3)
    source.send(keys, b"request")
    assert store.has(keys) == 6 and source.counters.resyncs == 0
    store.store.clear()  # its group's cache was flushed
    eventually(lambda: source.counters.resyncs == 1)
    source.send(keys, b"request")
    assert store.has(keys) == 6 and store.live(keys[0]) == 1


def test_requests_of_a_source_that_says_nothing_any_more_make_room(world, monkeypatch):
    monkeypatch.setattr(server_module, "SILENCE", 0.3)
    store = world.store(capacity=8)
    dead, other = world.source(group=0).to(store).linked(), world.source(group=1).to(store).linked()
    run = sequence(1, 8)
    dead.send(run, b"request")
    assert store.live(run[7]) == 1
    other.send(sequence(2, 1), seconds=5)
    eventually(lambda: store.live(run[0]) == 0)
    other.send(sequence(3, 1))
    assert store.has(sequence(3, 1)) == 1
    dead.send(run, b"request")  # it was only slow
    eventually(lambda: store.live(run[0]) == 1)


def test_lost_tickets_end_however_much_traffic_there_is(world, monkeypatch):
    monkeypatch.setattr("sglang_kevlar.shadow.store.TICKET_LIFE", 0.1)
    store = world.store(capacity=40)
    source = world.source().to(store).linked()
    source.send(sequence(1, 4))
    asking = world.peer(store)
    assert asking.ask(Lookup(ticket="t", keys=sequence(1, 6))) == Held(ticket="t", blocks=4)
    end = time.monotonic() + 5
    number = 10
    while store.store._tickets:
        assert time.monotonic() < end
        asking.ask(Lookup(ticket=str(number), keys=[b"unknown"]))
        number += 1


def test_ranks_with_the_same_kv_read_it_in_one_store(world):
    store = world.store(capacity=4, readers=3)
    keys, others = sequence(1, 4), sequence(2, 4)
    source = world.source().to(store).linked().send(keys)
    asking = world.peer(store)
    held = asking.ask(Lookup(ticket="t", keys=keys))
    assert isinstance(held, Held) and held.blocks == 4 and held.shelf is not None
    readers = [SharedStore(store.endpoint, LAYOUT.block_bytes) for _ in range(2)]
    for reader in readers:
        reader.expect("t", held.shelf)
    assert not source.offer(others)
    eventually(lambda: source.sender.waiting_tokens == 0)  # there was no room for them
    store.store.release("t")
    readers[0].release("t")
    for reader in readers[1:]:
        assert np.array_equal(reader.read("t", 1, 3), [content(key) for key in keys[1:]])
        reader.release("t")
    eventually(lambda: not store.store._tickets)
    source.send(others)
    assert all(key in store.store for key in others)


# -- who may open a session


def test_an_older_epoch_is_refused_while_the_newer_is_there_and_after(world):
    store = world.store()
    newer, older = world.peer(store, epoch=5), world.peer(store, epoch=4)
    assert isinstance(newer.ask(newer.hello), Accept)
    keys = sequence(1, 2)
    assert newer.ask(newer.parcel(keys, 0)) == Ack(session=newer.session, number=0, sequence=0, gone=[])
    refused = older.ask(older.hello)
    assert isinstance(refused, Refuse) and "epoch 5" in refused.reason
    assert isinstance(older.ask(older.parcel(sequence(2, 2), 0)), Resync)
    assert newer.ask(newer.parcel(keys[:1], 1)) == Ack(session=newer.session, number=1, sequence=1, gone=[])
    assert store.has(sequence(2, 2)) == 0 and store.counters.rejected_frames == 2
    # The newer one's session ends, and until it is back, the older has no business here either.
    assert isinstance(newer.ask(newer.parcel(keys, 7)), Resync)
    assert isinstance(older.ask(older.hello), Refuse)
    # The same epoch, and one that is newer, replace what is there; another group has nothing to do with it.
    other = world.peer(store, group=1, epoch=1)
    again, newest = world.peer(store, epoch=5), world.peer(store, epoch=6)
    for peer in (other, again, newest):
        assert isinstance(peer.ask(peer.hello), Accept)
    again.say(again.parcel(keys, 0))
    assert isinstance(other.ask(other.parcel(keys, 0)), Ack)
    assert isinstance(newest.ask(newest.parcel(keys, 0)), Ack)
    assert isinstance(again.hears(), Resync), "its session is over"


@pytest.mark.parametrize("field", [field.name for field in msgspec.structs.fields(LAYOUT)])
def test_a_source_with_another_layout_is_refused(world, field):
    store = world.store()
    value = getattr(LAYOUT, field)
    wrong = value + 1 if isinstance(value, int) else [*reversed(value)] if isinstance(value, list) else value + "x"
    peer = world.peer(store)
    layout = msgspec.structs.replace(LAYOUT, **{field: wrong})
    answer = peer.ask(msgspec.structs.replace(peer.hello, layout=layout))
    assert isinstance(answer, Refuse) and answer.session == peer.session
    assert field in answer.reason
    peer.say(peer.parcel(sequence(1, 1), 0))
    eventually(lambda: store.counters.rejected_frames == 2)
    assert len(store.store) == 0


@pytest.mark.parametrize("world", ["shm"], indirect=True)
@pytest.mark.parametrize(
    ("name", "size", "why"),
    [
        ("../../etc/passwd", 100, "no name of a window"),
        ("/etc/passwd", 100, "no name of a window"),
        ("kevlar-00000000-g0e1.window0.0/../x", 100, "no name of a window"),
        ("kevlar-00000000-g0e1.window0.0\n", 100, "no name of a window"),
        ("", 100, "no name of a window"),
        ("kevlar-00000000-g0e1.window0.0", 100, "cannot be opened"),
        (None, 4097, "smaller"),
        (None, 0, "smaller"),
        (None, -1, "smaller"),
        (None, 2**62, "smaller"),
    ],
)
def test_a_window_that_is_not_ours_or_too_short_is_refused(world, name, size, why):
    store = world.store()
    peer = world.peer(store, size=4096)
    answer = peer.ask(
        msgspec.structs.replace(peer.hello, window=peer.session if name is None else name, window_bytes=size)
    )
    assert isinstance(answer, Refuse) and why in answer.reason
    assert store.counters.rejected_frames == 1
    assert isinstance(peer.ask(peer.hello), Accept), "and it may try again"


@pytest.mark.parametrize("world", ["shm"], indirect=True)
def test_a_window_is_not_reached_through_a_link(world):
    store = world.store()
    peer = world.peer(store)
    (world.directory / "secret").write_bytes(b"x" * 4096)
    link = f"kevlar-{world.launch}-g0e1.window0.1"
    os.symlink(world.directory / "secret", f"{shm_module.DIRECTORY}/{link}")
    try:
        answer = peer.ask(msgspec.structs.replace(peer.hello, window=link))
    finally:
        os.unlink(f"{shm_module.DIRECTORY}/{link}")
    assert isinstance(answer, Refuse) and "cannot be opened" in answer.reason


def test_nonsense_from_strangers_costs_nobody_anything(world):
    store = world.store()
    good, stranger = world.peer(store, group=0), world.peer(store, group=1)
    assert isinstance(good.ask(good.hello), Accept)
    dice = random.Random(1)
    valid = frame(stranger.parcel(sequence(2, 2), 0))
    for _ in range(200):
        data = bytearray(valid)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        stranger.raw(bytes(data))
        stranger.raw(*[dice.randbytes(dice.randrange(5)) for _ in range(dice.randrange(1, 4))])
    stranger.say(Ended(session=stranger.session, sequence=0, request=b"r"))
    stranger.say(Forget(session=stranger.session, sequence=0))
    stranger.raw(frame(stranger.hello), b"")
    eventually(lambda: store.counters.rejected_frames == 403)
    for _ in range(2):
        assert stranger.hears() == Resync(session=stranger.session, reason="there is no such session")
    stolen = good.parcel(sequence(3, 1), 0)
    assert stranger.ask(stolen) == Resync(session=good.session, reason="there is no such session")
    assert store.counters.rejected_frames == 404
    assert isinstance(good.ask(stolen), Ack)
    assert store.has(sequence(3, 1)) == 1 and len(store.store) == 1
    assert isinstance(stranger.ask(stranger.hello), Accept)


def test_a_ticket_that_comes_twice_pins_nothing_for_ever(world):
    store = world.store(capacity=4)
    peer = world.peer(store)
    assert isinstance(peer.ask(peer.hello), Accept)
    keys = sequence(1, 4)
    assert isinstance(peer.ask(peer.parcel(keys, 0)), Ack)
    assert peer.ask(Lookup(ticket="t", keys=keys)) == Held(ticket="t", blocks=4)
    peer.say(Lookup(ticket="t", keys=keys))
    eventually(lambda: store.counters.rejected_frames == 1)
    full = peer.ask(peer.parcel(sequence(2, 2), 1))
    assert isinstance(full, Ack) and full.gone == sequence(2, 2)
    store.store.release("t")
    assert peer.ask(peer.parcel(sequence(2, 2), 2)).gone == [keys[3], keys[2]]
    assert store.has(sequence(2, 2)) == 2 and store.has(keys) == 2


def test_no_more_sessions_than_there_is_room_for(world, monkeypatch):
    monkeypatch.setattr(server_module, "MAX_SESSIONS", 3)
    store = world.store()
    peers = [world.peer(store, group=group) for group in range(5)]
    for peer in peers:
        assert isinstance(peer.ask(peer.hello), Accept)
    assert len(store.server._sessions) == 3
    for peer in peers:
        peer.say(peer.parcel(sequence(1, 1), 0))
    assert [isinstance(peer.hears(0.2), Ack) for peer in peers] == [False, False, True, True, True]


def test_a_lookup_of_many_blocks_races_with_what_replaces_them(world):
    """Two sources fill a small store while a third thread looks up: what it finds is right."""
    store = world.store(capacity=20)
    one, other = world.source(group=0).to(store).linked(), world.source(group=1).to(store).linked()
    stop = threading.Event()
    found = []
    errors = []

    def look() -> None:
        try:
            while not stop.is_set():
                found.append(store.has(sequence(random.randrange(6), 10, shared=3)))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for turn in range(150):
            one.offer(sequence(turn % 6, 10, shared=3), b"%d" % (turn % 2) if turn % 3 else None)
            other.offer(sequence((turn + 1) % 6, 10, shared=3))
            if one.sender.link is not None and turn % 10 == 0:
                one.sender.ended(b"0", one.sender.link)
            time.sleep(0.002)
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert max(found) == 10
    assert one.counters.resyncs == other.counters.resyncs == store.counters.rejected_frames == 0
