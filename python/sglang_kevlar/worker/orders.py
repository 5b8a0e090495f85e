"""What a supervisor tells a member, which waits for it: one JSON line for each epoch that it is to be part of.

A member is started with no epoch. It imports, a rank loads its weights, and then it reads.
"""

from __future__ import annotations

import os

import msgspec

#: flag of a rank that is to load its weights as a part of its only epoch
IN_PLACE = "--in-place"


class Order(msgspec.Struct, frozen=True):
    """Be part of this epoch. The ranks meet at ``dist_port``, on this host unless another is named."""

    epoch: int
    dist_port: int
    dist_host: str | None = None


class OrderReader:
    """The member's end."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        self._file = os.fdopen(fd, "rb")

    def next(self) -> Order | None:
        """However long it takes; None when there will be none."""
        line = self._file.readline()
        return msgspec.json.decode(line, type=Order) if line else None


class OrderWriter:
    """The supervisor's end. An order is far smaller than what a pipe takes at once, so writing does not wait."""

    def __init__(self) -> None:
        self.reader, self._writer = os.pipe()

    def close_reader(self) -> None:
        """Once the member has it."""
        os.close(self.reader)

    def let_go(self) -> None:
        """A member that was forked waits for this, too, before it is one (`worker.template`)."""
        os.write(self._writer, b"1")

    def send(self, order: Order) -> None:
        """Nothing happens when the member is dead."""
        try:
            os.write(self._writer, msgspec.json.encode(order) + b"\n")
        except BrokenPipeError:
            pass

    def close(self) -> None:
        os.close(self._writer)
