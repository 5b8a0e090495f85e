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
#: digest of an API key
Principal: TypeAlias = Annotated[str, Meta(max_length=128)]
#: principal and id: two clients may choose the same id
Name: TypeAlias = tuple[str, str]

MAX_PATH, MAX_QUERY, MAX_HEADERS = 4096, 65_536, 256
#: bytes of one record; it travels whole, and a frame takes some more than this
MAX_RECORD = 32 << 20


class HttpRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Enough to run its endpoint again."""

    method: Annotated[str, Meta(max_length=16)]
    path: Annotated[str, Meta(max_length=MAX_PATH)]
    query: Annotated[bytes, Meta(max_length=MAX_QUERY)]
    headers: Annotated[list[tuple[bytes, bytes]], Meta(max_length=MAX_HEADERS)]
    body: bytes
    #: where the application is mounted; ``path`` may begin with it
    root_path: Annotated[str, Meta(max_length=MAX_PATH)] = ""


class Opened(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="opened"):
    rid: Rid
    principal: Principal
    #: its Idempotency-Key
    key: Annotated[str, Meta(max_length=255)]
    #: frontends that had it before, and the tokens up to which each of them counts (`control.lineage`)
    before: Annotated[list[tuple[str, int]], Meta(max_length=1024)] = []
    request: HttpRequest


class Yielded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="yielded"):
    """One output that the endpoint is about to be given."""

    rid: Rid
    principal: Principal
    #: counts the outputs of the request from 0
    number: Annotated[int, Meta(ge=0)]
    #: output tokens of the request with this one
    offset: Annotated[int, Meta(ge=0)]
    #: upstream's messages of which it is made (msgpack), each of this request alone
    messages: list[bytes]


class Ended(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="ended"):
    """There will be no more output. ``failure``: (status, message, kind, retry after) that the endpoint was told."""

    rid: Rid
    principal: Principal
    failure: tuple[int, str, str, int | None] | None = None


class Alone(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="alone"):
    """It goes on at this frontend only: no more of its outputs are recorded, and it cannot be taken up by another.
    ``why``: half a sentence."""

    rid: Rid
    principal: Principal
    why: Annotated[str, Meta(max_length=1000)]


class Dropped(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="dropped"):
    """Nobody will ask for it any more. ``why``: half a sentence."""

    rid: Rid
    principal: Principal
    why: Annotated[str, Meta(max_length=1000)]


class Complete(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="complete"):
    """Everything that was there when the session began has been said."""


class Taken(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="taken"):
    """The first ``count`` messages of the session, these not counted, have been taken in. It comes behind what was
    published here before that, so a request that both sides have begun is known before it counts as safe."""

    count: Annotated[int, Meta(ge=0)]


Record: TypeAlias = Opened | Yielded | Ended | Alone | Dropped
#: a payload between frontends is a list of these
PeerMessage: TypeAlias = Record | Complete | Taken

decoder: msgspec.msgpack.Decoder[list[PeerMessage]] = msgspec.msgpack.Decoder(list[PeerMessage])
encode = msgspec.msgpack.Encoder().encode


def name_of(record: Record) -> Name:
    return record.principal, record.rid


def without_content(opened: Opened) -> Opened:
    """Enough of a request that is not taken up by another frontend."""
    return msgspec.structs.replace(
        opened, request=HttpRequest(method=opened.request.method, path="", query=b"", headers=[], body=b"")
    )


def why_not_recorded(request: HttpRequest, size: int) -> str | None:
    """Half a sentence for what peers would not take. ``size``: of its record."""
    if len(request.path) > MAX_PATH or len(request.root_path) > MAX_PATH or len(request.query) > MAX_QUERY:
        return f"its path is longer than {MAX_PATH} characters, or its query than {MAX_QUERY} bytes"
    if len(request.headers) > MAX_HEADERS:
        return f"it has more than {MAX_HEADERS} headers"
    return f"it is larger than {MAX_RECORD >> 20} MiB" if size > MAX_RECORD else None


def size_of(record: Record) -> int:
    """Bytes of memory, about."""
    if isinstance(record, Opened):
        request = record.request
        headers = sum(len(name) + len(value) for name, value in request.headers)
        return 512 + len(request.body) + len(request.query) + len(request.path) + headers
    if isinstance(record, Yielded):
        return 128 + sum(map(len, record.messages))
    return 128
