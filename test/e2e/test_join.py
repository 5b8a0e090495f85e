"""A worker group that joined over the network is lost, leaves, and comes back; every client gets its exact answer."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from cases import LONG_PROMPT, Answer, Case, catalogue, native
from joined import Cluster, Joined
from server import Server

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


class World:
    """A server with one group of its own, and one that joined."""

    def __init__(self, models: Path, directory: Path) -> None:
        self.cluster = Cluster(directory)
        self.server = Server(models / "llama-f32", directory / "log", *FLAGS, *self.cluster.listen, groups=1)
        self.other: Joined | None = None

    def up(self) -> Joined:
        """Both groups are ready."""
        if self.other is None or self.other.process.poll() is not None:
            self.other = self.cluster.join("other", "--host-label", "elsewhere")
        self.other.wait_ready(self.server)
        self.server.wait_ready(2)
        return self.other

    def stop(self) -> None:
        try:
            if self.other is not None:
                self.other.stop()
        finally:
            self.server.stop()


@pytest.fixture(scope="module")
def world(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    world = World(models, tmp_path_factory.mktemp("join"))
    try:
        world.up()
        yield world
    finally:
        world.stop()


@pytest.fixture(scope="module")
def undisturbed(world: World) -> list[tuple[Case, Answer]]:
    """The catalogue with its answers, which are the same wherever they were made."""
    cases = catalogue(world.server.url, seeded=True)
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda case: case.run(world.server.url), cases))
        second = list(pool.map(lambda case: case.run(world.server.url), cases))
    for case, one, other in zip(cases, first, second, strict=True):
        assert one.status == 200 and not one.error and one.done, f"{case.name}: {one}"
        assert (difference := one.difference(other)) is None, f"{case.name}: {difference}"
    return list(zip(cases, first, strict=True))


def run_all(
    world: World, undisturbed: list[tuple[Case, Answer]], group: Callable[[], int], fault: Callable[[], None], seed: int
) -> list[dict[str, Any]]:
    """All features at once, and ``fault`` while some of them run on ``group``. Returns the failovers."""
    chance = random.Random(seed)
    expected = list(undisturbed)
    chance.shuffle(expected)
    before = len(world.server.status()["failovers"])

    def hit() -> None:
        victim = group()
        world.server.wait(
            lambda status: any(g["id"] == victim and g["running"] for g in status["groups"]), "requests there", 30
        )
        time.sleep(chance.uniform(0.0, 0.4))
        fault()

    with ThreadPoolExecutor(len(expected)) as pool:
        thread = threading.Thread(target=hit)
        thread.start()
        answers = list(pool.map(lambda pair: pair[0].run(world.server.url), expected))
        thread.join()
    differences = [
        f"{case.name} ({answer.redirects} redirects): {difference}"
        for (case, reference), answer in zip(expected, answers, strict=True)
        if (difference := reference.difference(answer)) is not None
    ]
    assert not differences, "\n".join(differences)
    status = world.server.wait(lambda s: len(s["failovers"]) > before, "failover record", 30)
    records = status["failovers"][before:]
    # Only the native API's answers say so themselves.
    assert sum(record["redirected"] for record in records) > 0, f"no request was moved: {records}"
    return records


@pytest.mark.parametrize(
    ("process", "sig", "kind"),
    [
        ("rank", signal.SIGKILL, "exit"),
        pytest.param("detokenizer", signal.SIGKILL, "exit", marks=pytest.mark.slow),
        pytest.param("rank", signal.SIGSTOP, "stopped", marks=pytest.mark.slow),
        pytest.param("supervisor", signal.SIGKILL, "exit", marks=pytest.mark.slow),
        ("gateway", signal.SIGKILL, "network"),
        pytest.param("gateway", signal.SIGSTOP, "network", marks=pytest.mark.slow),
        # As the gateway's death to the frontend; that it joins again is in the next one, too.
        pytest.param("launcher", signal.SIGKILL, "network", marks=pytest.mark.slow),
        ("launcher", signal.SIGTERM, "left"),
    ],
)
@pytest.mark.timeout(300)
def test_requests_of_a_joined_group_go_on_exactly(world, undisturbed, process, sig, kind) -> None:
    other = world.up()
    known = other.group(world.server)
    pid = other.pid(world.server, process)
    records = run_all(world, undisturbed, lambda: known["id"], lambda: os.kill(pid, sig), seed=len(process) + sig)
    if sig == signal.SIGSTOP:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    assert [record["group"] for record in records] == [known["id"]]
    assert records[0]["cause"]
    if process == "launcher":
        assert other.end() == (0 if sig == signal.SIGTERM else -sig)
        assert bool(other.group(world.server)) == (kind != "left")
    # It comes back under its name, as the same group and another incarnation.
    back = world.up().group(world.server)
    assert back["id"] == known["id"] and back["epoch"] > known["epoch"] and back["link"] == "up"


@pytest.mark.timeout(300)
def test_requests_of_a_local_group_go_on_exactly_in_the_joined_one(world, undisturbed) -> None:
    world.up()
    run_all(world, undisturbed, lambda: 0, lambda: world.server.kill(0), seed=1)


@pytest.mark.timeout(300)
def test_each_keeps_the_shadow_of_the_other(world) -> None:
    """Over TCP, with the cluster's key: a request that is moved computes little again."""
    other = world.up()
    known = other.group(world.server)

    def linked(status: dict[str, Any]) -> bool:
        to = {group["name"]: group["shadow"] and group["shadow"]["to"] for group in status["groups"]}
        return to == {"0": "other", "other": 0}

    world.server.wait(linked, "shadows both ways", 60)
    cases = [
        native(f"long {seed}", prompt=f"{LONG_PROMPT} # {seed}", sampling={"max_new_tokens": 400}) for seed in range(4)
    ]
    references = [case.run(world.server.url) for case in cases]
    assert httpx.post(f"{world.server.url}/flush_cache", timeout=30).status_code == 200
    with ThreadPoolExecutor(len(cases)) as pool:
        running = [pool.submit(case.run, world.server.url) for case in cases]
        world.server.wait(
            lambda s: any(g["id"] == known["id"] and g["running"] for g in s["groups"]), "requests there", 30
        )
        time.sleep(1.5)
        os.kill(other.pid(world.server, "rank"), signal.SIGKILL)
        answers = [future.result() for future in running]
    for reference, answer in zip(references, answers, strict=True):
        assert reference.difference(answer) is None
    moved = [answer.recomputed for answer in answers if answer.redirects]
    assert moved and max(moved) <= 64, moved


@pytest.mark.timeout(300)
def test_a_joined_group_is_drained_and_restarted_by_the_operator(world, undisturbed) -> None:
    known = world.up().group(world.server)
    case, reference = undisturbed[0]
    assert httpx.post(f"{world.server.url}/kevlar/groups/0/drain").status_code == 202
    assert reference.difference(case.run(world.server.url)) is None, "made by the joined group alone"
    assert httpx.post(f"{world.server.url}/kevlar/groups/0/restart").status_code == 202
    world.server.wait_ready(2)

    def restart() -> None:
        assert httpx.post(f"{world.server.url}/kevlar/groups/{known['id']}/restart").status_code == 202

    run_all(world, undisturbed, lambda: known["id"], restart, seed=2)
    back = world.up().group(world.server)
    assert back["pids"]["gateway"] == known["pids"]["gateway"] and back["pids"]["ranks"] != known["pids"]["ranks"]


@pytest.mark.slow  # what is refused, and how it is said, is in test/unit/test_fingerprint.py
@pytest.mark.timeout(300)
def test_what_does_not_fit_is_refused_by_name(world, models, tmp_path) -> None:
    world.up()
    model = tmp_path / "model"
    shutil.copytree(models / "llama-f32", model)
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-2000:-1000] = bytes(1000)
    weights.write_bytes(data)
    for name, flags, said in (
        ("wrong-model", ("--model-path", str(model)), "model_digest"),
        ("wrong-flags", ("--dtype", "bfloat16", "--chunked-prefill-size", "128"), "dtype: 'float32' here, 'bfloat16'"),
    ):
        refused = world.cluster.join(name, *flags)
        try:
            assert refused.end() == 78, refused.log_end()
        finally:
            refused.stop()
        assert said in refused.log_end() and "the frontend (here) and the group (there) differ" in refused.log_end()
        assert "chunked_prefill_size" not in refused.log_end().split("differ:")[1], "that may differ"
        assert not refused.group(world.server)
