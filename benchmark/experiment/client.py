"""A client that wants its answer: when a stream fails, it asks again, from the beginning, until it has it all."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

import aiohttp
from workload import Ask

from load import Stream, request_body

#: seconds without an event after which a client takes a stream for dead
HUNG = 30.0
#: seconds between two attempts
AGAIN = 0.5


@dataclass
class Answered:
    """One question, through all its attempts. Times are CLOCK_MONOTONIC seconds."""

    number: int
    ask: Ask
    arrived: float
    attempts: list[Stream] = field(default_factory=list)
    #: how the attempts before the last one ended
    failures: list[str] = field(default_factory=list)
    finished: float | None = None

    @property
    def first_token(self) -> float | None:
        return min((stream.times[0] for stream in self.attempts if stream.times), default=None)

    @property
    def tokens(self) -> list[int]:
        return self.attempts[-1].event(-1)["output_ids"] if self.attempts and self.attempts[-1].times else []

    @property
    def redirects(self) -> int:
        meta = self.attempts[-1].meta_info if self.attempts else {}
        return meta.get("kevlar", {}).get("redirects", 0)

    def had(self, at: float) -> int:
        """Tokens that its client had seen at a time."""
        return max((sum(when <= at for when in stream.times) for stream in self.attempts), default=0)

    def further_than(self, count: int, after: float) -> float | None:
        """When it first had more than ``count`` tokens after a time."""
        reached = [stream.times[count] for stream in self.attempts if len(stream.times) > count]
        return min((when for when in reached if when > after), default=None)

    def stands_at(self, at: float) -> bool:
        """Whether it was being answered then."""
        return self.arrived <= at and (self.finished is None or self.finished > at)


async def answer(session: aiohttp.ClientSession, url: str, answered: Answered, deadline: float) -> None:
    while time.monotonic() < deadline:
        stream = Stream(request_body(answered.ask.prompt, answered.ask.new_tokens))
        answered.attempts.append(stream)
        failure = await _attempt(session, url, stream, answered.ask.new_tokens)
        if failure is None:
            answered.finished = stream.times[-1]
            return
        answered.failures.append(failure)
        await asyncio.sleep(AGAIN)


async def _attempt(session: aiohttp.ClientSession, url: str, stream: Stream, new_tokens: int) -> str | None:
    """None when the answer is whole, else what happened to it."""
    running = asyncio.create_task(stream.run(session, url))
    try:
        while not running.done():
            await asyncio.wait([running], timeout=1.0)
            last = stream.times[-1] if stream.times else stream.sent
            if not running.done() and time.monotonic() - last > HUNG:
                return "hung"
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    if len(stream.times) >= new_tokens and not stream.error:
        return None
    if not stream.times:
        return "refused"
    return "cut, reported complete" if stream.done and not stream.error else "cut"
