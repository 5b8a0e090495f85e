"""Asks a rank of a server with ``--allow-chaos`` to do harm to itself."""

from __future__ import annotations

import msgspec
import zmq

from sglang_kevlar.protocol.chaos import Obeyed, Order

#: milliseconds within which a rank answers
PATIENCE = 5000


class Disobeyed(Exception):
    """The rank did not do it; the message says why."""


def ask(endpoint: str, order: Order) -> Obeyed:
    """Waits for the answer, in a thread of the caller's choice. Raises Disobeyed."""
    socket: zmq.Socket[bytes]
    with zmq.Context.instance().socket(zmq.REQ) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(endpoint)
        socket.send(msgspec.json.encode(order))
        if not socket.poll(PATIENCE):
            raise Disobeyed(f"no answer within {PATIENCE / 1000:g} s from {endpoint}")
        answer = msgspec.json.decode(socket.recv(), type=Obeyed)
    if answer.error:
        raise Disobeyed(answer.error)
    return answer
