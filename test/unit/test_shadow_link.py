"""The source's books: pieces of the window that never overlap, and what the target is known to hold."""

from __future__ import annotations

import sys
import threading
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control.shadow_link import ShadowLink, WindowRing


@given(st.integers(1, 40), st.lists(st.integers(-3, 40), max_size=60))
@settings(max_examples=300, deadline=None)
def test_pieces_in_flight_never_overlap(size: int, steps: list[int]):
    """A positive step takes a piece of that size, another gives the oldest back."""
    ring = WindowRing(size)
    #: offset, size, end, and where its room begins: before a gap at the end of the window, if it has one
    flying: deque[tuple[int, int, int, int]] = deque()
    for step in steps:
        if step <= 0:
            if flying:
                ring.give_back(flying.popleft()[2])
            continue
        if step > size:
            with pytest.raises(AssertionError):
                ring.take(step)
            continue
        taken = ring.take(step)
        if taken is None:
            # Only for want of room: what is free is neither empty nor in one piece, or too short.
            begin, last = flying[0][3], flying[-1][0] + flying[-1][1]
            free = [(last, size), (0, begin)] if begin < last else [(last, begin)]
            assert all(end - start < step for start, end in free)
            continue
        offset, end = taken
        assert offset >= 0 and offset + step <= size
        assert all(offset + step <= other or other + length <= offset for other, length, *_ in flying)
        assert flying or offset == 0, "all of an empty window is one piece"
        before = flying[-1][0] + flying[-1][1] if flying else 0
        flying.append((offset, step, end, offset if offset else before % size))
    assert ring.used >= sum(length for _, length, *_ in flying)
    assert ring.used <= size
    while flying:
        ring.give_back(flying.popleft()[2])
    assert ring.used == 0
    assert ring.take(size) is not None, "the whole window is free again"


@given(st.integers(4, 30), st.lists(st.tuples(st.booleans(), st.integers(1, 12), st.integers(0, 3)), max_size=60))
@settings(max_examples=200, deadline=None)
def test_a_link_counts_what_is_in_flight(window: int, steps: list[tuple[bool, int, int]]):
    """Sends and acknowledgements; sequence numbers in between belong to messages that need no room."""
    link = ShadowLink(window)
    flying: deque[tuple[int, int, int]] = deque()
    sequence = 0
    for sends, size, others in steps:
        sequence += others
        if sends:
            if size > window:
                continue
            if link.send(size, size * 10, sequence) is not None:
                flying.append((sequence, size, size * 10))
                sequence += 1
        else:
            upto = max(0, sequence - size)
            arrived = [item for item in flying if item[0] <= upto]
            assert link.acknowledge(upto, []) == sum(i[2] for i in arrived)
            flying = deque(item for item in flying if item[0] > upto)
        assert link.in_flight_tokens == sum(item[2] for item in flying)
    link.acknowledge(sequence, [])
    assert link.in_flight_tokens == 0
    assert link.send(window, 1, sequence) is not None


def test_missing_is_the_first_that_the_target_does_not_have():
    link = ShadowLink(8)
    keys = [b"a", b"b", b"c", b"d"]
    assert link.missing(keys, 0) == 0
    link.known.update(keys[:3])
    assert [link.missing(keys, start) for start in range(5)] == [3, 3, 3, 3, 4]
    assert link.missing(keys[:2], 0) == 2
    assert link.missing([], 0) == 0
    link.acknowledge(-1, [b"b", b"never sent"])
    assert [link.missing(keys, start) for start in range(3)] == [1, 1, 3]


def test_the_scheduler_may_ask_what_is_in_flight_while_the_sender_changes_it():
    link = ShadowLink(1000)
    errors = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                assert link.in_flight_tokens >= 0
        except Exception as error:
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for sequence in range(20000):
            link.send(10, 1, sequence)
            if sequence % 50 == 49:
                link.acknowledge(sequence - 25, [])
    finally:
        stop.set()
        asking.join()
        sys.setswitchinterval(before)
    assert not errors
