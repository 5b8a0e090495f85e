"""What the two sockets of the cluster's protocol have in common, and a group's, a DEALER; a frontend's is in `router`.

They carry frames and know none. ZMQ does not tell a reader that a connection ended; its monitor does, within
milliseconds of a process's death. Nothing waits, except `poll`, and nothing grows with what others do: frames have a
size, and ZMQ keeps no more of them than its high-water marks say.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import parse_monitor_message

from sglang_kevlar.cluster.keys import ClusterKey, KeyProblem, is_loopback, secure_client
from sglang_kevlar.control.session import MAX_UNSEEN
from sglang_kevlar.protocol.cluster import MAX_FRAME_BYTES

#: messages that ZMQ keeps for one peer, after the session has said that it does not read, and of one
SEND_HWM, RECEIVE_HWM = MAX_UNSEEN + 10_000, 200
#: what is read in one go
FRAMES_AT_ONCE, BYTES_AT_ONCE = 200, 16 << 20
#: events of connections that may wait for us; ZMQ's thread waits when there are more, and so do new connections
MONITOR_HWM = 20_000
#: milliseconds; with no reconnecting at all, ZMQ drops what came just before the end of a connection
NEVER = 1 << 29

_CLOSED = (
    zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_CONNECT_RETRIED  # alone, when a name has no address
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


@dataclass(frozen=True)
class Frame:
    #: empty at a DEALER
    sender: bytes
    data: bytes


@dataclass(frozen=True)
class Misshapen:
    """A message of another number of frames than ours have."""

    sender: bytes
    problem: str


@dataclass(frozen=True)
class Connected:
    """Of a DEALER: the other side has the key, too."""


@dataclass(frozen=True)
class Closed:
    sender: bytes
    reason: str


Arrival = Frame | Misshapen | Connected | Closed


def split_address(address: str) -> tuple[str, int]:
    """``HOST:PORT`` or ``[V6]:PORT``. A name stands for its IPv4 address. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host, int(port)


class Monitor:
    """What ZMQ says of a socket's connections, in the order in which it happened."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], of: zmq.Socket[bytes], events: int) -> None:
        self._of = of
        endpoint = f"inproc://connections-{id(self):x}-{time.monotonic_ns():x}"
        of.monitor(endpoint, events)
        self._socket = context.socket(zmq.PAIR)
        self._socket.setsockopt(zmq.RCVHWM, MONITOR_HWM)
        self._socket.connect(endpoint)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._socket

    def next(self) -> tuple[int, int] | None:
        """Event and value."""
        try:
            message = parse_monitor_message(self._socket.recv_multipart(zmq.NOBLOCK))
        except zmq.Again:
            return None
        return int(message["event"]), int(message["value"])

    def close(self) -> None:
        self._of.disable_monitor()
        self._socket.close(linger=0)


def receive(socket: zmq.Socket[bytes]) -> list[zmq.Frame] | None:
    """A message, if there is one."""
    try:
        return socket.recv_multipart(zmq.NOBLOCK, copy=False)
    except zmq.Again:
        return None


def wait(seconds: float, *sockets: zmq.Socket[bytes]) -> None:
    poller = zmq.Poller()
    for socket in sockets:
        poller.register(socket, zmq.POLLIN)
    poller.poll(int(max(0.0, seconds) * 1000))


class Dealer:
    """A group's connection to a frontend. One, once: when it is closed it stays closed."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str, key: ClusterKey | None) -> None:
        """Raises KeyProblem, ValueError, or zmq.ZMQError for an address that is none."""
        host, port = split_address(address)
        if key is None and not is_loopback(host):
            raise KeyProblem(f"without a cluster key only a loopback address can be joined, not {host}")
        self._keyed = key is not None
        self._connected = self._closed = False
        self._socket = context.socket(zmq.DEALER)
        secure_client(self._socket, key)
        for option, value in (
            (zmq.MAXMSGSIZE, MAX_FRAME_BYTES),
            (zmq.SNDHWM, SEND_HWM),
            (zmq.RCVHWM, RECEIVE_HWM),
            (zmq.LINGER, 500),
            (zmq.RECONNECT_IVL, NEVER),
            (zmq.IPV6, int(":" in host)),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = Monitor(context, self._socket, zmq.EVENT_HANDSHAKE_SUCCEEDED | _CLOSED)
        try:
            self._socket.connect(f"tcp://{host}:{port}")
        except zmq.ZMQError:
            self.close()
            raise

    @property
    def fds(self) -> list[int]:
        return [int(self._socket.getsockopt(zmq.FD)), int(self._monitor.socket.getsockopt(zmq.FD))]

    @property
    def sockets(self) -> list[zmq.Socket[bytes]]:
        """The same for a poller of ZMQ's."""
        return [self._socket, self._monitor.socket]

    def poll(self, seconds: float) -> None:
        wait(seconds, *self.sockets)

    def read(self) -> tuple[list[Arrival], bool]:
        """What has arrived, and whether there may be more. Nothing comes after `Closed`."""
        arrivals: list[Arrival] = []
        if self._closed:
            return arrivals, False
        size, reason = 0, None
        while reason is None and (event := self._monitor.next()) is not None:
            if event[0] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
                arrivals.append(Connected())
            else:
                reason = self._why(event[0])
        while len(arrivals) < FRAMES_AT_ONCE and size < BYTES_AT_ONCE:
            frames = receive(self._socket)
            if frames is None:
                break
            size += sum(map(len, frames))
            if len(frames) != 1:
                arrivals.append(Misshapen(b"", f"a message of {len(frames)} frames"))
                continue
            arrivals.append(Frame(b"", frames[0].bytes))
        else:
            if reason is None:
                return arrivals, True
            # The rest of what came before the end is read by nobody: more than a go of it, and all of it in vain.
        if reason is not None:
            self._closed = True
            arrivals.append(Closed(b"", reason))
        return arrivals, False

    def send(self, data: bytes) -> bool:
        """Never waits. False: there is no room for it."""
        try:
            self._socket.send(data, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        """What was sent still goes out, for half a second at most."""
        self._closed = True
        self._monitor.close()
        self._socket.close()

    def _why(self, event: int) -> str:
        if self._connected:
            return "its connection ended"
        if event in (zmq.EVENT_CLOSED, zmq.EVENT_CONNECT_RETRIED):
            return "cannot connect"
        mine = "with the cluster key of this group" if self._keyed else "without a cluster key"
        return f"the connection ended before it was set up, {mine}: it needs the frontend's"
