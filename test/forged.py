"""Bytes that were changed on purpose: their CRC-32 is as before."""

from __future__ import annotations

#: the generator of CRC-32: added to a message anywhere, it changes nothing
_GENERATOR = 0x104C11DB7
BYTES = 5


def with_the_same_crc(data: bytes, at: int) -> bytes:
    """Other bytes than ``data`` from ``at`` on, at least BYTES before its end."""
    changed = bytearray(data)
    for position in range(33):
        if _GENERATOR >> (32 - position) & 1:
            changed[at + position // 8] ^= 1 << position % 8
    return bytes(changed)
