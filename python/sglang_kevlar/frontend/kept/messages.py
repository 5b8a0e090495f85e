"""Outputs of a kept request as bytes: how they are recorded, and read again by the frontend that goes on with it."""

from __future__ import annotations

from collections.abc import Mapping

from sglang.srt.managers.io_struct import BatchStrOutput, BatchTokenIDOutput

from sglang_kevlar.cluster import wire
from sglang_kevlar.cluster.batches import UnknownShape, cut
from sglang_kevlar.frontend.host import BatchOutput
from sglang_kevlar.frontend.kept.progress import Progress


def write(batch: BatchOutput, kept: Mapping[int, Progress]) -> None:
    """Note of which part of ``batch`` the outputs of these requests (by row) will be made."""
    owners = [row if row in kept else None for row in range(len(batch.rids))]
    try:
        parts = cut(batch, owners)
    except UnknownShape as problem:
        for progress in kept.values():
            progress.unrecordable = f"its output cannot be recorded: {problem}"
        return
    for row, message in parts.items():
        try:
            kept[row].messages.append(wire.encode(message))
        except wire.NotForNetwork as problem:
            kept[row].unrecordable = f"its output cannot be recorded: {problem}"


def read(message: bytes) -> BatchStrOutput | BatchTokenIDOutput:
    """The output of one request. Raises `wire.NotForNetwork`."""
    batch = wire.decode_answer(message)
    if not isinstance(batch, BatchStrOutput | BatchTokenIDOutput) or len(batch.rids) != 1:
        raise wire.NotForNetwork(f"{type(batch).__name__} is not the output of one request")
    return batch
