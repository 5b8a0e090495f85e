"""Windows between processes of one host: shared memory that the source writes and the target reads.

Its file has a name only until the target has opened it, so that whatever dies later, nothing is left behind; what dies
before is swept by the name (`protocol.launch.window_name`).
"""

from __future__ import annotations

import mmap
import os
import re

import numpy as np

from sglang_kevlar.transport import TransportError, nothing_along

DIRECTORY = "/dev/shm"
_NAME = re.compile(r"kevlar-[0-9a-f]{8}-g\d+e\d+\.window\d+\.\d+")


class SharedMemory:
    name = "shm"
    authentic = True
    push_bytes = 8 << 20

    def offer(self, name: str, size: int) -> OutgoingWindow:
        return OutgoingWindow(name, size)

    def take(self, descriptor: str, size: int) -> IncomingWindow:
        return IncomingWindow(descriptor, size)


class OutgoingWindow:
    def __init__(self, name: str, size: int) -> None:
        self.descriptor = name
        path = f"{DIRECTORY}/{name}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise TransportError(f"{path}: {error}") from None
        try:
            # Takes the memory now: if there is too little (a container has 64 MiB by default), writing would end the
            # rank.
            os.posix_fallocate(descriptor, 0, size)
            self.bytes = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
        except OSError as error:
            self._remove()
            raise TransportError(f"{size} bytes of shared memory in {DIRECTORY}: {error}") from None
        finally:
            os.close(descriptor)

    def accepted(self, descriptor: str) -> None:
        self._remove()  # it is mapped on both sides

    def push(self, offset: int, size: int) -> None:
        """Both ends are the same memory."""

    def close(self) -> None:
        """The memory goes when the last view of it does."""
        self._remove()
        del self.bytes

    def _remove(self) -> None:
        try:
            os.unlink(f"{DIRECTORY}/{self.descriptor}")
        except FileNotFoundError:
            pass


class IncomingWindow:
    descriptor = ""

    def __init__(self, name: str, size: int) -> None:
        """Raises TransportError for a name that is not one of ours, and a file that is not there or too short."""
        if _NAME.fullmatch(name) is None:
            raise TransportError(f"{name[:100]!r} is no name of a window")
        try:
            descriptor = os.open(f"{DIRECTORY}/{name}", os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise TransportError(f"the window cannot be opened: {error}") from None
        try:
            if size <= 0 or os.fstat(descriptor).st_size < size:
                raise TransportError(f"the window is smaller than {size} bytes")
            self.bytes = np.frombuffer(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), dtype=np.uint8)
        except OSError as error:
            raise TransportError(f"the window cannot be mapped: {error}") from None
        finally:
            os.close(descriptor)

    def read(self, offset: int, size: int, along: bytes | None) -> np.ndarray:
        nothing_along(along)
        return self.bytes[offset : offset + size]

    def close(self) -> None:
        del self.bytes
