"""Members that are forked of a template: what that changes, and what becomes of it when it goes wrong."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervised_group import Group, alive, eventually, pid_of

from sglang_kevlar.protocol.group import GroupReport
from sglang_kevlar.worker.template import why_not_forkable


@pytest.fixture
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    group = Group(tmp_path_factory.mktemp("g"), warm=True)
    yield group
    group.end()
    pids = {*group.pids, *templates(group)}
    eventually(lambda: not any(alive(pid) for pid in pids))


def templates(group: Group) -> list[int]:
    """Pids of all templates so far."""
    file = group.run_dir / "templates"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def is_warm(report: GroupReport) -> bool:
    """Whether all its members are forks: a fork has the command line of its template."""
    lines = [Path(f"/proc/{member.pid}/cmdline").read_bytes() for member in report.members]
    warm = [b"fake_template" in line for line in lines]
    assert len(set(warm)) == 1
    return warm[0]


def log(group: Group) -> str:
    assert group.process is not None and group.process.stderr is not None
    os.set_blocking(group.process.stderr.fileno(), False)
    return (group.process.stderr.read() or b"").decode()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_every_epoch_is_forked_of_one_template_and_belongs_to_the_supervisor(group: Group) -> None:
    group.start()
    assert group.process is not None
    for epoch in (1, 2, 3):
        report = group.ready(after=epoch - 1)
        assert is_warm(report)
        assert {parent(member.pid) for member in report.members} == {group.process.pid}
        assert len({os.getsid(member.pid) for member in report.members}) == 3
        os.kill(pid_of(report, "rank1"), signal.SIGKILL)
    group.ready(after=3)
    assert len(templates(group)) == 1


def test_members_collect_garbage_though_their_template_did_not(group: Group) -> None:
    group.behave("template", "import gc; gc.disable()")
    group.behave("rank0.load", "import gc; assert gc.isenabled() and gc.get_freeze_count()")
    group.start()
    assert is_warm(group.ready())


@pytest.mark.parametrize("told", [None, "dirty_decay_ms:0"])
def test_a_template_is_told_to_have_no_thread_of_arrow(
    group: Group, monkeypatch: pytest.MonkeyPatch, told: str | None
) -> None:
    """Unless the operator says otherwise."""
    monkeypatch.delenv("JE_ARROW_MALLOC_CONF", raising=False)
    if told is not None:
        monkeypatch.setenv("JE_ARROW_MALLOC_CONF", told)
    said = told or "background_thread:false"
    group.behave("template", f"import os; assert os.environ['JE_ARROW_MALLOC_CONF'] == {said!r}")
    group.start()
    assert is_warm(group.ready())


def test_template_and_members_die_with_the_supervisor(group: Group) -> None:
    group.start()
    group.ready()
    assert group.process is not None
    group.process.kill()
    group.process.wait()
    eventually(lambda: not any(alive(pid) for pid in {*group.pids, *templates(group)}))


def test_killed_template_costs_no_member_and_is_replaced(group: Group) -> None:
    group.start()
    first = group.ready()
    os.kill(templates(group)[0], signal.SIGKILL)
    eventually(lambda: len(templates(group)) == 2)
    assert all(alive(member.pid) for member in first.members)
    time.sleep(1)
    os.kill(pid_of(first, "rank0"), signal.SIGKILL)
    assert is_warm(group.ready(after=1))
    assert "template given up: it ended; another one in 1 s" in log(group)


def test_killed_template_means_a_cold_start_until_there_is_another(group: Group) -> None:
    group.start()
    first = group.ready()
    for pid in (templates(group)[0], pid_of(first, "rank0")):
        os.kill(pid, signal.SIGKILL)
    assert not is_warm(group.ready(after=1))


def test_stopped_template_is_not_waited_for_long_and_forks_nothing_late(group: Group) -> None:
    group.start()
    first = group.ready()
    (template,) = templates(group)
    os.kill(template, signal.SIGSTOP)
    os.kill(pid_of(first, "rank0"), signal.SIGKILL)
    second = group.ready(after=1)
    assert not is_warm(second) and not alive(template)
    assert "template given up: it does not fork: no answer" in log(group)
    time.sleep(0.5)
    assert all(alive(member.pid) for member in second.members)


def test_template_that_cannot_import_means_cold_starts(group: Group) -> None:
    group.behave("template", "raise ImportError('no module named torch')")
    group.start()
    assert not is_warm(group.ready())
    assert "ImportError: no module named torch" in log(group)


def test_template_that_imports_for_too_long_means_cold_starts(group: Group) -> None:
    group.configure(start_timeout=2.0)
    group.behave("template", "time.sleep(1000)")
    group.start()
    assert not is_warm(group.ready())
    assert "its imports take longer than 2 s" in log(group)


@pytest.mark.parametrize(
    ("leaves", "reason"),
    [
        ("threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()", "have started 1 threads"),
        ("child = subprocess.Popen(['sleep', '1000'])", "have started 1 processes"),
    ],
)
def test_template_that_would_not_be_whole_in_a_fork_says_so_once(group: Group, leaves: str, reason: str) -> None:
    group.behave("template", leaves)
    group.start()
    first = group.ready()
    assert not is_warm(first)
    os.kill(pid_of(first, "rank0"), signal.SIGKILL)
    assert not is_warm(group.ready(after=1))
    assert reason in log(group) and len(templates(group)) == 1


#: fails in a fork, as something that does not survive one does
FORK_ONLY = """
if "fake_template" in open("/proc/self/cmdline").read() and %s:
    raise RuntimeError("lost in the fork")
"""


def test_first_start_that_fails_warm_is_repeated_cold_before_the_server_gives_up(group: Group) -> None:
    group.behave("rank0", FORK_ONLY % "True")
    group.start(fail_fast=True)
    down = group.report(lambda r: r.phase == "down")
    assert "lost in the fork" in down.cause
    assert not is_warm(group.ready())


def test_what_fails_twice_as_a_fork_and_not_cold_is_not_forked_again(group: Group) -> None:
    group.behave("rank1", FORK_ONLY % "True")
    group.start()
    epochs = []
    for after in (0, 2):
        report = group.ready(after=after)
        epochs.append(report.epoch)
        assert not is_warm(report)
        os.kill(pid_of(report, "rank1"), signal.SIGKILL)
    last = group.ready(after=4)
    assert [*epochs, last.epoch] == [2, 4, 5] and not is_warm(last)
    assert "cold for 300 s, with all imports: 2 starts in a row failed of which a cold repetition succeeded" in log(
        group
    )
    eventually(lambda: not any(alive(pid) for pid in templates(group)))


def test_an_operators_restart_has_forks_tried_again(group: Group) -> None:
    group.behave("rank1", FORK_ONLY % "os.path.exists(f'{run_dir}/bad')")
    (group.run_dir / "bad").touch()
    group.start()
    for after in (0, 2):
        report = group.ready(after=after)
        os.kill(pid_of(report, "rank1"), signal.SIGKILL)
    cold = group.ready(after=4)
    assert not is_warm(cold)
    (group.run_dir / "bad").unlink()
    group.kill_group(cold.epoch, planned=True)
    assert is_warm(group.ready(after=cold.epoch))
    assert "what was set aside is tried again" in log(group)


def test_a_fork_that_failed_is_forgiven_when_one_works(group: Group) -> None:
    group.behave("rank1", FORK_ONLY % "int(epoch) in (1, 4)")
    group.start()
    after = 0
    for epoch, warm in ((2, False), (3, True), (5, False), (6, True)):
        report = group.ready(after=after)
        assert (report.epoch, is_warm(report)) == (epoch, warm)
        os.kill(pid_of(report, "rank0"), signal.SIGKILL)
        after = epoch


def test_a_start_that_fails_cold_too_is_not_held_against_the_template(group: Group) -> None:
    group.behave("rank0", """if int(epoch) <= 2: raise ValueError("no memory")""")
    group.start()
    assert is_warm(group.ready(after=2))


def test_a_member_killed_while_it_starts_is_not_held_against_the_template(group: Group) -> None:
    group.behave("rank0", """time.sleep(1000 if epoch == "1" else 0)""")
    group.start()
    starting = group.report(lambda r: r.phase == "starting" and len(r.members) == 3)
    os.kill(pid_of(starting, "rank0"), signal.SIGKILL)
    assert is_warm(group.ready(after=1))


def zombies_of(group: Group) -> list[str]:
    assert group.process is not None
    children = Path(f"/proc/{group.process.pid}/task/{group.process.pid}/children").read_text()
    found = []
    for pid in children.split():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # reaped just now
        if stat.rpartition(")")[2].split()[0] == "Z":
            found.append(stat)
    return found


LEAVES_A_CHILD = """
child = subprocess.Popen(["sleep", "1000"], start_new_session=False)
open(f"{run_dir}/children", "a").write(f"{child.pid}\\n")
"""


def test_what_members_leave_behind_is_reaped(group: Group) -> None:
    group.behave("rank0", LEAVES_A_CHILD)
    group.start()
    first = group.ready()
    os.kill(pid_of(first, "rank0"), signal.SIGKILL)
    group.ready(after=1)
    eventually(lambda: not zombies_of(group))


def test_what_ends_together_with_members_is_reaped(group: Group) -> None:
    group.behave("rank0", LEAVES_A_CHILD)
    group.start()
    first = group.ready()
    left = int((group.run_dir / "children").read_text())
    assert group.process is not None
    # It sees all these ends at once, and gets one signal for them.
    group.process.send_signal(signal.SIGSTOP)
    for name in ("rank0", "rank1", "detokenizer"):
        os.kill(pid_of(first, name), signal.SIGKILL)
    eventually(lambda: not alive(pid_of(first, "rank0")))
    os.kill(left, signal.SIGKILL)
    eventually(lambda: len(zombies_of(group)) == 4)
    group.process.send_signal(signal.SIGCONT)
    group.ready(after=1)
    eventually(lambda: not zombies_of(group))


def test_a_thread_of_this_process_is_seen() -> None:
    # The test runner may have threads of its own; one more has to be counted.
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        assert "threads" in str(why_not_forkable())
    finally:
        stop.set()
        thread.join()


#: prints the number of threads torch computes with, having computed with them; as a fork when asked to
THREADS = """
import os, sys, torch
from sglang_kevlar.worker import template
if sys.argv[1] == "fork":
    assert template.why_not_forkable() is None
    if os.fork():
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
    template._restore_threads()
torch.rand(2048, 2048) @ torch.rand(2048, 2048)
print(torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"), flush=True)
"""


def threads(how: str, environment: dict[str, str]) -> str:
    base = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", THREADS, how]
    done = subprocess.run(command, env=base | environment, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_a_fork_computes_with_as_many_threads_as_it_was_told() -> None:
    told = threads("fork", {"OMP_NUM_THREADS": "1", "SGLANG_KEVLAR_OMP_NUM_THREADS": "2"})
    assert told == threads("cold", {"OMP_NUM_THREADS": "2"}) == "2 2\n"
    untold = threads("fork", {"OMP_NUM_THREADS": "1", "SGLANG_KEVLAR_OMP_NUM_THREADS": ""})
    assert untold == f"{len(os.sched_getaffinity(0))} None\n"
