"""What may be told to clients: what all peers have that are waited for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_messages import P, alone, dropped, ended, opened, yielded

from sglang_kevlar.control.records import Source
from sglang_kevlar.control.replication import Replication
from sglang_kevlar.protocol.records import Complete


def joined(replication: Replication, name: str = "b") -> None:
    """A peer that has taken in what there was."""
    replication.acknowledged(name, len(replication.joined(name)))


def test_alone_everything_is_safe_at_once() -> None:
    replication = Replication()
    assert replication.publish(opened("r")) == 0 and replication.safe == 1 and replication.current == []


def test_a_peer_is_waited_for_from_when_it_has_what_there_was() -> None:
    replication = Replication()
    replication.publish(opened("r"))
    first = replication.joined("b")
    assert first == [opened("r"), Complete()] and replication.current == []
    replication.publish(yielded("r", 0, 1))
    assert replication.safe == 2, "one that has only just come holds nothing up"
    replication.acknowledged("b", 2)
    assert replication.current == [], "it has not all that clients were told"
    position = replication.publish(yielded("r", 1, 2))
    assert replication.safe == position, "but from now on it is waited for"
    replication.acknowledged("b", 4)
    assert replication.safe == position + 1 and replication.current == ["b"]
    replication.check()


def test_the_slowest_peer_counts_and_no_longer_when_it_has_left() -> None:
    replication = Replication()
    joined(replication, "b")
    joined(replication, "c")
    position = replication.publish(opened("r"))
    replication.acknowledged("b", 2)
    assert replication.safe == position
    replication.left("c")
    assert replication.safe == position + 1 and replication.current == ["b"]
    replication.left("b")
    replication.left("b")
    assert replication.publish(yielded("r", 0, 1)) + 1 == replication.safe


def test_more_than_was_sent_is_not_acknowledged() -> None:
    replication = Replication()
    joined(replication)
    with pytest.raises(ValueError, match="acknowledges 2 records of 1"):
        replication.acknowledged("b", 2)


def test_who_does_not_keep_up_is_named_and_who_has_much_to_take_in_is_not() -> None:
    replication = Replication(max_behind=10_000)
    replication.publish(opened("large"))
    replication.publish(yielded("large", 0, 1, b"x" * 50_000))
    replication.joined("b")
    assert replication.too_slow() == [], "what was there before is no fault of it"
    replication.publish(opened("r"))
    for number in range(5):
        replication.publish(yielded("r", number, number, b"x" * 2_000))
    assert replication.too_slow() == ["b"]
    replication.acknowledged("b", 7)
    assert replication.too_slow() == []
    replication.check()


def test_what_is_gone_is_told_to_no_new_peer() -> None:
    replication = Replication()
    for record in (opened("r"), yielded("r", 0, 1), ended("r"), dropped("r")):
        replication.publish(record)
        replication.check()
    assert replication.joined("b") == [Complete()] and replication.bytes == 0


def test_of_one_that_goes_on_alone_only_its_name_is_told() -> None:
    replication = Replication()
    replication.publish(opened("r", body=b"x" * 10_000))
    replication.publish(yielded("r", 0, 1, b"x" * 10_000))
    replication.publish(alone("r"))
    replication.check()
    assert replication.bytes < 2_000
    first, second, _ = replication.joined("b")
    assert first.rid == "r" and not first.request.body and second == alone("r")
    replication.publish(ended("r"))
    replication.check()
    replication.publish(dropped("r"))
    assert replication.bytes == 0


def test_the_largest_is_to_go_on_alone() -> None:
    replication = Replication()
    for rid, size in (("small", 100), ("large", 5_000), ("middle", 3_000)):
        replication.publish(opened(rid))
        replication.publish(yielded(rid, 0, 1, b"x" * size))
    assert replication.largest(100_000) is None
    assert replication.largest(9_000) == (P, "large")
    replication.publish(alone("large"))
    assert replication.largest(6_000) is None and replication.largest(5_000) == (P, "middle")
    replication.publish(alone("middle"))
    replication.publish(alone("small"))
    assert replication.largest(0) is None, "there is nothing left that would help"


steps = st.lists(
    st.one_of(
        st.tuples(st.just("yield"), st.integers(0, 2)),
        st.tuples(st.just("alone"), st.integers(0, 2)),
        st.tuples(st.just("drop"), st.integers(0, 2)),
        st.tuples(st.just("take"), st.sampled_from("bc"), st.integers(1, 5)),
        st.tuples(st.just("join"), st.sampled_from("bc")),
        st.tuples(st.just("leave"), st.sampled_from("bc")),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(steps)
def test_what_is_safe_is_at_every_peer_that_is_current(steps) -> None:
    replication = Replication()
    sources: dict[str, Source] = {}
    arriving: dict[str, list] = {}
    taken: dict[str, int] = {}
    outputs: dict[int, int] = {}
    gone_alone: set[int] = set()
    told: dict[int, int] = {}
    positions: list[tuple[int, int, int]] = []

    def publish(record) -> int:
        position = replication.publish(record)
        for messages in arriving.values():
            messages.append(record)
        return position

    for step in steps:
        if step[0] == "yield":
            number = step[1]
            if number not in outputs:
                outputs[number] = 0
                publish(opened(f"r{number}"))
            if number not in gone_alone:
                outputs[number] += 1
                position = publish(yielded(f"r{number}", outputs[number] - 1, outputs[number]))
                positions.append((position, number, outputs[number]))
        elif step[0] == "alone" and step[1] in outputs and step[1] not in gone_alone:
            gone_alone.add(step[1])
            publish(alone(f"r{step[1]}"))
        elif step[0] == "drop" and step[1] in outputs:
            publish(dropped(f"r{step[1]}"))
            del outputs[step[1]]
            gone_alone.discard(step[1])
            told.pop(step[1], None)
            positions = [each for each in positions if each[1] != step[1]]
        elif step[0] == "join":
            sources[step[1]], taken[step[1]] = Source("a", "a1"), 0
            arriving[step[1]] = list(replication.joined(step[1]))
        elif step[0] == "leave" and step[1] in sources:
            replication.left(step[1])
            del sources[step[1]], arriving[step[1]]
        elif step[0] == "take" and step[1] in sources:
            for _ in range(min(step[2], len(arriving[step[1]]))):
                sources[step[1]].apply(arriving[step[1]].pop(0))
                taken[step[1]] += 1
            replication.acknowledged(step[1], taken[step[1]])
        replication.check()
        for position, number, count in positions:
            if position < replication.safe:
                told[number] = max(told.get(number, 0), count)
        for name in replication.current:
            for number, count in told.items():
                record = sources[name].records.get((P, f"r{number}"))
                assert record is not None and (record.lost is not None or record.offset >= count)
