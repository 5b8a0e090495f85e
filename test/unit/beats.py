"""A rank's heartbeat that remembers what it was told."""

from __future__ import annotations

from typing import Any


class Beats:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def forward(self, tokens: int) -> None:
        self.seen.append(tokens)

    def idle(self) -> None:
        self.seen.append("idle")

    def control(self) -> None:
        self.seen.append("control")

    def wait(self) -> None:
        self.seen.append("wait")
