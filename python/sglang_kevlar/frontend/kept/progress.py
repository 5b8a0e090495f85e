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

    def read(self) -> None:
        """A client is given something of it."""

    async def output(self, messages: list[bytes], offset: int) -> None:
        """What one output is made of, and the tokens with it. The endpoint has it when this returns."""

    async def alone(self, why: str) -> None:
        """No outputs are recorded any more, for what ``why`` says: another frontend cannot go on with it. The endpoint
        has the next one when this returns."""

    def end(self, failure: FailureValues | None) -> None:
        """The endpoint is through. ``failure``: what it was told went wrong."""

    def drop(self, why: str) -> None:
        """It cannot be taken up any more. Called last, perhaps twice."""


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
        #: the endpoint takes no more
        self.left = False
        self._wanted = asyncio.Semaphore(0)

    def want(self) -> None:
        """The endpoint has taken the output before."""
        self._wanted.release()

    def leave(self) -> None:
        """It wants nothing any more."""
        self.left = True
        self._wanted.release()

    async def wanted(self) -> None:
        """Until the next output is wanted, or ``left``."""
        await self._wanted.acquire()
        if self.left:
            self._wanted.release()


class Progress:
    """Of one HTTP request."""

    __slots__ = ("_record", "_rid", "messages", "offset", "recorded", "requests", "unrecordable")

    def __init__(self, rid: str, record: RunRecord | None = None, recorded: Recorded | None = None) -> None:
        self._rid: str | None = rid
        self._record = record
        self.recorded = recorded
        #: output tokens, over all choices, of the outputs that the endpoint has been given
        self.offset = 0
        #: since the last output
        self.messages: list[bytes] = []
        #: how many requests its endpoint has made of it
        self.requests = 0
        #: why what comes cannot be recorded, as half a sentence
        self.unrecordable: str | None = None

    @property
    def is_recorded(self) -> bool:
        return self._record is not None

    def made_a_request(self) -> None:
        self.requests += 1
        if self.requests > 1:
            # Their messages come in any order, and under ids that are drawn.
            self.unrecordable = "a batch, or several choices, is not continued by another one"

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
                messages, self.messages = self.messages, []
                if self._record is not None and self.unrecordable is not None:
                    output = _as_it_is(output)
                    await self._record.alone(self.unrecordable)
                elif self._record is not None and messages:
                    # Upstream goes on appending to the lists in it while we wait.
                    output = _as_it_is(output)
                    await self._record.output(messages, self.offset)
                yield output
        finally:
            if self.recorded is not None:
                self.recorded.leave()
            await outputs.aclose()


def _as_it_is(value: Any) -> Any:
    """A copy of an output: of its dictionaries and lists, not of what is in those lists."""
    if isinstance(value, dict):
        return {name: list(each) if isinstance(each, list) else _as_it_is(each) for name, each in value.items()}
    return [_as_it_is(each) for each in value] if isinstance(value, list) else value
