"""Membership under arbitrary input: what holds whatever the order and the nonsense of what arrives."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control.detection import CpuTime, Observation
from sglang_kevlar.control.membership import GroupKill, GroupLost, GroupReady, GroupSuspect, GroupTrusted, Membership
from sglang_kevlar.protocol.group import GroupReport, ProcessRef
from sglang_kevlar.protocol.heartbeat import Heartbeat, Phase
from sglang_kevlar.protocol.launch import KevlarArgs

ARGS = KevlarArgs(worker_groups=2, hang_timeout=0.3, stop_grace=0.1, control_timeout=0.3, error_budget=3)
NAMES = ["supervisor", "rank0", "rank1", "detokenizer"]

groups = st.integers(0, 1)
epochs = st.integers(0, 6)
names = st.sampled_from(NAMES)
beats = st.builds(
    Heartbeat, st.sampled_from(Phase), st.integers(0, 2000), st.integers(0, 10**12), st.integers(0, 10**12),
    st.integers(0, 3),
)  # fmt: skip
observations = st.builds(
    Observation,
    st.dictionaries(names, beats, max_size=3),
    st.frozensets(names, max_size=2),
    st.dictionaries(names, st.builds(CpuTime, st.floats(0, 10), st.floats(0, 10)), max_size=2),
)
reports = st.builds(
    GroupReport,
    group=groups,
    epoch=epochs,
    phase=st.sampled_from(["starting", "ready", "ready", "down", "stopped"]),
    supervisor=st.just(ProcessRef("supervisor", 1, 1)),
    members=st.just([ProcessRef("rank0", 2, 2)]),
    retry_in=st.floats(0, 10),
    cause=st.sampled_from(["", "why"]),
)
gone = st.frozensets(names, max_size=1)
steps = st.one_of(
    st.tuples(st.just("on_report"), reports),
    st.tuples(st.just("on_report_gone"), reports, gone),
    st.tuples(st.just("on_process_exit"), groups, epochs, names),
    st.tuples(st.just("on_observation"), groups, epochs, observations),
    st.tuples(st.just("repeat"), groups, epochs, observations, st.integers(1, 40)),
    st.tuples(st.just("on_internal_error"), groups, epochs),
    st.tuples(st.just("declare_lost"), groups, epochs),
    st.tuples(st.sampled_from(["drain", "undrain"]), groups),
)


def apply(membership: Membership, step: tuple, now: float) -> list:
    kind, *rest = step
    if kind == "on_report":
        return membership.on_report(rest[0], now)
    if kind == "on_report_gone":
        return membership.on_report(rest[0], now, rest[1])
    if kind == "declare_lost":
        return membership.declare_lost(*rest, "because", now)
    if kind in ("drain", "undrain"):
        membership.group(*rest).draining = kind == "drain"
        return []
    if kind == "repeat":
        group, epoch, obs, times = rest
        return [e for i in range(times) for e in membership.on_observation(group, epoch, obs, now + i * 0.05)]
    return getattr(membership, kind)(*rest, now)


class Checker:
    """The contract of the event stream."""

    def __init__(self) -> None:
        self.ready: set[tuple[int, int]] = set()
        self.lost: set[tuple[int, int]] = set()
        self.fenced: set[tuple[int, int]] = set()
        self.suspect: set[tuple[int, int]] = set()
        self.last_ready = {}

    def check(self, event) -> None:
        key = (event.group, event.epoch)
        serving = key in self.ready and key not in self.lost
        if isinstance(event, GroupReady):
            assert key not in self.ready and key not in self.fenced
            assert event.epoch > self.last_ready.get(event.group, -1)
            # the one before it was given up first
            assert all(k in self.lost for k in self.ready if k[0] == event.group)
            self.last_ready[event.group] = event.epoch
            self.ready.add(key)
        elif isinstance(event, GroupLost):
            assert serving and event.detect_s >= 0 and event.cause
            self.lost.add(key)
        elif isinstance(event, GroupSuspect):
            assert serving and key not in self.suspect and event.why
            self.suspect.add(key)
        elif isinstance(event, GroupTrusted):
            assert serving and key in self.suspect
            self.suspect.remove(key)
        else:
            assert isinstance(event, GroupKill) and not serving
            self.fenced.add(key)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(steps, st.floats(-1, 20)), max_size=60))
def test_invariants(script):
    membership = Membership(ARGS)
    checker = Checker()
    now = 100.0
    for step, passed in script:
        now += passed
        before = [g.epoch for g in membership.groups]
        for event in apply(membership, step, now):
            checker.check(event)
        for g, epoch in zip(membership.groups, before, strict=True):
            assert g.epoch >= epoch
            serving = (g.id, g.epoch) in checker.ready - checker.lost
            assert serving == (g.state in ("ready", "suspect", "draining"))
            assert g.retry_in(now) >= 0
        # whatever was ready and is not served any more was announced as lost
        current = {(g.id, g.epoch) for g in membership.groups}
        assert checker.ready - current <= checker.lost
