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

import pytest
from losing_ranks import CASES, MANY, World
from server import Server


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
        world.leave(0)
        assert "loaded again" not in (tmp_path / "log").read_text()
        world.check_alone(0)
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_spare_takes_the_place_of_the_only_rank(models: Path, tmp_path: Path) -> None:
    server = Server(models / "llama-f32", tmp_path / "log", "--spare-ranks", "1", "--restart-backoff", "30", *MANY)
    try:
        server.wait_ready()
        world = World(server)
        for _ in range(2):
            world.spare_takes_over(0)
        world.leave(0)
    finally:
        server.stop()


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
            os.kill(world.spare(0), signal.SIGKILL)
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
