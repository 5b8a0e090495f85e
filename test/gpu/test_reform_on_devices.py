"""Groups on GPUs form again around who lives: what `test/e2e/test_reform.py` does on CPUs, by the same code.

One group only, so that one or two devices will do: what it was at when it lost a rank goes on when it serves again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from losing_ranks import MANY, World
from on_devices import KERNELS, POOL
from server import Server

#: Whatever waits on a device for another rank past NCCL has to be off (docs/limits.md).
FLAGS = [*KERNELS, "--disable-custom-all-reduce", "--enforce-disable-flashinfer-allreduce-fusion", *MANY]
#: MiB that may be in use on a device more after many re-forms than after the first
GROWTH = 64
_CAPTURE = "Capture target decode CUDA graph begin"


@contextmanager
def serving(models: Path, log: Path, *flags: str) -> Iterator[World]:
    server = Server(models / "llama-f32", log, *FLAGS, *POOL, "--reform", "on", *flags, groups=1)
    try:
        server.wait_ready()
        yield World(server)
        assert "starts are cold" not in log.read_text(errors="replace"), "ranks are forked of a template"
    finally:
        server.stop()


def used(pid: int) -> int:
    """MiB of device memory of a process; of all together where the driver does not tell them apart (in a container)."""
    smi = ["nvidia-smi", "--format=csv,noheader,nounits"]

    def query(what: str) -> str:
        return subprocess.run([*smi, what], check=True, capture_output=True, text=True, timeout=60).stdout

    for line in query("--query-compute-apps=pid,used_memory").splitlines():
        found, _, memory = line.partition(",")
        if found.strip() == str(pid) and memory.strip().isdecimal():
            return int(memory)
    return sum(map(int, query("--query-gpu=memory.used").split()))


@pytest.mark.gpu(1)
@pytest.mark.timeout(1800)
def test_the_other_rank_lives_on_over_nccl(models: Path, tmp_path: Path, two_ranks: list[str]) -> None:
    """Also while it waits for the dead one in a captured graph, which is where it mostly is under load."""
    with serving(models, tmp_path / "log", *two_ranks) as world:
        world.leave(0)  # both live, and one waits for the other
        for rank, after in ((1, 0.3), (0, 0.3), (1, 0.1), (0, 0.5)):
            world.lose(0, [rank], after)
        log = (tmp_path / "log").read_text()
        assert log.count("re-formed around") == 5
        assert "does not leave" not in log


@pytest.mark.gpu(1)
@pytest.mark.timeout(1800)
def test_a_spare_takes_the_place_of_the_only_rank(models: Path, tmp_path: Path) -> None:
    with serving(models, tmp_path / "log", "--spare-ranks", "1") as world:
        for _ in range(2):
            world.spare_takes_over(0)


@pytest.mark.gpu(1)
@pytest.mark.timeout(1800)
def test_a_rank_that_is_bound_again_captures_its_graphs_again_and_gives_its_memory_back(
    models: Path, tmp_path: Path
) -> None:
    with serving(models, tmp_path / "log") as world:
        world.leave(0)
        (rank,) = world.server.group(0)["pids"]["ranks"]
        after_one = used(rank)
        for _ in range(4):
            world.leave(0)
        grown = used(rank) - after_one
        print(f"{after_one} MiB after the first, {grown} more after five")
        assert grown <= GROWTH
        log = (tmp_path / "log").read_text()
        assert log.count("re-formed around rank0") == 5
        assert log.count(_CAPTURE) == 6


@pytest.mark.gpu(1)
@pytest.mark.timeout(1800)
def test_weights_that_are_kept_do_not_make_the_pool_larger(models: Path, tmp_path: Path) -> None:
    """They are on the device before the free memory is measured of which the pool gets its share."""
    sizes = {}
    share = ["--mem-fraction-static", "0.3"]
    for reform in ("off", "on"):
        server = Server(models / "llama-f32", tmp_path / reform, *FLAGS, *share, "--reform", reform, groups=1)
        try:
            server.wait_ready()
            sizes[reform] = server.get("/server_info").json()["internal_states"][0]["memory_usage"]["token_capacity"]
        finally:
            server.stop()
    assert sizes["on"] == pytest.approx(sizes["off"], rel=0.01)
