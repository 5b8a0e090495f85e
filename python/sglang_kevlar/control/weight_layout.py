"""Which bytes of a rank's memory are its weights, in which order they travel, and whether two ranks have the same.

By memory, not by name: weights that were packed or quantised after loading go as they are, tied ones once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import msgspec

from sglang_kevlar.protocol.weights import TensorLayout, WeightLayout

DIGEST_BYTES = 32


@dataclass(frozen=True)
class Region:
    """Bytes of a storage."""

    storage: int
    start: int
    end: int


def extent(shape: tuple[int, ...], stride: tuple[int, ...], itemsize: int) -> int:
    """Bytes from the first element of a tensor to behind its last."""
    if 0 in shape:
        return 0
    return (1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))) * itemsize


def regions(layout: WeightLayout) -> list[Region]:
    """What the tensors cover, each byte once, in a fixed order."""
    spans = sorted({(t.storage, t.offset, t.offset + t.extent) for t in layout.tensors if t.extent})
    merged: list[Region] = []
    for storage, start, end in spans:
        last = merged[-1] if merged else None
        if last is not None and last.storage == storage and start <= last.end:
            merged[-1] = Region(storage, last.start, max(last.end, end))
        else:
            merged.append(Region(storage, start, end))
    return merged


def pieces(layout: WeightLayout, largest: int) -> Iterator[Region]:
    """The regions, cut where they are larger than ``largest`` bytes."""
    for region in regions(layout):
        for start in range(region.start, region.end, largest):
            yield Region(region.storage, start, min(start + largest, region.end))


def size(layout: WeightLayout) -> int:
    """Bytes that travel."""
    return sum(region.end - region.start for region in regions(layout))


def digest(layout: WeightLayout) -> Any:  # type: ignore[explicit-any]  # hashlib's type has no public name
    """A hash that has taken in names, types, shapes and places; the bytes of the pieces are to follow, in order."""
    return blake2b(msgspec.msgpack.encode(layout, order="deterministic"), digest_size=DIGEST_BYTES)


def difference(there: WeightLayout, here: WeightLayout) -> str | None:
    """Why the weights of one are none for the other; None: they are."""
    theirs, ours = ({tensor.name: tensor for tensor in layout.tensors} for layout in (there, here))
    for name in [*theirs, *ours]:
        if name not in ours or name not in theirs:
            return f"{name} is only {'there' if name in theirs else 'here'}"
        if theirs[name] != ours[name]:
            return f"{name} is {_describe(theirs[name])} there and {_describe(ours[name])} here"
    if there.tensors != here.tensors:
        return "its tensors are in another order"
    for name in sorted({*there.numbers, *here.numbers}):
        a, b = there.numbers.get(name), here.numbers.get(name)
        if a != b and not (a != a and b != b):  # NaN is the same as NaN here
            return f"{name} is {a} there and {b} here"
    return None


def _describe(tensor: TensorLayout) -> str:
    place = f"storage {tensor.storage} from byte {tensor.offset}"
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride)} in {place}"
