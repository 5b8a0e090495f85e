"""Messages by which a rank takes over the weights of the same rank of another group (msgpack over ZMQ).

The rank that has them is a ROUTER, the one that takes them a DEALER. `Begin` is answered by `Offer`; then a `Piece`,
with its bytes in a second frame, for each piece that `Credit` allows, in the order of `control.weight_layout.pieces`;
then `Sent`, and `Taken` as the last word of the other side. `Failed` may come instead of any answer.
"""

from __future__ import annotations

import msgspec


class TensorLayout(msgspec.Struct, frozen=True):
    """Where a tensor of the model is, by storages that are numbered in the order in which the tensors name them."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    #: in elements
    stride: tuple[int, ...]
    storage: int
    #: bytes of the storage before its first element, and from there behind its last
    offset: int
    extent: int


class WeightLayout(msgspec.Struct, frozen=True):
    """All that loading or an update may change. Two ranks with equal layouts can have each other's weights."""

    #: also tied ones, by each of their names
    tensors: list[TensorLayout]
    #: what weights were made into besides tensors, such as scales: compared, not copied
    numbers: dict[str, float]


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    #: of the transfer; who does not know it gets nothing
    ticket: str


class Credit(msgspec.Struct, frozen=True, tag="credit"):
    """So many pieces more may be sent."""

    pieces: int


class Taken(msgspec.Struct, frozen=True, tag="taken"):
    """It is over."""


class Offer(msgspec.Struct, frozen=True, tag="offer"):
    layout: WeightLayout


class Piece(msgspec.Struct, frozen=True, tag="piece"):
    #: its place in the order
    number: int


class Sent(msgspec.Struct, frozen=True, tag="sent"):
    #: over the layout and all bytes (`control.weight_layout.digest`)
    digest: bytes


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    reason: str
    #: it may succeed in a moment: the weights were just being changed
    busy: bool = False


class RankStatement(msgspec.Struct, frozen=True):
    """What a rank came to, in its file (`Paths.weights`): the first rank answers for all."""

    ticket: str
    #: why it failed; empty: it did not
    reason: str = ""
    #: see `Failed`
    busy: bool = False
    #: where its weights are to be had
    endpoint: str = ""
    bytes: int = 0


ToSource = Begin | Credit | Taken
FromSource = Offer | Piece | Sent | Failed
