"""A worker group dies while it serves; every client gets exactly the answer it would have got."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from cases import LONG_PROMPT, Answer, Case, catalogue, native
from leftovers import Leftovers
from server import Server

#: faults of one run over the catalogue: what is hit, with what
FAULTS = [
    ("rank", signal.SIGKILL),
    ("detokenizer", signal.SIGKILL),
    ("rank", signal.SIGSTOP),
    ("supervisor", signal.SIGKILL),
    ("rank", signal.SIGKILL),
    ("detokenizer", signal.SIGSTOP),
    ("rank", signal.SIGKILL),
]
#: the last times of what is hit like that before
REPEATED = (4, 6)
FLAGS = (
    "--enable-deterministic-inference",
    "--chunked-prefill-size",
    "256",
    "--max-running-requests",
    "16",
    "--reasoning-parser",
    "qwen3",
    "--tool-call-parser",
    "qwen25",
)


@pytest.fixture(scope="module")
def leftovers(tmp_path_factory: pytest.TempPathFactory) -> Leftovers:
    return Leftovers(tmp_path_factory.mktemp("run") / "r")


@pytest.fixture(scope="module")
def server(models: Path, tmp_path_factory: pytest.TempPathFactory, leftovers: Leftovers):
    lora = ("--enable-lora", "--lora-paths", f"adapter={models / 'lora'}", "--max-lora-rank", "16")
    flags = (*FLAGS, *lora, *leftovers.flags)
    server = Server(models / "llama-f32", tmp_path_factory.mktemp("server") / "log", *flags)
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> list[tuple[Case, Answer]]:
    """The catalogue with its answers. What differs between two undisturbed runs could prove nothing."""
    cases = catalogue(server.url, seeded=True, lora="adapter")
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda case: case.run(server.url), cases))
        second = list(pool.map(lambda case: case.run(server.url), cases))
    for case, one, other in zip(cases, first, second, strict=True):
        assert one.status == 200 and not one.error and one.done, f"{case.name}: {one}"
        assert (difference := one.difference(other)) is None, f"{case.name}: {difference}"
    return list(zip(cases, first, strict=True))


@pytest.mark.parametrize(
    "round_number",
    [pytest.param(n, marks=pytest.mark.slow if n in REPEATED else ()) for n in range(len(FAULTS))],
)
@pytest.mark.timeout(600)
def test_every_feature_survives_the_loss_of_its_group(server, undisturbed, round_number) -> None:
    """All features at once, one group hit at a random moment: each round is over 40 requests."""
    kind, fault = FAULTS[round_number]
    chance = random.Random(round_number)
    server.wait_ready()
    expected = list(undisturbed)
    chance.shuffle(expected)
    failovers = len(server.status()["failovers"])

    def hit() -> None:
        group = server.serving_group()
        until, most = time.monotonic() + chance.uniform(0.0, 1.5), 1
        # Sooner when half of its requests have ended: on a fast machine none might be left to move.
        while time.monotonic() < until and 2 * (running := server.group(group)["running"]) > most:
            most = max(most, running)
            time.sleep(0.01)
        pid = server.kill(group, kind, fault)
        if fault == signal.SIGSTOP:
            time.sleep(2)
            with_suppress_kill(pid, signal.SIGCONT)

    with ThreadPoolExecutor(len(expected)) as pool:
        fault_thread = threading.Thread(target=hit)
        fault_thread.start()
        answers = list(pool.map(lambda pair: pair[0].run(server.url), expected))
        fault_thread.join()
    differences = [
        f"{case.name} ({answer.redirects} redirects): {difference}"
        for (case, reference), answer in zip(expected, answers, strict=True)
        if (difference := reference.difference(answer)) is not None
    ]
    assert not differences, "\n".join(differences)
    records = server.wait(lambda s: len(s["failovers"]) > failovers, "failover record", 30)["failovers"][failovers:]
    # Near the end of a round the few that are moved may be of endpoints that do not say so.
    assert sum(record["redirected"] for record in records) > 0, records


def with_suppress_kill(pid: int, sig: int) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        pass


@pytest.mark.timeout(600)
def test_at_every_point_of_a_request(server: Server) -> None:
    """Queued, in chunked prefill, before the first token, in decode, at the last token: the same answer."""
    case = native("long", prompt=LONG_PROMPT, sampling={"max_new_tokens": 48})
    server.wait_ready()
    started = time.monotonic()
    expected = case.run(server.url)
    duration = time.monotonic() - started
    for fraction in (0.02, 0.3, 0.95):
        server.wait_ready()
        # Upstream flushes an idle group only, and the last request may just have ended.
        httpx.post(f"{server.url}/flush_cache", params={"timeout": 30}, timeout=60).raise_for_status()
        with ThreadPoolExecutor(24) as pool:
            # More than --max-running-requests of one group, so that some wait in its queue.
            running = [pool.submit(case.run, server.url) for _ in range(24)]
            time.sleep(duration * fraction)
            server.kill(server.serving_group())
            answers = [one.result() for one in running]
        assert [expected.difference(answer) for answer in answers] == [None] * 24, f"killed at {fraction:.0%}"


@pytest.mark.timeout(600)
def test_an_unseeded_request_keeps_what_was_delivered(server: Server) -> None:
    """Sampling without a seed cannot be repeated; what the client has seen stands (`_native` asserts it)."""
    server.wait_ready()
    case = native("hot", sampling={"temperature": 1.0, "max_new_tokens": 250})
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(case.run, server.url) for _ in range(8)]
        group = server.serving_group()
        time.sleep(0.3)
        server.kill(group)
        answers = [one.result() for one in running]
    assert [len(answer.token_ids[0]) for answer in answers] == [250] * 8
    assert Counter(answer.done for answer in answers) == {True: 8}
    assert any(answer.redirects for answer in answers)


@pytest.mark.timeout(600)
def test_abort_and_disconnect_during_a_failover(server: Server) -> None:
    """A request aborted or abandoned while it moves ends, and nothing of it stays behind."""
    server.wait_ready()
    long = {"text": LONG_PROMPT, "sampling_params": {"max_new_tokens": 400, "ignore_eos": True}, "stream": True}
    finished: dict[str, str] = {}

    def run(rid: str, leave: bool) -> None:
        with httpx.stream("POST", f"{server.url}/generate", json={**long, "rid": rid}, timeout=120) as response:
            for line in response.iter_lines():
                if leave and line:
                    finished[rid] = "left"
                    return
                if '"finish_reason":{' in line:
                    finished[rid] = "abort" if '"type":"abort"' in line else "end"

    threads = [threading.Thread(target=run, args=(f"abort-{i}", i % 2 == 1)) for i in range(6)]
    for thread in threads:
        thread.start()
    group = server.serving_group()
    time.sleep(0.2)
    server.kill(group)
    for i in range(0, 6, 2):
        httpx.post(f"{server.url}/abort_request", json={"rid": f"abort-{i}"}, timeout=30).raise_for_status()
    for thread in threads:
        thread.join()
    assert finished == {f"abort-{i}": "left" if i % 2 else "abort" for i in range(6)}
    server.wait(lambda s: all(g["running"] == 0 for g in s["groups"]) and s["held"] == 0, "empty server", 60)


@pytest.mark.timeout(600)
def test_both_groups_die(server: Server) -> None:
    """With no group left requests wait, and go on when one is back."""
    case = native("both", sampling={"max_new_tokens": 80})
    server.wait_ready()
    expected = case.run(server.url)
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(case.run, server.url, 300) for _ in range(8)]
        server.serving_group()
        server.kill_all_at_once()
        server.wait(lambda s: not any(g["state"] == "ready" for g in s["groups"]), "loss of both groups", 10)
        assert httpx.get(f"{server.url}/health", timeout=10).status_code == 503
        late = pool.submit(case.run, server.url, 300)
        answers = [one.result() for one in [*running, late]]
    assert [expected.difference(answer) for answer in answers] == [None] * 9


@pytest.mark.timeout(600)
def test_one_group_after_the_other_and_one_that_is_starting(server: Server) -> None:
    """The second group dies while it runs the first one's requests, and the first again while it starts."""
    server.wait_ready()
    case = native("moved twice", sampling={"max_new_tokens": 600})
    expected = case.run(server.url)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(case.run, server.url, 400) for _ in range(4)]
        first = server.serving_group()
        second = 1 - first
        server.wait(lambda s: all(g["running"] for g in s["groups"]), "requests on both groups", 30)
        failovers = len(server.status()["failovers"])
        server.kill(first)
        # The record of a failover is complete once all its requests have gone on.
        server.wait(lambda s: len(s["failovers"]) > failovers and s["groups"][second]["running"] == 4, "move", 30)
        starting = server.wait(lambda s: s["groups"][first]["pids"]["ranks"], "first group starting", 60)
        server.kill(second)
        os.kill(starting["groups"][first]["pids"]["ranks"][0], signal.SIGKILL)
        answers = [one.result() for one in running]
    assert [expected.difference(answer) for answer in answers] == [None] * 4
    assert max(answer.redirects for answer in answers) == 2
    server.wait_ready()


@pytest.mark.timeout(600)
def test_nothing_is_left_behind_when_the_launcher_is_killed(server: Server, leftovers: Leftovers) -> None:
    """The last test of this server. The same after Ctrl-C: test_operation.py."""
    leftovers.check_end(server, signal.SIGKILL)
