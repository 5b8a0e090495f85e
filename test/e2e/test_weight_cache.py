"""Weights of a weight cache daemon. On a CPU its tensors are in shared memory; all else of it is upstream's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import weight_cache
from losing_ranks import MANY, World
from server import Server


@pytest.fixture(scope="module")
def daemon(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[weight_cache.Daemon]:
    directory = tmp_path_factory.mktemp("daemon")
    command = [sys.executable, str(Path(__file__).parent / "daemon_on_cpu.py"), str(directory / "sockets" / "daemon")]
    command += ["--model-path", str(models / "llama-f32"), "--dtype", "float32", "--device", "cpu"]
    daemon = weight_cache.Daemon(command, directory, {"OMP_NUM_THREADS": "1"})
    try:
        yield daemon
    finally:
        daemon.kill()


@pytest.fixture(scope="module")
def mapped(models: Path, daemon: weight_cache.Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    flags = [*weight_cache.FLAGS, "--weight-cache-socket", str(daemon.sockets / "daemon"), "--spare-ranks", "1", *MANY]
    server = Server(models / "llama-f32", tmp_path_factory.mktemp("mapped") / "log", *flags)
    try:
        server.wait_ready()
        world = World(server)
        weight_cache.attach(world, daemon)
        yield world
    finally:
        server.stop()


@pytest.mark.timeout(600)
def test_ranks_and_spares_map_the_weights_of_a_daemon(mapped: World) -> None:
    weight_cache.check_who_maps(mapped)


@pytest.mark.timeout(300)
def test_weights_of_a_daemon_are_not_changed(mapped: World) -> None:
    weight_cache.check_changes(mapped)


@pytest.mark.timeout(600)
def test_the_daemon_dies_and_comes_back(mapped: World, daemon: weight_cache.Daemon) -> None:
    weight_cache.check_death_of_the_daemon(mapped, daemon)
