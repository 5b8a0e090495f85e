"""A frontend's place in the cluster: its socket, and the sessions over it."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import zmq

from sglang_kevlar.cluster.driver import Driver, RareLog
from sglang_kevlar.cluster.keys import ClusterKey
from sglang_kevlar.cluster.router import Router
from sglang_kevlar.cluster.sockets import Closed, Connected, Frame
from sglang_kevlar.control.frontend_end import Sessions
from sglang_kevlar.control.session import TICK, Dial, Effect, Event, HangUp, Joined, Send
from sglang_kevlar.protocol.cluster import BadFrame, Refused, decode, encode, from_group, version_of

logger = logging.getLogger(__name__)

#: what a peer whose session is not known is told it speaks of
_NO_SESSION = "none"


class Listener:
    """``on_event`` is called with the sessions' events, one at a time and in order, also those it causes itself.

    Until `start` the owner calls `poll`; from then on the event loop does all.
    """

    def __init__(
        self, address: str, key: ClusterKey | None, sessions: Sessions, on_event: Callable[[Event], None]
    ) -> None:
        """Raises KeyProblem, ValueError, or zmq.ZMQError."""
        self.sessions = sessions
        self.on_event = on_event
        self._router = Router(address, key)
        self._log = RareLog(logger)
        self._driver = Driver(self.turn, self._log)
        self._driver.watch(self._router.fds)
        self._pending: deque[Effect] = deque()
        self._acting = False
        self._tick_at = 0.0

    @property
    def address(self) -> str:
        return self._router.address

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """For an owner with a poller of ZMQ's, which calls `turn` when one of them is readable, and every `TICK`."""
        return self._router.sockets

    @property
    def connections(self) -> int:
        return self._router.connections

    def start(self) -> None:
        """On the running event loop."""
        self._driver.start()

    def poll(self, seconds: float) -> None:
        """Wait until something comes, at most so long, and act on it."""
        self._router.poll(seconds)
        self.turn()

    def requests(self, session: str, epoch: int, payload: bytes) -> None:
        """To a session that is over nothing is sent. Raises ValueError for what is too large."""
        self._act(self.sessions.requests(session, epoch, payload, time.monotonic()))

    def kill(self, session: str, epoch: int, cause: str, *, planned: bool = False) -> None:
        self._act(self.sessions.kill(session, epoch, cause, time.monotonic(), planned=planned))

    def end(self, session: str, reason: str) -> None:
        """For a fault that is noticed above: nothing of it is delivered any more."""
        self._act(self.sessions.end(session, reason, time.monotonic()))

    def close(self, reason: str, retry_s: float | None) -> None:
        """Tell everybody, and be gone."""
        self._act(self.sessions.close(reason, retry_s, time.monotonic()))
        self._driver.stop()
        self._router.close()

    def turn(self) -> bool:
        """Act on what has come, and on the time. Whether there may be more."""
        now = time.monotonic()
        arrivals, more = self._router.read(now)
        for arrival in arrivals:
            if isinstance(arrival, Closed):
                self._act(self.sessions.on_closed(arrival.sender, arrival.reason, now))
            elif isinstance(arrival, Connected) or self._router.is_left(arrival.sender):
                continue
            elif isinstance(arrival, Frame):
                self._on_frame(arrival, now)
            else:
                self._on_bad(arrival.sender, arrival.problem, _NO_SESSION, None, now)
        # After what had come, and also when there is more: beats are due.
        if now >= self._tick_at:
            self._tick_at = now + TICK
            self._act(self.sessions.tick(now))
            self._router.tick(now)
        return more

    def _on_frame(self, frame: Frame, now: float) -> None:
        try:
            message = decode(from_group, frame.data)
        except BadFrame as problem:
            session, version = version_of(frame.data) or (_NO_SESSION, None)
            self._on_bad(frame.sender, str(problem), session, version, now)
            return
        self._act(self.sessions.on_message(frame.sender, message, now))

    def _on_bad(self, sender: bytes, problem: str, session: str, version: int | None, now: float) -> None:
        self._log("bad", "a bad message from sender %r: %s", sender, problem)
        self._act(self.sessions.on_bad_frame(sender, problem, session, version, now))

    def _act(self, effects: list[Effect]) -> None:
        self._pending.extend(effects)
        if self._acting:
            return
        self._acting = True
        try:
            while self._pending:
                self._carry_out(self._pending.popleft())
        finally:
            self._acting = False
        self._driver.soon()

    def _carry_out(self, effect: Effect) -> None:
        now = time.monotonic()
        if isinstance(effect, Send):
            if isinstance(effect.message, Refused):
                self._log("refused", "refused a group that wants to join: %s", effect.message.reason)
            if not self._router.send(effect.to, encode(effect.message)):
                self._pending.extend(self.sessions.on_unread(effect.to, now))
        elif isinstance(effect, HangUp):
            self._router.hang_up(effect.to, now)
        else:
            assert not isinstance(effect, Dial)
            if isinstance(effect, Joined) and (end := self.sessions.session(effect.session)) is not None:
                self._router.joined(end.sender)
            try:
                self.on_event(effect)
            except Exception:
                logger.exception("handling %s of session %s", type(effect).__name__, getattr(effect, "session", ""))
