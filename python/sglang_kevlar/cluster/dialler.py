"""A gateway's way to one frontend: a connection at a time, and the sessions over them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

import zmq

from sglang_kevlar.cluster.driver import Driver, RareLog
from sglang_kevlar.cluster.keys import ClusterKey
from sglang_kevlar.cluster.sockets import Closed, Connected, Dealer, Frame, Misshapen
from sglang_kevlar.control.group_end import GroupEnd
from sglang_kevlar.control.session import TICK, Dial, Effect, Event, HangUp, NotJoined, Send
from sglang_kevlar.protocol.cluster import BadFrame, GroupState, decode, encode, to_group

logger = logging.getLogger(__name__)


class Dialler:
    """``on_event`` is called with the sessions' events, one at a time and in order, also those it causes itself.

    A context of its own: ZMQ looks names up in the context's only thread, and another frontend must not wait for that.
    """

    def __init__(
        self,
        address: str,
        key: ClusterKey | None,
        end: GroupEnd,
        on_event: Callable[[Event], None],
        whom: str = "frontend",
    ) -> None:
        """``whom``: who listens there, in the log."""
        self.address = address
        self.end = end
        self.on_event = on_event
        self._key = key
        self._whom = whom
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._dealer: Dealer | None = None
        self._log = RareLog(logger)
        self._driver = Driver(self.turn, self._log)
        self._pending: deque[Effect] = deque()
        self._acting = False
        self._tick_at = 0.0

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """For an owner with a poller of ZMQ's, which calls `turn` when one of them is readable, and every `TICK`; they
        may be others after each call."""
        return [] if self._dealer is None else self._dealer.sockets

    def start(self) -> None:
        """On the running event loop."""
        self._driver.start()

    def poll(self, seconds: float) -> None:
        """Wait until something comes, at most so long, and act on it; instead of `start`."""
        if self._dealer is not None:
            self._dealer.poll(seconds)
        else:
            time.sleep(seconds)
        self.turn()

    def change_state(self, state: GroupState) -> None:
        self._act(self.end.change_state(state, time.monotonic()))

    def outputs(self, epoch: int, payload: bytes) -> None:
        """Without a session it goes nowhere. Raises ValueError for what is too large."""
        self._act(self.end.outputs(epoch, payload, time.monotonic()))

    def reject(self, problem: str) -> None:
        """For a fault that is noticed above: the session ends, and the next is tried."""
        self._on_bad(problem, time.monotonic())

    def close(self, reason: str) -> None:
        """Leave, and be gone."""
        self._act(self.end.leave(reason, time.monotonic()))
        self._driver.stop()
        self._hang_up()
        self._context.term()

    def turn(self) -> bool:
        """Act on what has come, and on the time. Whether there may be more."""
        now = time.monotonic()
        dealer, more = self._dealer, False
        if dealer is not None:
            arrivals, more = dealer.read()
            for arrival in arrivals:
                if self._dealer is not dealer:
                    return True  # the rest is of a connection that was given up
                if isinstance(arrival, Connected):
                    self._act(self.end.on_connected(now))
                elif isinstance(arrival, Frame):
                    self._on_frame(arrival, now)
                elif isinstance(arrival, Misshapen):
                    self._on_bad(arrival.problem, now)
                elif isinstance(arrival, Closed):
                    self._act(self.end.on_closed(arrival.reason, now))
        if now >= self._tick_at:
            self._tick_at = now + TICK
            self._act(self.end.tick(now))
        return more

    def _on_frame(self, frame: Frame, now: float) -> None:
        try:
            message = decode(to_group, frame.data)
        except BadFrame as problem:
            self._on_bad(str(problem), now)
            return
        self._act(self.end.on_message(message, now))

    def _on_bad(self, problem: str, now: float) -> None:
        self._log("bad", "a bad message from the %s at %s: %s", self._whom, self.address, problem)
        self._act(self.end.on_bad_frame(problem, now))

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
            if self._dealer is not None and not self._dealer.send(encode(effect.message)):
                self._pending.extend(self.end.on_unread(now))
        elif isinstance(effect, HangUp):
            self._hang_up()
        elif isinstance(effect, Dial):
            self._dial(now)
        else:
            if isinstance(effect, NotJoined):
                self._log("not joined", "not joined to the %s at %s: %s", self._whom, self.address, effect.reason)
            try:
                self.on_event(effect)
            except Exception:
                logger.exception("handling %s of the %s at %s", type(effect).__name__, self._whom, self.address)

    def _dial(self, now: float) -> None:
        self._hang_up()
        try:
            self._dealer = Dealer(self._context, self.address, self._key)
        except zmq.ZMQError as error:
            self._pending.extend(self.end.on_closed(f"cannot connect: {error}", now))
            return
        self._driver.watch(self._dealer.fds)

    def _hang_up(self) -> None:
        if self._dealer is not None:
            self._driver.watch([])
            self._dealer.close()
            self._dealer = None
