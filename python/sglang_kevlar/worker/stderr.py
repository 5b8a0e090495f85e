"""Standard error of group members: passed through to ours, its last lines kept for saying why a member died."""

from __future__ import annotations

import fcntl
import os
import re
import stat
from collections import deque

#: a supervisor that is stopped must not stop its members soon: they block when their pipe is full
_PIPE_SIZE = 1 << 20
_PENDING_LIMIT = 1 << 20
_LINES = 40
_LINE_LIMIT = 300
_ERROR = re.compile(
    r"\b\w*(Error|Exception|Interrupt)\b|\berror:|^terminate called|^Fatal|out of memory", re.IGNORECASE
)


class MemberStderr:
    """Reading end of one member's standard error."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        try:
            fcntl.fcntl(self._reader, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:
            pass  # over this user's limit; the default of 64 KiB does too
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._partial = b""

    def fileno(self) -> int:
        return self._reader

    def close_writer(self) -> None:
        """After the member was started, so that its end is seen."""
        os.close(self.writer)

    def read(self) -> bytes | None:
        """What has arrived, b"" when nothing has, None at the end."""
        try:
            data = os.read(self._reader, 1 << 16)
        except BlockingIOError:
            return b""
        if not data:
            return None
        *lines, partial = (self._partial + data).split(b"\n")
        self._partial = partial[-_LINE_LIMIT:]
        for line in lines:
            text = line[-_LINE_LIMIT:].decode(errors="replace").strip()
            if text:
                self._lines.append(text)
        return data

    def last_error(self) -> str:
        """The last lines that look like an error, or the very last one; empty when there was nothing."""
        lines = list(self._lines)
        errors = [line for line in lines if _ERROR.search(line)]
        return " | ".join(errors[-2:] or lines[-1:])

    def last_with(self, text: str) -> str:
        """The last of the lines that contains ``text``; empty when none does."""
        return next((line for line in reversed(self._lines) if text in line), "")

    def forget(self) -> None:
        """What was said so far is no reason for what comes."""
        self._lines.clear()

    def close(self) -> None:
        os.close(self._reader)


class PassThrough:
    """Our own standard error, never waited for: what a stuck reader does not take is dropped beyond a limit."""

    def __init__(self) -> None:
        self._fd = 2
        kind = os.fstat(2).st_mode
        if stat.S_ISFIFO(kind) or stat.S_ISCHR(kind):
            try:
                # A description of our own: O_NONBLOCK on the shared one would hit whoever else uses the terminal.
                self._fd = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
            except OSError:
                pass
        self._pending = bytearray()

    def fileno(self) -> int:
        return self._fd

    @property
    def waiting(self) -> bool:
        return bool(self._pending)

    def write(self, data: bytes) -> None:
        room = _PENDING_LIMIT - len(self._pending)
        self._pending += data[:room]
        self.flush()

    def flush(self) -> None:
        while self._pending:
            try:
                del self._pending[: os.write(self._fd, self._pending)]
            except BlockingIOError:
                return
            except OSError:
                self._pending.clear()  # nobody will read it any more
