"""The thread that carries a rank's KV to its shadow: from the copies that the scheduler made, into the window.

The scheduler never waits for it. It asks whether there is room for another copy, and when there is not, the shadow
lags until there is.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import zmq

from sglang_kevlar.control.shadow_index import Origin
from sglang_kevlar.control.shadow_link import ShadowLink
from sglang_kevlar.protocol.shadow import (
    Accept,
    Ack,
    Ended,
    Forget,
    FromStore,
    Hello,
    Layout,
    Parcel,
    Refuse,
    Resync,
    ShadowCounters,
    Still,
)
from sglang_kevlar.shadow.pool import Staged, pack
from sglang_kevlar.shadow.sockets import UNREAD, frame, unframe
from sglang_kevlar.transport import Outgoing, Transport, TransportError, digest

logger = logging.getLogger(__name__)

WINDOW_BYTES = 32 << 20
#: the window holds at least this many blocks
WINDOW_BLOCKS = 8
#: seconds after which a target that acknowledges nothing is begun with anew
SILENCE = 10.0
#: seconds after which a target is told that there is nothing to tell, so that it answers
STILL = 5.0
#: milliseconds between two looks at the clock while nothing happens
TICK = 100
#: seconds without parcels when two sessions went wrong shortly one after the other: the next may, too, and each costs
#: copies of everything
PAUSE = 1.0
#: seconds before a target that refused or cannot be reached, or for which there was no window, is tried again
RETRY = 30.0
COUNTERS_INTERVAL = 0.5
_ANSWERS = msgspec.msgpack.Decoder(FromStore)


@dataclass
class Piece:
    """Blocks of one sequence that follow each other, in a copy shared with other pieces."""

    keys: list[bytes]
    parent: bytes | None
    staged: Staged
    #: token of the copy at which they begin
    first: int
    #: of its blocks, int64
    tokens: bytes
    origin: Origin
    request: bytes | None
    #: when it was copied, monotonic seconds. The clock is looked up then: a simulation has its own
    at: float = field(default_factory=lambda: time.monotonic())


@dataclass
class _End:
    request: bytes


class _Flush:
    """Everything sent so far is no longer in the source's cache."""


@dataclass
class Target:
    """The store of one rank of an incarnation."""

    name: str
    epoch: int
    endpoint: str
    #: how KV goes there
    transport: Transport


class ShadowSender:
    """Methods without an underscore are called by the scheduler's thread."""

    def __init__(
        self,
        launch: str,
        group: str,
        epoch: int,
        layout: Layout,
        bandwidth: float,
        dial: Callable[[str, int], zmq.Socket[bytes]],
        new_window: Callable[[], str],
        counters: ShadowCounters,
        counters_file: str,
    ) -> None:
        """``bandwidth``: bytes a second, 0 for no limit. ``new_window``: a name for a window, another at each call.

        ``dial``: by endpoint, and how many messages may wait for it.
        """
        self._launch, self._group, self._epoch = launch, group, epoch
        self._layout = layout
        self._bandwidth = bandwidth
        self._new_window = new_window
        self._counters = counters
        self._counters_file = counters_file
        self._written = b""
        self.window_bytes = max(WINDOW_BYTES, WINDOW_BLOCKS * layout.block_bytes)
        #: most blocks of a piece
        self.piece_blocks = 1
        #: every parcel that the window has room for, and as many other messages as there may ever be
        self._unread = self.window_bytes // layout.block_bytes + UNREAD
        #: what the target has. None while there is no session; another object when nothing is known any more, and
        #: everything has to be sent (again)
        self.link: ShadowLink | None = None
        self._queue: deque[tuple[ShadowLink, Piece | _End | _Flush]] = deque()
        #: bytes of copies that are not in the window yet
        self._staged = 0
        self._staged_lock = threading.Lock()
        self._wanted: Target | None = None
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._dial = dial
        self._socket: zmq.Socket[bytes] | None = None
        self._session = ""
        self._window: Outgoing | None = None
        self._target: Target | None = None
        self._opened_at = self._progress_at = 0.0
        self._wrong_at = -2 * PAUSE
        self._sent_sequence = 0
        #: all before this number is acknowledged
        self._answered = 0
        #: when the last one was sent
        self._said_at = 0.0
        #: acknowledgements of this session that have come
        self._acknowledgements = 0
        #: parcels that are not acknowledged, and when their KV was copied
        self._unacknowledged: deque[tuple[int, float]] = deque()
        #: when the next parcel may go
        self._not_before = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kevlar-shadow-sender", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._notify()
        self._thread.join()

    # -- the scheduler's side

    def retarget(self, target: Target | None) -> None:
        self._wanted = target
        self._notify()

    def room(self) -> int:
        """Blocks that may be copied now."""
        if self.link is None:
            return 0
        return max(0, (self.window_bytes - self._staged) // self._layout.block_bytes)

    def queue(self, piece: Piece, link: ShadowLink) -> None:
        """``link``: the one that says it is missing. What is meant for one that is over is dropped."""
        link.known.update(piece.keys)
        with self._staged_lock:
            self._staged += len(piece.keys) * self._layout.block_bytes
        self._queue.append((link, piece))

    def ended(self, request: bytes, link: ShadowLink) -> None:
        self._queue.append((link, _End(request)))

    def flushed(self) -> None:
        """The cache was flushed here: the target drops what it has of us."""
        link = self.link
        if link is not None:
            link.known.clear()
            self._queue.append((link, _Flush()))
            self._notify()

    def wake(self) -> None:
        """There is something in the queue."""
        self._notify()

    @property
    def waiting_tokens(self) -> int:
        """Tokens copied or sent, and not acknowledged."""
        link = self.link
        staged = self._staged // self._layout.token_bytes
        return staged + (link.in_flight_tokens if link is not None else 0)

    def _notify(self) -> None:
        os.eventfd_write(self._wake, 1)

    # -- the thread

    def _run(self) -> None:
        counted_at = 0.0
        while not self._stopping:
            if not (self._guarded(self._wait) and self._guarded(self._step)):
                time.sleep(1)
            if time.monotonic() - counted_at >= COUNTERS_INTERVAL:
                counted_at = time.monotonic()
                self._write_counters()
        self._disconnect()

    def _guarded(self, act: Callable[[], None]) -> bool:
        """False: something that nobody thought of went wrong, and everything begins anew."""
        try:
            act()
        except Exception:
            logger.exception("shadow sender: starting over")
            self._disconnect()
            return False
        return True

    def _wait(self) -> None:
        """Until there may be something to do."""
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        if self._socket is not None:
            poller.register(self._socket, zmq.POLLIN)
        pause = self._not_before - time.monotonic()
        poller.poll(min(TICK, int(pause * 1000) + 1) if pause > 0 else TICK)
        try:
            os.eventfd_read(self._wake)
        except BlockingIOError:
            pass

    def _step(self) -> None:
        """Whatever can be done without waiting."""
        now = time.monotonic()
        wanted = self._wanted
        if wanted != self._target:
            self._disconnect()
            if wanted is not None:
                self._connect(wanted)
        elif self._target is not None and self._socket is None and now - self._opened_at > RETRY:
            self._connect(self._target)
        self._receive()
        try:
            self._work()
            if self.link is not None and now - self._said_at > STILL:
                self._say(Still(session=self._session, sequence=self._next_sequence()))
        except zmq.Again:
            self._start_over("it does not read")
        except TransportError as error:
            self._start_over(str(error))
        waiting = self._socket is not None and (self.link is None or self._answered < self._sent_sequence)
        if waiting and now - max(self._progress_at, self._opened_at) > SILENCE:
            self._start_over(f"no answer for {SILENCE:g} s")

    def _connect(self, target: Target) -> None:
        name = self._new_window()
        self._target = target
        self._opened_at = time.monotonic()
        try:
            self._window = target.transport.offer(name, self.window_bytes)
            self._socket = self._dial(target.endpoint, self._unread)
        except TransportError as error:
            logger.error("no window for a shadow, or no way to it: %s", error)
            self._close_socket()
            return
        self._session = name
        most = min(self.window_bytes // 4, target.transport.push_bytes)
        self.piece_blocks = max(1, most // self._layout.block_bytes)
        self._say(
            Hello(
                session=name,
                launch=self._launch,
                group=self._group,
                epoch=self._epoch,
                layout=self._layout,
                transport=target.transport.name,
                window=self._window.descriptor,
                window_bytes=self.window_bytes,
            )
        )

    def _disconnect(self) -> None:
        """Forget the target. What was to be sent to it is dropped; the scheduler copies it again for the next."""
        self._target = None
        self._close_socket()

    def _close_socket(self) -> None:
        self.link = None
        self._counters.to, self._counters.linked, self._counters.lag_tokens = None, False, 0
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._window is not None:
            self._window.close()
            self._window = None

    def _start_over(self, reason: str) -> None:
        target = self._target
        assert target is not None
        logger.warning("shadow at worker group %s (epoch %d): starting over: %s", target.name, target.epoch, reason)
        self._counters.resyncs += 1
        now = time.monotonic()
        if now - self._wrong_at < 2 * PAUSE:
            self._not_before = max(self._not_before, now + PAUSE)
        self._wrong_at = now
        self._close_socket()
        self._connect(target)

    def _say(self, message: Hello | Parcel | Ended | Forget | Still, along: np.ndarray | None = None) -> None:
        """Raises zmq.Again when too much waits to be sent already: the target does not read."""
        assert self._socket is not None
        parts: list[bytes | memoryview] = [frame(message)]
        if along is not None:
            parts.append(along.data)
        self._socket.send_multipart(parts, zmq.NOBLOCK, copy=False)

    def _receive(self) -> None:
        while self._socket is not None:
            try:
                message = unframe(self._socket.recv(zmq.NOBLOCK), _ANSWERS)
            except zmq.Again:
                return
            except ValueError as error:
                self._start_over(f"an answer of it cannot be read: {error}")
                continue
            self._progress_at = time.monotonic()
            target = self._target
            assert target is not None
            if isinstance(message, Accept) and message.session == self._session:
                assert self._window is not None
                try:
                    self._window.accepted(message.window)
                except TransportError as error:
                    logger.error("worker group %s cannot be sent our KV: %s", target.name, error)
                    self._counters.resyncs += 1
                    self._close_socket()
                    continue
                self._sent_sequence = self._acknowledgements = self._answered = 0
                self._said_at = time.monotonic()
                self._unacknowledged.clear()
                self.link = ShadowLink(self.window_bytes, message.held)
                self._counters.to, self._counters.linked = (target.name, target.epoch), True
                how = target.transport.name
                logger.info("KV is shadowed to worker group %s (epoch %d) by %s", target.name, target.epoch, how)
            elif isinstance(message, Refuse) and message.session == self._session:
                logger.error("worker group %s refused to keep our KV: %s", target.name, message.reason)
                self._close_socket()
            elif isinstance(message, Resync) and message.session == self._session:
                self._start_over(message.reason)
            elif isinstance(message, Ack) and message.session == self._session and self.link is not None:
                if message.number != self._acknowledgements:
                    # ZMQ drops answers to a peer that reads too slowly, and with one what it says is gone.
                    self._start_over("an acknowledgement is missing")
                    continue
                self._acknowledgements += 1
                self._answered = message.sequence + 1
                self._counters.shadowed_tokens += self.link.acknowledge(message.sequence, message.gone)
                while self._unacknowledged and self._unacknowledged[0][0] <= message.sequence:
                    self._unacknowledged.popleft()

    def _work(self) -> None:
        while self._queue:
            link, item = self._queue[0]
            if link is self.link and isinstance(item, Piece) and not self._send_piece(item):
                return
            self._queue.popleft()
            if isinstance(item, Piece):
                with self._staged_lock:
                    self._staged -= len(item.keys) * self._layout.block_bytes
            elif link is self.link:
                sequence = self._next_sequence()
                if isinstance(item, _End):
                    self._say(Ended(session=self._session, sequence=sequence, request=item.request))
                else:
                    self._say(Forget(session=self._session, sequence=sequence))

    def _send_piece(self, piece: Piece) -> bool:
        """False while the window has no room (an acknowledgement wakes us), or the bandwidth is used up."""
        assert self.link is not None and self._window is not None and self._target is not None
        if time.monotonic() < self._not_before:
            return False
        size = len(piece.keys) * self._layout.block_bytes
        room = self.link.send(size, len(piece.keys) * self._layout.block_tokens, self._sent_sequence)
        if room is None:
            return False
        sequence = self._next_sequence()
        self._unacknowledged.append((sequence, piece.at))
        out = self._window.bytes[room : room + size].reshape(len(piece.keys), -1)
        pack(piece.staged.wait(), piece.first, len(piece.keys), self._layout.block_tokens, out)
        crcs = [zlib.crc32(block.data) for block in out]
        digests = [] if self._target.transport.authentic else [digest(block.data) for block in out]
        along = self._window.push(room, size)
        self._say(
            Parcel(
                session=self._session,
                sequence=sequence,
                offset=room,
                parent=piece.parent,
                keys=piece.keys,
                crcs=crcs,
                tokens=piece.tokens,
                origin=piece.origin,
                request=piece.request,
                digests=digests,
            ),
            along,
        )
        self._counters.sent_tokens += len(piece.keys) * self._layout.block_tokens
        self._counters.sent_bytes += size
        if self._bandwidth:
            self._not_before = time.monotonic() + size / self._bandwidth
        return True

    def _lag_ms(self) -> float:
        """Age of the oldest copy that the target has not acknowledged."""
        pending = [at for _, at in list(self._unacknowledged)[:1]]
        pending += [item.at for link, item in list(self._queue)[:1] if link is self.link and isinstance(item, Piece)]
        return round((time.monotonic() - min(pending)) * 1e3, 1) if self.link is not None and pending else 0.0

    def _next_sequence(self) -> int:
        self._said_at = time.monotonic()
        if self._answered == self._sent_sequence:
            self._progress_at = self._said_at  # nothing was to be answered until now
        self._sent_sequence += 1
        return self._sent_sequence - 1

    def _write_counters(self) -> None:
        self._counters.token_bytes = self._layout.token_bytes
        self._counters.lag_ms = self._lag_ms()
        data = msgspec.json.encode(self._counters)
        if data == self._written:
            return
        self._written = data
        temporary = f"{self._counters_file}.new"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
            os.replace(temporary, self._counters_file)
        except OSError as error:
            logger.warning("the shadow's counters cannot be written: %s", error)
