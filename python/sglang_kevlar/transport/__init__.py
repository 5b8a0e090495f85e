"""Moving bytes from one process to another, through a window: memory that the source writes and the target reads.

Messages about it travel elsewhere. The source's `Outgoing` has a descriptor for the target, the target's `Incoming` one
for the source. Neither side trusts what it finds: whether bytes are those that were sent is for checksums of the target
to say. What was pushed may arrive late, even after both ends were closed; it then lands in some window of that target,
and nowhere else.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np


class TransportError(Exception):
    """A window cannot be made or used, or bytes did not arrive; the message says why."""


class Outgoing(Protocol):
    """The source's end. Not thread-safe."""

    #: for `Transport.take` of the target
    descriptor: str
    #: uint8 (size,): what is to be sent
    bytes: np.ndarray

    def accepted(self, descriptor: str) -> None:
        """The target has taken it, and described its end. Raises TransportError."""

    def push(self, offset: int, size: int) -> None:
        """Returns when the target can read ``bytes[offset : offset + size]``, at the same offset.

        May wait for seconds. Raises TransportError; nothing is known then of what is there at the target.
        """

    def close(self) -> None: ...


class Incoming(Protocol):
    """The target's end. Not thread-safe."""

    #: for `Outgoing.accepted` of the source
    descriptor: str
    #: uint8 (size,): what has arrived, and may change at any time
    bytes: np.ndarray

    def close(self) -> None: ...


class Transport(Protocol):
    """One of a process; each of its methods is called by one thread."""

    def offer(self, name: str, size: int) -> Outgoing:
        """``name``: one of `protocol.launch.window_name`, another at each call. Raises TransportError."""

    def take(self, descriptor: str, size: int) -> Incoming:
        """``descriptor`` and ``size`` are the source's word. Raises TransportError."""


def require(name: str) -> None:
    """Raises TransportError with the cause and what to do when this machine lacks what a transport needs."""
    if name == "mooncake":
        from sglang_kevlar.transport import mooncake

        mooncake.load()


def choose(name: str, host: str) -> Transport:
    """``name``: of --shadow-transport. ``host``: where the other processes reach this one. Raises TransportError."""
    if name == "mooncake":
        from sglang_kevlar.transport.mooncake import Mooncake

        return Mooncake(host)
    from sglang_kevlar.transport.shared_memory import SharedMemory

    return SharedMemory()
