"""Which connection a sender has, when descriptors are used again: the ROUTER's and its monitor's words, as scripted."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import zmq

from sglang_kevlar.cluster import router as module
from sglang_kevlar.cluster.router import Router
from sglang_kevlar.cluster.sockets import Arrival, Closed, Frame

NOW = 100.0
OLD, NEW = b"\0\0\0\0\1", b"\0\0\0\0\2"
ACCEPTED, GONE = (zmq.EVENT_ACCEPTED, 19), (zmq.EVENT_DISCONNECTED, 19)


class FakeFrame:
    def __init__(self, data: bytes) -> None:
        self.bytes = data

    def __len__(self) -> int:
        return len(self.bytes)

    def get(self, option: int) -> int:
        assert option == zmq.SRCFD
        return 19


class Script:
    """In the order in which ZMQ's thread did it: what the monitor says is there before what comes after it."""

    def __init__(self, router: Router, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: deque[tuple[int, int]] = deque()
        self.frames: deque[tuple[bytes, list[tuple[int, int]]]] = deque()
        monkeypatch.setattr(router._monitor, "next", lambda: self.events.popleft() if self.events else None)
        monkeypatch.setattr(module, "receive", self.receive)

    def receive(self, socket: Any) -> list[FakeFrame] | None:
        if not self.frames:
            return None
        sender, before = self.frames.popleft()
        self.events.extend(before)
        return [FakeFrame(sender), FakeFrame(b"data")]


@pytest.fixture
def router() -> Iterator[Router]:
    router = Router("127.0.0.1:0", None)
    yield router
    router.close()


@pytest.fixture
def script(router: Router, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(router, monkeypatch)


def read(router: Router) -> list[Arrival]:
    return router.read(NOW)[0]


def frame(sender: bytes) -> Frame:
    return Frame(sender, b"data")


def closed(sender: bytes) -> Closed:
    return Closed(sender, "its connection ended")


def test_the_next_connection_of_a_descriptor_is_another(router: Router, script: Script) -> None:
    script.frames.append((OLD, [ACCEPTED]))
    script.frames.append((NEW, [GONE, ACCEPTED]))
    assert read(router) == [frame(OLD), frame(NEW), closed(OLD)]
    assert router.connections == 1
    script.events.append(GONE)
    assert read(router) == [closed(NEW)]


def test_what_a_dead_one_had_sent_is_read_before_its_end(router: Router, script: Script) -> None:
    script.frames.append((OLD, [ACCEPTED]))
    script.frames.append((OLD, [GONE]))
    assert read(router) == [frame(OLD), frame(OLD)]
    script.frames.append((OLD, []))
    assert read(router) == [frame(OLD), closed(OLD)]
    script.events.append(ACCEPTED)
    script.frames.append((OLD, []))
    assert read(router) == [], "it comes back from the dead"


def test_a_late_first_frame_of_a_dead_one_is_not_the_living_ones(router: Router, script: Script) -> None:
    script.frames.append((NEW, [ACCEPTED, GONE, ACCEPTED]))
    script.frames.append((OLD, []))
    script.frames.append((NEW, []))
    assert read(router) == [frame(NEW), frame(NEW)]


def test_one_that_was_taken_for_a_living_one_makes_room_for_it(router: Router, script: Script) -> None:
    script.frames.append((OLD, [ACCEPTED, GONE, ACCEPTED]))
    assert read(router) == [frame(OLD)]
    router.hang_up(OLD, NOW)
    script.frames.append((NEW, []))
    assert read(router) == [closed(OLD), frame(NEW)]
    router.tick(NOW + module.FAREWELL_TIME + 0.1)
    assert router.connections == 1, "closed for what another had said"


def test_a_frame_of_a_connection_that_is_gone_already_is_dropped(router: Router, script: Script) -> None:
    script.frames.append((OLD, [ACCEPTED, GONE]))
    assert read(router) == []


def test_names_are_compared_around_the_end_of_their_count() -> None:
    last, first = b"\0\xff\xff\xff\xff", b"\0\0\0\0\0"
    assert module._is_before(last, first) and not module._is_before(first, last)
    assert module._is_before(OLD, NEW) and not module._is_before(NEW, OLD)


def test_what_comes_without_an_end_is_read_in_goes_and_ends_are_told(router: Router, script: Script) -> None:
    script.frames.append((OLD, [ACCEPTED]))
    read(router)
    script.events.append(GONE)
    script.frames.append((NEW, [(zmq.EVENT_ACCEPTED, 20)]))
    other = [(NEW, list[tuple[int, int]]())] * 3 * module.FRAMES_AT_ONCE
    script.frames.extend(other)
    arrivals, more = router.read(NOW)
    assert more and closed(OLD) not in arrivals
    arrivals, more = router.read(NOW + module.LATE_FRAMES_TIME + 0.1)
    assert more and closed(OLD) in arrivals
