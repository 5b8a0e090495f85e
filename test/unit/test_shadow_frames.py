"""Frames between ranks: what was damaged on its way is no message."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_kevlar.protocol.shadow import Ack, FromStore, Lookup, ToStore
from sglang_kevlar.shadow.sockets import frame, unframe

TO_STORE, FROM_STORE = msgspec.msgpack.Decoder(ToStore), msgspec.msgpack.Decoder(FromStore)


@given(st.text(max_size=20), st.lists(st.binary(min_size=16, max_size=16), max_size=8), st.data())
def test_a_frame_with_a_wrong_bit_or_an_end_missing_is_refused(ticket, keys, data):
    message = Lookup(ticket=ticket, keys=keys)
    sent = frame(message)
    assert unframe(sent, TO_STORE) == message
    bit = data.draw(st.integers(0, len(sent) * 8 - 1))
    flipped = bytearray(sent)
    flipped[bit // 8] ^= 1 << bit % 8
    for damaged in (bytes(flipped), sent[: data.draw(st.integers(0, len(sent) - 1))]):
        with pytest.raises(ValueError, match="checksum"):
            unframe(damaged, TO_STORE)


def test_a_whole_frame_of_the_other_direction_is_refused():
    answer = frame(Ack(session="s", sequence=1, number=0, gone=[]))
    assert unframe(answer, FROM_STORE).sequence == 1
    with pytest.raises(ValueError, match="Invalid"):
        unframe(answer, TO_STORE)
