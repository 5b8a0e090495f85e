"""Server-sent events of a kept request: where one ends and the next begins, and the ids that they are given.

An id is ``RID:TOKENS.NUMBER``: the request, the output tokens of the output that its endpoint was at work on, and how
many events it had sent since. Given the same outputs an endpoint sends the same events, so these ids do not depend on
when they were sent, or by which process. With several frontends it is ``RID:TOKENS.NUMBER~TAG``, the frontend to which
the output came (`control.lineage`).
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from sglang_kevlar.control.event_log import Position

#: an event that is longer breaks its response off; upstream's endpoints send whole events
MAX_EVENT = 64 << 20

#: what may name a kept request: it appears in a header, in event ids and in a path
RID = re.compile(r"[A-Za-z0-9._:~@+=-]{1,128}")
_TAG = re.compile(r"[0-9a-z]{1,16}")
_POSITION = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,15}))?")


class BadId(Exception):
    """The message says why."""


class Splitter:
    """Cuts what an endpoint sends into whole events."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        *events, self._rest = (self._rest + chunk).split(b"\n\n")
        if len(self._rest) > MAX_EVENT:
            raise RuntimeError(f"an event is longer than {MAX_EVENT >> 20} MiB")
        return [event + b"\n\n" for event in events]

    def rest(self) -> bytes:
        """What is left at the end: an event that was not ended."""
        rest, self._rest = self._rest, b""
        return rest


def event_id(rid: str, position: Position, tag: str | None = None) -> str:
    return f"{rid}:{position.tokens}.{position.number}{'' if tag is None else f'~{tag}'}"


def with_id(event: bytes, name: str) -> bytes:
    return f"id: {name}\n".encode() + event


def request_digest(path: str, query: bytes, body: bytes) -> bytes:
    """Names a request: a key belongs to one."""
    digest = digest_of(path, query)
    digest.update(body)
    return digest.digest()


def digest_of(path: str, query: bytes) -> Any:
    """To be fed the body."""
    return hashlib.sha256(path.encode() + b"?" + query + b"\0")


def tag_of(text: str) -> tuple[str, str | None]:
    """An event's id without the tag at its end, and the tag."""
    rest, _, tag = text.rpartition("~")
    return (rest, tag) if rest and _TAG.fullmatch(tag) else (text, None)


def parse_position(text: str) -> Position:
    """``TOKENS`` or ``TOKENS.NUMBER``. Raises BadId."""
    match = _POSITION.fullmatch(text)
    if match is None:
        raise BadId(f"{text[:64]!r} is no position in a stream: TOKENS or TOKENS.NUMBER")
    return Position(int(match[1]), int(match[2] or 0))


def parse_id(text: str, rid: str) -> Position:
    """The position in the id of an event of ``rid``. Raises BadId."""
    named, _, position = tag_of(text)[0].rpartition(":")
    if named != rid:
        raise BadId(f"{text[:200]!r} is no event of request {rid}")
    return parse_position(position)
