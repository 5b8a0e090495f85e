"""Scenarios: those that come with the package are right, and what is wrong with others is said with its place."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sglang_kevlar.chaos.scenario import Kill, ScenarioError, load, parse, shipped

GOOD = """
description: a test
duration: 10
load: {clients: 2}
faults:
  - {every: 2, do: kill, group: random, process: [rank, supervisor]}
"""


def test_a_scenario_is_read() -> None:
    scenario = parse(GOOD, "x.yaml")
    (kill,) = scenario.faults
    assert isinstance(kill, Kill) and kill.waits and kill.processes == ["rank", "supervisor"]
    assert scenario.checks.answers == "exact"


def test_those_that_come_with_it_are_valid_and_say_what_they_do() -> None:
    descriptions = shipped()
    assert {"kills", "stops", "starved", "frames", "mixed"} <= descriptions.keys()
    assert all(descriptions.values())
    assert load("kills").description == descriptions["kills"]


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("clients: 2", "clients: two", "load.clients"),
        ("clients: 2", "clients: -1", "load.clients"),
        ("clients: 2", "cleints: 2", "load"),
        ("clients: 2", "clients: 2, rate: 5", "load"),
        ("clients: 2", "rate: 0", "load"),
        ("clients: 2", "clients: 2, leave: 1.5", "load.leave"),
        ("clients: 2", "clients: 2, prompt_tokens: []", "load.prompt_tokens"),
        ("clients: 2", "clients: 2, output_tokens: [9, 3]", "load.output_tokens"),
        ("clients: 2", "clients: 2, temperature: 1", "checks.answers"),
        ("duration: 10", "duration: 0", "duration"),
        ("duration: 10", "duration: 10\nspeed: 2", "the whole of it"),
        ("description: a test", "", "the whole of it"),
        ("do: kill", "do: burn", "faults[0]"),
        ("do: kill", "do: stop", "faults[0]"),  # for how long?
        ("do: kill, group: random", "do: kill, group: most", "faults[0].group"),
        ("do: kill, group: random", "do: kill, group: all", "faults[0].group"),
        ("do: kill", "do: kill, loops: 3", "faults[0]"),
        ("every: 2", "at: 1, every: 2", "faults[0].at"),
        ("every: 2", "wait_ready: true", "faults[0].at"),
        ("every: 2", "at: 10", "faults[0].at"),
        ("every: 2", "at: 1, jitter: 0.5", "faults[0].jitter"),
        ("every: 2", "every: .nan", "faults[0].every"),
        ("[rank, supervisor]", "[rank, launcher]", "faults[0].process"),
        ("[rank, supervisor]", "[]", "faults[0].process"),
        ("description: a test", "description: [a", "not YAML"),
    ],
)
def test_an_error_names_the_file_and_the_place(old: str, new: str, place: str) -> None:
    assert old in GOOD
    with pytest.raises(ScenarioError) as caught:
        parse(GOOD.replace(old, new), "dir/x.yaml")
    assert str(caught.value).startswith(f"dir/x.yaml: {place}"), caught.value
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(ScenarioError, match="no such file"):
        load("no-such-scenario")
    with pytest.raises(ScenarioError, match="cannot be read"):
        load("/nowhere/x.yaml")


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sglang_kevlar.chaos", *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_command_checks_a_file_without_a_server(tmp_path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    assert command(str(file), "--validate").returncode == 0
    file.write_text(GOOD.replace("kill", "kilt"))
    refused = command(str(file), "--validate")
    assert refused.returncode == 2 and "mine.yaml: faults[0]" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert "kills" in command("--list").stdout


def test_without_a_server_it_says_so_and_ends(tmp_path) -> None:
    ended = command("kills", "--url", "http://127.0.0.1:9", "--out", str(tmp_path))
    assert ended.returncode == 2 and "does not answer" in ended.stderr and "Traceback" not in ended.stderr


def test_it_imports_neither_torch_nor_sglang() -> None:
    code = "import sys, sglang_kevlar.chaos.__main__; print(sorted({'torch', 'sglang', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
