"""The whole run against a server of ours: every feature goes on exactly.

./scripts/test test/conformance/test_conformance.py -m slow        (about 5 minutes on two idle cores)

The same by hand, and against other systems: see docs/conformance.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from verdict import Verdict

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_every_feature_goes_on(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "systems.py"), "--run", "sglang-kevlar"]
    subprocess.run([*command, "--models", str(models), "--out", str(tmp_path)], check=True)
    results = json.loads((tmp_path / "sglang-kevlar.json").read_text())
    good = (Verdict.EXACT, Verdict.KEPT)
    assert [result for result in results if result["verdict"] not in good] == []
    assert len(results) > 40
