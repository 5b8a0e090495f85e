"""Load that goes on until it is told to end. Every token of it is compared with what an undisturbed run gave."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
from cases import Answer, Case, catalogue, native
from server import Server

#: tokens that are known of a stream; it asks for more than it could get, so that no group is through with it by itself
KNOWN = 800
ENDLESS = 20_000
STREAMS = 4
#: clients beside the streams, each with one whole request of the catalogue after the other
CLIENTS = 3
#: seconds for what has to happen at some time
PATIENCE = 90.0


@dataclass
class Expected:
    """What is asked, with its undisturbed answers."""

    streams: list[tuple[Case, list[int]]]
    cases: list[tuple[Case, Answer]]


def undisturbed(server: Server) -> Expected:
    prompts = [f"class Node{i}:\n    def __init__(self, value={i * 37}):" for i in range(STREAMS)]
    endless = [native(f"stream {i}", prompt=p, sampling={"max_new_tokens": ENDLESS}) for i, p in enumerate(prompts)]
    known = [native("whole", stream=False, prompt=p, sampling={"max_new_tokens": KNOWN}) for p in prompts]
    with server.network():
        cases = catalogue(server.url, seeded=True)
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda case: case.run(server.url), [*known, *cases]))
    for case, answer in zip([*known, *cases], answers, strict=True):
        assert answer.status == 200 and not answer.error and answer.done, f"{case.name}: {answer}"
    tokens = [answer.token_ids[0] for answer in answers[:STREAMS]]
    return Expected(list(zip(endless, tokens, strict=True)), list(zip(cases, answers[STREAMS:], strict=True)))


class SteadyLoad:
    """As a context manager: begins when every group runs some of it, fails at the end if not all was as expected."""

    def __init__(self, server: Server, expected: Expected, seed: int) -> None:
        self._server = server
        self._expected = expected
        self._seed = seed
        self._ending = threading.Event()
        #: by stream
        self._tokens = [0] * STREAMS
        #: whole answers
        self.answered = 0
        self._problems: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(self._stream, i)) for i in range(STREAMS)]
        self._threads += [threading.Thread(target=self._run, args=(self._client, i)) for i in range(CLIENTS)]

    def __enter__(self) -> SteadyLoad:
        for thread in self._threads:
            thread.start()
        try:
            self._server.wait(lambda s: all(g["running"] for g in s["groups"]), "requests on every group", PATIENCE)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end()
        if kind is None:
            self.check()

    def check(self) -> None:
        assert not self._problems, "\n".join(self._problems)

    def goes_on(self, tokens: int = 20) -> None:
        """Every stream gets so many more."""
        wanted = [count + tokens for count in self._tokens]
        deadline = time.monotonic() + PATIENCE
        while any(count < enough for count, enough in zip(self._tokens, wanted, strict=True)):
            self.check()
            assert time.monotonic() < deadline, f"streams stand still: {self._tokens}, not {wanted}"
            time.sleep(0.05)

    def _end(self) -> None:
        self._ending.set()
        for thread in self._threads:
            thread.join()

    # ---- threads

    def _run(self, work: Callable[[int], None], number: int) -> None:
        with self._server.network():
            try:
                while not self._ending.is_set():
                    work(number)
            except Exception as error:
                self._problems.append(f"{work.__name__.strip('_')} {number}: {error!r}")

    def _stream(self, number: int) -> None:
        """From its beginning to the last token that is known, or until the load ends; then the client leaves."""
        case, known = self._expected.streams[number]
        with httpx.stream("POST", self._server.url + case.path, json=case.body, timeout=PATIENCE) as response:
            seen = 0
            for event in _events(response):
                tokens = event["output_ids"][:KNOWN]
                assert len(tokens) >= seen, f"{len(tokens)} tokens after {seen}"
                assert tokens == known[: len(tokens)], f"{tokens[seen:]} is not what comes after {seen} tokens"
                self._tokens[number] += len(tokens) - seen
                seen = len(tokens)
                if seen == KNOWN or self._ending.is_set():
                    return
        raise AssertionError(f"ended after {seen} tokens")

    def _client(self, number: int) -> None:
        chance = random.Random(f"{self._seed} {number}")
        for case, reference in chance.sample(self._expected.cases, len(self._expected.cases)):
            if self._ending.is_set():
                return
            difference = reference.difference(case.run(self._server.url))
            assert difference is None, f"{case.name}: {difference}"
            self.answered += 1


def _events(response: httpx.Response) -> Iterator[dict]:
    if response.status_code != 200:
        raise AssertionError(f"{response.status_code}: {response.read()[:500]!r}")
    for line in response.iter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            yield event
