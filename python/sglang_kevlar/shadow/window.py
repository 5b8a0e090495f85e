"""The window of a shadow link on one host: a piece of shared memory that the source writes and the target reads.

Its file has a name only until the target has opened it, so that whatever dies later, nothing is left behind; what dies
before is swept by the name (`protocol.launch.window_name`).
"""

from __future__ import annotations

import mmap
import os
import re

import numpy as np

DIRECTORY = "/dev/shm"
_NAME = re.compile(r"kevlar-[0-9a-f]{8}-g\d+e\d+\.window\d+\.\d+")


class WindowError(ValueError):
    """The window that a source offers cannot be used; the message says why."""


class Window:
    def __init__(self, memory: mmap.mmap, size: int) -> None:
        self._memory = memory
        self.bytes = np.frombuffer(memory, dtype=np.uint8, count=size)

    def close(self) -> None:
        """The memory goes when the last view of it does."""
        del self.bytes


def create(name: str, size: int) -> Window:
    """Raises OSError when there is no room for it."""
    path = f"{DIRECTORY}/{name}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Takes the memory now: if there is too little (a container has 64 MiB by default), writing would end the rank.
        os.posix_fallocate(descriptor, 0, size)
        return Window(mmap.mmap(descriptor, size), size)
    except OSError:
        remove(name)
        raise
    finally:
        os.close(descriptor)


def remove(name: str) -> None:
    try:
        os.unlink(f"{DIRECTORY}/{name}")
    except FileNotFoundError:
        pass


def attach(name: str, size: int) -> Window:
    """Raises WindowError for a name that is not one of ours, and a file that is not there or shorter than said."""
    if _NAME.fullmatch(name) is None:
        raise WindowError(f"{name[:100]!r} is no name of a window")
    try:
        descriptor = os.open(f"{DIRECTORY}/{name}", os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise WindowError(f"the window cannot be opened: {error}") from None
    try:
        if size <= 0 or os.fstat(descriptor).st_size < size:
            raise WindowError(f"the window is smaller than {size} bytes")
        return Window(mmap.mmap(descriptor, size, prot=mmap.PROT_READ), size)
    finally:
        os.close(descriptor)
