"""Sockets between the ranks that shadow each other, and between the ranks of a group that ask each other's stores."""

from __future__ import annotations

import zmq

MAX_FRAME_BYTES = 16 << 20


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
