"""Between the ranks of `shadow_sim`: clock, sockets and windows that do all that real ones may do, and worse."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq
from faults import Faults
from shadow_pool import LAYOUT

from forged import BYTES, with_the_same_crc
from sglang_kevlar.shadow.sockets import is_network
from sglang_kevlar.transport import TransportError, nothing_along

#: messages that a socket keeps for a reader that does not read
HIGH_WATER = 12


class Clock:
    """Stands in for the module `time` in the classes under test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def thread_time(self) -> float:
        return 0.0


class Network:
    def __init__(self, faults: Faults, clock: Clock) -> None:
        self.faults, self.clock = faults, clock
        self.stores: dict[str, StoreSocket] = {}
        #: pairs (from, to) of groups between which nothing passes; one way
        self.cut: set[tuple[int, int]] = set()
        self._way: list[tuple[float, int, Callable[[], None]]] = []
        #: when the last message of a way arrives, if it was held up
        self._last: dict[tuple[int, int], float] = {}
        self._order = itertools.count()
        self.names = itertools.count()

    def post(self, way: tuple[int, int], parts: list[bytes], arrive: Callable[[list[bytes]], None], kind: str) -> None:
        """``kind``: part of the faults' names."""
        if way in self.cut:
            return
        faults, late = self.faults, 0.0
        if faults.strike(f"{kind} lost", 0.015):
            return
        part = faults.random.randrange(len(parts))
        data = parts[part]
        if faults.strike(f"{kind} cut short", 0.004):
            data = data[: faults.random.randrange(len(data))]
        if data and faults.strike(f"{kind} damaged", 0.004):
            at = faults.random.randrange(len(data))
            data = data[:at] + bytes([data[at] ^ (1 << faults.random.randrange(8))]) + data[at + 1 :]
        parts = [*parts[:part], data, *parts[part + 1 :]]
        if faults.strike(f"{kind} delayed", 0.3):
            late = faults.random.choice([0.06, 0.06, 0.2, 1.0])
        if faults.strike(f"{kind} doubled", 0.015):
            self.later(late + faults.random.choice([0.0, 0.3, 12.0]), lambda: arrive(parts))
        if faults.strike(f"{kind} overtaken", 0.015):
            late += 0.3
            self.later(late, lambda: arrive(parts))
        else:
            self.in_order(way, late, lambda: arrive(parts))

    def later(self, late: float, arrive: Callable[[], None]) -> None:
        heapq.heappush(self._way, (self.clock.now + late, next(self._order), arrive))

    def in_order(self, way: tuple[int, int], late: float, arrive: Callable[[], None]) -> None:
        """A delay holds up what comes behind it on the same way, too."""
        at = max(self.clock.now + late, self._last.get(way, 0.0))
        if at > self.clock.now:
            self._last[way] = at
        heapq.heappush(self._way, (at, next(self._order), arrive))

    def deliver(self) -> None:
        while self._way and self._way[0][0] <= self.clock.now:
            heapq.heappop(self._way)[2]()

    @property
    def quiet(self) -> bool:
        return not self._way


class StoreSocket:
    """ROUTER: a store's end."""

    def __init__(self, network: Network, group: int, endpoint: str) -> None:
        self.network, self.group = network, group
        self.inbox: deque[list[bytes]] = deque()
        self.peers: dict[bytes, SourceSocket] = {}
        network.stores[endpoint] = self

    def recv_multipart(self, flags: int) -> list[bytes]:
        if not self.inbox:
            raise zmq.Again
        frames = self.inbox.popleft()
        if (peer := self.peers.get(frames[0])) is not None:
            peer.unread -= 1
        return frames

    def send_multipart(self, frames: list[bytes], flags: int) -> None:
        """Like ZMQ's: what cannot be sent is dropped without a word."""
        name = frames[0]
        peer = self.peers.get(name)
        if peer is None or peer.closed or peer.name != name:
            return
        if len(peer.inbox) >= HIGH_WATER:
            self.network.faults.counts["answer dropped at high water"] += 1
            return
        self.network.post((self.group, peer.group), frames[1:], lambda parts: peer.arrive(name, parts), "answer")


class SourceSocket:
    """DEALER: a source's end. Over TCP its connection may break; then it has another one, and another name."""

    def __init__(self, network: Network, group: int, endpoint: str) -> None:
        self.network, self.group, self.endpoint = network, group, endpoint
        self.name = self._new_name()
        #: what went along with the last parcel
        self._along: list[bytes] = []
        self.inbox: deque[bytes] = deque()
        self.closed = False
        #: sent and not read over there
        self.unread = 0

    def _new_name(self) -> bytes:
        return f"socket{next(self.network.names)}".encode()

    def send_multipart(self, parts: list[Any], flags: int, copy: bool) -> None:
        message = [bytes(part) for part in parts]
        store = self.network.stores.get(self.endpoint)
        if self.unread >= HIGH_WATER:
            self.network.faults.counts["store does not read"] += 1
            raise zmq.Again
        if store is None:
            return

        faults, name = self.network.faults, self.name
        if is_network(self.endpoint):
            if faults.strike("connection broken", 0.006):
                # In the middle of this message. What else is on its way, either way, is lost, too.
                self.name = self._new_name()
                return
            if len(message) > 1 and self._along and faults.strike("bytes of an older parcel", 0.006):
                message[1:] = self._along
            self._along = message[1:] or self._along

        def arrive(parts: list[bytes]) -> None:
            if self.name == name:
                store.peers[name] = self
                self.unread += 1
                store.inbox.append([name, *parts])

        self.network.post((self.group, store.group), message, arrive, "frame")

    def arrive(self, name: bytes, parts: list[bytes]) -> None:
        if not self.closed and self.name == name:
            self.inbox += parts

    def recv(self, flags: int) -> bytes:
        if not self.inbox:
            raise zmq.Again
        return self.inbox.popleft()

    def close(self) -> None:
        self.closed = True


class Ends:
    """`shadow.sockets.Network` of one rank."""

    def __init__(self, listen: Callable[[str], StoreSocket], dial: Callable[[str], SourceSocket], place: str) -> None:
        self._listen, self._dial, self._place = listen, dial, place

    def listen(self, host: str, largest: int) -> tuple[StoreSocket, str]:
        endpoint = over_tcp(self._place)
        return self._listen(endpoint), endpoint

    def dial(self, endpoint: str, unread: int) -> SourceSocket:
        return self._dial(endpoint)


def over_tcp(place: str) -> str:
    """``place``: the endpoint of the same rank's file."""
    return f"tcp://{place}"


class Windows:
    """A transport whose ends are different memory, as with Mooncake: writes fail, are lost or damaged, come late, or
    are somebody else's.
    """

    name = "shm"
    authentic = False
    push_bytes = 1 << 20

    def __init__(self, network: Network) -> None:
        self._network = network
        self._taken: dict[str, np.ndarray] = {}
        self._spare: list[np.ndarray] = []

    def offer(self, name: str, size: int) -> OutgoingWindow:
        if self._network.faults.strike("no window", 0.01):
            raise TransportError("simulated")
        return OutgoingWindow(self, name, size)

    def take(self, descriptor: str, size: int) -> IncomingWindow:
        # The memory of an earlier session, to which something may still be on its way.
        memory = self._spare.pop() if self._spare else np.zeros(size, np.uint8)
        self._taken[descriptor] = memory
        return IncomingWindow(self, descriptor, memory)

    def push(self, name: str, source: np.ndarray, offset: int, size: int) -> None:
        faults, there = self._network.faults, self._taken[name]
        data = source[offset : offset + size].copy()

        def write() -> None:
            there[offset : offset + size] = data

        if faults.strike("write failed", 0.003):
            raise TransportError("simulated")
        if faults.strike("write lost", 0.004):
            return
        if faults.strike("write damaged", 0.01):
            data[faults.random.randrange(size)] ^= 1 << faults.random.randrange(8)
        if faults.strike("write forged", 0.01):
            forged = with_the_same_crc(
                data[: LAYOUT.block_bytes].tobytes(), faults.random.randrange(LAYOUT.block_bytes - BYTES)
            )
            data[: LAYOUT.block_bytes] = np.frombuffer(forged, np.uint8)
        if faults.strike("write late", 0.01):
            self._network.later(faults.random.choice([0.1, 1.0, 15.0]), write)
            return
        write()

    def spare(self, name: str, memory: np.ndarray) -> None:
        self._spare.append(memory)


class OutgoingWindow:
    def __init__(self, windows: Windows, name: str, size: int) -> None:
        self._windows, self.descriptor = windows, name
        self.bytes = np.zeros(size, np.uint8)

    def accepted(self, descriptor: str) -> None:
        if descriptor != self.descriptor:
            raise TransportError("another window")

    def push(self, offset: int, size: int) -> None:
        self._windows.push(self.descriptor, self.bytes, offset, size)

    def close(self) -> None:
        pass


class IncomingWindow:
    def __init__(self, windows: Windows, name: str, memory: np.ndarray) -> None:
        self._windows, self.descriptor, self.bytes = windows, name, memory

    def read(self, offset: int, size: int, along: bytes | None) -> np.ndarray:
        nothing_along(along)
        return self.bytes[offset : offset + size]

    def close(self) -> None:
        self._windows.spare(self.descriptor, self.bytes)
