"""Groups on other hosts as a frontend counts them: ids by name, epochs that never come again, losses told once."""

from __future__ import annotations

from typing import Any

from sglang_kevlar.control.joined import FORGET_AFTER, JoinedGroups
from sglang_kevlar.control.membership import GroupKill, GroupLost, GroupReady, GroupSuspect, GroupTrusted
from sglang_kevlar.protocol.cluster import GroupState, Identity
from sglang_kevlar.protocol.launch import KevlarArgs

READY: dict[str, Any] = {"phase": "ready", "init_info": {"max_total_num_tokens": 5}}


def identity(name: str = "a", host: str = "h") -> Identity:
    return Identity(name=name, host=host, instance="i")


def state(epoch: int = 1, phase: str = "ready", **fields: Any) -> GroupState:
    extra = {"init_info": {"max_total_num_tokens": 5}} if phase == "ready" else {}
    return GroupState(epoch=epoch, phase=phase, **{**extra, **fields})


def table(**args: Any) -> JoinedGroups:
    return JoinedGroups(KevlarArgs(**args), first=2)


def kinds(events: list[Any]) -> list[type]:
    return [type(event) for event in events]


def test_ids_go_on_behind_the_local_ones_and_stay_with_their_names() -> None:
    t = table()
    assert [event.group for event in t.joined("s1", identity("a"), state(), 0.0)] == [2]
    assert [event.group for event in t.joined("s2", identity("b"), state(), 0.0)] == [3]
    t.ended("s1", "left", "bye", 1.0, 1.0)
    assert set(t.groups) == {3}, "who leaves on purpose is forgotten at once"
    (ready,) = t.joined("s3", identity("a"), state(), 2.0)
    assert (ready.group, ready.epoch) == (2, 2), "the same group, and another incarnation"


def test_every_session_and_every_epoch_of_the_group_is_an_epoch_of_ours() -> None:
    t = table()
    (first,) = t.joined("s1", identity(), state(7), 0.0)
    lost, ready = t.on_state("s1", state(8), 1.0)
    assert (type(lost), lost.epoch, type(ready), ready.epoch) == (GroupLost, first.epoch, GroupReady, first.epoch + 1)
    (lost,) = t.ended("s1", "network", "silent", 1.0, 4.0)
    assert (lost.epoch, lost.kind, lost.detect_s) == (ready.epoch, "network", 3.0)
    (again,) = t.joined("s2", identity(), state(8), 5.0)
    assert again.epoch == ready.epoch + 1, "the same incarnation over there, but of another session"


def test_a_loss_is_told_once_with_what_the_group_says_of_it() -> None:
    t = table()
    t.joined("s1", identity(), state(1), 0.0)
    (lost,) = t.on_state("s1", state(1, "down", cause="rank0 exited", kind="exit"), 1.0)
    assert (lost.cause, lost.kind) == ("rank0 exited", "exit")
    assert t.on_state("s1", state(1, "down", cause="rank0 exited", kind="exit"), 2.0) == []
    assert t.on_state("s1", state(2, "starting"), 3.0) == [] and t.groups[2].status == "starting"
    assert kinds(t.on_state("s1", state(2), 4.0)) == [GroupReady]
    assert (
        kinds(t.ended("s1", "network", "closed", 5.0, 5.0)) == [GroupLost] and t.ended("s1", "network", "", 6, 6) == []
    )


def test_what_the_frontend_gives_up_stays_down_until_the_group_has_begun_anew() -> None:
    t = table()
    (ready,) = t.joined("s1", identity(), state(1), 0.0)
    events = t.declare_lost(2, ready.epoch, "does not read", 1.0, kind="unfit")
    assert kinds(events) == [GroupLost, GroupKill] and t.groups[2].status == "down"
    assert t.declare_lost(2, ready.epoch, "again", 1.0, kind="unfit") == []
    assert kinds(t.on_state("s1", state(1), 2.0)) == [GroupKill], "it has not heard yet"
    assert kinds(t.on_state("s1", state(2), 3.0)) == [GroupReady]
    assert t.declare_lost(2, ready.epoch, "of an old epoch", 4.0, kind="unfit") == []
    assert t.declare_lost(9, 1, "of nobody", 4.0, kind="unfit") == []


def test_silence_and_suspicions_are_second_choice_not_loss() -> None:
    t = table()
    t.joined("s1", identity(), state(), 0.0)
    assert kinds(t.on_silence("s1", True)) == [GroupSuspect] and t.groups[2].status == "suspect"
    assert t.on_state("s1", state(suspicions=["rank0 stopped"]), 1.0) == [], "it was suspect before"
    assert t.on_silence("s1", False) == []
    assert kinds(t.on_state("s1", state(), 2.0)) == [GroupTrusted]
    assert t.on_silence("gone", True) == []


def test_a_missing_group_counts_until_it_is_forgotten() -> None:
    t = table()
    t.joined("s1", identity("a"), state(), 0.0)
    t.joined("s2", identity("b"), state(role="standby"), 0.0)
    assert t.active() == 1
    t.ended("s1", "network", "closed", 10.0, 10.0)
    t.forget_missing(10.0 + FORGET_AFTER - 1)
    assert t.active() == 1 and t.groups[2].status == "down" and t.groups[2].link == "down"
    t.forget_missing(10.0 + FORGET_AFTER)
    assert t.active() == 0 and set(t.groups) == {3}


def test_the_error_budget_is_the_frontends() -> None:
    t = table(error_budget=2, error_window=10.0)
    (ready,) = t.joined("s1", identity(), state(), 0.0)
    assert t.on_internal_error(2, ready.epoch, 1.0) == []
    assert kinds(t.on_internal_error(2, ready.epoch, 2.0)) == [GroupLost, GroupKill]
    assert t.on_internal_error(2, ready.epoch, 3.0) == []


def test_ids_of_names_long_gone_are_given_away(monkeypatch) -> None:
    monkeypatch.setattr("sglang_kevlar.control.joined.MAX_NAMES", 2)
    t = table()
    for session, name in enumerate("abc"):
        t.joined(str(session), identity(name), state(), 0.0)
        if name != "b":
            t.ended(str(session), "left", "", 0.0, 0.0)
    (ready,) = t.joined("9", identity("a"), state(), 0.0)
    assert ready.group == 2 and ready.epoch == 1, "a's id went to c, and from c back to a"
    assert set(t.groups) == {2, 3}
