"""The group supervisor with light members: real processes, real signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest
from supervised_group import LAUNCH_ID, Group, alive, eventually, pid_of

from sglang_kevlar.launcher.process import identify
from sglang_kevlar.protocol.launch import EXIT_CONFIG, EXIT_WEIGHTS_GONE, instance_id


@pytest.fixture(params=[False, True], ids=["cold", "warm"])
def group(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Group]:
    run_dir = tmp_path_factory.mktemp("g")
    group = Group(run_dir, warm=request.param)
    yield group
    group.end()
    eventually(lambda: not any(alive(pid) for pid in group.pids))


def test_reports_ready_with_identities_and_init_info(group: Group) -> None:
    group.start()
    report = group.ready()
    assert (report.epoch, report.failed_starts, report.cause) == (1, 0, "")
    assert [member.name for member in report.members] == ["rank0", "rank1", "detokenizer"]
    assert all(identify(m.pid) == (m.pid, m.start_ticks) for m in report.members)
    assert report.init_info is not None and report.init_info["max_req_input_len"] == 7
    assert report.shadow_endpoints == []
    assert group.process is not None and report.supervisor.pid == group.process.pid
    # Said again without any change: a frontend that starts late needs nothing else.
    assert group.ready().members == report.members


@pytest.mark.parametrize("who", [["rank0", "rank1"], ["rank1"]])
def test_reports_where_others_reach_the_shadow_stores_of_all_ranks(group: Group, who: list[str]) -> None:
    for rank in who:
        group.behave(rank, f"more['shadow_endpoint'] = 'tcp://h:{rank}'")
    group.start()
    endpoints = [f"tcp://h:{rank}" if rank in who else "" for rank in ("rank0", "rank1")]
    assert group.ready().shadow_endpoints == endpoints
    os.kill(pid_of(group.ready(), "rank0"), signal.SIGKILL)
    assert group.report(lambda r: r.phase == "down").shadow_endpoints == []


@pytest.mark.parametrize("victim", ["rank0", "rank1", "detokenizer"])
def test_any_member_dead_ends_the_epoch_and_starts_the_next(group: Group, victim: str) -> None:
    group.start()
    first = group.ready()
    os.kill(pid_of(first, victim), signal.SIGKILL)
    down = group.report(lambda r: r.phase == "down")
    assert down.epoch == 1 and down.members == []
    assert victim in down.cause and "SIGKILL" in down.cause
    second = group.ready(after=1)
    assert second.epoch == 2
    assert not any(alive(member.pid) for member in first.members)
    assert not {m.pid for m in first.members} & {m.pid for m in second.members}
    assert all("g0e2" in name for name in group.leftovers())


def test_cause_quotes_the_last_error_line(group: Group) -> None:
    group.behave(
        "rank1",
        """
        if epoch == "1":
            say(status="ready")
            time.sleep(0.3)
            print("step 1", "step 2", sep="\\n", file=sys.stderr)
            raise RuntimeError("device lost")
        """,
    )
    group.start()
    down = group.report(lambda r: r.phase == "down")
    assert "rank1" in down.cause and "exited with status 1" in down.cause
    assert "RuntimeError: device lost" in down.cause
    group.ready(after=1)
    assert group.process is not None and group.process.stderr is not None
    os.set_blocking(group.process.stderr.fileno(), False)
    assert b"step 1\nstep 2\n" in group.process.stderr.read()  # passed through


def test_failed_starts_are_counted_and_back_off(group: Group) -> None:
    group.behave("rank0", """if int(epoch) <= 3: say(status="error", error="no such model"); time.sleep(1000)""")
    group.start()
    delays = [
        group.report(lambda r, n=n: r.phase == "down" and r.failed_starts == n).retry_in for n in (1, 2, 3)
    ]  # fmt: skip
    assert delays[0] <= 0.05 < delays[2] <= 0.2
    down = group.report(lambda r: r.failed_starts == 3)
    assert down.cause == "rank0 failed to start: no such model"
    assert group.ready(after=3).failed_starts == 0


def test_member_that_never_becomes_ready_is_started_again(group: Group) -> None:
    group.configure(start_timeout=1.0)
    group.behave("detokenizer", """if epoch == "1": time.sleep(1000)""")
    group.start()
    down = group.report(lambda r: r.phase == "down")
    assert down.cause == "detokenizer not ready after 1 s"
    group.ready(after=1)


def test_member_that_is_stopped_while_it_starts_is_noticed(group: Group) -> None:
    group.configure(stop_grace=0.5)
    group.behave("rank1", """time.sleep(1000 if epoch == "1" else 0)""")
    group.start()
    starting = group.report(lambda r: r.phase == "starting" and len(r.members) == 3)
    os.kill(pid_of(starting, "rank1"), signal.SIGSTOP)
    time.sleep(0.2)
    os.kill(pid_of(starting, "rank1"), signal.SIGCONT)
    assert group.report(lambda r: True).epoch == 1
    os.kill(pid_of(starting, "rank1"), signal.SIGSTOP)
    assert "rank1 stopped (state T)" in group.report(lambda r: r.phase == "down", timeout=10).cause
    assert group.ready(after=1).epoch == 2


def test_first_failure_ends_a_supervisor_that_was_asked_to(group: Group) -> None:
    group.behave("rank0", """raise ValueError("bad weights")""")
    group.start(fail_fast=True)
    assert group.wait() == 79
    (message,) = group.messages()
    assert message["status"] == "failed" and "ValueError: bad weights" in message["cause"]
    assert group.leftovers() == []


def test_failure_after_ready_does_not_end_it(group: Group) -> None:
    group.start(fail_fast=True)
    os.kill(pid_of(group.ready(), "rank0"), signal.SIGKILL)
    group.ready(after=1)


def test_configuration_error_of_a_member_ends_it(group: Group) -> None:
    group.behave("rank1", f"sys.exit({EXIT_CONFIG})")
    group.start()
    assert group.wait() == EXIT_CONFIG


def test_a_rank_whose_weights_are_gone_says_why(group: Group) -> None:
    dies = f"print('something else', file=sys.stderr, flush=True); os._exit({EXIT_WEIGHTS_GONE})"
    group.behave("rank1", f"if epoch == '1': {dies}")
    group.start()
    down = group.report(lambda r: r.phase == "down")
    assert "ended because the weight cache daemon died" in down.cause and "something else" not in down.cause
    # It is no failure of its own, which a start without forks would have to explain.
    assert group.ready(after=1).formed == ("warm" if group.warm else "cold")


def test_kill_from_the_frontend_counts_only_for_this_epoch(group: Group) -> None:
    group.start()
    first = group.ready()
    group.kill_group(epoch=7)
    group.report(lambda r: r.phase == "ready")
    group.kill_group(epoch=1, planned=True)
    down = group.report(lambda r: r.phase == "down")
    assert down.cause == "fenced by the test" and down.retry_in == 0
    second = group.ready(after=1)
    assert not any(alive(member.pid) for member in first.members)
    group.kill_group(epoch=1)
    assert group.ready().epoch == second.epoch


def test_restarted_frontend_learns_everything(group: Group) -> None:
    group.start()
    first = group.ready()
    group.router.close(linger=0)
    time.sleep(1.2)
    group.listen()
    report = group.report(lambda r: True)
    assert (report.phase, report.members) == ("ready", first.members)
    group.kill_group(epoch=1)
    group.ready(after=1)


def test_sigterm_ends_everything(group: Group) -> None:
    group.start()
    report = group.ready()
    assert group.process is not None
    group.process.terminate()
    assert group.wait() == 0
    assert not any(alive(member.pid) for member in report.members)
    assert group.leftovers() == []
    assert group.report(lambda r: r.phase == "stopped").members == []


def test_sigterm_is_enforced(group: Group) -> None:
    group.behave("rank0", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)")
    group.start()
    report = group.ready()
    assert group.process is not None
    group.process.terminate()
    assert group.wait() == 0
    assert not any(alive(member.pid) for member in report.members)


def test_a_member_whose_watchdog_sends_sigquit_ends_its_epoch(group: Group) -> None:
    stuck = """
        if epoch == "1":
            import signal
            say(status="ready")
            time.sleep(1)
            print("ERROR Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)", file=sys.stderr)
            os.kill(os.getppid(), signal.SIGQUIT)
            time.sleep(1000)
    """
    group.behave("rank1", stuck)
    group.start()
    assert group.ready().epoch == 1
    cause = group.report(lambda r: r.phase == "down").cause
    assert cause.startswith("rank1's watchdog") and "self.watchdog_timeout=300" in cause
    assert group.ready(after=1).epoch == 2


def test_a_member_that_sends_sigquit_and_ends_says_why_itself(group: Group) -> None:
    group.behave(
        "rank0",
        """
        if epoch == "1":
            import signal
            print("ValueError: the reason", file=sys.stderr)
            os.kill(os.getppid(), signal.SIGQUIT)
            time.sleep(0.5)
            sys.exit(1)
        """,
    )
    group.start()
    cause = group.report(lambda r: r.phase == "down").cause
    assert "exited with status 1: ValueError: the reason" in cause
    time.sleep(2.5)  # the signal is not held against the next epoch
    assert group.ready().epoch == 2


def test_killed_supervisor_takes_its_members_along_and_epochs_go_on(group: Group) -> None:
    group.start()
    report = group.ready()
    assert group.process is not None
    group.process.kill()
    group.process.wait()
    eventually(lambda: not any(alive(member.pid) for member in report.members))
    group.start()
    assert group.ready(after=1).epoch == 2
    assert all("g0e2" in name for name in group.leftovers())


def test_stopped_supervisor_catches_up(group: Group) -> None:
    """Stopped over the start deadline and the death of a member: what was in time counts, what died is replaced."""
    group.configure(start_timeout=3.0)
    group.behave("rank0", """time.sleep(1) if epoch == "1" else None""")
    group.start()
    starting = group.report(lambda r: r.phase == "starting" and len(r.members) == 3)
    assert group.process is not None
    group.process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    group.process.send_signal(signal.SIGCONT)
    assert group.ready().members == starting.members
    group.process.send_signal(signal.SIGSTOP)
    os.kill(pid_of(starting, "rank1"), signal.SIGKILL)
    time.sleep(0.2)
    group.process.send_signal(signal.SIGCONT)
    assert "rank1" in group.report(lambda r: r.phase == "down").cause
    group.ready(after=1)


def test_children_of_members_die_with_them(group: Group) -> None:
    group.behave(
        "rank0",
        """
        helper = subprocess.Popen(["sleep", "1000"])
        open(f"{run_dir}/child{epoch}", "w").write(str(helper.pid))
        """,
    )
    group.start()
    os.kill(pid_of(group.ready(), "rank0"), signal.SIGKILL)
    group.ready(after=1)
    helpers = [int((group.run_dir / f"child{epoch}").read_text()) for epoch in (1, 2)]
    assert not alive(helpers[0]) and alive(helpers[1])
    assert group.process is not None
    group.process.kill()
    group.process.wait()
    group.start()  # finds what its predecessor left
    group.ready(after=2)
    assert not alive(helpers[1])


def test_member_that_writes_more_than_anyone_reads_goes_on(group: Group) -> None:
    """Nobody reads our standard error here: 8 MB are more than all buffers together."""
    group.behave("rank0", """for _ in range(80): os.write(2, b"x" * 99_999 + b"\\n")""")
    group.start()
    group.ready()


def test_instance_id_is_what_the_cleanup_looks_for() -> None:
    assert instance_id(LAUNCH_ID, 0, 1) == f"kevlar-{LAUNCH_ID}-g0e1"
