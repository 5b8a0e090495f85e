"""Membership: every rule of failure detection, and every false alarm it has to stand."""

from __future__ import annotations

import pytest

from sglang_kevlar.control.detection import MAX_TICK, OBSERVE_INTERVAL, CpuTime, Observation
from sglang_kevlar.control.membership import GroupKill, GroupLost, GroupReady, GroupSuspect, GroupTrusted, Membership
from sglang_kevlar.protocol.group import GroupReport, ProcessRef
from sglang_kevlar.protocol.heartbeat import Heartbeat, Phase
from sglang_kevlar.protocol.launch import KevlarArgs

ARGS = KevlarArgs(worker_groups=2, hang_timeout=3.0, hang_per_ktoken=10.0, control_timeout=5.0)
SUPERVISOR = ProcessRef("supervisor", 10, 1)
MEMBERS = [ProcessRef("rank0", 11, 2), ProcessRef("detokenizer", 12, 3)]


def report(epoch: int, phase: str, group: int = 0, **fields) -> GroupReport:
    members = [] if phase in ("down", "stopped") else MEMBERS
    return GroupReport(group=group, epoch=epoch, phase=phase, supervisor=SUPERVISOR, members=members, **fields)


def ready(args: KevlarArgs = ARGS, now: float = 100.0) -> Membership:
    membership = Membership(args)
    membership.on_report(report(1, "starting"), now)
    events = membership.on_report(report(1, "ready", init_info={"max_total_num_tokens": 7}), now)
    assert events == [GroupReady(0, 1, {"max_total_num_tokens": 7})]
    return membership


class Watcher:
    """Observes group 0 as the monitor does, on a clock of its own."""

    def __init__(self, membership: Membership, now: float = 100.0) -> None:
        self.membership = membership
        self.now = now
        self.start = now
        self.events: list = []

    def look(self, beats=(), stopped=(), cpu=None, step: float = OBSERVE_INTERVAL) -> list:
        self.now += step
        obs = Observation(dict(beats), frozenset(stopped), cpu or {})
        events = self.membership.on_observation(0, 1, obs, self.now)
        self.events += events
        return events

    def watch(self, seconds: float, report_too: bool = True, **kwargs) -> GroupLost | None:
        """Look every OBSERVE_INTERVAL for this long, or until the group is lost."""
        for _ in range(round(seconds / OBSERVE_INTERVAL)):
            if report_too:
                self.membership.on_report(report(1, "ready"), self.now)
            for event in self.look(**kwargs):
                if isinstance(event, GroupLost):
                    return event
        return None

    def beat(self, phase: Phase, tokens: int = 1, steps: int = 1) -> Heartbeat:
        ns = int(self.now * 1e9)
        return Heartbeat(phase, tokens, ns, ns, steps)


def lost(events) -> GroupLost:
    (event,) = [e for e in events if isinstance(e, GroupLost)]
    return event


# Reports


def test_ready_once_per_epoch_and_roles():
    membership = ready(KevlarArgs(worker_groups=3, standby_groups=1))
    assert [g.role for g in membership.groups] == ["active", "active", "standby"]
    assert [g.state for g in membership.groups] == ["ready", "starting", "starting"]
    assert membership.on_report(report(1, "ready"), 101) == []
    with pytest.raises(ValueError, match="no group 3"):
        membership.on_report(report(1, "ready", group=3), 101)


def test_older_epoch_is_ignored():
    membership = ready()
    membership.on_process_exit(0, 1, "rank0", 101)
    assert membership.on_report(report(2, "ready"), 102) == [GroupReady(0, 2, {})]
    assert membership.on_report(report(1, "down", cause="late"), 103) == []
    assert membership.on_process_exit(0, 1, "supervisor", 103) == []
    assert membership.on_observation(0, 1, Observation({}, frozenset({"rank0"})), 104) == []
    assert membership.on_internal_error(0, 1, 104) == []
    assert membership.declare_lost(0, 1, "late", 104) == []
    assert membership.group(0).state == "ready" and membership.group(0).epoch == 2


def test_a_lost_epoch_never_comes_back_and_is_killed_again():
    membership = ready()
    events = membership.on_process_exit(0, 1, "rank0", 101)
    assert [type(e) for e in events] == [GroupLost, GroupKill]
    assert events[0].kind == "exit" and "rank0" in events[0].cause
    assert membership.on_report(report(1, "ready"), 102) == [GroupKill(0, 1, "rank0 exited", "exit")]
    assert membership.group(0).state == "down"
    assert membership.on_process_exit(0, 1, "detokenizer", 102) == []
    # the supervisor knows better why, and when it tries again
    assert membership.on_report(report(1, "down", cause="rank0: signal 9", retry_in=2.0), 103) == []
    assert membership.group(0).cause == "rank0: signal 9"
    assert membership.group(0).retry_in(103.5) == pytest.approx(1.5)
    assert membership.group(0).retry_in(110) == 0


@pytest.mark.parametrize("phase", ["down", "stopped"])
def test_supervisor_reports_the_end(phase):
    events = ready().on_report(report(1, phase, cause="rank0: signal 11"), 101)
    assert events == [GroupLost(0, 1, "rank0: signal 11", "report", 0.0)]


def test_next_epoch_without_word_of_the_last():
    membership = ready()
    events = membership.on_report(report(3, "starting"), 101)
    assert [type(e) for e in events] == [GroupLost, GroupKill]
    assert {e.epoch for e in events} == {1}
    assert membership.group(0).state == "starting"
    events = membership.on_report(report(5, "ready"), 102)
    assert events == [GroupReady(0, 5, {})]


def test_frontend_that_starts_late_sees_what_is():
    membership = Membership(ARGS)
    assert membership.on_report(report(7, "down", cause="no memory", failed_starts=3, retry_in=4), 100) == []
    group = membership.group(0)
    assert (group.state, group.cause, group.failed_starts) == ("down", "no memory", 3)
    assert membership.on_report(report(1, "ready", group=1), 100) == [GroupReady(1, 1, {})]


def test_report_with_dead_processes_is_not_taken_into_service():
    membership = Membership(ARGS)
    events = membership.on_report(report(4, "ready"), 100, gone=frozenset({"rank0"}))
    assert events == [GroupKill(0, 4, "rank0 exited", "exit")]
    assert membership.on_report(report(4, "ready"), 101) == [GroupKill(0, 4, "rank0 exited", "exit")]
    assert membership.on_report(report(5, "ready"), 101) == [GroupReady(0, 5, {})]


def test_exit_while_starting_fences_without_a_loss():
    membership = Membership(ARGS)
    membership.on_report(report(1, "starting"), 100)
    assert membership.on_process_exit(0, 1, "rank0", 101) == [GroupKill(0, 1, "rank0 exited", "exit")]
    assert membership.on_report(report(1, "ready"), 102) == [GroupKill(0, 1, "rank0 exited", "exit")]


def test_supervisor_exit_is_a_loss():
    assert lost(ready().on_process_exit(0, 1, "supervisor", 101)).kind == "exit"


# Operator


def test_drain_stays_through_restarts():
    membership = ready()
    membership.group(0).draining = True
    assert membership.group(0).state == "draining"
    events = membership.declare_lost(0, 1, "restart", 101, planned=True)
    assert lost(events).kind == "operator"
    assert events[-1] == GroupKill(0, 1, "restart", "operator", planned=True)
    assert membership.on_report(report(1, "ready"), 101.5) == [GroupKill(0, 1, "restart", "operator", planned=True)]
    assert membership.group(0).state == "down"
    membership.on_report(report(2, "ready"), 102)
    assert membership.group(0).state == "draining"
    membership.group(0).draining = False
    assert membership.group(0).state == "ready"


def test_a_draining_group_is_still_watched():
    membership = ready()
    membership.group(0).draining = True
    assert lost(membership.on_process_exit(0, 1, "rank0", 101)).kind == "exit"


# Stopped


@pytest.mark.parametrize("name", ["rank0", "detokenizer"])
def test_stopped_longer_than_grace(name):
    watcher = Watcher(ready())
    event = watcher.watch(5, stopped=[name])
    assert event is not None and event.kind == "stopped" and name in event.cause
    assert ARGS.stop_grace < event.detect_s <= ARGS.stop_grace + 2 * OBSERVE_INTERVAL
    assert isinstance(watcher.events[0], GroupSuspect)


def test_stopped_shorter_than_grace():
    watcher = Watcher(ready())
    for _ in range(20):  # again and again: each stop is judged alone
        assert watcher.watch(ARGS.stop_grace, stopped=["rank0"]) is None
        assert watcher.watch(0.1) is None
    assert watcher.membership.group(0).state == "ready"
    assert [type(e) for e in watcher.events] == [GroupSuspect, GroupTrusted] * 20


def test_stopped_supervisor_is_only_suspect():
    watcher = Watcher(ready())
    assert watcher.watch(60, report_too=False, stopped=["supervisor"]) is None
    assert watcher.membership.group(0).state == "suspect"
    assert watcher.watch(1) is None
    assert watcher.membership.group(0).state == "ready"
    assert [type(e) for e in watcher.events] == [GroupSuspect, GroupTrusted]


def test_silent_supervisor_is_only_suspect():
    watcher = Watcher(ready())
    assert watcher.watch(60, report_too=False) is None
    assert [e.why for e in watcher.events] == ["supervisor silent"]


# Hangs


def test_forward_past_its_deadline():
    watcher = Watcher(ready())
    beat = watcher.beat(Phase.FORWARD, tokens=200)
    event = watcher.watch(20, beats={"rank0": beat})
    assert event is not None and event.kind == "hang" and "rank0" in event.cause
    assert 5.0 < event.detect_s < 5.2
    assert 5.0 < watcher.now - watcher.start < 5.2


def test_long_prefill_has_a_long_deadline():
    watcher = Watcher(ready())
    assert watcher.watch(160, beats={"rank0": watcher.beat(Phase.FORWARD, tokens=16384)}) is None
    assert watcher.events == []


@pytest.mark.parametrize(("phase", "limit"), [(Phase.CONTROL, 10.0), (Phase.DETOKENIZE, 3.0)])
def test_other_deadlines(phase, limit):
    watcher = Watcher(ready())
    beat = watcher.beat(phase, tokens=100_000)
    assert watcher.watch(limit - 0.1, beats={"rank0": beat}) is None
    event = watcher.watch(1, beats={"rank0": beat})
    assert event is not None and event.kind == "hang"


@pytest.mark.parametrize("phase", [Phase.STARTING, Phase.WAITING])
def test_phases_without_deadline(phase):
    watcher = Watcher(ready())
    assert watcher.watch(3600, beats={"rank0": watcher.beat(phase)}) is None
    assert watcher.events == []


def test_an_idle_rank_whose_loop_does_not_turn_is_hung():
    watcher = Watcher(ready())
    idle_for_long = Heartbeat(Phase.IDLE, 0, 0, int(watcher.now * 1e9), 1)
    event = watcher.watch(20, beats={"rank0": idle_for_long, "detokenizer": watcher.beat(Phase.WAITING)})
    assert event is not None and event.kind == "hang" and "rank0 in IDLE" in event.cause
    assert 3.0 < event.detect_s < 3.2


def test_an_idle_rank_whose_loop_turns_is_none():
    watcher = Watcher(ready())
    for _ in range(100):
        beat = Heartbeat(Phase.IDLE, 0, 0, int(watcher.now * 1e9), 1)
        assert watcher.watch(1.1, beats={"rank0": beat}) is None
    assert watcher.events == []


@pytest.mark.parametrize(("phase", "limit"), [(Phase.FORWARD, 103.0), (Phase.CONTROL, 10.0)])
def test_an_idle_rank_may_wait_for_a_busy_one(phase, limit):
    watcher = Watcher(ready())
    beats = {"rank0": watcher.beat(Phase.IDLE), "rank1": watcher.beat(phase, tokens=10_000)}
    assert watcher.watch(limit - 0.1, beats=beats) is None
    event = watcher.watch(1, beats=beats)
    assert event is not None and "rank1" in event.cause


def test_an_idle_rank_may_wait_for_one_on_another_host():
    membership = ready()
    watcher = Watcher(membership)
    beats = {"rank0": watcher.beat(Phase.IDLE)}
    membership.on_report(report(1, "ready", busy_elsewhere=True), watcher.now)
    assert watcher.watch(100, beats=beats, report_too=False) is None
    event = watcher.watch(4, beats=beats)
    assert event is not None and event.kind == "hang"


def test_what_its_supervisor_alone_can_know_is_the_kind_of_the_loss():
    events = ready().on_report(report(1, "down", cause="node 1 (b): silent", kind="network"), 101)
    assert [(e.kind, e.cause) for e in events] == [("network", "node 1 (b): silent")]


def test_starting_group_is_not_judged():
    membership = Membership(ARGS)
    membership.on_report(report(1, "starting"), 100)
    watcher = Watcher(membership)
    beats = {"rank0": watcher.beat(Phase.FORWARD)}
    for _ in range(1000):
        assert watcher.look(beats=beats, stopped=["rank0"]) == []


def test_steps_are_progress():
    """Many steps, each just within the deadline: never a hang."""
    watcher = Watcher(ready())
    for steps in range(20):
        assert watcher.watch(2.9, beats={"rank0": watcher.beat(Phase.FORWARD, steps=steps)}) is None
    assert watcher.events == []


def test_a_rank_that_runs_or_waits_for_a_cpu_gets_longer_but_not_for_ever():
    watcher = Watcher(ready())
    beat = watcher.beat(Phase.FORWARD)
    limit = 3.01
    event = None
    while event is None and watcher.now < watcher.start + 60:
        passed = watcher.now - watcher.start
        # waiting on a starved machine: 20 % of a CPU in all
        cpu = {"rank0": CpuTime(passed * 0.05, passed * 0.15)} if round(passed / OBSERVE_INTERVAL) % 10 == 0 else {}
        event = next((e for e in watcher.look({"rank0": beat}, cpu=cpu) if isinstance(e, GroupLost)), None)
    assert event is not None and event.kind == "hang"
    assert 2.5 * limit < event.detect_s < 4 * limit + 1
    (suspect,) = [e for e in watcher.events if isinstance(e, GroupSuspect)]
    assert "rank0 in FORWARD" in suspect.why


def test_a_rank_that_sleeps_in_its_phase_does_not_get_longer():
    watcher = Watcher(ready())
    beat = watcher.beat(Phase.FORWARD)
    event = None
    while event is None and watcher.now < watcher.start + 60:
        passed = watcher.now - watcher.start
        cpu = {"rank0": CpuTime(passed * 0.01, passed * 0.01)}
        event = next((e for e in watcher.look({"rank0": beat}, cpu=cpu) if isinstance(e, GroupLost)), None)
    assert event is not None and event.detect_s < 3.3


# Our own pauses


@pytest.mark.parametrize("pause", [1.0, 30.0, 86400.0])
def test_our_own_pause_is_no_evidence(pause):
    watcher = Watcher(ready())
    beats = {"rank0": watcher.beat(Phase.FORWARD)}
    watcher.look(beats=beats)
    assert watcher.look(beats=beats, stopped=["rank0"], step=pause) != []  # suspect
    assert [type(e) for e in watcher.look(beats=beats, step=pause)] == [GroupTrusted]
    assert watcher.membership.group(0).state == "ready"


def test_slow_frontend_still_detects():
    """Every look a second late: stops and hangs are found, after as many looks as a fast loop's would need."""
    watcher = Watcher(ready())
    looks = 0
    while watcher.membership.group(0).stage == "ready":
        watcher.look(stopped=["rank0"], step=1.0)
        looks += 1
    assert looks == int(ARGS.stop_grace / MAX_TICK) + 2


def test_time_that_does_not_advance_or_steps_back_is_no_evidence():
    watcher = Watcher(ready())
    beats = {"rank0": watcher.beat(Phase.FORWARD)}
    for step in (0.0, -5.0, 0.0, -50.0) * 100:
        assert not any(isinstance(e, GroupLost) for e in watcher.look(beats, ["rank0"], step=step))


# Internal errors


def test_error_budget():
    args = KevlarArgs(worker_groups=1, error_budget=3, error_window=10.0)
    membership = ready(args)
    for now in (101, 107, 112, 118, 123):  # never three within ten seconds
        assert membership.on_internal_error(0, 1, now) == []
    events = membership.on_internal_error(0, 1, 124)
    assert lost(events).kind == "errors" and lost(events).detect_s == 6
    assert membership.on_internal_error(0, 1, 124) == []
    assert membership.on_report(report(2, "ready"), 130) == [GroupReady(0, 2, {})]
    assert membership.on_internal_error(0, 2, 130) == []  # the new incarnation has a budget of its own
