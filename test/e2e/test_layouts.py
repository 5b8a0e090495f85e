"""Other shapes of a group: tensor and pipeline parallel, pages, embeddings. Whatever rank dies, the answers stay."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from cases import LONG_PROMPT, PROMPT, Answer, native
from server import Server

CASES = [
    native("greedy", sampling={"max_new_tokens": 100}),
    native("long", prompt=LONG_PROMPT, sampling={"max_new_tokens": 60}),
    native("penalty", sampling={"frequency_penalty": 0.6, "presence_penalty": 0.3, "max_new_tokens": 100}),
    native("log-probs", stream=False, return_logprob=True, logprob_start_len=0, sampling={"max_new_tokens": 100}),
    native("regex", sampling={"regex": r"([a-z]{1,6} ){40}", "max_new_tokens": 100}),
]


#: kills, of which one has to come while requests run: they take less than a second
HITS = 5


@contextmanager
def serving(models: Path, tmp_path: Path, *flags: str, model: str = "llama-f32") -> Iterator[Server]:
    server = Server(models / model, tmp_path / "log", *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def lose_a_rank(server: Server, rank: int) -> None:
    with ThreadPoolExecutor(len(CASES)) as pool:
        expected: list[Answer] = list(pool.map(lambda case: case.run(server.url), CASES))
        running = [pool.submit(case.run, server.url) for case in CASES]
        group = server.serving_group()
        time.sleep(0.3)
        os.kill(server.group(group)["pids"]["ranks"][rank], signal.SIGKILL)
        answers = [one.result() for one in running]
    differences = [
        f"{case.name}: {difference}"
        for case, one, other in zip(CASES, expected, answers, strict=True)
        if (difference := one.difference(other)) is not None
    ]
    assert not differences
    assert any(answer.redirects for answer in answers)
    server.wait_ready()


@pytest.mark.slow  # test_reform.py has such groups, too
@pytest.mark.timeout(900)
def test_tensor_parallel_groups_with_pages(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path, "--tp-size", "2", "--page-size", "16") as server:
        lose_a_rank(server, rank=1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pipeline_parallel_groups(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path, "--pp-size", "2") as server:
        lose_a_rank(server, rank=1)
        lose_a_rank(server, rank=0)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mixture_of_experts_without_overlap(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path, "--disable-overlap-schedule", model="moe-f32") as server:
        lose_a_rank(server, rank=0)


@pytest.mark.timeout(900)
def test_embeddings_are_run_again(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path, "--is-embedding", "--chunked-prefill-size", "64") as server:
        body = {"model": "m", "input": [f"{LONG_PROMPT} {PROMPT} {i}" for i in range(12)]}

        def embed() -> list[list[float]]:
            response = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=120)
            response.raise_for_status()
            return [item["embedding"] for item in response.json()["data"]]

        expected = embed()
        for _ in range(HITS):
            httpx.post(f"{server.url}/flush_cache", params={"timeout": 30}, timeout=60).raise_for_status()
            with ThreadPoolExecutor(2) as pool:
                running = [pool.submit(embed) for _ in range(2)]
                server.kill(server.serving_group())
                for answer in running:
                    for one, other in zip(expected, answer.result(), strict=True):
                        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-4
            if server.status()["failovers"][-1]["redirected"] > 0:
                return
            server.wait_ready()
        raise AssertionError("no kill came while something ran")
