"""Sessions with the other frontends: one with each, dialled by the one whose name comes first."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping
from typing import Protocol

import msgspec

from sglang_kevlar.cluster.dialler import Dialler
from sglang_kevlar.cluster.keys import ClusterKey
from sglang_kevlar.cluster.listener import Listener
from sglang_kevlar.control.group_end import GroupEnd
from sglang_kevlar.control.session import Admitted, Ended, Event, Joined, NotJoined, OutputsArrived, RequestsArrived
from sglang_kevlar.protocol.cluster import Configuration, GroupState, Identity
from sglang_kevlar.protocol.records import PeerMessage, decoder, encode

logger = logging.getLogger(__name__)

#: bytes of messages that go as one
PIECE = 4 << 20
#: a frontend has no incarnations of a group
_EPOCH = 0
_STATE = GroupState(epoch=_EPOCH, phase="ready")


class LinkHandler(Protocol):
    """What becomes of sessions with other frontends."""

    def joined(self, peer: Identity) -> None:
        """What is sent from now on arrives, in order, or the session ends."""

    def arrived(self, name: str, messages: list[PeerMessage]) -> None: ...

    def left(self, name: str) -> None: ...


class PeerLinks:
    """On the event loop. ``addresses``: of the other frontends, by name, where each of them listens."""

    def __init__(
        self,
        identity: Identity,
        addresses: Mapping[str, str],
        configuration: Configuration,
        key: ClusterKey | None,
        listener: Listener,
        handler: LinkHandler,
    ) -> None:
        self._identity = identity
        self._addresses = addresses
        self._listener = listener
        self._handler = handler
        now = time.monotonic()
        self._diallers = {
            name: Dialler(
                address,
                key,
                GroupEnd(identity, configuration, _STATE, now),
                functools.partial(self._on_dialled, name),
            )
            for name, address in addresses.items()
            if name > identity.name
        }
        #: of those that dialled us, with a session: name by session, and back
        self._names: dict[str, str] = {}
        self._sessions: dict[str, str] = {}

    def start(self) -> None:
        for dialler in self._diallers.values():
            dialler.start()

    def close(self) -> None:
        for dialler in self._diallers.values():
            dialler.close("the frontend ends")

    def send(self, name: str, messages: list[PeerMessage]) -> None:
        """To a peer without a session it goes nowhere."""
        pieces: list[bytes] = []
        size = 0
        for message in messages:
            piece = encode(message)
            if pieces and size + len(piece) > PIECE:
                self._send_pieces(name, pieces)
                pieces, size = [], 0
            pieces.append(piece)
            size += len(piece)
        self._send_pieces(name, pieces)

    def reject(self, name: str, problem: str) -> None:
        """What it says cannot be: its session ends, and the next begins anew."""
        if (session := self._sessions.get(name)) is not None:
            self._listener.end(session, problem)
        elif name in self._diallers:
            self._diallers[name].reject(problem)

    def _send_pieces(self, name: str, pieces: list[bytes]) -> None:
        payload = msgspec.msgpack.encode([msgspec.Raw(piece) for piece in pieces])
        try:
            if (session := self._sessions.get(name)) is not None:
                self._listener.requests(session, _EPOCH, payload)
            elif name in self._diallers:
                self._diallers[name].outputs(_EPOCH, payload)
        except ValueError as too_large:
            self.reject(name, str(too_large))

    def owns(self, event: Event) -> bool:
        """Whether this event of the listener is of a session with a frontend."""
        if isinstance(event, Joined):
            return event.identity.kind == "frontend"
        return getattr(event, "session", None) in self._names

    def on_session(self, event: Event) -> None:
        """An event of a session that a frontend dialled."""
        if isinstance(event, Joined):
            name = event.identity.name
            if name not in self._addresses:
                self._listener.end(event.session, f"frontend {self._identity.name} has no {name} in its --peers")
                return
            if name > self._identity.name:
                self._listener.end(event.session, f"frontend {self._identity.name} dials {name}, not the other way")
                return
            self._names[event.session] = name
            self._sessions[name] = event.session
            self._joined(event.identity)
        elif isinstance(event, OutputsArrived):
            self._arrived(self._names[event.session], event.payload)
        elif isinstance(event, Ended):
            name = self._names.pop(event.session)
            del self._sessions[name]
            self._ended(name, event)

    def _on_dialled(self, name: str, event: Event) -> None:
        if isinstance(event, Admitted):
            peer = event.identity
            if peer is None or (peer.kind, peer.name) != ("frontend", name):
                found = "no frontend with --peers" if peer is None else f"frontend {peer.name}"
                logger.error("--peers: at %s there is %s, not %s", self._addresses[name], found, name)
                self._diallers[name].reject(f"it is not {name}")
                return
            self._joined(peer)
        elif isinstance(event, RequestsArrived):
            self._arrived(name, event.payload)
        elif isinstance(event, Ended):
            self._ended(name, event)
        elif isinstance(event, NotJoined) and event.retry_s is None:
            logger.error("frontend %s refuses this one for good: %s", name, event.reason)

    def _joined(self, peer: Identity) -> None:
        logger.info("frontend %s (%s) is there", peer.name, peer.url)
        self._handler.joined(peer)

    def _arrived(self, name: str, payload: bytes) -> None:
        try:
            messages = decoder.decode(payload)
        except (msgspec.MsgspecError, ValueError) as error:
            self.reject(name, f"records that cannot be read: {error}"[:300])
            return
        try:
            self._handler.arrived(name, messages)
        except Exception:
            # It would wait for ever for what was not taken in.
            logger.exception("what frontend %s says", name)
            self.reject(name, "what it says cannot be taken in")

    def _ended(self, name: str, event: Ended) -> None:
        logger.warning("the session with frontend %s ended: %s: %s", name, event.kind, event.reason)
        self._handler.left(name)
