"""One process of a worker group, as its supervisor sees it."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from sglang_kevlar.launcher.process import describe_exit, spawn
from sglang_kevlar.launcher.status import StatusReader
from sglang_kevlar.worker.stderr import MemberStderr
from sglang_kevlar.worker.warm_start import WarmStart


class Member:
    """A rank or a detokenizer, from its start to its end."""

    def __init__(self, name: str, command: Sequence[str], warm: WarmStart) -> None:
        self.name = name
        self.ready = False
        #: what it said when it became ready
        self.init_info: dict[str, object] | None = None
        self.stderr = MemberStderr()
        self._status = StatusReader()
        ready, stderr = self._status.writer, self.stderr.writer
        self.process = warm.fork(name, command, stderr, ready) or spawn(
            name, [*command, "--ready-fd", str(ready)], pass_fds=[ready], stderr=stderr
        )
        self.stderr.close_writer()
        os.close(ready)

    @property
    def ready_fd(self) -> int:
        return self._status.fileno()

    @property
    def ready_closed(self) -> bool:
        return self._status.closed

    def read_ready(self) -> dict[str, object] | None:
        """Its message, when one has arrived."""
        messages = self._status.read()
        if not messages:
            return None
        if messages[-1].get("status") == "ready":
            self.ready = True
            self.init_info = messages[-1]
        return messages[-1]

    def describe_exit(self, status: int) -> str:
        """How it ended, and what it said last, if that can be the reason."""
        told = f"{self.name} (pid {self.process.pid}) {describe_exit(status)}"
        # Killed from outside: whatever it wrote before has nothing to do with it.
        quoted = status not in (0, -signal.SIGKILL, -signal.SIGTERM) and self.stderr.last_error()
        return f"{told}: {quoted}" if quoted else told

    def close(self) -> None:
        self._status.close()
        self.stderr.close()
