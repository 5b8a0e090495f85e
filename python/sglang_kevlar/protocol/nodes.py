"""Orders of the first node of a group on several hosts to the others (in `protocol.cluster.Requests`)."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from sglang_kevlar.protocol.cluster import Short


class StartNode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="start"):
    """Start the ranks of this node, which meet the others at an address that is new for each epoch."""

    host: Short
    port: Annotated[int, Meta(ge=1, le=65535)]


def encode(order: StartNode) -> bytes:
    return msgspec.msgpack.encode(order)


def decode(payload: bytes) -> StartNode:
    """Raises ValueError."""
    return msgspec.msgpack.decode(payload, type=StartNode)
