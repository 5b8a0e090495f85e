"""Run directories and recorded processes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sglang_kevlar.launcher import rundir
from sglang_kevlar.launcher.process import ProcessId, identify, kill_recorded, open_pidfd, record, spawn
from sglang_kevlar.launcher.rundir import RunDirError
from sglang_kevlar.protocol.launch import Paths


@pytest.fixture(autouse=True)
def base(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.tempdir", str(base))
    return base


def crashed_launch(path: str | None = None) -> rundir.RunDir:
    """A run directory whose launcher is gone."""
    run_dir = rundir.create(path, 2)
    os.close(run_dir._lock)
    return run_dir


def test_directory_is_private_and_removed(base: Path) -> None:
    run_dir = rundir.create(None, 2)
    assert Path(run_dir.path).parent == base
    assert stat.S_IMODE(os.stat(run_dir.path).st_mode) == 0o700
    run_dir.remove()
    assert list(base.iterdir()) == []


def test_dead_ones_are_swept_and_living_ones_are_not(base: Path) -> None:
    living = rundir.create(None, 2)
    dead = crashed_launch()
    shared = Path(f"/dev/shm/sglang_loads_kevlar-{dead.launch_id}-g0e1_ab.shm")
    shared.touch()
    Path(dead.path, "g0e1.rank0.hb").symlink_to("/dev/shm/nothing")
    (base / "kevlar-0-notours").mkdir()
    new = rundir.create(None, 2)
    assert not Path(dead.path).exists() and not shared.exists()
    assert Path(living.path).exists() and (base / "kevlar-0-notours").exists()
    new.remove()
    living.remove()


def test_sweep_kills_what_the_dead_launch_left() -> None:
    dead = crashed_launch()
    orphan = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    identity = identify(orphan.pid)
    assert identity is not None
    record(Paths(dead.path).processes, "g0.rank0", identity)
    rundir.create(None, 2).remove()
    assert orphan.wait(10) == -signal.SIGKILL


def test_symbolic_link_of_someone_is_left_alone(base: Path) -> None:
    target = base / "precious"
    target.mkdir()
    (target / "file").touch()
    (base / f"kevlar-{os.getuid()}-01234567").symlink_to(target)
    rundir.create(None, 2).remove()
    assert (target / "file").exists()


def test_given_directory_is_reused_after_a_crash(base: Path) -> None:
    dead = crashed_launch(str(base / "mine"))
    Path(dead.path, "plan.json").touch()
    again = rundir.create(dead.path, 2)
    assert sorted(os.listdir(again.path)) == ["lock"] and again.launch_id != dead.launch_id
    again.remove()
    assert not Path(dead.path).exists()


def test_given_directory_in_use_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_HANDOVER", 0.3)
    first = rundir.create(str(base / "mine"), 2)
    with pytest.raises(RunDirError, match="in use by another launch"):
        rundir.create(str(base / "mine"), 2)
    first.remove()


def test_given_directory_with_foreign_files_is_refused(base: Path) -> None:
    (base / "home").mkdir()
    (base / "home" / "thesis").touch()
    with pytest.raises(RunDirError, match="not ours"):
        rundir.create(str(base / "home"), 2)
    assert (base / "home" / "thesis").exists()


def test_path_too_long_for_sockets_is_refused_by_name(base: Path) -> None:
    with pytest.raises(RunDirError, match=r"too long.*107"):
        rundir.create(str(base / ("x" * 100)), 2)


def test_directory_that_cannot_be_made_is_refused(base: Path) -> None:
    with pytest.raises(RunDirError, match="cannot create"):
        rundir.create(str(base / "a" / "b"), 2)


def test_janitor_of_an_old_launch_does_not_touch_a_new_one(base: Path) -> None:
    old = crashed_launch(str(base / "mine"))
    new = rundir.create(str(base / "mine"), 2)
    os.close(new._lock)
    assert not rundir.remove_dead(new.path, old.launch_id)
    assert Path(new.path).exists()


def test_recorded_pid_of_another_process_is_not_killed(tmp_path: Path) -> None:
    bystander = subprocess.Popen(["sleep", "1000"])
    identity = identify(bystander.pid)
    assert identity is not None
    impostor = ProcessId(identity.pid, identity.start_ticks - 1)
    assert open_pidfd(impostor) is None
    record(str(tmp_path), "g0.rank0", impostor)
    assert kill_recorded(str(tmp_path))
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_kill_recorded_takes_what_a_dead_leader_left(tmp_path: Path) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '1000'], stdout=subprocess.DEVNULL).pid, flush=True)"
    leader = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE)
    identity = identify(leader.pid)
    assert identity is not None and leader.stdout is not None
    record(str(tmp_path), "g1.rank0", identity)
    helper = int(leader.stdout.read())
    leader.wait()
    assert kill_recorded(str(tmp_path), "g0.") and identify(helper) is not None
    assert kill_recorded(str(tmp_path), "g1.")
    deadline = time.monotonic() + 10
    while identify(helper) is not None and time.monotonic() < deadline:
        time.sleep(0.02)  # until init has reaped it
    stat_file = Path(f"/proc/{helper}/stat")
    assert not stat_file.exists() or stat_file.read_text().rpartition(")")[2].split()[0] == "Z"


def test_child_whose_parent_died_before_it_looked_ends_itself(tmp_path: Path) -> None:
    """Between fork and prctl the parent-death signal is not set yet."""
    late = "import time; time.sleep(1); from sglang_kevlar.launcher.process import die_with_parent; die_with_parent()"
    late += f"; open({str(tmp_path / 'survived')!r}, 'w'); time.sleep(1000)"
    code = "import sys; from sglang_kevlar.launcher.process import spawn; "
    code += f"print(spawn('x', [sys.executable, '-c', {late!r}]).pid)"
    result = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    pid = int(result.stdout)
    deadline = time.monotonic() + 20
    while identify(pid) is not None and time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/stat").read_text()
        if status.rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    assert not (tmp_path / "survived").exists() and time.monotonic() < deadline


def test_child_kill_and_reap() -> None:
    child = spawn("x", ["sleep", "1000"])
    assert child.reap() is None
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert child.reap() == -signal.SIGKILL and child.reap() == -signal.SIGKILL
    child.signal(signal.SIGTERM)
    child.kill()


SEMAPHORE = """
import multiprocessing, os, signal, sys
from multiprocessing import resource_tracker
from sglang_kevlar.worker.bootstrap import name_semaphores
name_semaphores(sys.argv[1])
multiprocessing.set_start_method("spawn")
lock = multiprocessing.Lock()
os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_semaphores_of_a_process_that_was_killed_with_its_resource_tracker_are_removed() -> None:
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", SEMAPHORE, "kevlar-0a1b2c3d-g0e1"]
    assert subprocess.run(command, timeout=60).returncode == -signal.SIGKILL
    (left,) = {name for name in set(os.listdir("/dev/shm")) - before if "0a1b2c3d" in name}
    assert left.startswith("sem.kevlar-0a1b2c3d-g0e1-")
    rundir.remove_shared_memory("0a1b2c3d", "-g1e")
    assert left in os.listdir("/dev/shm")
    rundir.remove_shared_memory("0a1b2c3d", "-g0e")
    assert left not in os.listdir("/dev/shm")
