"""A frontend's socket in the cluster: a ROUTER that knows which connection a sender has, and when it is gone.

ZMQ's monitor names connections by file descriptor, and so does each frame that comes over one, so a sender is known by
the connection of its first frame. Descriptors are used again. What the monitor said *before* a frame came is therefore
read before the frame is believed, and a sender whose connection is gone stays forgotten.

Connections are counted, and closed for cause.
"""

from __future__ import annotations

import contextlib
import os
import socket as tcp
from collections import deque
from dataclasses import dataclass

import zmq

from sglang_kevlar.cluster.keys import ClusterKey, KeyProblem, admit_only, is_loopback, secure_server
from sglang_kevlar.cluster.sockets import (
    BYTES_AT_ONCE,
    FRAMES_AT_ONCE,
    RECEIVE_HWM,
    SEND_HWM,
    Arrival,
    Closed,
    Frame,
    Misshapen,
    Monitor,
    receive,
    split_address,
    wait,
)
from sglang_kevlar.protocol.cluster import MAX_FRAME_BYTES

#: connections of a frontend, in whatever state; above that the oldest without a session goes
MAX_CONNECTIONS = 512
#: seconds that a connection may be without a session
UNJOINED_TIME = 10.0
#: seconds between the last word to a peer and the end of its connection, which the peer should end itself
FAREWELL_TIME = 1.0
#: seconds that frames of a connection that ended are still read for before its end is told
LATE_FRAMES_TIME = 0.2
#: senders whose late frames are dropped
MAX_FORGOTTEN = 4_096


@dataclass
class _Connection:
    fd: int
    #: monotonic seconds
    accepted: float
    #: as ZMQ names it, from its first frame on
    sender: bytes | None = None
    joined: bool = False
    #: no more is read of it, and when it is closed if it is still there
    leaving: float | None = None


class Router:
    """A frontend's socket."""

    def __init__(self, address: str, key: ClusterKey | None) -> None:
        """``address``: HOST:PORT; port 0 takes a free one. Raises KeyProblem, ValueError, or zmq.ZMQError."""
        name, port = split_address(address)
        host = _interface(name)
        if key is None and not is_loopback(host):
            raise KeyProblem(f"without a cluster key only a loopback address can be listened on, not {name}")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._admission = admit_only(self._context, key)
        self._socket = self._context.socket(zmq.ROUTER)
        secure_server(self._socket, key)
        for option, value in (
            (zmq.ROUTER_MANDATORY, 1),
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.SNDHWM, SEND_HWM),
            (zmq.RCVHWM, RECEIVE_HWM),
            (zmq.LINGER, 500),
            (zmq.IPV6, int(":" in host)),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = Monitor(self._context, self._socket, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._connections: dict[int, _Connection] = {}
        self._senders: dict[bytes, _Connection] = {}
        #: senders whose connection ended, and since when, until what they had sent is read
        self._ended: deque[tuple[float, bytes]] = deque()
        self._forgotten: dict[bytes, None] = {}
        try:
            self._socket.bind(f"tcp://{host}:{port or '*'}")
        except zmq.ZMQError:
            self.close()
            raise
        bound = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        #: HOST:PORT, with the port that was taken
        self.address = bound.removeprefix("tcp://").rstrip("\0")
        self._port = split_address(self.address)[1]

    @property
    def fds(self) -> list[int]:
        """Readable when there may be something to `read`; edges only, so read until nothing is left."""
        return [int(self._socket.getsockopt(zmq.FD)), int(self._monitor.socket.getsockopt(zmq.FD))]

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The same for a poller of ZMQ's."""
        return [self._socket, self._monitor.socket]

    @property
    def connections(self) -> int:
        return len(self._connections)

    def poll(self, seconds: float) -> None:
        """Wait until there may be something to read."""
        wait(seconds, *self.sockets)

    def read(self, now: float) -> tuple[list[Arrival], bool]:
        """What has arrived, and whether there may be more."""
        arrivals: list[Arrival] = []
        size = 0
        self._watch(now)
        read = 0  # with those that nobody is to see
        while read < FRAMES_AT_ONCE and size < BYTES_AT_ONCE:
            frames = receive(self._socket)
            if frames is None:
                self._tell_ended(arrivals, now)
                return arrivals, False
            read += 1
            size += sum(map(len, frames))
            sender = frames[0].bytes
            if not self._heard(sender, frames[0], arrivals, now):
                continue
            if len(frames) != 2:
                arrivals.append(Misshapen(sender, f"a message of {len(frames) - 1} frames"))
                continue
            arrivals.append(Frame(sender, frames[1].bytes))
        self._tell_ended(arrivals, now - LATE_FRAMES_TIME)
        return arrivals, True

    def send(self, sender: bytes, data: bytes) -> bool:
        """Never waits. False: there is no room for it. To one that is gone nothing is sent; that it is gone is told."""
        try:
            self._socket.send_multipart([sender, data], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        return True

    def joined(self, sender: bytes) -> None:
        """Its connection may stay."""
        if (connection := self._senders.get(sender)) is not None:
            connection.joined = True

    def is_left(self, sender: bytes) -> bool:
        """Whether what has arrived of it is not to be looked at any more."""
        connection = self._senders.get(sender)
        return connection is not None and connection.leaving is not None

    def hang_up(self, sender: bytes, now: float) -> None:
        """Read no more of it, and close its connection if it does not do so itself."""
        connection = self._senders.get(sender)
        if connection is not None and connection.leaving is None:
            connection.joined = False
            connection.leaving = now + FAREWELL_TIME

    def tick(self, now: float) -> None:
        """Close connections that have had their time."""
        self._watch(now)
        for connection in list(self._connections.values()):
            limit = connection.accepted + UNJOINED_TIME if connection.leaving is None else connection.leaving
            if not connection.joined and now > limit:
                self._cut(connection, now)

    def close(self) -> None:
        self._monitor.close()
        self._socket.close()
        if self._admission is not None:
            self._admission.stop()
        self._context.term()

    def _watch(self, now: float) -> None:
        """Read what the monitor has to say of connections."""
        while (event := self._monitor.next()) is not None:
            what, fd = event
            if what == zmq.EVENT_ACCEPTED:
                self._connections[fd] = _Connection(fd, now)
                if len(self._connections) > MAX_CONNECTIONS:
                    self._make_room(now)
            elif (connection := self._connections.get(fd)) is not None:
                self._lose(connection, now)

    def _lose(self, connection: _Connection, now: float) -> None:
        del self._connections[connection.fd]
        if connection.sender is not None:
            self._ended.append((now, connection.sender))

    def _make_room(self, now: float) -> None:
        """The oldest goes: who has the key needs milliseconds to join."""
        oldest = next((each for each in self._connections.values() if not each.joined), None)
        if oldest is not None:
            self._cut(oldest, now)

    def _heard(self, sender: bytes, frame: zmq.Frame, arrivals: list[Arrival], now: float) -> bool:
        """Whether a frame of this sender is to be read. Makes a new sender known."""
        known = self._senders.get(sender)
        if known is not None:
            return known.leaving is None
        if sender in self._forgotten or not _is_given(sender):
            return False
        fd = int(frame.get(zmq.SRCFD))
        self._watch(now)
        connection = self._connections.get(fd)
        if connection is None:
            return False
        if connection.sender is not None:
            # One connection has one sender: the earlier one was gone when this descriptor was given away again.
            if _is_before(sender, connection.sender):
                return False
            arrivals.append(Closed(connection.sender, "its connection ended"))
            self._forget(connection.sender)
            connection.joined, connection.leaving = False, None
        connection.sender = sender
        self._senders[sender] = connection
        return True

    def _tell_ended(self, arrivals: list[Arrival], until: float) -> None:
        """All that they had sent is read, or there is too much to wait for."""
        while self._ended and self._ended[0][0] <= until:
            _, sender = self._ended.popleft()
            if sender in self._senders:
                arrivals.append(Closed(sender, "its connection ended"))
                self._forget(sender)

    def _forget(self, sender: bytes) -> None:
        del self._senders[sender]
        self._forgotten[sender] = None
        if len(self._forgotten) > MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]

    def _cut(self, connection: _Connection, now: float) -> None:
        """Close a connection from under ZMQ, which has no call for it, and sees it end as if the peer had closed it.

        The descriptor may be another file by now. Only a connection of this very socket is touched, which dials again
        if it is not the one that was meant.
        """
        self._lose(connection, now)
        with contextlib.suppress(OSError):
            fd = os.dup(connection.fd)
            try:
                with tcp.socket(fileno=fd) as duplicate:
                    fd = -1
                    if duplicate.getsockname()[1] == self._port:
                        duplicate.shutdown(tcp.SHUT_RDWR)
            finally:
                if fd != -1:
                    os.close(fd)


def _is_given(sender: bytes) -> bool:
    """Whether the ROUTER gave this name. One that a peer gave itself tells nothing of when it came."""
    return len(sender) == 5 and sender[0] == 0


def _is_before(sender: bytes, other: bytes) -> bool:
    """Of names that a ROUTER gave: it counts, in 32 bits."""
    return (int.from_bytes(sender[1:], "big") - int.from_bytes(other[1:], "big")) % 2**32 >= 2**31


def _interface(host: str) -> str:
    """ZMQ listens on an address, and looks no name up for that. Raises ValueError."""
    if host == "*" or ":" in host:
        return host
    try:
        return str(tcp.getaddrinfo(host, None, tcp.AF_INET, tcp.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ValueError(f"cannot listen on {host!r}: {error}") from None
