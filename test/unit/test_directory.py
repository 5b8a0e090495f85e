"""Where a kept request is, as one frontend knows it; and two that begin the same one at once."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_messages import P, alone, ended, opened, yielded

from sglang_kevlar.control.directory import Directory, Here, Nowhere, Refused, Run, TakeUp, There, Unsure
from sglang_kevlar.control.lineage import LAST_K, EventId, Lineage, Point
from sglang_kevlar.control.replication import Replication
from sglang_kevlar.protocol.records import Complete, Dropped, Opened, Taken

PATIENCE = 10.0
K = (P, "key-r")


def directory(name: str = "b", expected: str = "", now: float = 0.0) -> Directory:
    return Directory(name, f"{name}1", expected, now, PATIENCE)


def joined(one: Directory, name: str, *records, tag: str | None = None, now: float = 0.0) -> list[TakeUp]:
    taken = one.joined(name, tag or f"{name}1", now)
    for record in (*records, Complete()):
        one.apply(name, record)
    one.check()
    return taken


def find(one: Directory, behind: tuple[str, int] | None = None, now: float = 100.0, **by):
    event = None if behind is None else EventId("r", Point(behind[1], LAST_K), behind[0])
    by = {"identity": K, "rid": None, "principal": P} | by
    return one.find(behind=event, now=now, **by)


# ---- what there is


def test_its_own_are_here_for_who_may_see_them() -> None:
    one = directory()
    one.started("r", K)
    assert find(one) == find(one, identity=None, rid="r") == Here("r")
    assert find(one, identity=None, rid="r", principal="other") == Nowhere()
    assert find(one, identity=("other", "key-r"), principal="other") == Nowhere()


def test_two_clients_may_choose_one_id() -> None:
    one = directory()
    first, second = one.started("r", K), one.started("r", ("q", "k"))
    one.check()
    assert not one.in_the_way("r", ("p", "k")) and one.in_the_way("r", (P, "other")) == [first]
    # What another client's request of this id does elsewhere is no business of these.
    joined(one, "a")
    assert one.apply("a", opened("r", principal="x")) is None
    one.dropped(first)
    assert find(one, identity=None, rid="r", principal="q") == Here("r") and find(one) == Nowhere()
    assert second.name == ("q", "r")


def test_a_peer_answers_for_its_own() -> None:
    one = directory()
    joined(one, "a", opened("r"), yielded("r", 0, 5))
    assert find(one) == find(one, ("a1", 99)) == There("a")
    assert find(one, identity=None, rid="r", principal="other") == Nowhere()
    assert find(one, alone=True) == Nowhere(), "it was asked, and does not have it any more"


def test_until_all_are_heard_nothing_is_new() -> None:
    one = directory(expected="ac")
    assert find(one, now=9.0) == Unsure(("a", "c"))
    one.joined("a", "a1", 1.0)
    assert find(one, now=50.0) == Unsure(("a",)), "it is there, and has not said yet what it has"
    one.apply("a", Complete())
    assert find(one, now=9.0) == Unsure(("c",))
    assert find(one, now=10.0) == Nowhere(), "c is not coming"


# ---- frontends that are lost


def test_the_heir_goes_on_with_what_had_not_ended() -> None:
    one = directory("b")
    joined(one, "c")
    joined(one, "a", opened("r"), yielded("r", 0, 5), opened("s"), ended("s"), opened("t"), alone("t"))
    (taken,) = one.lost("a", 0.0)
    one.check()
    assert taken.record.opened.rid == "r" and taken.lineage == Lineage("b1", (("a1", 5),))
    assert isinstance(find(one, identity=(P, "key-s")), TakeUp), "an answer that is complete is read if it is asked for"
    refused = find(one, identity=(P, "key-t"))
    assert isinstance(refused, Refused) and "it is a batch" in refused.why


def test_another_heir_is_asked_and_is_none_any_more_when_it_is_lost_too() -> None:
    one = directory("c")
    joined(one, "b")
    joined(one, "a", opened("r"), yielded("r", 0, 5))
    assert one.lost("a", 0.0) == [] and find(one) == There("b")
    assert isinstance(find(one, alone=True), TakeUp), "the heir says that it cannot"
    assert one.lost("b", 0.0) == []
    assert isinstance(find(one), TakeUp)


def test_an_heir_that_started_later_never_had_it() -> None:
    one = directory("c")
    joined(one, "b")
    joined(one, "a", opened("r"), yielded("r", 0, 5))
    one.lost("a", 0.0)
    joined(one, "b", tag="b2")
    assert isinstance(find(one), TakeUp)


def test_what_the_client_has_and_nobody_knows_is_refused() -> None:
    one = directory()
    joined(one, "a", opened("r"), yielded("r", 0, 5))
    one.lost("a", 0.0)
    assert isinstance(find(one, ("a1", 5)), TakeUp)
    refused = find(one, ("a1", 6))
    assert isinstance(refused, Refused) and "6 tokens" in refused.why and "known here (5)" in refused.why
    assert find(one, ("a1", 6), now=5.0) == Unsure(("a",)), "a itself may come back and know"


def test_it_is_taken_up_once_and_is_not_there_for_ever() -> None:
    one = directory()
    joined(one, "a", opened("r"), yielded("r", 0, 5), opened("s"))
    found, _ = one.lost("a", 50.0)
    assert one.may_be_taken_up(found)
    one.taken_up((P, "r"))
    one.started("r", K, found.lineage)
    one.check()
    assert not one.may_be_taken_up(found) and find(one) == Here("r")
    one.expire(49.0)
    assert isinstance(find(one, identity=(P, "key-s")), TakeUp)
    one.expire(50.0)
    assert find(one, identity=(P, "key-s")) == Nowhere()


def test_a_frontend_that_comes_back_in_between_has_its_time_anew() -> None:
    one = directory()
    joined(one, "a", opened("r"))
    one.lost("a", 0.0)
    joined(one, "a", opened("r"), now=5.0)
    one.lost("a", 50.0)
    one.expire(0.0)
    assert isinstance(find(one, now=100.0), TakeUp)
    one.expire(50.0)
    assert find(one, now=120.0) == Nowhere()


def test_what_was_to_be_taken_up_is_not_when_its_frontend_is_back() -> None:
    one = directory()
    joined(one, "a", opened("r"))
    (found,) = one.lost("a", 0.0)
    joined(one, "a", opened("r"))
    assert not one.may_be_taken_up(found) and find(one) == There("a")


def test_nor_when_another_peer_has_it_by_now() -> None:
    one = directory("b")
    joined(one, "c")
    joined(one, "a", opened("r"))
    (found,) = one.lost("a", 0.0)
    one.apply("c", opened("r", before=[("a1", 0)]))
    assert not one.may_be_taken_up(found)


def test_a_new_incarnation_ends_the_one_before() -> None:
    one = directory()
    joined(one, "a", opened("r"), yielded("r", 0, 5))
    (taken,) = joined(one, "a", tag="a2")
    assert taken.record.opened.rid == "r"
    assert isinstance(find(one, ("a1", 5)), TakeUp)


def test_who_went_on_behind_less_sends_the_client_to_the_one_it_had() -> None:
    """a was only out of reach, and is back: the client has more of it than we took over."""
    one = directory()
    joined(one, "a", opened("r"), yielded("r", 0, 5))
    (found,) = one.lost("a", 0.0)
    one.taken_up((P, "r"))
    one.started("r", K, found.lineage)
    assert find(one, ("a1", 5)) == Here("r")
    assert isinstance(find(one, ("a1", 8), now=100.0), Refused)
    joined(one, "a", opened("r"), yielded("r", 0, 9))
    assert find(one, ("a1", 8)) == There("a")


# ---- two that begin the same


@pytest.mark.parametrize(
    ("mine", "theirs", "before", "gives_way"),
    [
        ("a", "b", 0, False),
        ("b", "a", 0, True),
        ("a", "b", 1, False),  # b went on with what a has itself
        ("b", "a", 1, False),
    ],
)
def test_who_gives_way(mine: str, theirs: str, before: int, gives_way: bool) -> None:
    one = directory(mine)
    run = one.started("r", K)
    joined(one, theirs)
    other = opened("r", before=[("c1", 0)] * before)
    assert one.apply(theirs, other) is (run if gives_way else None)


def test_what_a_client_was_given_is_abandoned_for_nobody() -> None:
    one = directory("b")
    one.started("r", K).read = True
    joined(one, "a")
    assert one.apply("a", opened("x", "key-r")) is None


class Frontend:
    """Begins a request with the key k when it is told to; a client reads its output as soon as that is safe."""

    def __init__(self, name: str) -> None:
        self.directory = Directory(name, f"{name}1", (), 0.0, PATIENCE)
        self.replication = Replication()
        self.inbox: deque = deque()
        self.taken = 0
        self.outbox: deque
        self.run: Run | None = None
        self.position: int | None = None

    def publish(self, record) -> int:
        self.outbox.append(record)
        return self.replication.publish(record)

    def begin(self) -> None:
        if self.run is None and isinstance(self.directory.find((P, "k"), None, P, None, 100.0), Nowhere):
            name = self.directory.name
            self.run = self.directory.started(f"r-{name}", (P, "k"))
            self.publish(Opened(rid=self.run.rid, principal=P, key="k", request=opened("x").request))
            self.position = self.publish(yielded(self.run.rid, 0, 1))

    def take(self, peer: Frontend) -> None:
        if not self.inbox:
            return
        message = self.inbox.popleft()
        if isinstance(message, Taken):
            self.replication.acknowledged(peer.directory.name, message.count)
            return
        self.taken += 1
        if (gone := self.directory.apply(peer.directory.name, message)) is not None:
            assert gone is self.run
            self.directory.dropped(gone)
            self.run = self.position = None
            self.publish(Dropped(rid=gone.rid, principal=P, why="a peer has it"))
        self.outbox.append(Taken(count=self.taken))

    def read(self) -> None:
        if self.run is not None and self.position is not None and self.replication.safe > self.position:
            self.run.read = True


def race(order: list[tuple[str, str]]) -> tuple[Frontend, Frontend]:
    a, b = Frontend("a"), Frontend("b")
    a.outbox, b.outbox = b.inbox, a.inbox
    for one, other in ((a, b), (b, a)):
        one.directory.joined(other.directory.name, other.directory.tag, 0.0)
        other.inbox.extend(one.replication.joined(other.directory.name))
    for one, other in ((a, b), (b, a)) * 4:
        one.take(other)
    by_name = {"a": (a, b), "b": (b, a)}
    for who, what in order:
        one, other = by_name[who]
        if what == "begin":
            one.begin()
        elif what == "take":
            one.take(other)
        one.read()
        assert not (a.run and a.run.read and b.run and b.run.read), "two clients were told two things"
    for _ in range(20):
        a.take(b)
        b.take(a)
        a.read()
        b.read()
    return a, b


actions = st.tuples(st.sampled_from("ab"), st.sampled_from(["begin", "take", "take", "take"]))


@settings(max_examples=400, deadline=None)
@given(st.lists(actions, max_size=30))
def test_of_two_that_begin_at_once_one_is_abandoned_before_anything_is_read(order: list[tuple[str, str]]) -> None:
    a, b = race([("a", "begin"), ("b", "begin"), *order])
    runs = [one.run for one in (a, b) if one.run is not None]
    assert len(runs) == 1 and runs[0].read
    assert isinstance((a if a.run is None else b).directory.find((P, "k"), None, P, None, 100.0), There)


def test_each_order_of_the_first_steps() -> None:
    steps = [("a", "begin"), ("b", "begin"), ("a", "take"), ("b", "take"), ("a", "take"), ("b", "take")]
    for order in set(itertools.permutations(steps)):
        a, b = race(list(order))
        assert sum(one.run is not None for one in (a, b)) == 1


def test_memory_is_shared_by_all_that_is_kept_of_others() -> None:
    one = directory()
    joined(one, "a", opened("r"), yielded("r", 0, 1, b"x" * 5_000))
    one.lost("a", 0.0)
    joined(one, "c", opened("s"), yielded("s", 0, 1, b"x" * 4_000))
    one.make_room(6_000)
    one.check()
    assert {record.opened.rid: record.lost is not None for _, record in one.records()} == {"r": True, "s": False}
    refused = find(one)
    assert isinstance(refused, Refused) and "--stream-memory" in refused.why
