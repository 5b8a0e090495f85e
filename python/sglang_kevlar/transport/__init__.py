"""Moving bytes from one process to another, through a window: memory that the source writes and the target reads.

Messages about it travel elsewhere, and with some transports the bytes go along with them. The source's `Outgoing` has a
descriptor for the target, the target's `Incoming` one for the source. Neither side trusts what it finds: whether bytes
are those that were sent is for checksums of the target to say. What was pushed may arrive late, even after both ends
were closed; it then lands in some window of that target, and nowhere else.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Protocol

import numpy as np

_DIGEST_BYTES = 16


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

    def push(self, offset: int, size: int) -> np.ndarray | None:
        """Let the target have ``bytes[offset : offset + size]``.

        Returns what has to go with the message about them, to be sent without a copy; None where the target can read
        them at the same offset by now. May wait for seconds. Raises TransportError; nothing is known then of what is
        there at the target.
        """

    def close(self) -> None: ...


class Incoming(Protocol):
    """The target's end. Not thread-safe."""

    #: for `Outgoing.accepted` of the source
    descriptor: str

    def read(self, offset: int, size: int, along: bytes | None) -> np.ndarray:
        """uint8 (size,): what the source has pushed there, and may change at any time.

        ``along``: what came with the message about it. Raises TransportError when that is not what it has to be.
        """

    def close(self) -> None: ...


class Transport(Protocol):
    """One of a process; each of its methods is called by one thread."""

    #: as in --shadow-transport
    name: str
    #: Whether nobody but the source can have written what arrives: otherwise blocks need digests.
    authentic: bool
    #: of one push at most, where a block is not more
    push_bytes: int

    def offer(self, name: str, size: int) -> Outgoing:
        """``name``: one of `protocol.launch.window_name`, another at each call. Raises TransportError."""

    def take(self, descriptor: str, size: int) -> Incoming:
        """``descriptor`` and ``size`` are the source's word. Raises TransportError."""


def digest(block: memoryview) -> bytes:
    """Of a block of a transport that is not authentic. What has the same was written by the source."""
    return blake2b(block, digest_size=_DIGEST_BYTES).digest()


def nothing_along(along: bytes | None) -> None:
    if along is not None:
        raise TransportError("bytes came with the message that belong into the window")


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
    if name == "tcp":
        from sglang_kevlar.transport.tcp import Tcp

        return Tcp()
    from sglang_kevlar.transport.shared_memory import SharedMemory

    return SharedMemory()
