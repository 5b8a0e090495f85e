"""The supervisor's end of its template (`worker.template`), and when it is worth a start."""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Sequence

from sglang_kevlar.control.backoff import Backoff
from sglang_kevlar.control.breaker import Breaker
from sglang_kevlar.launcher.process import Child, adopted, spawn
from sglang_kevlar.worker.template import ARROW, MESSAGE_LIMIT, OMP_ENV, TORCH

#: seconds within which it forks; it takes some milliseconds
_ANSWER = 5.0
#: a template that dies is replaced, and again after these seconds at least
_REPLACE = (1.0, 60.0)
#: so many times in a row the imports may be to blame for a start that failed, before starts are cold for a time; and
#: the shortest and the longest such time
_STRIKES = 2
_REST = (300.0, 86400.0)


class WarmStart:
    """Members of a group, forked of a template.

    What a fork lacks shows when the member starts. So after a warm start that failed the next is cold, and when that
    succeeds, twice in a row, there are no warm ones for a time.
    """

    def __init__(
        self,
        template: Sequence[str] | None,
        patience: float,
        log: Callable[[str], None],
        watch: Callable[[int, Callable[[], None]], None],
        unwatch: Callable[[int], None],
    ) -> None:
        """``template``: its command line; None: all starts are cold. ``patience``: seconds for its imports.

        ``watch``: has a function called when a descriptor is readable.
        """
        self._template = template
        self._patience = patience
        self._log = log
        self._watch = watch
        self._unwatch = unwatch
        self._backoff = Backoff(*_REPLACE)
        self._child: Child | None = None
        self._channel: socket.socket | None = None
        self._ready_at: float | None = None
        self._deadline = float("inf")
        #: when there is to be a template (again), monotonic seconds
        self._due = float("inf") if template is None else 0.0
        #: whether the epoch of now is, or was, begun by forks
        self.warm = False
        #: the last one was, and failed
        self.suspect = False
        self._trust = Breaker(_STRIKES, *_REST)

    # -- for the supervisor's loop

    @property
    def pids(self) -> set[int]:
        return set() if self._child is None else {self._child.pid}

    @property
    def importing(self) -> bool:
        """A start had better wait for it than import by itself."""
        return not self.suspect and self._child is not None and self._ready_at is None

    @property
    def next_deadline(self) -> float:
        return min(self._deadline, self._due)

    def step(self) -> Child | None:
        """End a template that takes too long, start one when it is time. One that was started."""
        now = time.monotonic()
        if now >= self._deadline and self._channel is not None and select.select([self._channel], [], [], 0)[0]:
            self._on_message()  # in time: it was us who did not run
        elif now >= self._deadline:
            self._discard(f"its imports take longer than {self._patience:g} s")
        return self._start(now) if now >= self._due else None

    def end(self) -> None:
        """Kill the template. Members that were forked of it go on."""
        self._due = self._deadline = float("inf")
        if self._child is not None and self._channel is not None:
            self._unwatch(self._channel.fileno())
            self._channel.close()
            self._child.kill()
            while self._child.reap() is None:
                time.sleep(0.001)
        self._child = self._channel = self._ready_at = None

    # -- for starts

    def begin(self, cold: bool) -> None:
        """An epoch starts. ``cold``: it tries something else that may fail, which is to be told from this."""
        self.warm = self._ready_at is not None and not self.suspect and not cold

    def fork(self, name: str, command: Sequence[str], stderr: int, ready: int, orders: int) -> Child | None:
        """A member that runs ``command`` (a Python module) when it is let go, or None: it has to be started cold."""
        if not self.warm or self._channel is None:
            return None
        python, option, module, *argv = command
        assert (python, option) == (sys.executable, "-m")
        request = json.dumps({"module": module, "argv": argv}).encode()
        try:
            socket.send_fds(self._channel, [request], [stderr, ready, orders])
            answer = self._receive()
            if isinstance(pid := answer.get("pid"), int):
                return adopted(name, pid)
            reason = str(answer.get("error", "no answer"))
        except OSError as error:
            reason = str(error)
        self._discard(f"it does not fork: {reason}")
        return None

    def succeeded(self) -> None:
        """The epoch became ready."""
        now = time.monotonic()
        if self.suspect:
            self._trust.failed(now)
            if self._trust.is_open(now):
                rest = self._trust.open_until - now
                why = f"{self._trust.failures} starts in a row failed of which a cold repetition succeeded"
                self._log(f"starts are cold for {rest:.0f} s, with all imports: {why}")
                self.end()
                self._due = self._trust.open_until
        elif self.warm:
            self._trust.worked()
        self.suspect = False

    def failed(self) -> None:
        """The epoch ended before it was ready, and nobody from outside ended it."""
        # When the cold one fails too, imports are not to blame.
        self.suspect = self.warm

    def forget(self) -> bool:
        """What failed before may have been put right. Whether starts were cold for it."""
        aside = self._trust.is_open(time.monotonic())
        if aside:
            self._due = 0.0
        self._trust.worked()
        self.suspect = False
        return aside

    # -- the template

    def _start(self, now: float) -> Child:
        assert self._template is not None
        self._due = float("inf")
        self._deadline = now + self._patience
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_ANSWER)
        command = [*self._template, "--channel-fd", str(theirs.fileno())]
        environment = {**ARROW, **os.environ, **TORCH, OMP_ENV: os.environ.get("OMP_NUM_THREADS", "")}
        child = self._child = spawn("template", command, pass_fds=[theirs.fileno()], environment=environment)
        theirs.close()
        self._channel = ours
        self._watch(ours.fileno(), self._on_message)
        return child

    def _on_message(self) -> None:
        """It says without being asked that it is ready, or unfit; or it is dead."""
        message = self._receive()
        if message.get("ready"):
            self._ready_at, self._deadline = time.monotonic(), float("inf")
        elif reason := message.get("unfit"):
            self._give_up(str(reason))
        else:
            self._discard("it ended")

    def _receive(self) -> dict[str, object]:
        """Its next message; empty when it says nothing, or nothing that could be understood."""
        assert self._channel is not None
        try:
            message = json.loads(self._channel.recv(MESSAGE_LIMIT) or b"{}")
        except (OSError, ValueError):
            return {}
        return message if isinstance(message, dict) else {}

    def _discard(self, reason: str) -> None:
        """Until there is another one, starts are cold."""
        now = time.monotonic()
        delay = self._backoff.failed(0.0 if self._ready_at is None else now - self._ready_at)
        self._log(f"template given up: {reason}; another one in {delay:g} s")
        self.end()
        self._due = now + delay

    def _give_up(self, reason: str) -> None:
        self._log(f"starts are cold from now on, with all imports: {reason}")
        self.end()
