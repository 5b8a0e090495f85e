"""What frontends tell each other of requests that outlive them, so that another one can go on with them.

A record of a request is all that its endpoint saw: the HTTP request, and, in order, each output that it was given. What
the endpoint makes of that is the same wherever it runs, so a peer that has the record can make the same events of it
and go on behind the last.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

Rid: TypeAlias = Annotated[str, Meta(max_length=256)]


class HttpRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Enough to run its endpoint again."""

    method: Annotated[str, Meta(max_length=16)]
    path: Annotated[str, Meta(max_length=4096)]
    query: Annotated[bytes, Meta(max_length=65_536)]
    headers: Annotated[list[tuple[bytes, bytes]], Meta(max_length=256)]
    body: bytes


class Opened(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="opened"):
    rid: Rid
    #: digest of the API key, and the Idempotency-Key
    principal: Annotated[str, Meta(max_length=128)]
    key: Annotated[str, Meta(max_length=255)]
    #: frontends that had it before, and the tokens up to which each of them counts (`control.lineage`)
    before: Annotated[list[tuple[str, int]], Meta(max_length=1024)] = []
    request: HttpRequest


class Yielded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="yielded"):
    """One output that the endpoint is about to be given."""

    rid: Rid
    #: counts the outputs of the request from 0
    number: Annotated[int, Meta(ge=0)]
    #: output tokens of the request with this one
    offset: Annotated[int, Meta(ge=0)]
    #: upstream's messages of which it is made (msgpack), each of this request alone
    messages: list[bytes]


class Ended(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ended"):
    """There will be no more output. ``failure``: (status, message, kind, retry after) that the endpoint was told."""

    rid: Rid
    failure: tuple[int, str, str, int | None] | None = None


class Dropped(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dropped"):
    """Nobody will ask for it any more, or it cannot be taken up again. ``why``: half a sentence."""

    rid: Rid
    why: Annotated[str, Meta(max_length=1000)]


class Complete(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="complete"):
    """Everything that was there when the session began has been said."""


class Taken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="taken"):
    """The first ``count`` messages of the session, these not counted, have been taken in. It comes behind what was
    published here before that, so a request that both sides have begun is known before it counts as safe."""

    count: Annotated[int, Meta(ge=0)]


Record: TypeAlias = Opened | Yielded | Ended | Dropped
#: a payload between frontends is a list of these
PeerMessage: TypeAlias = Record | Complete | Taken

decoder: msgspec.msgpack.Decoder[list[PeerMessage]] = msgspec.msgpack.Decoder(list[PeerMessage])
encode = msgspec.msgpack.Encoder().encode


def size_of(record: Record) -> int:
    """Bytes of memory, about."""
    if isinstance(record, Opened):
        request = record.request
        headers = sum(len(name) + len(value) for name, value in request.headers)
        return 512 + len(request.body) + len(request.query) + len(request.path) + headers
    if isinstance(record, Yielded):
        return 128 + sum(map(len, record.messages))
    return 128
