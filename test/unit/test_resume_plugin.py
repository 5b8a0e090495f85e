"""Our hooks in SGLang: on only where asked for, and never silently missing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")

PREAMBLE = """
from sglang_kevlar.platform import torchvision_shim
torchvision_shim.install()
from sglang.srt.plugins import load_plugins
from sglang_kevlar.upstream import plugin
"""


def run(code: str, enabled: bool = True) -> str:
    """Output of ``code`` in a process of its own: hooks cannot be taken back."""
    env = os.environ | {"SGLANG_KEVLAR": "1" if enabled else "0"}
    done = subprocess.run([sys.executable, "-c", PREAMBLE + code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_hooks_are_applied_and_verified() -> None:
    out = run("load_plugins(); plugin.verify_applied(); print([plugin.is_applied(h) for h in plugin.hooks()])")
    assert "True" in out and "False" not in out


def test_stock_processes_are_left_alone() -> None:
    out = run("load_plugins(); print([plugin.is_applied(h) for h in plugin.hooks()])", enabled=False)
    assert "False" in out and "True" not in out


def test_a_hook_that_did_not_apply_is_named() -> None:
    out = run(
        """
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
del SamplingBatchInfo.adjusted_from_schedule_batch
load_plugins()
try:
    plugin.verify_applied()
except Exception as error:
    print("refused:", error)
"""
    )
    assert "refused:" in out and "adjusted_from_schedule_batch" in out and "cumulate" not in out
