"""A streaming client that disturbs what it measures little: it notes when events arrive and reads them later."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

import aiohttp

#: the lowest ids are special tokens
FIRST_ORDINARY_TOKEN = 64


def random_prompt(chance: random.Random, tokens: int, vocabulary: int) -> list[int]:
    """Token ids that share no prefix with any other prompt, so that nothing of them is cached."""
    return [chance.randrange(FIRST_ORDINARY_TOKEN, vocabulary) for _ in range(tokens)]


def request_body(prompt: list[int] | list[list[int]], new_tokens: int) -> dict[str, Any]:
    """A greedy streaming ``/generate`` that runs to ``new_tokens``. A list of prompts is a batch in one request."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, "stream": True}


class Stream:
    """One streaming request. Times are CLOCK_MONOTONIC seconds."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body
        self.sent = 0.0
        #: arrival of every event; one token each, as the server streams every token
        self.times: list[float] = []
        self.done = False
        self.error = ""
        self._raw: list[bytes] = []

    async def run(self, session: aiohttp.ClientSession, url: str) -> Stream:
        """Until the server ends the stream, or until cancelled, which disconnects. Failures are in ``error``."""
        self.sent = time.monotonic()
        try:
            async with session.post(f"{url}/generate", json=self.body) as response:
                if response.status != 200:
                    self.error = f"{response.status}: {await response.text()}"
                    return self
                partial = b""
                async for chunk in response.content.iter_any():
                    now = time.monotonic()
                    *events, partial = (partial + chunk).split(b"\n\n")
                    self._raw += events
                    self.times += [now] * len(events)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.error = repr(error)
        self._finish()
        return self

    def _finish(self) -> None:
        if self._raw and self._raw[-1] == b"data: [DONE]":
            self.done = True
            del self._raw[-1], self.times[-1]
        elif not self.error:
            self.error = "ended without [DONE]"
        if self._raw and b'"error"' in self._raw[-1]:
            self.error = self._raw[-1].decode(errors="replace")

    def event(self, index: int) -> dict[str, Any]:
        return json.loads(self._raw[index].removeprefix(b"data: "))

    @property
    def meta_info(self) -> dict[str, Any]:
        """Of the last event; empty before the first."""
        return self.event(-1)["meta_info"] if self._raw else {}

    def first_token_seconds(self) -> float:
        """From sending the request to its first token."""
        return self.times[0] - self.sent

    def seconds_per_token(self) -> float:
        """Mean over all tokens after the first."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)

    def first_token_seconds_of_batch(self) -> dict[int, float]:
        """The same for every prompt of a batch, by its index."""
        first: dict[int, float] = {}
        for position, at in enumerate(self.times):
            first.setdefault(self.event(position).get("index", 0), at - self.sent)
        return first


class Load:
    """Streams that run in the background. As a context manager it disconnects those that are left."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url
        self.streams: list[Stream] = []
        self._tasks: list[asyncio.Task[Stream]] = []

    def start(self, body: dict[str, Any]) -> Stream:
        stream = Stream(body)
        self.streams.append(stream)
        self._tasks.append(asyncio.create_task(stream.run(self._session, self._url)))
        return stream

    async def wait_for_tokens(self, tokens: int, timeout: float = 60.0) -> None:
        """Until every stream has ``tokens``. Raises RuntimeError when one ended before, TimeoutError."""
        async with asyncio.timeout(timeout):
            while any(len(stream.times) < tokens for stream in self.streams):
                if ended := [stream.error for stream in self.streams if stream.error]:
                    raise RuntimeError(f"a stream ended early: {ended[0]}")
                await asyncio.sleep(0.01)

    async def finished(self, timeout: float = 120.0) -> None:
        """Until every stream has ended."""
        async with asyncio.timeout(timeout):
            await asyncio.gather(*self._tasks)

    async def __aenter__(self) -> Load:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def client_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None), read_bufsize=1 << 20
    )
