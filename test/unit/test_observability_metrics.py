"""Metrics in prometheus_client's multiprocess mode, each case in processes of its own (it is decided at import)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_kevlar.observability.metrics import forget_dead_processes

pytest.importorskip("prometheus_client")

SCRAPE = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""
START = "from sglang_kevlar.observability.metrics import PrometheusMetrics\nm = PrometheusMetrics(range(2))\n"


def run(code: str, directory: Path | None) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "PROMETHEUS_MULTIPROC_DIR"}
    if directory is not None:
        env["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


def values(code: str, directory: Path) -> dict[str, float]:
    done = run(code + SCRAPE, directory)
    assert done.returncode == 0, done.stderr
    samples = (line.rsplit(" ", 1) for line in done.stdout.splitlines() if line.startswith("sglang_kevlar"))
    return {name: float(value) for name, value in samples}


def test_every_metric_is_exported(tmp_path: Path) -> None:
    got = values(
        START
        + """
m.failover(0, "signal", 0.02); m.redirect(0); m.redirect(0); m.resumed(0.03, 500, 70); m.refused("no_group")
m.hold(1.5); m.held(3); m.formed(1, "reformed", 0.75); m.formed(1, "reformed", 0.5)
m.weight_transfer("changed", 0, 9.0); m.weight_transfer("done", 5000, 2.0)
m.group(0, ready=False, epoch=4); m.group(1, ready=True, epoch=2)
from sglang_kevlar.frontend.shadow_status import ShadowReader, gauges
from sglang_kevlar.protocol.shadow import ShadowCounters
from types import SimpleNamespace
import msgspec, os
file_name = os.environ["PROMETHEUS_MULTIPROC_DIR"] + "/counters"
paths = SimpleNamespace(shadow_counters=lambda *at: file_name)
with open(file_name, "wb") as file:
    file.write(msgspec.json.encode(ShadowCounters(lag_tokens=9, lag_ms=250.0, token_bytes=4, lookups=3, hits=2)))
m.shadow(1, gauges(ShadowReader(SimpleNamespace(tp_size=1, pp_size=1), paths).status(1, 2)))
""",
        tmp_path,
    )
    expected = {
        'failovers_total{cause="signal",group="0"}': 1,
        'redirects_total{group="0"}': 2,
        'groups_formed_total{group="1",how="reformed"}': 2,
        'groups_formed_seconds_total{group="1",how="reformed"}': 1.25,
        'weight_transfers_total{outcome="changed"}': 1,
        'weight_transfers_total{outcome="done"}': 1,
        "weight_transfer_bytes_total": 5000,
        "weight_transfer_seconds_sum": 2,
        "recomputed_tokens_total": 500,
        "restored_tokens_total": 70,
        'shadow_linked{group="1"}': 0,
        'shadow_lag_tokens{group="1"}': 9,
        'shadow_lag_seconds{group="1"}': 0.25,
        'shadow_store_hits{group="1"}': 2,
        'refused_requests_total{kind="no_group"}': 1,
        "held_requests": 3,
        'group_ready{group="0"}': 0,
        'group_ready{group="1"}': 1,
        'group_epoch{group="0"}': 4,
        "detection_seconds_count": 1,
        'redirect_stall_seconds_bucket{le="0.05"}': 1,
        "hold_seconds_sum": 1.5,
    }
    assert {name: got[f"sglang_kevlar_{name}"] for name in expected} == expected


def test_restarted_frontend_keeps_counters_and_forgets_gauges(tmp_path: Path) -> None:
    # The first process dies as by SIGKILL, with a wall clock an hour ahead: its values carry later timestamps.
    first = run(
        "import time; real = time.time; time.time = lambda: real() + 3600\n"
        + START
        + 'm.held(7); m.group(1, ready=True, epoch=9); m.failover(1, "hang", 1.0); import os; os._exit(1)',
        tmp_path,
    )
    assert first.returncode == 1, first.stderr
    got = values(START + 'm.failover(1, "hang", 1.0)\n', tmp_path)
    assert got['sglang_kevlar_failovers_total{cause="hang",group="1"}'] == 2
    assert got["sglang_kevlar_held_requests"] == 0
    assert got['sglang_kevlar_group_ready{group="1"}'] == 0
    assert got["sglang_kevlar_detection_seconds_count"] == 2


def test_only_gauges_of_dead_processes_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = {
        pid: [f"{kind}_{pid}.db" for kind in ("gauge_livesum", "gauge_mostrecent", "counter")]
        for pid in (dead.pid, os.getpid())
    }
    for name in (name for of_pid in names.values() for name in of_pid):
        (tmp_path / name).write_bytes(b"")
    forget_dead_processes(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {*names[os.getpid()], f"counter_{dead.pid}.db"}


def test_without_directory_it_does_not_start() -> None:
    done = run(START, None)
    assert "RuntimeError: PROMETHEUS_MULTIPROC_DIR is not set" in done.stderr


def test_import_before_the_directory_was_set_does_not_start(tmp_path: Path) -> None:
    done = run(
        f"import prometheus_client, os; os.environ['PROMETHEUS_MULTIPROC_DIR'] = {str(tmp_path)!r}\n{START}", None
    )
    assert "imported before PROMETHEUS_MULTIPROC_DIR" in done.stderr
