"""Orders to a rank of a server with ``--allow-chaos``: one JSON object each, answered by one (ZMQ REQ/REP)."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

HARMS = ("flip", "truncate", "drop", "double", "swap", "replay")


class Raise(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="order", tag="error"):
    """The scheduler's loop raises."""


class Sleep(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="order", tag="hang"):
    """The scheduler's loop sleeps; the other threads go on."""

    seconds: Annotated[float, Meta(gt=0, le=86_400)]


class HarmFrames(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="order", tag="frames"):
    """Harm to the next ``count`` frames of the shadow that this rank sends; which and where is drawn from ``seed``."""

    count: Annotated[int, Meta(ge=1, le=1000)]
    harm: Literal["flip", "truncate", "drop", "double", "swap", "replay", "any"]
    seed: int


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="order", tag="report"):
    """Changes nothing."""


Order = Raise | Sleep | HarmFrames | Report


class Obeyed(msgspec.Struct, frozen=True):
    """The answer. ``error``: why nothing was done."""

    error: str = ""
    #: frames that were harmed so far, by kind of harm, and those that still will be
    harmed: dict[str, int] = {}
    to_harm: int = 0
