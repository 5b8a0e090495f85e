"""The two ends of a session, without sockets: who is refused and why, what ends a session, what is bounded."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import pytest
from cluster_world import READY, SAME
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control import session as session_module
from sglang_kevlar.control.frontend_end import MAX_GROUPS, Sessions
from sglang_kevlar.control.group_end import BACKOFF_CAP, CONNECT_TIME, JOIN_TIME, GroupEnd
from sglang_kevlar.control.session import (
    Admitted,
    Dial,
    Effect,
    Ended,
    HangUp,
    Joined,
    KillArrived,
    Link,
    NotJoined,
    NotRead,
    OutputsArrived,
    RequestsArrived,
    Send,
    StateChanged,
    Suspect,
    Trusted,
)
from sglang_kevlar.protocol.cluster import (
    Beat,
    FromGroup,
    Identity,
    Join,
    Kill,
    Leave,
    Outputs,
    Over,
    Refused,
    Requests,
    State,
    Welcome,
)

LEASE = 2.0
_E = TypeVar("_E")


def of(kind: type[_E], effects: list[Effect]) -> list[_E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def sent(kind: type[_E], effects: list[Effect]) -> list[_E]:
    return [effect.message for effect in effects if isinstance(effect, Send) and isinstance(effect.message, kind)]


def join(session: str = "i-1", name: str = "g", instance: str = "i", **changes: Any) -> Join:
    identity = Identity(name=name, host="h1", instance=instance)
    configuration = msgspec.structs.replace(SAME, **changes)
    return Join(session=session, identity=identity, configuration=configuration, state=READY)


def table() -> Sessions:
    return Sessions("f", SAME, LEASE)


def joined() -> Sessions:
    sessions = table()
    effects = sessions.on_message(b"A", join(), 0.0)
    assert sent(Welcome, effects)[0].lease == LEASE and of(Joined, effects)
    return sessions


def refusal(effects: list[Effect]) -> Refused:
    (refused,) = sent(Refused, effects)
    assert of(HangUp, effects) and not of(Joined, effects)
    return refused


# Who is refused.


def test_a_group_that_differs_is_told_each_difference_with_both_values() -> None:
    refused = refusal(table().on_message(b"A", join(dtype="bfloat16", tp=2, other={"seed": "1"}), 0.0))
    assert "dtype: 'float32' here, 'bfloat16' there" in refused.reason
    assert "tp: 1 here, 2 there" in refused.reason
    assert "seed: not set here, '1' there" in refused.reason
    assert "random_seed: '7' here, not set there" in refused.reason
    assert "model" not in refused.reason
    assert refused.retry_s is None


def test_another_version_is_refused_by_name() -> None:
    refused = refusal(table().on_message(b"A", msgspec.structs.replace(join(), version=2), 0.0))
    assert "version 1 of the cluster's protocol, the group 2" in refused.reason and refused.retry_s is None


def test_a_group_of_another_version_gets_in_only_where_the_operator_allows_it_and_only_by_that() -> None:
    assert (
        "version: '0.1.0' here, '0.2.0' there" in refusal(table().on_message(b"A", join(version="0.2.0"), 0.0)).reason
    )
    upgrading = Sessions("f", SAME, LEASE, identity=Identity(name="f", host="h", instance="i"), version_skew=True)
    refused = refusal(upgrading.on_message(b"A", join(version="0.2.0", dtype="bfloat16", upstream="0.6"), 0.0))
    assert "dtype" in refused.reason and "upstream" in refused.reason and "'0.2.0'" not in refused.reason
    (entered,) = of(Joined, upgrading.on_message(b"A", join(version="0.2.0"), 0.0))
    assert entered.version == "0.2.0"
    other = msgspec.structs.replace(
        join("f-1", version="0.2.0"), identity=Identity(kind="frontend", name="g", host="h", instance="j")
    )
    assert "'0.2.0'" in refusal(upgrading.on_message(b"B", other, 0.0)).reason, "frontends must be of one version"


def test_a_name_is_taken_as_long_as_its_session_lives() -> None:
    sessions = joined()
    refused = refusal(sessions.on_message(b"B", join("j-1", instance="j"), 0.0))
    assert "a group named g is joined already, from host h1" in refused.reason and refused.retry_s
    assert [end.session for end in sessions] == ["i-1"]
    assert [ended.kind for ended in of(Ended, sessions.on_closed(b"A", "gone", 0.1))] == ["closed"]
    assert of(Joined, sessions.on_message(b"B", join("j-1", instance="j"), 0.2))


def test_the_same_process_replaces_its_own_session() -> None:
    sessions = joined()
    effects = sessions.on_message(b"B", join("i-2"), 0.5)
    assert [ended.kind for ended in of(Ended, effects)] == ["replaced"]
    assert [new.session for new in of(Joined, effects)] == ["i-2"]
    assert effects.index(of(Ended, effects)[0]) < effects.index(of(Joined, effects)[0])
    # What the old one still says is answered, and not believed.
    late = sessions.on_message(b"A", Outputs(session="i-1", number=0, epoch=1, payload=b"x"), 0.6)
    assert not of(OutputsArrived, late) and sent(Over, late)


def test_a_session_of_somebody_else_cannot_be_joined_or_used() -> None:
    sessions = joined()
    assert refusal(sessions.on_message(b"B", join("i-1", name="other", instance="thief"), 0.0)).reason
    stolen = sessions.on_message(b"B", Outputs(session="i-1", number=0, epoch=1, payload=b"x"), 0.0)
    assert not of(OutputsArrived, stolen) and [over.session for over in sent(Over, stolen)] == ["i-1"]
    assert of(OutputsArrived, sessions.on_message(b"A", Outputs(session="i-1", number=0, epoch=1, payload=b"x"), 0.0))


def test_no_more_groups_than_may_join() -> None:
    sessions = table()
    for number in range(MAX_GROUPS):
        assert of(Joined, sessions.on_message(b"%d" % number, join(f"i{number}", f"g{number}", f"i{number}"), 0.0))
    assert "the most" in refusal(sessions.on_message(b"x", join("j-1", "one-more", "j"), 0.0)).reason


def test_a_frontend_that_ends_tells_everybody_and_lets_nobody_in() -> None:
    sessions = joined()
    effects = sessions.close("it shuts down", 5.0, 1.0)
    assert [leave.reason for leave in sent(Leave, effects)] == ["it shuts down"]
    assert [ended.kind for ended in of(Ended, effects)] == ["left"]
    refused = refusal(sessions.on_message(b"B", join("j-1"), 1.0))
    assert (refused.reason, refused.retry_s) == ("it shuts down", 5.0)


# What ends a session, at the frontend's end.


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (Outputs(session="i-1", number=1, epoch=1, payload=b""), "message 1 came where 0 was to come"),
        (Beat(session="i-1", number=1, seen=0), "1 messages were sent and 0 arrived"),
        (Beat(session="i-1", number=0, seen=1), "1 messages of 0 were seen"),
        (Outputs(session="i-2", number=0, epoch=1, payload=b""), "session i-2 on the connection of another"),
        (join(), "joins twice"),
        (State(session="i-1", number=0, state=msgspec.structs.replace(READY, epoch=0)), "epoch 0 came after 1"),
    ],
)
def test_what_does_not_fit_ends_a_session(message: FromGroup, why: str) -> None:
    sessions = joined()
    effects = sessions.on_message(b"A", message, 1.0)
    (ended,) = of(Ended, effects)
    assert ended.kind == "protocol" and why in ended.reason and ended.since == 1.0
    assert sent(Over, effects) and of(HangUp, effects)
    assert not sessions.tick(2.0) and len(sessions) == 0
    assert not sessions.requests("i-1", 1, b"x", 2.0) and not sessions.on_closed(b"A", "gone", 2.0)


def test_silence_is_suspect_at_half_the_lease_and_the_end_after_it() -> None:
    sessions, now, seen = joined(), 0.0, list[tuple[float, Effect]]()
    while not any(isinstance(event, Ended) for _, event in seen):
        now += 0.05
        seen += [(now, event) for event in sessions.tick(now) if isinstance(event, Suspect | Ended)]
        assert now < 10
    (suspected, _), (ended_at, ended) = seen
    assert suspected == pytest.approx(LEASE / 2, abs=0.15) and ended_at == pytest.approx(LEASE, abs=0.15)
    assert isinstance(ended, Ended) and ended.kind == "silent" and ended.since == 0.0


def test_a_word_of_a_suspect_is_enough() -> None:
    sessions = joined()
    assert of(Suspect, [effect for i in range(24) for effect in sessions.tick(i * 0.05)])
    assert of(Trusted, sessions.on_message(b"A", Beat(session="i-1", number=0, seen=0), 1.2))
    assert not of(Ended, [effect for i in range(24) for effect in sessions.tick(1.2 + i * 0.05)])


def test_time_in_which_we_did_not_run_is_no_silence() -> None:
    sessions = joined()
    assert not of(Ended, sessions.tick(1000.0)) and not of(Ended, sessions.tick(1000.05))


def test_what_is_left_unread_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_UNSEEN", 10)
    sessions = joined()
    for _ in range(10):
        assert len(sent(Requests, sessions.requests("i-1", 1, b"x", 0.0))) == 1
    sessions.on_message(b"A", Beat(session="i-1", number=0, seen=3), 0.0)
    for _ in range(3):
        assert sent(Requests, sessions.requests("i-1", 1, b"x", 0.0))
    effects = sessions.requests("i-1", 1, b"x", 0.0)
    assert not sent(Requests, effects) and [ended.kind for ended in of(Ended, effects)] == ["unread"]


def test_a_leave_comes_after_all_that_was_sent_before() -> None:
    sessions = joined()
    assert [
        e.kind for e in of(Ended, sessions.on_message(b"A", Leave(session="i-1", number=1, reason="bye"), 0.0))
    ] == ["protocol"]
    sessions = joined()
    (ended,) = of(Ended, sessions.on_message(b"A", Leave(session="i-1", number=0, reason="bye"), 0.0))
    assert (ended.kind, ended.reason) == ("left", "bye")


def test_outputs_of_an_epoch_that_is_over_are_dropped() -> None:
    sessions = joined()
    down = msgspec.structs.replace(READY, phase="down")
    assert of(StateChanged, sessions.on_message(b"A", State(session="i-1", number=0, state=down), 0.0))
    late = sessions.on_message(b"A", Outputs(session="i-1", number=1, epoch=1, payload=b"x"), 0.0)
    assert not of(OutputsArrived, late) and not of(Ended, late)


# At the group's end.


def group(now: float = 0.0) -> GroupEnd:
    return GroupEnd(Identity(name="g", host="h1", instance="i"), SAME, READY, now)


def admitted() -> GroupEnd:
    end = group()
    assert end.tick(0.0) == [Dial()]
    (request,) = sent(Join, end.on_connected(0.1))
    effects = end.on_message(Welcome(session=request.session, frontend="f", lease=LEASE), 0.2)
    assert of(Admitted, effects) and sent(State, effects)[0].number == 0
    return end


def test_a_refusal_for_good_ends_the_tries() -> None:
    end = group()
    end.tick(0.0)
    (request,) = sent(Join, end.on_connected(0.1))
    effects = end.on_message(Refused(session=request.session, reason="other model"), 0.2)
    assert of(NotJoined, effects) == [NotJoined("other model", None)] and of(HangUp, effects)
    assert end.phase == "closed" and not end.tick(1000.0)


def test_tries_follow_each_other_with_back_off_up_to_a_bound() -> None:
    end, now, waits = group(), 0.0, list[float]()
    for _ in range(12):
        while end.phase == "apart":
            now += 0.05
            effects = end.tick(now)
        assert effects == [Dial()]
        (failed,) = of(NotJoined, end.on_closed("cannot connect", now))
        waits.append(failed.retry_s or 0.0)
    assert waits == sorted(waits) and waits[0] < 0.2 and waits[-1] == BACKOFF_CAP


def test_a_frontend_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    end, now = group(), 0.0
    end.tick(now)
    failed = list[NotJoined]()
    while not failed:
        now += 0.05
        failed = of(NotJoined, end.tick(now))
    assert "no connection" in failed[0].reason and now == pytest.approx(CONNECT_TIME, abs=0.2)
    while end.phase == "apart":
        now += 0.05
        end.tick(now)
    end.on_connected(now)
    began, failed = now, []
    while not failed:
        now += 0.05
        failed = of(NotJoined, end.tick(now))
    assert "no answer" in failed[0].reason and now - began == pytest.approx(JOIN_TIME, abs=0.2)


def test_requests_and_kills_for_another_epoch_are_not_meant_for_this_one() -> None:
    end = admitted()
    session = end.session
    assert of(RequestsArrived, end.on_message(Requests(session=session, number=0, epoch=1, payload=b"x"), 1.0))
    end.change_state(msgspec.structs.replace(READY, epoch=2), 1.0)
    old = end.on_message(Requests(session=session, number=1, epoch=1, payload=b"x"), 1.0)
    old += end.on_message(Kill(session=session, number=2, epoch=1, cause="slow"), 1.0)
    assert not of(RequestsArrived, old) and not of(KillArrived, old) and not of(Ended, old)
    assert of(KillArrived, end.on_message(Kill(session=session, number=3, epoch=2, cause="slow"), 1.0))


def test_nothing_is_sent_or_believed_between_sessions() -> None:
    end = admitted()
    session = end.session
    (ended,) = of(Ended, end.on_message(Over(session=session, reason="fenced"), 1.0))
    assert (ended.kind, ended.reason) == ("over", "fenced")
    assert not end.outputs(1, b"x", 1.0) and not end.change_state(READY, 1.0)
    assert not end.on_message(Requests(session=session, number=0, epoch=1, payload=b"x"), 1.0)
    assert not end.on_closed("late", 1.0)
    while end.phase == "apart":
        end.tick(end._retry_at)
    (again,) = sent(Join, end.on_connected(3.0))
    assert again.session != session


def test_a_state_that_changes_while_it_joins_is_told() -> None:
    end = group()
    end.tick(0.0)
    (request,) = sent(Join, end.on_connected(0.1))
    later = msgspec.structs.replace(READY, epoch=5)
    assert end.change_state(later, 0.2) == []
    effects = end.on_message(Welcome(session=request.session, frontend="f", lease=LEASE), 0.3)
    assert sent(State, effects)[0].state.epoch == 5


def test_what_is_too_large_is_an_error_and_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang_kevlar.protocol.cluster.MAX_PAYLOAD_BYTES", 10)
    with pytest.raises(ValueError, match="11 bytes cannot be sent"):
        admitted().outputs(1, b"x" * 11, 1.0)
    sessions = joined()
    with pytest.raises(ValueError, match="11 bytes cannot be sent"):
        sessions.requests("i-1", 1, b"x" * 11, 1.0)
    assert len(sessions) == 1


def test_long_causes_are_cut_and_not_refused() -> None:
    end = admitted()
    (state,) = sent(State, end.change_state(msgspec.structs.replace(READY, cause="x" * 10_000), 1.0))
    assert len(state.state.cause) == 4096 and state.state.cause.endswith("...")


# Of numbers.


@given(st.lists(st.sampled_from(["send", "deliver", "beat"]), max_size=60), st.data())
def test_two_ends_that_lose_nothing_agree_and_any_loss_is_noticed(steps: list[str], data: st.DataObject) -> None:
    here, there = Link("s", LEASE, 0.0), Link("s", LEASE, 0.0)
    way = list[int]()
    for step in steps:
        if step == "send":
            way.append(here.number(1))
        elif step == "deliver" and way:
            assert there.arrived(way.pop(0)) is None
        elif not way:
            assert there.on_beat(Beat(session="s", number=here.next, seen=0)) is None
            assert here.on_beat(Beat(session="s", number=0, seen=there.expected)) is None
            assert here._unseen_bytes == 0
    if way:
        lost = data.draw(st.integers(0, len(way) - 1))
        del way[lost]
        problems = [there.arrived(number) for number in way]
        problems.append(there.on_beat(Beat(session="s", number=here.next, seen=0)))
        assert any(problems)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 5)), max_size=50))
def test_unread_bytes_are_bounded_and_counted(sends: list[tuple[int, int]]) -> None:
    link, sizes, seen = Link("s", LEASE, 0.0), list[int](), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session_module, "MAX_UNSEEN_BYTES", 100)
        for size, taken in sends:
            try:
                link.number(size)
                sizes.append(size)
            except NotRead:
                assert sum(sizes[seen:]) + size > 100
            seen = min(len(sizes), seen + taken)
            assert link.on_beat(Beat(session="s", number=0, seen=seen)) is None
            assert link._unseen_bytes == sum(sizes[seen:]) <= 100


_SENDERS = st.sampled_from([b"A", b"B", b"C"])
_SESSIONS = st.sampled_from(["i-1", "i-2", "j-1"])
_NUMBERS = st.integers(0, 2)
_MESSAGES = st.one_of(
    st.builds(join, session=_SESSIONS, name=st.sampled_from(["g", "h"]), instance=st.sampled_from(["i", "j"])),
    st.builds(Outputs, session=_SESSIONS, number=_NUMBERS, epoch=st.just(1), payload=st.just(b"x")),
    st.builds(State, session=_SESSIONS, number=_NUMBERS, state=st.just(READY)),
    st.builds(Beat, session=_SESSIONS, number=_NUMBERS, seen=_NUMBERS),
    st.builds(Leave, session=_SESSIONS, number=_NUMBERS, reason=st.just("")),
    st.builds(Over, session=_SESSIONS, reason=st.just("")),
)


@given(st.lists(st.one_of(st.tuples(_SENDERS, _MESSAGES), _SENDERS, st.just(30), _SESSIONS), max_size=40))
@settings(max_examples=300)
def test_whatever_comes_a_session_ends_once_and_is_silent_after_it(steps: list[Any]) -> None:
    sessions, live, now = table(), dict[str, str](), 0.0
    for step in steps:
        if isinstance(step, tuple):
            effects = sessions.on_message(*step, now)
        elif isinstance(step, bytes):
            effects = sessions.on_closed(step, "closed", now)
        elif isinstance(step, str):
            effects = sessions.requests(step, 1, b"x", now)
        else:
            effects = []
            for _ in range(step):
                now += 0.05
                effects += sessions.tick(now)
        for effect in effects:
            if isinstance(effect, Joined):
                assert effect.session not in live and effect.identity.name not in live.values()
                live[effect.session] = effect.identity.name
            elif isinstance(effect, Ended):
                del live[effect.session]
            elif isinstance(effect, StateChanged | OutputsArrived | Suspect | Trusted):
                assert effect.session in live
        assert {end.session for end in sessions} == set(live)
