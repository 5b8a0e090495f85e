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
        return self.attempts[-1].event(-1).get("output_ids", []) if self.attempts and self.attempts[-1].times else []

    @property
    def redirects(self) -> int:
        meta = self.attempts[-1].event(-1).get("meta_info", {}) if self.tokens else {}
        return meta.get("kevlar", {}).get("redirects", 0)

    def longest_wait(self, after: float) -> float | None:
        """For a token that its client did not have, from a time on; None when the whole answer never came."""
        if self.finished is None:
            return None
        most, last, longest = 0, after, 0.0
        for when, count in sorted(each for stream in self.attempts for each in _progress(stream)):
            if count > most:
                most = count
                if when > after:
                    longest = max(longest, when - last)
                    last = when
        return longest

    def token_times(self) -> list[float]:
        """When its client got each token, those that it had got in an attempt before included."""
        times = []
        for stream in self.attempts:
            before = 0
            for when, count in _progress(stream):
                times += [when] * (count - before)
                before = count
        return times

    def stands_at(self, at: float) -> bool:
        """Whether it was being answered then."""
        return self.arrived <= at and (self.finished is None or self.finished > at)


def _progress(stream: Stream) -> list[tuple[float, int]]:
    """Time and tokens so far of each event. An event may bring several tokens; one that is an error brings none."""
    events = [(when, stream.event(number)) for number, when in enumerate(stream.times)]
    return [(when, event["meta_info"]["completion_tokens"]) for when, event in events if "meta_info" in event]


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
    if not stream.times:
        return "refused"
    if stream.error:
        return "cut, reported complete" if stream.done else "cut"
    # Not the number of events: under load a server may put several tokens into one.
    return None if stream.meta_info.get("completion_tokens", 0) >= new_tokens else "cut, reported complete"
