"""The thread that fills a rank's shadow store and answers lookups of the group's other ranks.

Whatever arrives is checked against what it claims to be; what does not fit is dropped and counted, and its source told
to begin again. Nothing of it is ever found by a lookup.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

import msgspec
import zmq

from sglang_kevlar.control.shadow_keys import belong
from sglang_kevlar.protocol.shadow import (
    SHADOW_VERSION,
    Accept,
    Ack,
    Ended,
    Forget,
    FromStore,
    Held,
    Hello,
    Layout,
    Lookup,
    Parcel,
    Refuse,
    Release,
    Resync,
    ShadowCounters,
    ToStore,
)
from sglang_kevlar.shadow.sockets import frame, listen, unframe
from sglang_kevlar.shadow.store import DamagedBlock, ShadowStore
from sglang_kevlar.transport import Incoming, Transport, TransportError

logger = logging.getLogger(__name__)

#: keys that a new source is told of, 16 bytes each; what it is not told of, it sends again
HELD_KEYS = 1 << 17
#: frames taken in before anything else is looked at
BURST = 256
#: sources at once; the oldest is dropped for one more
MAX_SESSIONS = 64
#: milliseconds between two looks at whether to stop, and at the time
STOP_POLL = 200
#: seconds after which the requests of a source that sends nothing are running no more, as far as we know
SILENCE = 60.0


@dataclass
class _Session:
    hello: Hello
    window: Incoming
    #: what the store had forgotten before: of this, the source knows
    clears: int
    heard_at: float
    next_sequence: int = 0
    requests: set[bytes] = field(default_factory=set)
    acknowledge: bool = False
    acknowledgements: int = 0
    gone: list[bytes] = field(default_factory=list)


class ShadowServer:
    """``start`` runs it in a thread of its own until ``stop``."""

    def __init__(
        self, endpoint: str, layout: Layout, store: ShadowStore, transport: Transport, counters: ShadowCounters
    ) -> None:
        self._layout = layout
        self._transport = transport
        self._store = store
        self._counters = counters
        self._decoder = msgspec.msgpack.Decoder(ToStore)
        #: by the routing id of its socket
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        #: newest epoch of each group that was here
        self._epochs: dict[int, int] = {}
        self._looked_at = 0.0
        self._stopping = False
        self._socket = listen(endpoint)
        self._thread = threading.Thread(target=self._run, name="kevlar-shadow-store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._thread.join()

    def _run(self) -> None:
        while not self._stopping:
            self._socket.poll(STOP_POLL)
            self._step()
        for session in self._sessions.values():
            session.window.close()
        self._socket.close()

    def _step(self) -> None:
        """Whatever can be done without waiting."""
        for _ in range(BURST):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                self._on_frames(frames)
            except Exception:
                # The store must not end with one message that nobody thought of.
                logger.exception("shadow store: a message could not be handled")
                self._counters.rejected_frames += 1
        self._acknowledge()
        self._look_at_the_time()

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise ValueError(f"{len(frames)} frames")
            message = unframe(frames[1], self._decoder)
        except ValueError as error:
            reason = f"not one of ours: {error}"
            if frames[0] in self._sessions:
                self._resync(frames[0], reason)
            else:
                self._reject(reason)
            return
        if isinstance(message, Lookup):
            blocks = self._store.pin(message.keys, message.ticket)
            shelf = self._store.shelf(message.ticket)
            self._send(frames[0], Held(ticket=message.ticket, blocks=blocks, shelf=shelf))
        elif isinstance(message, Release):
            self._store.release(message.ticket)
        elif isinstance(message, Hello):
            self._open(frames[0], message)
        else:
            self._in_session(frames[0], message)

    # -- sessions

    def _open(self, sender: bytes, hello: Hello) -> None:
        reason = self._why_not(hello)
        if reason is None:
            try:
                opened = self._transport.take(hello.window, hello.window_bytes)
            except TransportError as error:
                reason = str(error)
        if reason is not None:
            self._reject(f"session of worker group {hello.group} (epoch {hello.epoch}) refused: {reason}")
            self._send(sender, Refuse(session=hello.session, reason=reason))
            return
        # One rank of a group has one shadow here: what an earlier incarnation left open is over.
        for other, session in list(self._sessions.items()):
            if session.hello.group == hello.group or other == sender:
                self._close(other)
        if len(self._sessions) >= MAX_SESSIONS:
            self._close(next(iter(self._sessions)))
        self._sessions[sender] = _Session(hello, opened, self._store.clears, time.monotonic())
        self._epochs[hello.group] = hello.epoch
        # After the session has noted how often the store was emptied: if it is now, the session begins again.
        held = self._store.newest(HELD_KEYS)
        self._send(sender, Accept(session=hello.session, held=held, window=opened.descriptor))

    def _why_not(self, hello: Hello) -> str | None:
        """Why KV of this source means nothing here; None when it is as ours."""
        ours, theirs = msgspec.structs.asdict(self._layout), msgspec.structs.asdict(hello.layout)
        different = [f"{name} is {theirs[name]}, here {ours[name]}" for name in ours if ours[name] != theirs[name]]
        if hello.layout.version != SHADOW_VERSION:
            return f"it speaks version {hello.layout.version}, not {SHADOW_VERSION}"
        if (newest := self._epochs.get(hello.group, hello.epoch)) > hello.epoch:
            return f"epoch {newest} of this group has been here"
        return "; ".join(different) or None

    def _close(self, sender: bytes) -> None:
        session = self._sessions.pop(sender)
        for request in session.requests:
            self._store.end(request)
        session.window.close()

    def _in_session(self, sender: bytes, message: Parcel | Ended | Forget) -> None:
        session = self._sessions.get(sender)
        if session is None or session.hello.session != message.session:
            self._reject("of no session")
            return
        if message.sequence != session.next_sequence:
            expected = session.next_sequence
            self._resync(sender, f"frame {message.sequence} came where {expected} was due")
            return
        session.next_sequence += 1
        session.heard_at = time.monotonic()
        session.acknowledge = True
        if isinstance(message, Parcel):
            self._take(sender, session, message)
        elif isinstance(message, Ended):
            request = _own(session, message.request)
            session.requests.discard(request)
            self._store.end(request)
        else:
            self._store.clear()
            session.clears += 1
            session.requests.clear()

    def _take(self, sender: bytes, session: _Session, parcel: Parcel) -> None:
        size = len(parcel.keys) * self._layout.block_bytes
        inside = parcel.offset >= 0 and parcel.offset + size <= session.hello.window_bytes
        if not parcel.keys or len(parcel.crcs) != len(parcel.keys) or not inside:
            self._resync(sender, f"parcel {parcel.sequence} contradicts itself")
            return
        token_bytes = size // self._layout.token_bytes * array("q").itemsize
        if len(parcel.tokens) != token_bytes or not belong(parcel.keys, parcel.parent, parcel.tokens):
            self._resync(sender, f"parcel {parcel.sequence} has other tokens than its keys")
            return
        data = session.window.bytes[parcel.offset : parcel.offset + size].reshape(len(parcel.keys), -1)
        request = None
        if parcel.request is not None:
            request = _own(session, parcel.request)
            session.requests.add(request)
        try:
            session.gone += self._store.put(
                parcel.keys, parcel.parent, parcel.crcs, parcel.tokens, parcel.origin, data, request
            )
        except DamagedBlock:
            self._resync(sender, f"a block of parcel {parcel.sequence} has another checksum")

    def _resync(self, sender: bytes, reason: str) -> None:
        session = self._sessions[sender]
        self._reject(f"session of worker group {session.hello.group} (epoch {session.hello.epoch}) ended: {reason}")
        self._begin_again(sender, reason)

    def _begin_again(self, sender: bytes, reason: str) -> None:
        session = self._sessions[sender]
        self._close(sender)
        self._send(sender, Resync(session=session.hello.session, reason=reason))

    def _acknowledge(self) -> None:
        dropped = self._store.take_dropped()
        for sender, session in list(self._sessions.items()):
            if session.clears != self._store.clears:
                # It believes that we hold what we do not, and would never send it again.
                self._begin_again(sender, "the store was emptied")
                continue
            # Whoever sent it, others may count on it too.
            session.gone += dropped
            if session.acknowledge or session.gone:
                session.acknowledge = False
                ack = Ack(
                    session=session.hello.session,
                    number=session.acknowledgements,
                    sequence=session.next_sequence - 1,
                    gone=session.gone,
                )
                session.acknowledgements += 1
                session.gone = []
                self._send(sender, ack)
        self._counters.store_tokens = len(self._store) * self._layout.block_tokens
        self._counters.evicted_tokens = self._store.evicted * self._layout.block_tokens

    def _look_at_the_time(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < STOP_POLL / 1000:
            return
        self._looked_at = now
        self._store.expire()
        for session in self._sessions.values():
            if session.requests and now - session.heard_at > SILENCE:
                # It died, or sends to another: its requests must not keep those out that run. If it is only slow,
                # they are running again with its next parcel.
                for request in session.requests:
                    self._store.end(request)
                session.requests.clear()

    def _send(self, receiver: bytes, message: FromStore) -> None:
        try:
            self._socket.send_multipart([receiver, frame(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            pass  # a source that does not read, or is gone: it begins again when it misses the answer

    def _reject(self, why: str) -> None:
        self._counters.rejected_frames += 1
        logger.warning("shadow store: %s", why)


def _own(session: _Session, request: bytes) -> bytes:
    """Two sources may use the same name for a request."""
    return session.hello.session.encode() + request
