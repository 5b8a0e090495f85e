"""Cutting a batch of outputs by the frontend whose requests they are of."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, TypeVar

import msgspec

Owner = TypeVar("Owner", bound=Hashable)


class UnknownShape(ValueError):
    """A field of the batch is not one value per request, so it cannot be cut; the text names it."""


def cut(batch: Any, owners: Sequence[Owner | None]) -> dict[Owner, Any]:
    """A batch for each owner, with its rows in order; rows without one are left out. The batch itself stays."""
    rows: dict[Owner, list[int]] = {}
    for row, owner in enumerate(owners):
        if owner is not None:
            rows.setdefault(owner, []).append(row)
    if len(rows) == 1 and None not in owners:
        return {owner: batch for owner in rows}
    return {owner: _rows(batch, chosen, len(owners)) for owner, chosen in rows.items()}


def _rows(batch: Any, chosen: list[int], count: int) -> Any:
    fields = {}
    for name in type(batch).__struct_fields__:
        value = getattr(batch, name)
        if value is None or (isinstance(value, list) and not value):
            continue
        if isinstance(value, list) and len(value) == count:
            fields[name] = [value[row] for row in chosen]
        elif name == "pooled_hidden_states" and len(value) == 1:
            # Stacked: one tensor with a row for each request.
            fields[name] = [value[0][chosen]]
        elif name != "time_stats":  # not sent, see `cluster.wire`
            raise UnknownShape(f"{type(batch).__name__}.{name} has not one value for each of {count} requests")
    return msgspec.structs.replace(batch, **fields)
