"""What a long event has in common with the one before it, left out.

SGLang's native streams repeat in each event all text, token ids and log-probabilities so far: kept as they are, their
memory would grow with the square of their length.
"""

from __future__ import annotations

import struct

#: bytes that have to agree for two events to be taken to go on alike, and how far ahead that is looked for
_ANCHOR = 12
_REACH = 8192
_SKIPS = (0, 4, 8, 16, 32, 64, 128)
#: where the common part begins in the old event, its length, and the length of what is new behind it
_PART = struct.Struct("<III")


class Delta(bytes):
    """An event, as what has changed since the one before it."""

    __slots__ = ()


def encode(old: bytes, new: bytes) -> Delta | None:
    """None where it would not be much shorter."""
    parts = bytearray()
    at_old = at_new = 0
    while at_new < len(new):
        common = _common(old, at_old, new, at_new)
        next_old, next_new = _meet(old, at_old + common, new, at_new + common)
        parts += _PART.pack(at_old, common, next_new - at_new - common)
        parts += new[at_new + common : next_new]
        if 2 * len(parts) > len(new):
            return None
        at_old, at_new = next_old, next_new
    return Delta(parts)


def decode(old: bytes, delta: Delta) -> bytes:
    pieces = []
    at = 0
    while at < len(delta):
        start, common, added = _PART.unpack_from(delta, at)
        at += _PART.size
        pieces.append(old[start : start + common])
        pieces.append(delta[at : at + added])
        at += added
    return b"".join(pieces)


def _common(old: bytes, at_old: int, new: bytes, at_new: int) -> int:
    """How many bytes are the same from here on."""
    low, high = 0, min(len(old) - at_old, len(new) - at_new)
    while low < high:
        middle = (low + high + 1) // 2
        if old[at_old + low : at_old + middle] == new[at_new + low : at_new + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _meet(old: bytes, at_old: int, new: bytes, at_new: int) -> tuple[int, int]:
    """Where both go on alike behind a difference; their ends, where that is not found."""
    for skip in _SKIPS:
        anchor = old[at_old + skip : at_old + skip + _ANCHOR]
        if len(anchor) < _ANCHOR:
            break
        found = new.find(anchor, at_new, at_new + _REACH)
        if found >= 0:
            return at_old + skip, found
    return len(old), len(new)
