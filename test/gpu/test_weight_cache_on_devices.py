"""Ranks map the weights of upstream's weight cache daemon: what `test/e2e/test_weight_cache.py` does on CPUs, by the
same code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import weight_cache
from losing_ranks import MANY, World
from on_devices import KERNELS, POOL
from server import Server

MODEL = "llama-f32"


@pytest.fixture(scope="module")
def daemon(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[weight_cache.Daemon]:
    directory = tmp_path_factory.mktemp("daemon")
    command = [sys.executable, "-m", "sglang.srt.weight_cache.daemon", "--gpu-id", "0", "--tp-rank", "0"]
    command += ["--model-path", str(models / MODEL), "--dtype", "float32", *KERNELS]
    daemon = weight_cache.Daemon(command, directory, files(directory))
    try:
        yield daemon
    finally:
        daemon.kill()


def files(directory: Path) -> dict[str, str]:
    """Where a daemon of a test is to be found, and no other."""
    return {
        f"SGLANG_WEIGHT_CACHE_{what}_TEMPLATE": f"{directory}/sockets/{{device_uuid}}.{what.lower()}"
        for what in ("SOCKET", "READY")
    }


@pytest.fixture(scope="module")
def mapped(models: Path, daemon: weight_cache.Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    flags = [*KERNELS, *POOL, *weight_cache.FLAGS, "--reform", "on", "--spare-ranks", "1", *MANY]
    log = tmp_path_factory.mktemp("mapped") / "log"
    server = Server(models / MODEL, log, *flags, groups=1, env=files(daemon.sockets.parent))
    try:
        server.wait_ready()
        world = World(server)
        weight_cache.attach(world, daemon)
        yield world
    finally:
        server.stop()


@pytest.mark.gpu(1)
@pytest.mark.timeout(1800)
def test_ranks_and_spares_map_the_weights_of_a_daemon(mapped: World) -> None:
    weight_cache.check_who_maps(mapped)


@pytest.mark.gpu(1)
@pytest.mark.timeout(1800)
def test_weights_of_a_daemon_are_not_changed(mapped: World) -> None:
    weight_cache.check_changes(mapped)


@pytest.mark.gpu(1)
@pytest.mark.timeout(1800)
def test_the_daemon_dies_and_comes_back(mapped: World, daemon: weight_cache.Daemon) -> None:
    weight_cache.check_death_of_the_daemon(mapped, daemon)
