"""sglang_kevlar.Engine, offline: the same calls as sglang.Engine, through the death of a group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, signal, sys, threading, time
import sglang_kevlar

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
        print(json.dumps({
            "same": [a["output_ids"] == b["output_ids"] and a["text"] == b["text"] for a, b in zip(expected, answers)],
            "redirects": [a["meta_info"].get("kevlar", {}).get("redirects", 0) for a in answers],
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
    assert not os.path.exists(report["run_dir"])
