"""Faults from within a rank, for ``--allow-chaos``: an order-taker, and what its orders do to scheduler and shadow.

Without that flag nothing of this is imported.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections import Counter, deque
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import zmq

from sglang_kevlar.protocol.chaos import HARMS, HarmFrames, Obeyed, Order, Raise, Report, Sleep
from sglang_kevlar.shadow.sockets import Network
from sglang_kevlar.transport import Incoming, Outgoing, Transport

if TYPE_CHECKING:
    from sglang_kevlar.worker.scheduler import KevlarScheduler

logger = logging.getLogger(__name__)

MAX_ORDER_BYTES = 1 << 16
#: milliseconds between two looks whether to stop
STOP_POLL = 100
#: frames that are kept to be sent again
REMEMBERED = 16
_OF_THE_FIRST = ("truncate", "drop", "double", "swap")
_OF_FRAMES = (*_OF_THE_FIRST, "replay")
_OF_WINDOWS = ("flip",)


class Sabotage(Exception):
    """What the scheduler's loop raises by order."""


class OrderTaker:
    """Answers orders in a thread of its own. What they ask for happens in the threads it is done to."""

    def __init__(self, endpoint: str) -> None:
        self.frames = FrameHarm()
        self._decoder = msgspec.json.Decoder(Order)
        #: for the scheduler's loop; the newest order counts
        self._waiting: Raise | Sleep | None = None
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_ORDER_BYTES)
        self._socket.bind(endpoint)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kevlar-chaos", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._thread.join()

    def obey(self) -> None:
        """Called by the scheduler's loop at each turn."""
        order, self._waiting = self._waiting, None
        if isinstance(order, Raise):
            raise Sabotage("the scheduler's loop was ordered to raise (--allow-chaos)")
        if isinstance(order, Sleep):
            time.sleep(order.seconds)

    def _run(self) -> None:
        while not self._stopping:
            if not self._socket.poll(STOP_POLL):
                continue
            message = b"".join(self._socket.recv_multipart())
            try:
                error = ""
                self._take(self._decoder.decode(message))
            except msgspec.MsgspecError as problem:
                error = f"not an order: {problem}"
            harmed, to_harm = self.frames.account()
            self._socket.send(msgspec.json.encode(Obeyed(error=error, harmed=harmed, to_harm=to_harm)))
        self._socket.close()

    def _take(self, order: Order) -> None:
        if isinstance(order, Report):
            return
        logger.warning("CHAOS: ordered: %s", msgspec.json.encode(order).decode())
        if isinstance(order, HarmFrames):
            self.frames.begin(order)
        else:
            self._waiting = order


def obedient(scheduler_class: type[KevlarScheduler], orders: OrderTaker) -> type[KevlarScheduler]:
    """The scheduler, whose loop obeys."""

    class ObedientScheduler(scheduler_class):  # type: ignore[valid-type, misc]
        def ingest_requests(self, *args: Any, **kwargs: Any) -> list[Any]:
            orders.obey()
            received: list[Any] = super().ingest_requests(*args, **kwargs)
            return received

    return ObedientScheduler


class FrameHarm:
    """Stands between the sender of a rank's shadow and its line: does harm while it is ordered, else passes on.

    `transport` and `dial` are used by the sender's thread, the rest by the order-taker's.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = 0
        self._harm = "any"
        self._chance = random.Random(0)
        self._harmed: Counter[str] = Counter()
        #: the newest messages, also of sessions that are over, for replays
        self._sent: deque[list[bytes]] = deque(maxlen=REMEMBERED)

    def begin(self, order: HarmFrames) -> None:
        with self._lock:
            self._left, self._harm, self._chance = order.count, order.harm, random.Random(order.seed)

    def account(self) -> tuple[dict[str, int], int]:
        with self._lock:
            return dict(self._harmed), self._left

    def transport(self, transport: Transport) -> Transport:
        return _HarmedTransport(transport, self)

    def dial(self, network: Network, endpoint: str, unread: int) -> zmq.Socket[bytes]:
        socket = network.dial(endpoint, unread, _HarmedSocket)
        assert isinstance(socket, _HarmedSocket)
        socket._harm, socket._held, socket._sent = self, None, self._sent
        return socket

    def draw(self, possible: tuple[str, ...]) -> tuple[str, float]:
        """What to do to this frame: a harm, and where in it (0 to 1); "" for none."""
        with self._lock:
            if not self._left:
                return "", 0.0
            harm = self._chance.choice(HARMS) if self._harm == "any" else self._harm
            if harm not in possible:
                return "", 0.0  # a flip waits for a parcel, which comes to the window first
            self._left -= 1
            self._harmed[harm] += 1
            where = self._chance.random()
        logger.warning("CHAOS: harm to a frame of the shadow: %s", harm)
        return harm, where


class _HarmedTransport:
    """A transport whose windows may lose a bit on the way."""

    def __init__(self, transport: Transport, harm: FrameHarm) -> None:
        self._transport = transport
        self._harm = harm
        self.name, self.authentic, self.push_bytes = transport.name, transport.authentic, transport.push_bytes

    def offer(self, name: str, size: int) -> Outgoing:
        return _HarmedWindow(self._transport.offer(name, size), self._harm)

    def take(self, descriptor: str, size: int) -> Incoming:
        return self._transport.take(descriptor, size)


class _HarmedWindow:
    def __init__(self, window: Outgoing, harm: FrameHarm) -> None:
        self._window = window
        self._harm = harm
        self.descriptor = window.descriptor
        self.bytes = window.bytes

    def accepted(self, descriptor: str) -> None:
        self._window.accepted(descriptor)

    def push(self, offset: int, size: int) -> np.ndarray | None:
        harm, where = self._harm.draw(_OF_WINDOWS)
        if harm:
            # The checksums of these bytes are taken by now.
            bit = int(where * size * 8)
            self.bytes[offset + bit // 8] ^= 1 << bit % 8
        return self._window.push(offset, size)

    def close(self) -> None:
        self._window.close()
        del self.bytes


class _HarmedSocket(zmq.Socket[bytes]):
    """A message that is held back to be swapped goes after the next one. What comes along with it stays as it is."""

    # Declared: a socket takes other attributes for options.
    _harm: FrameHarm
    _held: list[bytes] | None
    _sent: deque[list[bytes]]

    def send_multipart(self, msg_parts: Any, flags: int = 0, *args: Any, **kwargs: Any) -> Any:
        """Raises zmq.Again."""
        message = [bytes(part) for part in msg_parts]
        for harmed in self._harmed(message):
            super().send_multipart(harmed, flags)
        self._sent.append(message)

    def _harmed(self, message: list[bytes]) -> list[list[bytes]]:
        if self._held is not None:
            held, self._held = self._held, None
            return [message, held]
        harm, where = self._harm.draw(_OF_FRAMES if self._sent else _OF_THE_FIRST)
        if harm == "truncate":
            return [[message[0][: int(where * len(message[0]))], *message[1:]]]
        if harm == "drop":
            return []
        if harm == "double":
            return [message, message]
        if harm == "replay":
            return [message, self._sent[int(where * len(self._sent))]]
        if harm == "swap":
            self._held = message
            return []
        return [message]
