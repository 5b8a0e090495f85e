"""What a child says to its parent about its start: JSON lines through an inherited pipe.

``{"status": "ready", ...}``, or ``{"status": "error"|"failed", ...}`` with the reason.
"""

from __future__ import annotations

import json
import os
import select


class StatusWriter:
    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_inheritable(fd, False)  # what this process starts must not keep the pipe open

    def send(self, message: dict[str, object]) -> None:
        """Nothing happens when the parent no longer listens."""
        try:
            os.write(self._fd, json.dumps(message).encode() + b"\n")
        except OSError:
            pass


class StatusReader:
    """The parent's end. Messages are small; more than LIMIT bytes without a line end are not one."""

    LIMIT = 1 << 16

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._buffer = b""
        #: read by `wait` together with an earlier one
        self._unread: list[dict[str, object]] = []
        self.closed = False

    def fileno(self) -> int:
        return self._reader

    def read(self) -> list[dict[str, object]]:
        """Complete messages that have arrived; sets ``closed`` at the end."""
        try:
            while data := os.read(self._reader, self.LIMIT):
                self._buffer += data
            self.closed = True
        except BlockingIOError:
            pass
        *lines, rest = self._buffer.split(b"\n")
        self._buffer = rest if len(rest) < self.LIMIT else b""
        return [json.loads(line) for line in lines]

    def wait(self) -> dict[str, object] | None:
        """The next message, however long it takes; None when the child ended without one."""
        while not self._unread and not self.closed:
            select.select([self._reader], [], [])
            self._unread += self.read()
        return self._unread.pop(0) if self._unread else None

    def close(self) -> None:
        os.close(self._reader)
