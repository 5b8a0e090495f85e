"""The rank process, up to where SGLang takes over."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

#: the imports of a rank, without those of what its arguments need
INTERVAL = """
from types import SimpleNamespace
from sglang_kevlar.upstream import saved_args
from sglang_kevlar.worker import bootstrap

saved_args.load = lambda path: None
bootstrap.import_upstream(SimpleNamespace(server_args_file=""))
from sglang.srt.managers.scheduler_components import output_streamer
print(output_streamer.DEFAULT_FORCE_STREAM_INTERVAL)
"""


@pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="SGLang is not installed")
def test_what_is_not_sent_as_a_stream_reports_nothing_before_its_end() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERVAL],
        env=os.environ | {"SGLANG_FORCE_STREAM_INTERVAL": "50"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1]) > 10**9
