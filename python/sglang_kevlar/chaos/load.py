"""The clients: requests from a seed, read as they come, and judged at their end."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from sglang_kevlar.chaos.answers import Answer, End, Reference, judge
from sglang_kevlar.chaos.scenario import Load

#: seconds before a client that was not let in tries again
RETRY = 0.2
#: characters of what a server said that are kept
SAID = 300
#: bytes of one event
MAX_EVENT = 64 << 20


class _Moved(msgspec.Struct):
    redirects: int = 0


class _Meta(msgspec.Struct):
    completion_tokens: int = 0
    finish_reason: Any = None
    kevlar: _Moved | None = None
    output_top_logprobs: list[list[Any]] = []


class _Event(msgspec.Struct):
    output_ids: list[int] = []
    meta_info: _Meta = msgspec.field(default_factory=_Meta)
    error: Any = None


_EVENT = msgspec.json.Decoder(_Event)


class Broken(Exception):
    """The answer does not make sense; ``end`` says in which way."""

    def __init__(self, end: End, detail: str) -> None:
        super().__init__(detail)
        self.end = end


def make_prompts(load: Load, seed: int) -> list[list[int] | str]:
    """Of one seed always the same. Raises OSError, and ValueError for a file without texts."""
    if load.texts is not None:
        texts = [line for line in Path(load.texts).read_text().splitlines() if line.strip()]
        if not texts:
            raise ValueError(f"{load.texts}: no text in it")
        return list(texts[: load.prompts])
    chance = random.Random(f"{seed}/prompts")
    prompts: list[list[int] | str] = []
    made: list[list[int]] = []
    for _ in range(load.prompts):
        prompt = [chance.randint(*load.vocabulary) for _ in range(chance.choice(load.prompt_tokens))]
        if made and chance.random() < load.shared_prefix:
            other = chance.choice(made)
            shared = min(len(other), len(prompt)) // 2
            prompt[:shared] = other[:shared]
        made.append(prompt)
        prompts.append(prompt)
    return prompts


def body(prompt: list[int] | str, tokens: int, temperature: float) -> dict[str, Any]:
    sampling = {"temperature": temperature, "max_new_tokens": tokens, "ignore_eos": True}
    return {"text" if isinstance(prompt, str) else "input_ids": prompt, "sampling_params": sampling, "stream": False}


def session(api_key: str | None, silence: float) -> aiohttp.ClientSession:
    """``silence``: seconds without a byte after which a request ends with TimeoutError."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return aiohttp.ClientSession(
        headers=headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=silence),
        read_bufsize=1 << 20,
    )


async def reference(http: aiohttp.ClientSession, url: str, prompt: list[int] | str, tokens: int) -> Reference:
    """The answer while nothing disturbs. Raises aiohttp.ClientError, TimeoutError, ValueError."""
    request = body(prompt, tokens, 0.0) | {"return_logprob": True, "top_logprobs_num": 2}
    async with http.post(f"{url}/generate", json=request) as response:
        content = await response.read()
    if response.status != 200:
        raise ValueError(f"status {response.status}: {content[:SAID].decode(errors='replace')}")
    event = _EVENT.decode(content)
    top = event.meta_info.output_top_logprobs
    if len(event.output_ids) != tokens or len(top) != tokens:
        raise ValueError(f"{len(event.output_ids)} tokens and {len(top)} log-probabilities instead of {tokens}")
    return Reference(
        output=event.output_ids,
        likeliest=[(first[1], second[1]) for first, second in top],
        gaps=[first[0] - second[0] for first, second in top],
    )


class Clients:
    """Runs until told to `stop`. Each request's end goes to ``on_end``."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        url: str,
        load: Load,
        seed: int,
        prompts: list[list[int] | str],
        references: list[Reference] | None,
        tie: float,
        lost_with_frontend: Callable[[float, float], bool],
        on_end: Callable[[Answer], None],
    ) -> None:
        """``lost_with_frontend``: whether we killed the frontend between two points of time."""
        self._http = http
        self._url = url
        self._load = load
        self._seed = seed
        self._prompts = prompts
        self._references = references
        self._tie = tie
        self._lost_with_frontend = lost_with_frontend
        self._on_end = on_end
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        #: of ours, for whoever calls `stop`
        self._mistake: BaseException | None = None
        #: of an open loop: requests that were due while too many were under way
        self.unsent = 0

    def start(self) -> None:
        if self._load.rate:
            self._begin(self._arrivals())
        else:
            for number in range(self._load.clients):
                self._begin(self._client(random.Random(f"{self._seed}/client/{number}")))

    async def stop(self) -> None:
        """No new requests; those under way are waited for, each as long as it gives signs of life."""
        self._stopping.set()
        while self._tasks:
            await asyncio.wait(self._tasks)
        if self._mistake is not None:
            raise self._mistake

    def cancel(self) -> None:
        self._stopping.set()
        for task in self._tasks:
            task.cancel()

    def _begin(self, coroutine: Any) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._mistake = self._mistake or task.exception()

    async def _client(self, chance: random.Random) -> None:
        while not self._stopping.is_set():
            answer = await self._one(chance)
            if answer.end in ("refused", "cut", "frontend") and answer.first_token is None:
                await asyncio.sleep(RETRY)

    async def _arrivals(self) -> None:
        chance = random.Random(f"{self._seed}/arrivals")
        due = time.monotonic()
        number = 0
        while not self._stopping.is_set():
            due += chance.expovariate(self._load.rate)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            number += 1
            if len(self._tasks) > self._load.in_flight:  # this one is a task, too
                self.unsent += 1
            else:
                self._begin(self._arrival(random.Random(f"{self._seed}/request/{number}")))

    async def _arrival(self, chance: random.Random) -> None:
        await self._one(chance)

    async def _one(self, chance: random.Random) -> Answer:
        # All draws, in one order, whatever comes of them: a seed's requests are the same in every run.
        number = chance.randrange(len(self._prompts))
        tokens = chance.randint(*self._load.output_tokens)
        stream, leave, salted, opted_out = (chance.random() for _ in range(4))
        leave_at, tenant = chance.randint(1, tokens), chance.randrange(3)
        request = body(self._prompts[number], tokens, self._load.temperature)
        if salted < self._load.cache_salt:
            request["cache_salt"] = f"tenant {tenant}"
        if opted_out < self._load.no_shadow:
            request["sampling_params"]["custom_params"] = {"kevlar_shadow": False}
        request["stream"] = stream < self._load.stream
        answer = Answer(prompt=number, asked=tokens, started=time.monotonic(), streamed=request["stream"])
        leaves = request["stream"] and leave < self._load.leave
        try:
            await self._ask(request, answer, leave_at if leaves else None)
        except Broken as error:
            answer.end, answer.detail = error.end, str(error)
        except TimeoutError:
            answer.end, answer.detail = "hung", f"nothing for {self._load.hung_after:g} s"
        except aiohttp.ClientError as error:
            answer.end, answer.detail = "cut", f"{type(error).__name__}: {error}"[:SAID]
        answer.ended = time.monotonic()
        if answer.end in ("cut", "hung", "refused") and self._lost_with_frontend(answer.started, answer.ended):
            answer.end = "frontend"
        self._on_end(answer)
        return answer

    async def _ask(self, request: dict[str, Any], answer: Answer, leave_at: int | None) -> None:
        async with self._http.post(f"{self._url}/generate", json=request) as response:
            if response.status != 200:
                said = (await response.read())[:SAID].decode(errors="replace")
                raise Broken("refused" if said else "cut", f"status {response.status}: {said}")
            if not request["stream"]:
                content = await response.read()
                answer.first_token = time.monotonic()
                self._take(content, answer)
                self._finish(answer)
                return
            last, partial = 0.0, b""
            async for chunk in response.content.iter_any():
                *events, partial = (partial + chunk).split(b"\n\n")
                if len(partial) > MAX_EVENT:
                    raise Broken("cut", "an event that does not end")
                for event in events:
                    if event == b"data: [DONE]":
                        self._finish(answer)
                        return
                    before = len(answer.output)
                    self._take(event.removeprefix(b"data: "), answer)
                    if len(answer.output) == before:
                        continue
                    now = time.monotonic()
                    if answer.first_token is None:
                        answer.first_token = now
                    else:
                        answer.stall = max(answer.stall, now - last)
                    last = now
                    if leave_at is not None and len(answer.output) >= leave_at:
                        answer.end = "left"
                        return
        raise Broken("cut", f"ended without [DONE] behind {len(answer.output)} tokens")

    def _take(self, content: bytes, answer: Answer) -> None:
        """One event: all tokens so far, or with ``--incremental-streaming-output`` the new ones."""
        try:
            event = _EVENT.decode(content)
        except msgspec.MsgspecError:
            raise Broken("cut", f"not an event: {content[:SAID].decode(errors='replace')}") from None
        if event.error is not None:
            raise Broken("refused", str(event.error)[:SAID])
        meta, before = event.meta_info, answer.output
        if meta.kevlar is not None:
            answer.redirects = meta.kevlar.redirects
        if isinstance(meta.finish_reason, dict) and meta.finish_reason.get("type") == "abort":
            raise Broken("refused", str(meta.finish_reason)[:SAID])
        if len(event.output_ids) != meta.completion_tokens:
            answer.output = before + event.output_ids
            if len(answer.output) != meta.completion_tokens:
                end: End = "doubled" if len(answer.output) > meta.completion_tokens else "short"
                raise Broken(end, f"{len(answer.output)} tokens came, {meta.completion_tokens} are said to have")
        elif event.output_ids[: len(before)] != before:
            raise Broken("changed", f"what had come ({len(before)} tokens) is not what came later begins with")
        else:
            answer.output = event.output_ids

    def _finish(self, answer: Answer) -> None:
        known = self._references[answer.prompt] if self._references is not None else None
        answer.end, answer.detail = judge(answer.output, answer.asked, known, self._tie)
