"""A rank dies, and the group forms again around the one that lives: its process, its weights, the same answers."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from cases import LONG_PROMPT, Answer, native
from server import Server

CASES = [
    native("greedy", sampling={"max_new_tokens": 100}),
    native("long", prompt=LONG_PROMPT, sampling={"max_new_tokens": 60}),
    native("penalty", sampling={"frequency_penalty": 0.6, "presence_penalty": 0.3, "max_new_tokens": 100}),
    native("log-probs", stream=False, return_logprob=True, logprob_start_len=0, sampling={"max_new_tokens": 100}),
    native("regex", sampling={"regex": r"([a-z]{1,6} ){40}", "max_new_tokens": 100}),
]


MANY = ["--max-redirects", "50", "--poison-deaths", "5"]


class World:
    def __init__(self, server: Server) -> None:
        self.server = server
        self.expected: list[Answer] = self._ask()

    def _ask(self) -> list[Answer]:
        with ThreadPoolExecutor(len(CASES)) as pool:
            return list(pool.map(lambda case: case.run(self.server.url), CASES))

    def check(self, answers: list[Answer]) -> None:
        differences = [
            f"{case.name}: {difference}"
            for case, one, other in zip(CASES, self.expected, answers, strict=True)
            if (difference := one.difference(other)) is not None
        ]
        assert not differences

    def lose(self, group: int, ranks: list[int], after: float) -> None:
        """Kill ranks of a group under load: the answers stay, and what lives of the group does, too."""
        before = self.server.group(group)
        with ThreadPoolExecutor(len(CASES)) as pool:
            running = [pool.submit(case.run, self.server.url) for case in CASES]
            time.sleep(after)
            for rank in ranks:
                os.kill(before["pids"]["ranks"][rank], signal.SIGKILL)
            self.check([one.result() for one in running])
        now = self.wait_epoch(group, before["epoch"])
        if len(ranks) == 1:
            survivor = 1 - ranks[0]
            assert now["pids"]["ranks"][survivor] == before["pids"]["ranks"][survivor]
        assert not set(now["pids"]["ranks"]) & {before["pids"]["ranks"][rank] for rank in ranks}

    def wait_epoch(self, group: int, behind: int) -> dict[str, Any]:
        def there(status: dict[str, Any]) -> bool:
            found = status["groups"][group]
            return found["epoch"] > behind and found["state"] == "ready"

        return self.server.wait(there, f"group {group} behind epoch {behind}")["groups"][group]

    def check_alone(self, group: int) -> None:
        """All cases on this group, while the other one starts."""
        other = self.server.group(1 - group)
        os.kill(other["pids"]["supervisor"], signal.SIGKILL)
        self.server.wait(lambda s: s["groups"][1 - group]["state"] != "ready", "the other group is down")
        self.check(self._ask())
        self.server.wait_ready()


@pytest.mark.timeout(900)
def test_the_other_rank_lives_on(models: Path, tmp_path: Path) -> None:
    server = Server(models / "llama-f32", tmp_path / "log", "--tp-size", "2", "--page-size", "16", "--spare-ranks", "1")
    try:
        server.wait_ready()
        world = World(server)
        for group, rank, after in ((0, 1, 0.3), (0, 0, 0.3), (1, 1, 0.1), (1, 1, 0.2)):
            world.lose(group, [rank], after)
        log = (tmp_path / "log").read_text()
        assert "spares" in log and "re-formed around rank0" in log
        before = server.group(0)
        os.kill(before["pids"]["detokenizer"], signal.SIGKILL)
        assert world.wait_epoch(0, before["epoch"])["pids"]["ranks"] == before["pids"]["ranks"]
        assert "loaded again" not in (tmp_path / "log").read_text()
        world.check_alone(0)
    finally:
        server.stop()


def _spare(server: Server, group: int) -> int:
    """The rank that serves in no epoch."""
    found = server.group(group)["pids"]
    serving = {found["supervisor"], found["detokenizer"], *found["ranks"]}
    children = psutil.Process(found["supervisor"]).children()
    spares = [child.pid for child in children if child.pid not in serving and _is_rank(child)]
    assert len(spares) == 1, spares
    return spares[0]


def _is_rank(process: psutil.Process) -> bool:
    return "scheduler" in " ".join(process.cmdline()) or "rank" in process.name()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_harm_while_a_group_forms(models: Path, tmp_path: Path) -> None:
    """Whatever happens to a group that forms again ends in a healthy one, and no answer is another."""
    server = Server(models / "llama-f32", tmp_path / "log", "--tp-size", "2", "--spare-ranks", "1", *MANY)
    try:
        server.wait_ready()
        world = World(server)

        def hit(rank: int, number: int) -> Callable[[dict[str, Any]], None]:
            return lambda before: os.kill(before["pids"]["ranks"][rank], number)

        def spare_dies(before: dict[str, Any]) -> None:
            os.kill(_spare(server, 0), signal.SIGKILL)
            hit(0, signal.SIGKILL)(before)

        def survivor_dies_while_it_forms(before: dict[str, Any]) -> None:
            hit(1, signal.SIGKILL)(before)
            server.wait(lambda status: status["groups"][0]["state"] != "ready", "the group is down")
            time.sleep(0.2)
            hit(0, signal.SIGKILL)(before)

        def survivor_hangs(before: dict[str, Any]) -> None:
            hit(0, signal.SIGSTOP)(before)
            hit(1, signal.SIGKILL)(before)

        for harm in (spare_dies, survivor_dies_while_it_forms, survivor_hangs):
            time.sleep(6)  # the spare's weights
            before = server.group(0)
            with ThreadPoolExecutor(len(CASES)) as pool:
                running = [pool.submit(case.run, server.url) for case in CASES]
                time.sleep(0.3)
                harm(before)
                world.check([one.result() for one in running])
            world.wait_epoch(0, before["epoch"])
            server.wait_ready()
        assert "does not leave" in (tmp_path / "log").read_text()
        world.check_alone(0)
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("model", "spares"), [("llama-f32", 0), ("moe-f32", 1), ("mla-f32", 2)])
def test_a_hundred_deaths(models: Path, tmp_path: Path, model: str, spares: int) -> None:
    """``KEVLAR_DEATHS`` of them, either rank of either group, at random moments, at times both."""
    chance = random.Random(11)
    flags = ["--tp-size", "2", "--restart-backoff", "0.1", "--spare-ranks", str(spares), *MANY]
    server = Server(models / model, tmp_path / "log", *flags)
    try:
        server.wait_ready()
        world = World(server)
        for number in range(int(os.environ.get("KEVLAR_DEATHS", "100"))):
            ranks = [chance.randrange(2)] if number % 10 else [0, 1]
            world.lose(chance.randrange(2), ranks, chance.random())
        world.check_alone(0)
        world.check_alone(1)
    finally:
        server.stop()
