"""Sockets and frames between ranks that shadow each other, and ranks of a group that ask each other's stores.

A frame is a message behind the CRC32 of it. That is against accident; KV has checksums of its own (`Parcel.crcs`).
Between ranks of one launch they travel through files that only its user reaches; between hosts over TCP, where both
ends have to hold the cluster's key.
"""

from __future__ import annotations

import socket as network
import zlib
from typing import TypeVar
from urllib.parse import urlsplit

import msgspec
import zmq

from sglang_kevlar.cluster.keys import ClusterKey, admit_only, is_loopback, secure_client, secure_server
from sglang_kevlar.protocol.shadow import FromStore, ToStore
from sglang_kevlar.transport import TransportError

MAX_FRAME_BYTES = 16 << 20
_CRC_BYTES = 4
#: messages that may wait for a store which does not read, where nothing else is said
UNREAD = 1000

_Message = TypeVar("_Message")


def frame(message: ToStore | FromStore) -> bytes:
    content = msgspec.msgpack.encode(message)
    return zlib.crc32(content).to_bytes(_CRC_BYTES, "little") + content


def unframe(data: bytes, decoder: msgspec.msgpack.Decoder[_Message]) -> _Message:
    """Raises ValueError (msgspec.DecodeError is one): damaged on its way, or not a message of this type."""
    content = memoryview(data)[_CRC_BYTES:]
    if len(data) < _CRC_BYTES or zlib.crc32(content) != int.from_bytes(data[:_CRC_BYTES], "little"):
        raise ValueError("its checksum is wrong")
    return decoder.decode(content)


def dial(endpoint: str, unread: int = UNREAD, socket_class: type[zmq.Socket[bytes]] = zmq.Socket) -> zmq.Socket[bytes]:
    """To the store of a rank of this launch, which need not be there yet. ``unread``: messages that may wait for it."""
    socket = _dealer(zmq.Context.instance(), socket_class, unread)
    socket.connect(endpoint)
    return socket


def listen(endpoint: str) -> zmq.Socket[bytes]:
    """Of the store of this rank, for those of its launch."""
    socket = _router(zmq.Context.instance(), MAX_FRAME_BYTES)
    socket.bind(endpoint)
    return socket


class Network:
    """A rank's sockets to and from ranks of other hosts."""

    def __init__(self, key: ClusterKey | None) -> None:
        self._key = key
        # Of its own: upstream's sockets are not to be asked whom they let in.
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._admission = admit_only(self._context, key)

    def listen(self, host: str, largest: int) -> tuple[zmq.Socket[bytes], str]:
        """Of the store of this rank, and where it is reached. ``largest``: bytes that come along with a message.

        Raises TransportError.
        """
        self._check(host)
        socket = _router(self._context, max(MAX_FRAME_BYTES, largest))
        secure_server(socket, self._key)
        try:
            family, *_, address = network.getaddrinfo(host, None, type=network.SOCK_STREAM)[0]
            where = f"[{address[0]}]" if family == network.AF_INET6 else address[0]
            socket.setsockopt(zmq.IPV6, family == network.AF_INET6)
            port = socket.bind_to_random_port(f"tcp://{where}")
        except (OSError, zmq.ZMQError, zmq.ZMQBindError) as error:
            socket.close()
            raise TransportError(f"cannot listen on {host}: {error}") from None
        return socket, f"tcp://{where}:{port}"

    def dial(
        self, endpoint: str, unread: int = UNREAD, socket_class: type[zmq.Socket[bytes]] = zmq.Socket
    ) -> zmq.Socket[bytes]:
        """To the store of a rank anywhere. Raises TransportError."""
        if not is_network(endpoint):
            return dial(endpoint, unread, socket_class)
        host = urlsplit(endpoint).hostname or ""
        self._check(host)
        socket = _dealer(self._context, socket_class, unread)
        socket.setsockopt(zmq.IPV6, ":" in host)
        secure_client(socket, self._key)
        socket.connect(endpoint)
        return socket

    def close(self) -> None:
        """Its sockets are closed."""
        if self._admission is not None:
            self._admission.stop()
        self._context.term()

    def _check(self, host: str) -> None:
        if self._key is None and not is_loopback(host):
            raise TransportError(f"without a cluster key there is no shadow to or from {host}")


def is_network(endpoint: str) -> bool:
    return endpoint.startswith("tcp://")


def _dealer(
    context: zmq.Context[zmq.Socket[bytes]], socket_class: type[zmq.Socket[bytes]], unread: int
) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = socket_class(context, zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, unread)
    return socket


def _router(context: zmq.Context[zmq.Socket[bytes]], largest: int) -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, largest)
    socket.setsockopt(zmq.LINGER, 0)
    return socket
