"""sglang_kevlar.Engine, offline: the same calls as sglang.Engine, through the death of a group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import asyncio, json, os, signal, sys, threading, time
import sglang_kevlar
import torch

if __name__ == "__main__":
    engine = sglang_kevlar.Engine(model_path=sys.argv[1], worker_groups=2, random_seed=3, dtype="float32")
    try:
        prompts = ["def main():", "class Node:", "import os", "for x in"]
        sampling = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
        expected = engine.generate(prompts, sampling)
        manager = engine.tokenizer_manager

        def kill():
            while True:
                for group in manager.kevlar_status()["groups"]:
                    if group["running"]:
                        time.sleep(0.2)
                        os.kill(group["pids"]["ranks"][0], signal.SIGKILL)
                        return
                time.sleep(0.01)

        killer = threading.Thread(target=kill)
        killer.start()
        answers = engine.generate(prompts, sampling)
        killer.join()
        # CPU tensors reach every group, and a request that would end them all none.
        while [group["state"] for group in manager.kevlar_status()["groups"]] != ["ready", "ready"]:
            engine.loop.run_until_complete(asyncio.sleep(0.1))
        norm = torch.ones(manager.model_config.hidden_size)
        update = [engine.begin_weight_update(), engine.update_weights_from_tensor([("model.norm.weight", norm)]),
                  engine.end_weight_update()]
        try:
            refused = engine.generate("x", {"regex": 5})
        except ValueError as error:
            refused = str(error)
        print(json.dumps({
            "same": [a["output_ids"] == b["output_ids"] and a["text"] == b["text"] for a, b in zip(expected, answers)],
            "redirects": [a["meta_info"].get("kevlar", {}).get("redirects", 0) for a in answers],
            "update": [success for success, _ in update],
            "refused": refused,
            "epochs": [group["epoch"] for group in manager.kevlar_status()["groups"]],
            "run_dir": manager.paths.run_dir,
        }))
    finally:
        engine.shutdown()
"""


@pytest.mark.timeout(400)
def test_the_offline_engine_survives_the_loss_of_a_group(models: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    result = subprocess.run(
        [sys.executable, str(program), str(models / "llama-f32")],
        capture_output=True,
        text=True,
        timeout=350,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["same"] == [True] * 4
    assert sum(report["redirects"]) > 0
    assert report["update"] == [True] * 3
    assert "sampling_params.regex" in report["refused"] and sorted(report["epochs"]) == [1, 2]
    assert not os.path.exists(report["run_dir"])


ASYNC_PROGRAM = """
import asyncio, json, sys
import sglang_kevlar

SAMPLING = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}

async def ask(engine):
    answers = await asyncio.gather(*(engine.async_generate(prompt, SAMPLING) for prompt in ("def", "class")))
    return [len(answer["output_ids"]) for answer in answers]

def error_of(call, *arguments):
    try:
        call(*arguments)
    except RuntimeError as error:
        return str(error)

def start():
    return sglang_kevlar.Engine(model_path=sys.argv[1], worker_groups=1, random_seed=3, dtype="float32")

async def inside():
    engine = start()
    try:
        return [await ask(engine), error_of(engine.generate, "x", SAMPLING)]
    finally:
        engine.shutdown()

if __name__ == "__main__":
    if sys.argv[2] == "inside":
        report = asyncio.run(inside())
    else:
        engine = start()
        try:
            report = [asyncio.run(ask(engine)), error_of(engine.generate, "x", SAMPLING)]
        finally:
            engine.shutdown()
    print(json.dumps(report))
"""


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("made", "then"),
    [("inside", "already running"), pytest.param("outside", "another", marks=pytest.mark.slow)],
)
def test_the_engine_in_an_event_loop(models: Path, tmp_path: Path, made: str, then: str) -> None:
    """Made inside a running loop or before it, as upstream's; a call from a second loop is an error, not a hang."""
    program = tmp_path / "program.py"
    program.write_text(ASYNC_PROGRAM)
    result = subprocess.run(
        [sys.executable, str(program), str(models / "llama-f32"), made],
        capture_output=True,
        text=True,
        timeout=350,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    answers, error = json.loads(result.stdout.strip().splitlines()[-1])
    assert answers == [8, 8] and then in error
