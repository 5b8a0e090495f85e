"""Writing and reading heartbeat pages (layout: ``protocol.heartbeat``).

Writing is two copies into mapped memory, a few microseconds, with no system call. The bytes lie in /dev/shm where
there is one: a page of a file on disk is write-protected while the kernel writes it back, and the next store would
wait for the disk.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

from sglang_kevlar.protocol.heartbeat import LAYOUT, PAGE_SIZE, Heartbeat, Phase, pack, unpack

_SEQUENCE = struct.Struct("<I")
_SEQUENCE_OFFSET = 4
_READ_ATTEMPTS = 50


class HeartbeatWriter:
    """The page of this process. One thread writes."""

    def __init__(self, path: str, shared_name: str | None = None) -> None:
        """Create the page at ``path``, in phase STARTING.

        ``shared_name``: name of its file in /dev/shm, to which ``path`` becomes a link.
        """
        self._sequence = 0
        self._steps = 0
        self._phase = Phase.STARTING
        self._phase_start = time.monotonic_ns()
        self._tokens = 0
        temporary = f"{path}.new"
        target = temporary
        if shared_name is not None and os.path.isdir("/dev/shm"):
            target = f"/dev/shm/{shared_name}"
            os.symlink(target, temporary)
        descriptor = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(descriptor, PAGE_SIZE)
        self._page = mmap.mmap(descriptor, PAGE_SIZE)
        os.close(descriptor)
        self._write(self._phase_start)
        os.replace(temporary, path)  # a reader never sees a page that is not complete

    def forward(self, tokens: int) -> None:
        """A forward step over ``tokens`` tokens begins."""
        self._begin(Phase.FORWARD, tokens)

    def control(self) -> None:
        """A control request begins."""
        self._begin(Phase.CONTROL, 0)

    def wait(self) -> None:
        """Nothing to do until another process sends something, however long that takes."""
        self._begin(Phase.WAITING, 0)

    def detokenize(self, tokens: int = 0) -> None:
        """A batch of outputs begins."""
        self._begin(Phase.DETOKENIZE, tokens)

    def idle(self) -> None:
        """Nothing to do in this turn. The phase starts when it was not idle before; the beat is now in any case."""
        now = time.monotonic_ns()
        if self._phase is not Phase.IDLE:
            self._phase, self._phase_start, self._tokens = Phase.IDLE, now, 0
        self._write(now)

    def _begin(self, phase: Phase, tokens: int) -> None:
        now = time.monotonic_ns()
        self._phase, self._phase_start, self._tokens = phase, now, tokens
        self._steps += 1
        self._write(now)

    def _write(self, now: int) -> None:
        # Stores of one thread become visible in their order on x86; elsewhere a torn page is possible in theory
        # and corrects itself at the next beat.
        odd = self._sequence + 1
        beat = Heartbeat(self._phase, self._tokens, self._phase_start, now, self._steps)
        _SEQUENCE.pack_into(self._page, _SEQUENCE_OFFSET, odd)
        self._page[: LAYOUT.size] = pack(odd, beat)
        self._sequence = (odd + 1) & 0xFFFFFFFE
        _SEQUENCE.pack_into(self._page, _SEQUENCE_OFFSET, self._sequence)


class HeartbeatReader:
    """The page of another process."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._page: mmap.mmap | None = None
        self._last: Heartbeat | None = None

    def read(self) -> Heartbeat | None:
        """The newest complete heartbeat; None when there is no page yet.

        A writer that was stopped in the middle of a write leaves the page odd: what it said before still counts.
        """
        if self._page is None and not self._open():
            return None
        assert self._page is not None
        for _ in range(_READ_ATTEMPTS):
            found = unpack(self._page[: LAYOUT.size])
            if found is None:
                break
            sequence, beat = found
            if sequence % 2 == 0 and sequence == _SEQUENCE.unpack_from(self._page, _SEQUENCE_OFFSET)[0]:
                self._last = beat
                break
        return self._last

    def close(self) -> None:
        if self._page is not None:
            self._page.close()
            self._page = None

    def _open(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            self._page = mmap.mmap(descriptor, PAGE_SIZE, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        return True
