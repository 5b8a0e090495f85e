"""The network of ``Hosts(wire=True)``: a switch in a process, which does to frames what the kernel has no netem for.

``python wire.py SEED NETNS_FILE...`` makes a TAP device ``eth0`` in each of the network namespaces. Host i has the
address ``02:00:00:00:00:<i + 1>``; other destinations are lost. Says ``ready``, takes orders from stdin, one JSON line
each (``{"from": [i], "to": [j], "faults": {...}}``, ``{"carrier": i, "up": true}``, ``{"count": [i, j]}``), and answers
each with a line when it is in force. Ends, and its devices with it, when stdin does.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import json
import os
import select
import struct
import sys
import time

from link_faults import Faults, Path

_CLONE_NEWNET = 0x40000000
_TUNSETIFF, _TUNSETCARRIER = 0x400454CA, 0x400454E2
_IFF_TAP, _IFF_NO_PI = 0x0002, 0x1000
_PREFIX = b"\x02\0\0\0\0"
#: frames of one device before the others have a turn
_TURN = 64
_FRAME = 65_536


def _tap(namespace: str) -> int:
    """A TAP device ``eth0`` in ``namespace``, which lives as long as its descriptor."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as here, open(namespace) as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
        try:
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TAP | _IFF_NO_PI))
        finally:
            libc.setns(here.fileno(), _CLONE_NEWNET)
    return device


class Wire:
    def __init__(self, seed: str, namespaces: list[str]) -> None:
        self._taps = [_tap(namespace) for namespace in namespaces]
        self._index = {tap: index for index, tap in enumerate(self._taps)}
        hosts = range(len(namespaces))
        self._paths = [[Path(f"{seed}:{source}:{target}") for target in hosts] for source in hosts]
        #: (due, order of entry, path, target's device, frame)
        self._on_their_way: list[tuple[float, int, Path, int, bytes]] = []
        self._entered = 0
        self._orders = b""

    def run(self) -> None:
        poll = select.epoll()
        stdin = sys.stdin.fileno()
        for descriptor in (stdin, *self._taps):
            poll.register(descriptor, select.EPOLLIN)
        while True:
            wait = -1.0
            if self._on_their_way:
                wait = max(0.0, self._on_their_way[0][0] - time.monotonic())
            for descriptor, _ in poll.poll(wait):
                if descriptor == stdin:
                    if not self._take_orders(stdin):
                        return
                else:
                    self._take_frames(descriptor)
            if self._on_their_way:
                self._deliver()

    def _take_frames(self, tap: int) -> None:
        paths, taps, now = self._paths[self._index[tap]], self._taps, time.monotonic()
        for _ in range(_TURN):
            try:
                frame = os.read(tap, _FRAME)
            except BlockingIOError:
                return
            target = frame[5] - 1
            if frame[:5] != _PREFIX or not 0 <= target < len(taps):
                continue
            path = paths[target]
            due = path.enter(len(frame), now)
            if due is None:
                continue
            if due <= now:
                self._arrive(path, taps[target], frame)
            else:
                self._entered += 1
                heapq.heappush(self._on_their_way, (due, self._entered, path, taps[target], frame))

    def _deliver(self) -> None:
        now = time.monotonic()
        while self._on_their_way and self._on_their_way[0][0] <= now:
            _, _, path, tap, frame = heapq.heappop(self._on_their_way)
            self._arrive(path, tap, frame)

    def _arrive(self, path: Path, tap: int, frame: bytes) -> None:
        if path.leave(len(frame)):
            # A device that is down or full loses it, as a cable would.
            with contextlib.suppress(OSError):
                os.write(tap, frame)

    # ---- orders

    def _take_orders(self, stdin: int) -> bool:
        data = os.read(stdin, 65_536)
        *lines, self._orders = (self._orders + data).split(b"\n")
        for line in lines:
            print(json.dumps(self._obey(json.loads(line))), flush=True)
        return bool(data)

    def _obey(self, order: dict) -> object:
        match order:
            case {"faults": faults, "from": sources, "to": targets}:
                for source in sources:
                    for target in targets:
                        self._paths[source][target].set(Faults(**faults), time.monotonic())
                return True
            case {"carrier": index, "up": up}:
                fcntl.ioctl(self._taps[index], _TUNSETCARRIER, struct.pack("i", up))
                return True
            case {"count": [source, target]}:
                path = self._paths[source][target]
                return {"passed": path.passed, "lost": path.lost}
        raise ValueError(f"no such order: {order}")


if __name__ == "__main__":
    wire = Wire(sys.argv[1], sys.argv[2:])
    print('"ready"', flush=True)
    wire.run()
