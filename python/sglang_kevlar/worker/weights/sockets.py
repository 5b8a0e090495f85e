"""Sockets between ranks that hand weights over, and their messages; the bytes of a piece are a second part of it.

Through a file of the run directory between ranks of one launch, over TCP with the cluster's key between hosts.
"""

from __future__ import annotations

import contextlib
import os
from typing import TypeVar

import msgspec
import zmq

from sglang_kevlar.shadow import sockets
from sglang_kevlar.shadow.sockets import Network

#: bytes of a message; the layout of a model with some ten thousand tensors
LARGEST = 64 << 20
_T = TypeVar("_T")


class TransferError(Exception):
    """The weights were not taken over; the message says why."""

    def __init__(self, reason: str, busy: bool = False) -> None:
        """``busy``: they were just being changed, so it may succeed in a moment."""
        super().__init__(reason)
        self.busy = busy


def listen(network: Network, address: str) -> tuple[zmq.Socket[bytes], str]:
    """``address``: an ipc endpoint, or a host to be reached at over TCP. And the endpoint.

    Raises TransportError or TransferError.
    """
    if not address.startswith("ipc://"):
        return network.listen(address, LARGEST)
    try:
        socket = sockets.listen(address)
        socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
    except zmq.ZMQError as error:
        raise TransferError(f"cannot listen on {address}: {error}") from None
    return socket, address


def close(socket: zmq.Socket[bytes], endpoint: str) -> None:
    # For the last word, which says why. Nobody waits for it.
    socket.close(linger=1000)
    if endpoint.startswith("ipc://"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(endpoint.removeprefix("ipc://"))


def decode(data: memoryview | bytes, decoder: msgspec.msgpack.Decoder[_T]) -> _T:
    """Raises TransferError."""
    try:
        return decoder.decode(data)
    except msgspec.DecodeError as error:
        raise TransferError(f"a message that is none: {error}") from None
