"""What is known of a kept request's outputs, before its endpoint makes events of them.

An endpoint's events follow from the request and the outputs of the tokenizer manager, which come one after the other
through `Progress.watch`: whoever has both can let the endpoint run again and gets the same events, with the same ids.
So what is recorded of a run are the messages of which its outputs are made, output by output.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

from sglang_kevlar.control.lineage import Lineage
from sglang_kevlar.protocol.records import HttpRequest

#: status, message, kind, seconds after which to try again
FailureValues = tuple[int, str, str, int | None]


class RunRecord(Protocol):
    """Sees one run, in order."""

    lineage: Lineage

    async def output(self, messages: list[bytes], offset: int) -> None:
        """What one output is made of, and the tokens with it. The endpoint has it when this returns."""

    def read(self) -> None:
        """A client is being given events of it."""

    def end(self, failure: FailureValues | None) -> None:
        """The endpoint is through. ``failure``: what it was told went wrong."""

    def drop(self, why: str) -> None:
        """It cannot be taken up any more. Called once, last."""


class Recorder(Protocol):
    def begin(self, rid: str, identity: tuple[str, str], lineage: Lineage | None, request: HttpRequest) -> RunRecord:
        """Before the endpoint runs. ``lineage``: of a run that another frontend began."""


class Recorded:
    """What another frontend recorded of a run, to be gone through before anything new is made."""

    def __init__(self, outputs: Sequence[Sequence[bytes]], ended: bool, failure: FailureValues | None) -> None:
        self.outputs = outputs
        #: nothing came behind them, but perhaps a failure
        self.ended = ended
        self.failure = failure
        self._wanted = asyncio.Semaphore(0)

    def want(self) -> None:
        """The endpoint has taken the output before."""
        self._wanted.release()

    async def wanted(self) -> None:
        await self._wanted.acquire()


class Progress:
    """Of one HTTP request."""

    __slots__ = ("_record", "_rid", "messages", "offset", "recorded")

    def __init__(self, rid: str, record: RunRecord | None = None, recorded: Recorded | None = None) -> None:
        self._rid: str | None = rid
        self._record = record
        self.recorded = recorded
        #: output tokens, over all choices, of the outputs that the endpoint has been given
        self.offset = 0
        #: since the last output
        self.messages: list[bytes] = []

    @property
    def is_recorded(self) -> bool:
        return self._record is not None

    def name(self, obj: Any) -> None:
        """Lets the engine's request have the id of the HTTP request: the first one, if the client named it not."""
        if obj.rid is None:
            obj.rid, self._rid = self._rid, None

    async def watch(self, outputs: AsyncGenerator[Any]) -> AsyncGenerator[Any]:
        before = self.offset
        tokens: dict[int, int] = {}
        try:
            while True:
                if self.recorded is not None:
                    self.recorded.want()
                try:
                    output = await anext(outputs)
                except StopAsyncIteration:
                    return
                for index, one in enumerate(output) if isinstance(output, list) else [(output.get("index", 0), output)]:
                    count = one["meta_info"].get("completion_tokens", 0)
                    tokens[index] = max(tokens.get(index, 0), count)
                self.offset = before + sum(tokens.values())
                if self._record is not None and self.messages:
                    messages, self.messages = self.messages, []
                    # Upstream goes on appending to the lists in it while we wait.
                    output = _as_it_is(output)
                    await self._record.output(messages, self.offset)
                yield output
        finally:
            await outputs.aclose()


def _as_it_is(value: Any) -> Any:
    """A copy of an output: of its dictionaries and lists, not of what is in those lists."""
    if isinstance(value, dict):
        return {name: list(each) if isinstance(each, list) else _as_it_is(each) for name, each in value.items()}
    return [_as_it_is(each) for each in value] if isinstance(value, list) else value
