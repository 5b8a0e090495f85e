"""A training loop through kills, over HTTP and on an Engine: no sample is missing, none is of the wrong weights.

./scripts/test test/clients/test_rl_loop.py -m slow -s        (KEVLAR_RL_STEPS=200 for an hour in small)
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills import Kills, Watched
from rl_loop import Loop, OverHttp
from server import Server

STEPS = int(os.environ.get("KEVLAR_RL_STEPS", "12"))
FLAGS = ("--restart-backoff", "0.1", "--restart-backoff-max", "0.5", "--poison-deaths", "5")
HERE = Path(__file__).resolve().parent

PROGRAM = """
import asyncio, json, os, sys
sys.path.insert(0, sys.argv[3])
import sglang_kevlar
from kills import Kills, Watched
from pathlib import Path
from rl_loop import Loop, OnEngine

async def train(engine):
    loop = Loop(OnEngine(engine), [Path(sys.argv[1]), Path(sys.argv[2])])
    await loop.learn_references()
    with Kills(Watched(engine.tokenizer_manager.kevlar_status), 1.5, seed=6) as kills:
        for number in range(1, int(sys.argv[4]) + 1):
            await loop.step(number, during=number % 2 == 0, tensors=number % 4 < 2)
    return {"samples": loop.samples, "aborted": loop.aborted, "redirects": loop.redirects, "kills": kills.count,
            "retried": loop.retried_updates, "run_dir": engine.tokenizer_manager.paths.run_dir}

async def main():
    engine = sglang_kevlar.Engine(
        model_path=sys.argv[1], worker_groups=2, random_seed=7, dtype="float32", restart_backoff=0.1,
        restart_backoff_max=0.5, poison_deaths=5)
    try:
        return await train(engine)
    finally:
        engine.shutdown()

if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
"""


async def train(url: str, models: list[Path]) -> Loop:
    loop = Loop(OverHttp(url), models)
    await loop.learn_references()
    with Kills(Watched.at(url), 1.5, seed=5) as kills:
        for number in range(1, STEPS + 1):
            await loop.step(number, during=number % 2 == 0, tensors=number % 4 < 2)
    print(f"{STEPS} steps, {kills.count} kills, {loop.samples} samples, {loop.aborted} of them first given back,")
    print(f"{loop.redirects} moved, {loop.retried_updates} updates sent again")
    assert kills.count and loop.redirects
    return loop


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_over_http(models: Path, other_weights: Path, tmp_path: Path) -> None:
    server = Server(models / "llama-f32", tmp_path / "log", *FLAGS)
    try:
        server.wait_ready()
        loop = asyncio.run(train(server.url, [models / "llama-f32", other_weights]))
        assert loop.samples == STEPS * (8 + 3 * 2 + 1) and loop.aborted
        status = server.wait(lambda s: all(g["state"] == "ready" for g in s["groups"]), "both groups")
        assert {group["weight_version"] for group in status["groups"]} == {f"step {STEPS}"}
        server.stop()
        assert server.descendants() == []
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_on_an_engine(models: Path, other_weights: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(models / "llama-f32"), str(other_weights), str(HERE), str(STEPS)]
    marked = {"OMP_NUM_THREADS": "1", "KEVLAR_TEST_RL": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=7000, env={**os.environ, **marked})
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.strip().splitlines()[-1])
    print(report)
    assert report["samples"] == STEPS * (8 + 3 * 2 + 1)
    assert report["aborted"] and report["kills"] and report["redirects"]
    assert not os.path.exists(report["run_dir"])
    assert _processes_with(f"KEVLAR_TEST_RL={tmp_path}") == []


def _processes_with(variable: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().decode())
        except OSError:
            continue
    return found
