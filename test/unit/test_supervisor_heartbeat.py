"""Heartbeat pages, with a writer in another process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_kevlar.protocol.heartbeat import Heartbeat, Phase
from sglang_kevlar.worker.heartbeat import HeartbeatReader, HeartbeatWriter


def read(reader: HeartbeatReader) -> Heartbeat:
    beat = reader.read()
    assert beat is not None
    return beat


def test_no_page_is_no_heartbeat(tmp_path: Path) -> None:
    reader = HeartbeatReader(str(tmp_path / "page"))
    assert reader.read() is None
    HeartbeatWriter(str(tmp_path / "page"))
    assert read(reader).phase is Phase.STARTING


def test_phases_tokens_and_times(tmp_path: Path) -> None:
    writer = HeartbeatWriter(str(tmp_path / "page"))
    reader = HeartbeatReader(str(tmp_path / "page"))
    before = time.monotonic_ns()
    writer.forward(512)
    beat = read(reader)
    assert (beat.phase, beat.tokens, beat.steps) == (Phase.FORWARD, 512, 1)
    assert before <= beat.phase_start_ns == beat.beat_ns <= time.monotonic_ns()
    writer.forward(3)
    assert (read(reader).tokens, read(reader).steps) == (3, 2)
    assert read(reader).phase_start_ns > beat.phase_start_ns
    writer.control()
    assert (read(reader).phase, read(reader).tokens) == (Phase.CONTROL, 0)
    writer.detokenize(7)
    assert (read(reader).phase, read(reader).tokens) == (Phase.DETOKENIZE, 7)
    writer.wait()
    assert (read(reader).phase, read(reader).tokens) == (Phase.WAITING, 0)


def test_idle_keeps_its_start_and_renews_its_beat(tmp_path: Path) -> None:
    writer = HeartbeatWriter(str(tmp_path / "page"))
    reader = HeartbeatReader(str(tmp_path / "page"))
    writer.idle()
    first = read(reader)
    time.sleep(0.01)
    writer.idle()
    second = read(reader)
    assert second.phase_start_ns == first.phase_start_ns and second.beat_ns > first.beat_ns
    assert second.steps == first.steps == 0
    assert second.since_ns == second.beat_ns


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no /dev/shm")
def test_page_lies_in_memory_behind_a_link(tmp_path: Path) -> None:
    name = f"kevlar-test-{os.getpid()}.hb"
    try:
        HeartbeatWriter(str(tmp_path / "page"), name)
        assert os.readlink(tmp_path / "page") == f"/dev/shm/{name}"
        assert read(HeartbeatReader(str(tmp_path / "page"))).phase is Phase.STARTING
    finally:
        os.unlink(f"/dev/shm/{name}")


WRITER = """
import sys
from sglang_kevlar.worker.heartbeat import HeartbeatWriter
writer = HeartbeatWriter(sys.argv[1])
step = 0
while True:
    step += 1
    writer.forward(step)  # tokens and steps are always the same number
"""


def test_reader_never_sees_half_a_write(tmp_path: Path) -> None:
    page = str(tmp_path / "page")
    process = subprocess.Popen([sys.executable, "-c", WRITER, page])
    try:
        reader = HeartbeatReader(page)
        while reader.read() is None:
            time.sleep(0.01)
        last = 0
        seen = set()
        until = time.monotonic() + 2
        while time.monotonic() < until:
            beat = read(reader)
            assert beat.tokens == beat.steps and beat.phase_start_ns == beat.beat_ns
            assert beat.steps >= last
            last = beat.steps
            seen.add(last)
        assert len(seen) > 5
        # Stopped anywhere, also in the middle of a write: what was said before still counts.
        for _ in range(20):
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            beat = read(reader)
            assert beat.tokens == beat.steps >= last
            assert read(reader) == beat
            process.send_signal(signal.SIGCONT)
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
