"""The store: bytes that come out are those that went in, or nothing comes out."""

from __future__ import annotations

import sys
import threading
import time
import zlib
from array import array

import numpy as np
import pytest

from sglang_kevlar.shadow import store as store_module
from sglang_kevlar.shadow.store import DamagedBlock, ShadowStore

BLOCK = 64
ORIGIN = ("adapter", "salt")


def content(key: bytes) -> np.ndarray:
    """The bytes that belong to a key."""
    return np.random.default_rng(zlib.crc32(key)).integers(0, 256, BLOCK, dtype=np.uint8)


def tokens(keys: list[bytes]) -> bytes:
    """Two of them for each block."""
    return array("q", [number for key in keys for number in (len(key), zlib.crc32(key))]).tobytes()


def names(prefix: str, count: int) -> list[bytes]:
    return [f"{prefix}{number}".encode() for number in range(count)]


def put(
    store: ShadowStore, keys: list[bytes], parent: bytes | None = None, request: bytes | None = None
) -> list[bytes]:
    data = np.stack([content(key) for key in keys])
    return store.put(keys, parent, [zlib.crc32(row.data) for row in data], tokens(keys), ORIGIN, data, request)


def holds(store: ShadowStore, keys: list[bytes], ticket: str = "check") -> int:
    """How many blocks a pin finds, all of which have the right bytes."""
    count = store.pin(keys, ticket)
    if count:
        assert np.array_equal(store.read(ticket, 0, count), [content(key) for key in keys[:count]])
        store.release(ticket)
    store.check()
    return count


def flip(store: ShadowStore, key: bytes) -> None:
    """A bit of a held block changes in memory."""
    store._memory[store._index.get(key).slot, BLOCK // 2] ^= 1


def test_what_is_put_is_read_also_when_the_source_overwrites_its_copy():
    store = ShadowStore(8, BLOCK)
    keys = names("a", 3)
    data = np.stack([content(key) for key in keys])
    assert store.put(keys, None, [zlib.crc32(row.data) for row in data], tokens(keys), ORIGIN, data, None) == []
    data[:] = 0
    assert put(store, names("a", 5)[2:], parent=keys[1]) == []
    assert put(store, [b"b"], parent=b"a1") == []
    assert holds(store, names("a", 6)) == 5
    assert holds(store, [b"a0", b"a1", b"b"]) == 3
    assert holds(store, [b"a2", b"a3"]) == 2
    assert holds(store, [b"never", b"a0"]) == 0
    assert store.pin(keys, "t") == 3
    assert np.array_equal(store.read("t", 1, 2), [content(b"a1"), content(b"a2")])
    for first, blocks in ((0, 4), (2, 2), (3, 1)):
        with pytest.raises(KeyError):
            store.read("t", first, blocks)
    store.release("t")
    with pytest.raises(KeyError):
        store.read("t", 0, 1)
    assert store.take_dropped() == []


def test_what_has_no_room_or_no_parent_is_said_to_be_missing():
    store = ShadowStore(4, BLOCK)
    # Its source believes that the parent is held.
    assert put(store, names("a", 3), parent=b"unknown") == [b"unknown", *names("a", 3)]
    assert put(store, names("a", 3)) == [] and store.pin(names("a", 3), "t") == 3
    assert put(store, names("b", 3)) == [b"b1", b"b2"]
    assert store.take_dropped() == [], "what is pinned cannot be evicted, nor an own ancestor"
    store.release("t")
    assert put(store, names("c", 2)) == []
    assert store.take_dropped() == [b"b0", b"a2"], "least recently used first"
    assert store.take_dropped() == []
    assert store.evicted == 2
    assert holds(store, names("a", 3)) == 2 and holds(store, names("c", 2)) == 2


def test_a_running_request_keeps_its_blocks_until_it_ends():
    store = ShadowStore(4, BLOCK)
    put(store, names("run", 3), request=b"r")
    for number in range(3):
        put(store, [b"idle%d" % number])
    assert holds(store, names("run", 3)) == 3
    assert put(store, names("x", 3)) == [b"x1", b"x2"]
    store.end(b"r")
    store.end(b"r")
    put(store, names("y", 3))
    assert holds(store, names("run", 3)) < 3


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_block_damaged_on_the_way_is_not_kept_nor_what_follows(damaged):
    store = ShadowStore(8, BLOCK)
    keys = names("a", 3)
    data = np.stack([content(key) for key in keys])
    crcs = [zlib.crc32(row.data) for row in data]
    data[damaged, 7] ^= 128
    with pytest.raises(DamagedBlock):
        store.put(keys, None, crcs, tokens(keys), ORIGIN, data, b"r")
    assert len(store) == damaged == holds(store, keys)
    assert put(store, keys) == [] and holds(store, keys) == 3


def test_it_knows_the_tokens_of_what_runs_longest_first():
    store = ShadowStore(16, BLOCK)
    put(store, names("long", 4)[:2], request=b"a")
    put(store, names("long", 4)[2:], parent=b"long1", request=b"a")
    put(store, names("short", 2), request=b"b")
    put(store, names("idle", 6))
    assert store.running() == [(b"a", b"long3", 4), (b"b", b"short1", 2)]
    assert store.sequence(b"long3") == (names("long", 4), array("q", tokens(names("long", 4))), ORIGIN)
    assert store.sequence(b"gone") is None
    store.end(b"a")
    assert store.running() == [(b"b", b"short1", 2)]
    assert store.newest(3) == [b"idle5", b"idle4", b"idle3"] and len(store.newest(100)) == 12


@pytest.mark.parametrize("damaged", [0, 1, 2])
def test_a_block_damaged_in_memory_is_never_found_and_can_be_sent_again(damaged):
    store = ShadowStore(8, BLOCK)
    keys = names("a", 3)
    put(store, keys, request=b"r")
    flip(store, keys[damaged])
    assert holds(store, keys) == damaged == len(store)
    assert sorted(store.take_dropped()) == keys[damaged:]
    assert put(store, keys[damaged:], parent=keys[damaged - 1] if damaged else None, request=b"r") == []
    assert holds(store, keys) == 3


def test_a_damaged_block_that_somebody_has_pinned_stays_and_is_not_found_by_others():
    store = ShadowStore(8, BLOCK)
    keys = names("a", 3)
    put(store, keys)
    assert store.pin(keys, "first") == 3
    flip(store, keys[1])
    assert store.pin(keys, "second") == 1
    store.check()
    store.release("second")
    store.release("first")
    assert holds(store, keys) == 1
    assert len(store) == 1 and store.take_dropped() == [b"a2", b"a1"]


def test_tickets_end_when_returned_or_forgotten_and_are_good_for_one_pin(monkeypatch):
    store = ShadowStore(2, BLOCK)
    keys = names("a", 2)
    put(store, keys)
    assert store.pin(keys, "t") == 2
    with pytest.raises(ValueError, match="already"):
        store.pin(keys, "t")
    store.expire()
    store.clear()
    assert put(store, [b"x"]) == [b"x"]
    store.release("t")
    store.release("t")
    store.release("none such")
    assert put(store, [b"x"]) == [], "the second pin held nothing"
    assert store.pin([b"x"], "next") == 1
    monkeypatch.setattr(store_module, "TICKET_LIFE", -1.0)
    assert store.pin([b"a0"], "lost") == 1
    store.expire()
    with pytest.raises(KeyError):
        store.read("lost", 0, 1)
    assert len(store.read("next", 0, 1)) == 1
    store.release("next")
    store.clear()
    assert len(store) == 0 and store.clears == 2
    store.check()


def test_a_ticket_that_is_returned_before_or_while_its_blocks_are_looked_at_pins_nothing(monkeypatch):
    """Whoever asked did not wait for the answer."""
    store = ShadowStore(4, BLOCK)
    keys = names("a", 4)
    put(store, keys)
    store.release("early")
    assert store.pin(keys, "early") == 0
    check = store._intact

    def returned_meanwhile(blocks):
        store.release("late")
        store.expire()
        assert put(store, [b"x"]) == [b"x"], "they are being read"
        return check(blocks)

    monkeypatch.setattr(store, "_intact", returned_meanwhile)
    assert store.pin(keys, "late") == 4
    monkeypatch.undo()
    assert put(store, [b"x"]) == []
    assert store.pin(keys[:3], "early") == 3, "it is good again"
    for number in range(5000):
        store.release(f"never {number}")
    assert len(store._returned) <= store_module.RETURNED_KEPT


@pytest.mark.parametrize("damaged", [0, 1, 6, 7, None])
def test_many_blocks_are_checked_by_several_threads(monkeypatch, damaged):
    monkeypatch.setattr(store_module, "CHECKERS", 4)
    monkeypatch.setattr(store_module, "CHECK_BYTES", BLOCK)
    store = ShadowStore(8, BLOCK)
    keys = names("a", 8)
    put(store, keys)
    if damaged is not None:
        flip(store, keys[damaged])
    assert holds(store, keys) == (8 if damaged is None else damaged)


def test_two_threads_put_and_pin_and_every_byte_read_is_right():
    """With little room, so that slots change hands all the time; some of the bytes go bad."""
    store = ShadowStore(24, BLOCK)
    chains = [names(f"c{number}-", 6) for number in range(8)]
    errors: list[BaseException] = []
    stop = threading.Event()

    def putting() -> None:
        rng = np.random.default_rng(1)
        try:
            while not stop.is_set():
                keys = chains[rng.integers(len(chains))]
                request = b"r%d" % rng.integers(3) if rng.integers(2) else None
                put(store, keys[: rng.integers(1, 7)], request=request)
                if rng.integers(4) == 0:
                    store.end(b"r%d" % rng.integers(3))
                if rng.integers(50) == 0:
                    store.expire()
                store.take_dropped()
        except BaseException as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    thread = threading.Thread(target=putting)
    thread.start()
    rng = np.random.default_rng(2)
    found = turn = 0
    end = time.monotonic() + 120
    try:
        # Until enough was found, however little the other thread gets to run.
        while found < 300 and time.monotonic() < end:
            turn += 1
            keys = chains[rng.integers(len(chains))]
            count = store.pin(keys, str(turn))
            if count:
                found += 1
                assert np.array_equal(store.read(str(turn), 0, count), [content(key) for key in keys[:count]])
                if turn % 7 == 0:
                    # Pinned, so it is this block for sure; what it held is never found again.
                    flip(store, keys[count - 1])
            store.release(str(turn))
            if turn % 500 == 0:
                store.clear()
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(before)
    assert not errors and found == 300
    store.check()
    store.clear()
    assert len(store) == 0
