"""SGLang's frontend language on our Engine, through the death of a group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys, zlib
sys.path.insert(0, sys.argv[2])
import sglang_kevlar
from kills import Watched, same_through_a_kill
from language_programs import PROGRAMS, sgl

def main():
    engine = sglang_kevlar.Engine(
        model_path=sys.argv[1], worker_groups=2, random_seed=7, dtype="float32", restart_backoff=0.1,
        restart_backoff_max=0.5)
    try:
        expected = engine.generate("def main():", {"temperature": 0, "max_new_tokens": 8})["text"]
        sgl.set_default_backend(engine)
        for name, program in PROGRAMS.items():
            watched = Watched(engine.tokenizer_manager.kevlar_status)
            same_through_a_kill(watched, program, zlib.crc32(name.encode()))
            print(name, flush=True)
        sgl.flush_cache()
        try:
            engine.generate("def main():", {"temperature": 0, "max_new_tokens": 8})
            raise AssertionError("the loop is another thread's")
        except RuntimeError as error:
            print("refused:", error)
    finally:
        engine.shutdown()
    print("end")

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_programs_on_an_engine(models: Path, tmp_path: Path) -> None:
    from language_programs import PROGRAMS

    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(models / "llama-f32"), str(Path(__file__).resolve().parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=580, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr[-4000:]
    *names, refused, end = result.stdout.splitlines()
    assert names == list(PROGRAMS) and refused.startswith("refused:") and end == "end"
