"""Groups that form again around the ranks that live: the supervisor with light members."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from supervised_group import Group, alive, eventually, pid_of

from sglang_kevlar.control.reforming import LEAVE_WITHIN, Reforming
from sglang_kevlar.protocol.group import GroupReport

RANKS = ("rank0", "rank1")


@pytest.fixture
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    group = Group(tmp_path_factory.mktemp("g"), warm=True)
    group.configure(reform="auto")
    yield group
    group.end()
    eventually(lambda: not any(alive(pid) for pid in group.pids))


def pids(report: GroupReport) -> dict[str, int]:
    return {member.name: member.pid for member in report.members}


@pytest.mark.parametrize("victim", ["rank0", "rank1"])
def test_the_other_rank_keeps_its_process(group: Group, victim: str) -> None:
    group.start()
    report = group.ready()
    survivor = next(name for name in RANKS if name != victim)
    for _ in range(3):
        before = pids(report)
        os.kill(before[victim], signal.SIGKILL)
        down = group.report(lambda r: r.phase == "down")
        assert victim in down.cause and down.members == []
        report = group.ready(after=report.epoch)
        after = pids(report)
        assert after[survivor] == before[survivor]
        assert after[victim] != before[victim] and after["detokenizer"] != before["detokenizer"]
    assert report.epoch == 4
    # Of the epochs before, nothing is left.
    eventually(lambda: all("g0e4" in name for name in group.leftovers()))


def test_both_ranks_outlive_the_detokenizer(group: Group) -> None:
    group.start()
    first = group.ready()
    os.kill(pid_of(first, "detokenizer"), signal.SIGKILL)
    second = group.ready(after=1)
    assert [pid_of(second, name) for name in RANKS] == [pid_of(first, name) for name in RANKS]


def test_a_rank_that_does_not_leave_is_killed(group: Group) -> None:
    group.behave("rank0.serve", "if epoch == '1': signal.signal(signal.SIGUSR2, signal.SIG_IGN)")
    group.start()
    first = group.ready()
    os.kill(pid_of(first, "rank1"), signal.SIGKILL)
    second = group.ready(after=1)
    assert pid_of(second, "rank0") != pid_of(first, "rank0")


def test_a_rank_on_a_device_may_take_longer_to_leave(group: Group) -> None:
    group.behave(
        "rank0.serve",
        """
        asked = []
        def late(*_):
            asked.append(time.monotonic())
            if asked[-1] - asked[0] > LEAVE_WITHIN + 0.5:
                raise Left
        signal.signal(signal.SIGUSR2, late)
        """.replace("LEAVE_WITHIN", str(LEAVE_WITHIN)),
    )
    group.configure(reform="auto", on_device=True)
    group.start()
    first = group.ready()
    os.kill(pid_of(first, "rank1"), signal.SIGKILL)
    assert pid_of(group.ready(after=1), "rank0") == pid_of(first, "rank0")


def test_a_request_to_leave_that_nobody_heard_is_made_again(group: Group) -> None:
    # The first is lost where an exception cannot get out, as in a finalizer.
    group.behave(
        "rank0.serve",
        """
        heard = []
        signal.signal(signal.SIGUSR2, lambda *_: leave() if heard else heard.append(1))
        """,
    )
    group.start()
    first = group.ready()
    os.kill(pid_of(first, "rank1"), signal.SIGKILL)
    assert pid_of(group.ready(after=1), "rank0") == pid_of(first, "rank0")


def test_a_loop_that_failed_because_the_other_died_is_no_fault(group: Group) -> None:
    group.behave("rank0.serve", "while os.path.exists(f'{run_dir}/fine'): time.sleep(0.01)\nraise OSError('peer')")
    (group.run_dir / "fine").touch()
    group.start()
    first = group.ready()
    (group.run_dir / "fine").unlink()
    os.kill(pid_of(first, "rank1"), signal.SIGKILL)
    down = group.report(lambda r: r.phase == "down")
    assert "rank1" in down.cause
    (group.run_dir / "fine").touch()
    assert pid_of(group.ready(after=1), "rank0") == pid_of(first, "rank0")


def test_a_loop_that_failed_by_itself_costs_its_rank_the_process(group: Group) -> None:
    group.behave("rank0.serve", "if epoch == '1':\n    time.sleep(0.3)\n    raise OSError('device lost')")
    group.start()
    first = group.ready()
    down = group.report(lambda r: r.phase == "down")
    assert down.cause == "rank0's scheduler failed: device lost"
    second = group.ready(after=1)
    assert pid_of(second, "rank0") != pid_of(first, "rank0")
    assert pid_of(second, "rank1") == pid_of(first, "rank1")


def test_a_reform_that_fails_is_followed_by_a_whole_start(group: Group) -> None:
    group.behave("rank1.load", "if os.path.exists(f'{run_dir}/bad'): os._exit(7)")
    group.start()
    first = group.ready()
    (group.run_dir / "bad").touch()
    os.kill(pid_of(first, "rank1"), signal.SIGKILL)
    group.report(lambda r: r.phase == "down" and r.epoch == 2)
    (group.run_dir / "bad").unlink()
    third = group.ready(after=2)
    assert not set(pids(third).values()) & set(pids(first).values())


def two_failed_reforms(group: Group) -> GroupReport:
    """From its start on; the group as it serves behind them."""
    group.behave("rank1.load", "if os.path.exists(f'{run_dir}/bad'): os.unlink(f'{run_dir}/bad'); os._exit(7)")
    group.start()
    report = group.ready()
    for _ in range(2):
        (group.run_dir / "bad").touch()
        os.kill(pid_of(report, "rank1"), signal.SIGKILL)
        report = group.ready(after=report.epoch + 1)
    return report


def test_after_two_failed_reforms_a_group_starts_whole_and_says_for_how_long(group: Group) -> None:
    report = two_failed_reforms(group)
    assert report.formed == "warm"  # for which they are no fault, either
    os.kill(pid_of(report, "rank1"), signal.SIGKILL)
    last = group.ready(after=report.epoch)
    assert not set(pids(last).values()) & set(pids(report).values())
    assert group.process is not None and group.process.stderr is not None
    group.process.send_signal(signal.SIGTERM)
    log = group.process.stderr.read().decode()
    assert group.wait() == 0
    [failed, died] = [line for line in log.splitlines() if "no re-forms for" in line]
    assert "exited with status 7" in failed and "no re-forms for 300 s, because 2 in a row failed" in failed
    assert "SIGKILL" in died


def test_an_operators_restart_has_reforms_tried_again(group: Group) -> None:
    group.configure(reform="auto", spare_ranks=1)
    group.behave("rank0.load", "open(f'{run_dir}/loaded', 'a').write(f'{os.getpid()}\\n')")
    report = two_failed_reforms(group)
    group.kill_group(report.epoch, planned=True)
    restarted = group.ready(after=report.epoch)

    def spares() -> list[int]:
        loaded = [int(line) for line in (group.run_dir / "loaded").read_text().split()]
        return [pid for pid in loaded if alive(pid) and pid != pid_of(restarted, "rank0")]

    eventually(lambda: len(spares()) == 1)
    os.kill(pid_of(restarted, "rank1"), signal.SIGKILL)
    assert group.ready(after=restarted.epoch).formed == "reformed"
    assert group.process is not None and group.process.stderr is not None
    group.process.send_signal(signal.SIGTERM)
    log = group.process.stderr.read().decode()
    assert group.wait() == 0
    assert log.count("what was set aside is tried again") == 1
    assert not spares()


def test_a_reform_that_hangs_is_followed_by_a_whole_start(group: Group) -> None:
    group.configure(reform="auto", start_timeout=2.0)
    group.behave("rank1.load", "if os.path.exists(f'{run_dir}/stuck'): time.sleep(1000)")
    group.start()
    first = group.ready()
    (group.run_dir / "stuck").touch()
    os.kill(pid_of(first, "rank1"), signal.SIGKILL)
    down = group.report(lambda r: r.phase == "down" and r.epoch == 2)
    assert "rank1 not ready" in down.cause
    (group.run_dir / "stuck").unlink()
    third = group.ready(after=2)
    assert not set(pids(third).values()) & set(pids(first).values())


@pytest.mark.parametrize("fail_fast", [False, True])
def test_ranks_that_cannot_load_first_load_in_place(group: Group, fail_fast: bool) -> None:
    group.configure(reform="auto", spare_ranks=1)
    group.behave("rank1", "if '--in-place' not in sys.argv: raise RuntimeError('asserted')")
    group.start(fail_fast)
    first = group.ready()
    assert first.epoch > 1
    os.kill(pid_of(first, "rank0"), signal.SIGKILL)
    second = group.ready(after=first.epoch)
    assert not set(pids(second).values()) & set(pids(first).values())


def test_operators_restart_is_of_new_processes(group: Group) -> None:
    group.start()
    first = group.ready()
    group.kill_group(1, planned=True)
    second = group.ready(after=1)
    assert not set(pids(second).values()) & set(pids(first).values())


def test_given_up_by_the_frontend_with_nobody_dead_or_stopped_all_go(group: Group) -> None:
    group.start()
    first = group.ready()
    group.kill_group(1)
    second = group.ready(after=1)
    assert not set(pids(second).values()) & set(pids(first).values())


def test_given_up_because_a_rank_is_stopped_the_other_stays(group: Group) -> None:
    group.start()
    first = group.ready()
    os.kill(pid_of(first, "rank1"), signal.SIGSTOP)
    group.kill_group(1)
    second = group.ready(after=1)
    assert pid_of(second, "rank0") == pid_of(first, "rank0")
    assert pid_of(second, "rank1") != pid_of(first, "rank1")


def test_a_spare_takes_the_place(group: Group) -> None:
    group.configure(reform="auto", spare_ranks=2)
    for name in RANKS:
        group.behave(f"{name}.load", f"open(f'{{run_dir}}/loaded', 'a').write(f'{{os.getpid()}} {name}\\n')")
    group.start()
    report = group.ready()
    loaded = group.run_dir / "loaded"

    def spares() -> dict[str, int]:
        lines = [line.split() for line in loaded.read_text().splitlines()]
        serving = set(pids(report).values())
        return {name: int(pid) for pid, name in lines if alive(int(pid)) and int(pid) not in serving}

    for victim in ("rank1", "rank0", "rank1"):
        eventually(lambda: set(spares()) == set(RANKS))
        time.sleep(0.05)  # it says so right after
        spare = spares()[victim]
        os.kill(pid_of(report, victim), signal.SIGKILL)
        report = group.ready(after=report.epoch)
        assert pid_of(report, victim) == spare
    # A spare that dies is nobody's loss.
    eventually(lambda: set(spares()) == set(RANKS))
    os.kill(spares()["rank0"], signal.SIGKILL)
    time.sleep(0.3)
    assert group.report(lambda r: True).phase == "ready"
    group.pids |= set(spares().values())


def test_a_spare_is_enough_for_an_epoch_to_begin_at_once(group: Group) -> None:
    """Nobody lives, as when the only rank of a group dies; the wait before new processes would be too long to see."""
    group.configure(reform="auto", spare_ranks=2, restart_backoff=1000.0, restart_backoff_max=1000.0)
    for name in RANKS:
        group.behave(f"{name}.load", f"open(f'{{run_dir}}/loaded', 'a').write(f'{{os.getpid()}} {name}\\n')")
    group.start()
    first = group.ready()
    assert first.formed in ("warm", "cold") and first.formed_s > 0
    loaded = group.run_dir / "loaded"
    eventually(lambda: len(loaded.read_text().splitlines()) == 4)
    spares = {int(line.split()[0]) for line in loaded.read_text().splitlines()} - set(pids(first).values())
    group.pids |= spares
    for name in RANKS:
        os.kill(pid_of(first, name), signal.SIGSTOP)
    group.kill_group(1)
    second = group.ready(after=1)
    assert {pid_of(second, name) for name in RANKS} == spares
    assert second.formed == "reformed"


def test_no_spare_outlives_a_start_that_failed() -> None:
    rules = Reforming(True, ["rank0"], 100.0)
    assert rules.keeps_spares(served=True, now=0.0)
    assert not rules.keeps_spares(served=False, now=0.0)


def test_sigterm_ends_those_that_wait_too(group: Group) -> None:
    group.configure(reform="auto", spare_ranks=1, restart_backoff_max=30.0, restart_backoff=30.0)
    group.start()
    group.ready()
    assert group.process is not None
    group.process.send_signal(signal.SIGTERM)
    assert group.wait() == 0
    assert group.leftovers() == []


@pytest.mark.timeout(300)
def test_whatever_dies_when_the_group_serves_again(group: Group) -> None:
    """Deaths at random moments, also while it forms again, of two at once, and stops."""
    chance = random.Random(7)
    group.configure(reform="auto", spare_ranks=1, start_timeout=20.0)
    group.start()
    report = group.ready()
    for _ in range(12):
        for _ in range(chance.choice((1, 1, 2, 3))):
            records = sorted(Path(group.paths.processes).glob("g0.*"))
            if not records:
                continue  # between two epochs of new processes
            record = chance.choice(records)
            try:
                pid = int(record.read_text().split()[0])
                os.kill(pid, chance.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP)))
            except (FileNotFoundError, ProcessLookupError):
                continue
            if pid in pids(report).values():
                group.kill_group(report.epoch)  # as a frontend does of one that is stopped
            time.sleep(chance.choice((0.0, 0.02, 0.3)))
        # A stopped rank of an epoch that serves is the frontend's to see.
        deadline = time.monotonic() + 60
        while True:
            assert time.monotonic() < deadline
            report = group.report(lambda r: r.phase == "ready")
            states = {pid: Path(f"/proc/{pid}/stat").read_text() for pid in pids(report).values() if alive(pid)}
            if len(states) == 3 and not any(") T " in stat for stat in states.values()):
                break
            group.kill_group(report.epoch)
    assert len(set(pids(report).values())) == 3
