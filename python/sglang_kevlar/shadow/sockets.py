"""Sockets and frames between ranks that shadow each other, and ranks of a group that ask each other's stores.

A frame is a message behind the CRC32 of it. That is against accident; KV has checksums of its own (`Parcel.crcs`).
"""

from __future__ import annotations

import zlib
from typing import TypeVar

import msgspec
import zmq

from sglang_kevlar.protocol.shadow import FromStore, ToStore

MAX_FRAME_BYTES = 16 << 20
_CRC_BYTES = 4

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


def dial(endpoint: str, socket_class: type[zmq.Socket[bytes]] = zmq.Socket) -> zmq.Socket[bytes]:
    """To the store of a rank, which need not be there yet."""
    socket: zmq.Socket[bytes] = socket_class(zmq.Context.instance(), zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.connect(endpoint)
    return socket


def listen(endpoint: str) -> zmq.Socket[bytes]:
    """Of the store of this rank."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(endpoint)
    return socket
