"""What is known of a kept request's outputs, before its endpoint makes events of them.

An endpoint's events follow from the request and the outputs of the tokenizer manager, which come one after the other
through `Progress.watch`: whoever has both can let the endpoint run again and gets the same events, with the same ids.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(slots=True, frozen=True)
class RunRequest:
    """The HTTP request of a run, as its endpoint gets it."""

    rid: str
    principal: str
    key: str
    method: str
    path: str
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes


class RunRecord(Protocol):
    """Sees one run, in order. What it raises ends the run."""

    async def output(self, output: Any) -> None:
        """One output of the tokenizer manager (a list for batches), before the endpoint has it and may change it."""

    async def end(self) -> None:
        """The endpoint is through, for whatever reason. Called once."""


class Recorder(Protocol):
    async def begin(self, request: RunRequest) -> RunRecord:
        """Before the endpoint runs."""


class Progress:
    """Of one HTTP request."""

    __slots__ = ("_record", "_rid", "offset")

    def __init__(self, rid: str, record: RunRecord | None = None) -> None:
        self._rid: str | None = rid
        self._record = record
        #: output tokens, over all choices, of the outputs that the endpoint has been given
        self.offset = 0

    def name(self, obj: Any) -> None:
        """Lets the engine's request have the id of the HTTP request: the first one, if the client named it not."""
        if obj.rid is None:
            obj.rid, self._rid = self._rid, None

    async def watch(self, outputs: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        before = self.offset
        tokens: dict[int, int] = {}
        try:
            async for output in outputs:
                for index, one in enumerate(output) if isinstance(output, list) else [(output.get("index", 0), output)]:
                    count = one["meta_info"].get("completion_tokens", 0)
                    tokens[index] = max(tokens.get(index, 0), count)
                self.offset = before + sum(tokens.values())
                if self._record is not None:
                    await self._record.output(output)
                yield output
        finally:
            await outputs.aclose()
