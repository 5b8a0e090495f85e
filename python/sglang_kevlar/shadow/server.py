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
from collections.abc import Collection, Sequence
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
    Still,
    ToStore,
)
from sglang_kevlar.shadow.sockets import frame, unframe
from sglang_kevlar.shadow.store import DamagedBlock, ShadowStore
from sglang_kevlar.transport import Incoming, Transport, TransportError

logger = logging.getLogger(__name__)

#: keys that a new source is told of, 16 bytes each; what it is not told of, it sends again
HELD_KEYS = 1 << 17
#: frames taken in before anything else is looked at
BURST = 256
#: sources at once; the oldest is dropped for one more
MAX_SESSIONS = 64
#: of which it is remembered which incarnation was here
MAX_SOURCES = 1024
#: milliseconds between two looks at whether to stop, and at the time
STOP_POLL = 200
#: seconds after which the requests of a source that sends nothing are running no more, as far as we know
SILENCE = 60.0


@dataclass
class _Session:
    hello: Hello
    window: Incoming
    transport: Transport
    #: what the store had forgotten before: of this, the source knows
    clears: int
    heard_at: float
    next_sequence: int = 0
    requests: set[bytes] = field(default_factory=set)
    acknowledge: bool = False
    acknowledgements: int = 0
    gone: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class Port:
    """Where a store is reached, and how KV may come in there."""

    socket: zmq.Socket[bytes]
    transports: Collection[Transport]
    #: for ranks of this launch alone
    local: bool = True
    #: whether ranks of this group that are elsewhere ask there; those of this launch do in any case
    asked: bool = False


#: number of the port, and routing id there
_Peer = tuple[int, bytes]


class ShadowServer:
    """``start`` runs it in a thread of its own until ``stop``."""

    def __init__(self, ports: Sequence[Port], layout: Layout, store: ShadowStore, counters: ShadowCounters) -> None:
        self._ports = ports
        self._layout = layout
        self._store = store
        self._counters = counters
        self._decoder = msgspec.msgpack.Decoder(ToStore)
        self._sessions: OrderedDict[_Peer, _Session] = OrderedDict()
        #: newest epoch of each group that was here, by launch and name
        self._epochs: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._looked_at = 0.0
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="kevlar-shadow-store", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._thread.join()

    def _run(self) -> None:
        poller = zmq.Poller()
        for port in self._ports:
            poller.register(port.socket, zmq.POLLIN)
        while not self._stopping:
            poller.poll(STOP_POLL)
            self._step()
        for session in self._sessions.values():
            session.window.close()
        for port in self._ports:
            port.socket.close()

    def _step(self) -> None:
        """Whatever can be done without waiting."""
        for number, port in enumerate(self._ports):
            for _ in range(BURST):
                try:
                    name, *frames = port.socket.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                try:
                    self._on_frames((number, name), frames)
                except Exception:
                    # The store must not end with one message that nobody thought of.
                    logger.exception("shadow store: a message could not be handled")
                    self._counters.rejected_frames += 1
                # What came along with it is not to be kept until the next one comes.
                del frames
        self._acknowledge()
        self._look_at_the_time()

    def _on_frames(self, sender: _Peer, frames: list[bytes]) -> None:
        try:
            if len(frames) not in (1, 2):
                raise ValueError(f"{len(frames)} frames")
            message = unframe(frames[0], self._decoder)
            if isinstance(message, Parcel):
                self._in_session(sender, message, frames[1] if len(frames) > 1 else None)
                return
            if len(frames) > 1:
                raise ValueError("bytes along with it")
            port = self._ports[sender[0]]
            if isinstance(message, Release) and not port.local:
                raise ValueError("a release from another host")
            if isinstance(message, Lookup) and not (port.local or port.asked):
                raise ValueError("a question from another host")
        except ValueError as error:
            reason = f"not one of ours: {error}"
            if sender in self._sessions:
                self._resync(sender, reason)
            else:
                self._reject(reason)
            return
        if isinstance(message, Lookup):
            blocks = self._store.pin(message.keys, message.ticket)
            shelf = self._store.shelf(message.ticket)
            self._send(sender, Held(ticket=message.ticket, blocks=blocks, shelf=shelf))
        elif isinstance(message, Release):
            self._store.release(message.ticket)
        elif isinstance(message, Hello):
            self._open(sender, message)
        else:
            self._in_session(sender, message)

    # -- sessions

    def _open(self, sender: _Peer, hello: Hello) -> None:
        try:
            self._check(hello)
            transport = self._transport(sender, hello.transport)
            opened = transport.take(hello.window, hello.window_bytes)
        except TransportError as reason:
            self._reject(f"session of worker group {hello.group} (epoch {hello.epoch}) refused: {reason}")
            self._send(sender, Refuse(session=hello.session, reason=str(reason)))
            return
        # One rank of a group has one shadow here: what an earlier incarnation left open is over.
        source = _source(hello)
        for other, session in list(self._sessions.items()):
            if _source(session.hello) == source or other == sender:
                self._close(other)
        if len(self._sessions) >= MAX_SESSIONS:
            self._close(next(iter(self._sessions)))
        self._sessions[sender] = _Session(hello, opened, transport, self._store.clears, time.monotonic())
        self._epochs[source] = hello.epoch
        self._epochs.move_to_end(source)
        if len(self._epochs) > MAX_SOURCES:
            self._epochs.popitem(last=False)
        # After the session has noted how often the store was emptied: if it is now, the session begins again.
        held = self._store.newest(HELD_KEYS)
        self._send(sender, Accept(session=hello.session, held=held, window=opened.descriptor))

    def _transport(self, sender: _Peer, name: str) -> Transport:
        for transport in self._ports[sender[0]].transports:
            if transport.name == name:
                return transport
        raise TransportError(f"the source sends by {name[:20]}, which is not taken here")

    def _check(self, hello: Hello) -> None:
        """Raises TransportError with the reason why KV of this source means nothing here."""
        ours, theirs = msgspec.structs.asdict(self._layout), msgspec.structs.asdict(hello.layout)
        different = [f"{name} is {theirs[name]}, here {ours[name]}" for name in ours if ours[name] != theirs[name]]
        if hello.layout.version != SHADOW_VERSION:
            raise TransportError(f"it speaks version {hello.layout.version}, not {SHADOW_VERSION}")
        if (newest := self._epochs.get(_source(hello), hello.epoch)) > hello.epoch:
            raise TransportError(f"epoch {newest} of this group has been here")
        if different:
            raise TransportError("; ".join(different))

    def _close(self, sender: _Peer) -> None:
        session = self._sessions.pop(sender)
        for request in session.requests:
            self._store.end(request)
        session.window.close()

    def _in_session(self, sender: _Peer, message: Parcel | Ended | Forget | Still, along: bytes | None = None) -> None:
        session = self._sessions.get(sender)
        if session is None or session.hello.session != message.session:
            self._reject("of no session")
            # Its connection broke and is another now: what was on its way is lost. Of an older session it is no news.
            self._send(sender, Resync(session=message.session, reason="there is no such session"))
            return
        if message.sequence != session.next_sequence:
            expected = session.next_sequence
            self._resync(sender, f"frame {message.sequence} came where {expected} was due")
            return
        session.next_sequence += 1
        session.heard_at = time.monotonic()
        session.acknowledge = True
        if isinstance(message, Parcel):
            self._take(sender, session, message, along)
        elif isinstance(message, Ended):
            request = _own(session, message.request)
            session.requests.discard(request)
            self._store.end(request)
        elif isinstance(message, Forget):
            self._store.clear()
            session.clears += 1
            session.requests.clear()

    def _take(self, sender: _Peer, session: _Session, parcel: Parcel, along: bytes | None) -> None:
        blocks = len(parcel.keys)
        size = blocks * self._layout.block_bytes
        inside = parcel.offset >= 0 and parcel.offset + size <= session.hello.window_bytes
        digests = 0 if session.transport.authentic else blocks
        if not blocks or len(parcel.crcs) != blocks or len(parcel.digests) != digests or not inside:
            self._resync(sender, f"parcel {parcel.sequence} contradicts itself")
            return
        token_bytes = size // self._layout.token_bytes * array("q").itemsize
        if len(parcel.tokens) != token_bytes or not belong(parcel.keys, parcel.parent, parcel.tokens):
            self._resync(sender, f"parcel {parcel.sequence} has other tokens than its keys")
            return
        try:
            data = session.window.read(parcel.offset, size, along).reshape(blocks, -1)
        except TransportError as reason:
            self._resync(sender, f"parcel {parcel.sequence}: {reason}")
            return
        request = None
        if parcel.request is not None:
            request = _own(session, parcel.request)
            session.requests.add(request)
        try:
            session.gone += self._store.put(
                parcel.keys, parcel.parent, parcel.crcs, parcel.tokens, parcel.origin, data, request, parcel.digests
            )
        except DamagedBlock:
            self._resync(sender, f"a block of parcel {parcel.sequence} has another checksum or digest")

    def _resync(self, sender: _Peer, reason: str) -> None:
        session = self._sessions[sender]
        self._reject(f"session of worker group {session.hello.group} (epoch {session.hello.epoch}) ended: {reason}")
        self._begin_again(sender, reason)

    def _begin_again(self, sender: _Peer, reason: str) -> None:
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

    def _send(self, receiver: _Peer, message: FromStore) -> None:
        number, name = receiver
        try:
            self._ports[number].socket.send_multipart([name, frame(message)], zmq.NOBLOCK)
        except zmq.ZMQError:
            pass  # a source that does not read, or is gone: it begins again when it misses the answer

    def _reject(self, why: str) -> None:
        self._counters.rejected_frames += 1
        logger.warning("shadow store: %s", why)


def _source(hello: Hello) -> tuple[str, str]:
    return hello.launch, hello.group


def _own(session: _Session, request: bytes) -> bytes:
    """Two sources may use the same name for a request."""
    return session.hello.session.encode() + request
