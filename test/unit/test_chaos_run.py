"""Whole runs against a server that is made to do wrong: the judge is on trial here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chaos_world import FakeServer

from sglang_kevlar.chaos.__main__ import main

#: every harm that is found in an answer, as it is called in the verdict
HARMS = {
    "changed": "changed",
    "short": "short",
    "doubled": "doubled",
    "taken back": "changed",
    "cut": "cut",
    "dropped": "cut",
    "hung": "hung",
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    (tmp_path / "run").mkdir()
    with FakeServer(tmp_path / "run") as server:
        yield server


def scenario(tmp_path: Path, **parts: Any) -> str:
    """A short one, with ``parts`` in place of what it has."""
    content: dict[str, Any] = {
        "description": "a test",
        "duration": 1.0,
        "load": {"clients": 3, "prompts": 4, "prompt_tokens": [8], "output_tokens": [4, 20]},
        "faults": [],
        "checks": {"answers": "exact"},
    }
    for name, value in parts.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    path = tmp_path / "scenario.yaml"
    path.write_text(json.dumps(content))  # JSON is YAML
    return str(path)


def run(server: FakeServer, tmp_path: Path, *arguments: str, **parts: Any) -> tuple[int, dict[str, Any]]:
    """Exit status, and the verdict."""
    out = tmp_path / "out"
    status = main([scenario(tmp_path, **parts), "--url", server.url, "--out", str(out), "--seed", "1", *arguments])
    return status, json.loads((out / "verdict.json").read_text())


def timeline(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out" / "timeline.jsonl").read_text().splitlines()]


def found(verdict: dict[str, Any], check: str) -> Any:
    return next(one["held"] for one in verdict["checks"] if one["check"] == check)


def test_right_answers_pass(server: FakeServer, tmp_path: Path) -> None:
    load = {"stream": 0.7, "leave": 0.2, "cache_salt": 0.3, "no_shadow": 0.3}
    status, verdict = run(server, tmp_path, load=load, checks={"refused": 0, "ready_within": 5, "stale_shm": 0})
    assert status == 0 and verdict["verdict"] == "held", verdict
    assert verdict["requests"].keys() == {"complete", "left"}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("demanded", ["exact", "whole"])
def test_no_harm_to_an_answer_goes_unnoticed(server: FakeServer, tmp_path: Path, harm: str, demanded: str) -> None:
    server.harm = harm  # not to the references: it answers questions for log-probabilities rightly
    load = {"hung_after": 0.5} if harm == "hung" else {}
    status, verdict = run(server, tmp_path, load=load, checks={"answers": demanded})
    end = HARMS[harm]
    if harm == "changed" and demanded == "whole":
        assert status == 0, verdict  # it is complete, and nobody asked for the tokens
    elif harm == "doubled" and demanded == "whole":
        assert status == 1 and verdict["requests"].get("doubled"), verdict
    else:
        assert status == 1 and found(verdict, "answers") is False, verdict
        assert verdict["requests"].get(end), verdict


@pytest.mark.parametrize("harm", ["status", "error"])
def test_a_clear_refusal_is_no_cut_but_counted(server: FakeServer, tmp_path: Path, harm: str) -> None:
    server.harm = harm
    status, verdict = run(server, tmp_path, checks={"answers": "any", "refused": 0})
    assert status == 1 and found(verdict, "refused") is False
    assert verdict["requests"].keys() == {"refused"}
    status, _ = run(server, tmp_path, checks={"answers": "any", "refused": 1_000_000})
    assert status == 0


def test_where_nothing_was_answered_nothing_is_proved(server: FakeServer, tmp_path: Path) -> None:
    server.harm = "status"
    status, verdict = run(server, tmp_path)
    assert status == 1 and verdict["verdict"] == "not judged"


def test_another_way_at_a_tie_is_right(server: FakeServer, tmp_path: Path) -> None:
    server.harm, server.tie_at = "changed", 5
    fixed = {"output_tokens": [10, 10]}
    status, verdict = run(server, tmp_path, load=fixed)
    assert status == 0 and verdict["requests"].get("tie"), verdict
    status, verdict = run(server, tmp_path, load=fixed, checks={"tie": 1e-9})
    assert status == 1 and verdict["requests"].get("changed"), verdict


def test_a_stall_is_measured(server: FakeServer, tmp_path: Path) -> None:
    server.harm = "stall"
    status, verdict = run(server, tmp_path, checks={"stall_ms": 200})
    assert status == 1 and found(verdict, "stall_ms") is False
    assert verdict["stall_ms"]["max"] >= 300
    server.harm = ""
    assert run(server, tmp_path, checks={"stall_ms": 5000})[0] == 0


def test_moved_requests_have_to_say_so(server: FakeServer, tmp_path: Path) -> None:
    server.moved = 2  # of each failover, says the status; no answer does
    kill = [{"at": 0.2, "do": "kill"}]
    status, verdict = run(server, tmp_path, faults=kill, checks={"redirects_marked": True})
    assert status == 1 and found(verdict, "redirects_marked") is False


def test_kills_are_counted_bite_and_leave_a_group(server: FakeServer, tmp_path: Path) -> None:
    before = {name: server.pid(f"g{group}.{name}") for group in (0, 1) for name in ("rank0", "supervisor")}
    kill = {"every": 0.05, "do": "kill", "group": "random", "process": ["rank", "detokenizer", "supervisor"]}
    checks = {"failovers_at_least": 6, "ready_within": 30}
    status, verdict = run(server, tmp_path, "--kills", "6", faults=[kill], checks=checks)
    assert status == 0, verdict
    assert verdict["kills"] == verdict["groups_lost"] == verdict["failovers"]["count"] == 6
    assert before != {name: server.pid(f"g{group}.{name}") for group in (0, 1) for name in ("rank0", "supervisor")}
    events = timeline(tmp_path)
    down: set[int] = set()
    for event in events:
        if event["event"] == "group":
            (down.discard if event["state"] == "ready" else down.add)(event["group"])
        assert len(down) < 2, "both groups at once"
        if event["event"] == "fault":
            assert not down, "a fault while a group was down"


def test_choices_come_from_the_seed(server: FakeServer, tmp_path: Path) -> None:
    kill = {"every": 0.05, "jitter": 0.5, "do": "kill", "group": "random", "process": ["rank", "detokenizer"]}
    chosen = []
    for _ in range(2):
        run(server, tmp_path, "--kills", "5", faults=[kill])
        chosen.append([event["process"] for event in timeline(tmp_path) if event["event"] == "fault"])
    assert chosen[0] == chosen[1] and len(set(chosen[0])) > 1


def test_all_groups_at_once_only_when_it_is_said(server: FakeServer, tmp_path: Path) -> None:
    kill = {"at": 0.2, "do": "kill", "group": "all", "allow_total_loss": True}
    status, verdict = run(server, tmp_path, faults=[kill], checks={"ready_within": 30})
    assert status == 0 and verdict["kills"] == 2, verdict


def test_too_few_and_too_many_failovers(server: FakeServer, tmp_path: Path) -> None:
    status, verdict = run(server, tmp_path, checks={"failovers_at_least": 1})
    assert status == 1 and found(verdict, "failovers_at_least") is False
    kill = [{"at": 0.2, "do": "kill"}]
    status, verdict = run(server, tmp_path, faults=kill, checks={"failovers_at_most": 0})
    assert status == 1 and found(verdict, "failovers_at_most") is False


def test_growth_that_was_not_watched_is_not_judged(server: FakeServer, tmp_path: Path) -> None:
    status, verdict = run(server, tmp_path, checks={"growth_mb": 1, "growth_files": 0})
    assert status == 1 and found(verdict, "growth_mb") is None and found(verdict, "growth_files") is None


def test_shared_memory_of_dead_epochs_is_found(server: FakeServer, tmp_path: Path) -> None:
    left = Path("/dev/shm/kevlar-0123abcd-g0e0.window0.0")
    left.write_bytes(b"")
    try:
        status, verdict = run(server, tmp_path, checks={"stale_shm": 0})
    finally:
        left.unlink()
    assert status == 1 and found(verdict, "stale_shm") is False


def test_a_stopped_process_is_woken(server: FakeServer, tmp_path: Path) -> None:
    faults = [
        {"at": 0.1, "do": "slow", "seconds": 0.4},
        {"at": 0.2, "do": "stop", "process": "detokenizer", "seconds": 0.2, "group": 0},
    ]
    run(server, tmp_path, faults=faults)
    for group in (0, 1):
        for name in ("rank0", "detokenizer"):
            state = Path(f"/proc/{server.pid(f'g{group}.{name}')}/stat").read_text().rpartition(") ")[2][0]
            assert state == "S", name


def test_burdens_end_with_the_run(server: FakeServer, tmp_path: Path) -> None:
    faults = [{"at": 0.1, "do": "starve", "seconds": 600, "loops": 2}, {"at": 0.1, "do": "memory", "seconds": 600}]
    faults[1]["leave"] = 100_000  # GiB: takes nothing
    assert run(server, tmp_path, faults=faults)[0] == 0
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    left = [pid for pid in children if b"chaos.burden" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert not left


def test_an_open_loop_is_bounded(server: FakeServer, tmp_path: Path) -> None:
    server.pace = 0.05
    load = {"clients": 0, "rate": 200, "in_flight": 4}
    status, verdict = run(server, tmp_path, load=load)
    assert status == 0 and verdict["unsent"] > 0
    assert verdict["requests"]["complete"] < 100


def test_texts_that_are_not_there(server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = scenario(tmp_path, load={"texts": "none.txt"})
    assert main([path, "--url", server.url, "--out", str(tmp_path / "out")]) == 2
    assert "none.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"at": 0, "do": "kill", "group": 7}, "2 groups"),
        ({"at": 0, "do": "error"}, "--allow-chaos"),
        ({"at": 0, "do": "frames"}, "--allow-chaos"),
    ],
)
def test_what_this_server_cannot_suffer(
    server: FakeServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], fault: dict[str, Any], said: str
) -> None:
    path = scenario(tmp_path, faults=[fault])
    assert main([path, "--url", server.url, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err


def test_interrupted_it_still_gives_a_verdict(server: FakeServer, tmp_path: Path) -> None:
    path, out = scenario(tmp_path), tmp_path / "out"
    command = [sys.executable, "-m", "sglang_kevlar.chaos", path, "--url", server.url, "--out", str(out)]
    process = subprocess.Popen([*command, "--minutes", "30"], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while "references" not in ((out / "timeline.jsonl").read_text() if out.exists() else ""):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert json.loads((out / "verdict.json").read_text())["verdict"] == "held"
