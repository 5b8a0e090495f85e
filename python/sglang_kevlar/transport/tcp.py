"""No memory in common: bytes go with the messages about them, over the connection that these have.

So they are as authentic and as secret as these, and need nothing but TCP. The window is the source's alone; its size
bounds what is on its way, as ZMQ, which counts messages, does not.
"""

from __future__ import annotations

import numpy as np

from sglang_kevlar.transport import TransportError


class Tcp:
    name = "tcp"
    authentic = True
    #: Small: a link is given up when nothing was acknowledged for a while, and a slow one has to get a whole message
    #: through in that time. What is more important waits for no more than the window anyway.
    push_bytes = 1 << 20

    def offer(self, name: str, size: int) -> OutgoingWindow:
        return OutgoingWindow(size)

    def take(self, descriptor: str, size: int) -> IncomingWindow:
        return IncomingWindow()


class OutgoingWindow:
    descriptor = ""

    def __init__(self, size: int) -> None:
        self.bytes = np.empty(size, dtype=np.uint8)

    def accepted(self, descriptor: str) -> None:
        """There is nothing to find."""

    def push(self, offset: int, size: int) -> np.ndarray:
        # ZMQ reads it when it sends it. By the time that it is acknowledged, and written over, it has.
        return self.bytes[offset : offset + size]

    def close(self) -> None:
        """The memory goes when ZMQ has let go of the last view of it."""
        del self.bytes


class IncomingWindow:
    descriptor = ""

    def read(self, offset: int, size: int, along: bytes | None) -> np.ndarray:
        if along is None or len(along) != size:
            raise TransportError(
                f"{size} bytes were to come with the message, not {0 if along is None else len(along)}"
            )
        return np.frombuffer(along, dtype=np.uint8)

    def close(self) -> None:
        """There is nothing to give back."""
