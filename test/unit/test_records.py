"""What is kept of another frontend's requests, and who goes on with those of a lost one."""

from __future__ import annotations

import random

import pytest
from peer_messages import P, alone, dropped, ended, http, opened, yielded

from sglang_kevlar.control.records import Contradiction, Source, heir, make_room
from sglang_kevlar.protocol.records import (
    MAX_HEADERS,
    MAX_PATH,
    MAX_QUERY,
    MAX_RECORD,
    Complete,
    decoder,
    encode,
    size_of,
    why_not_recorded,
    without_content,
)


def source(*records) -> Source:
    one = Source("a", "a1")
    for record in records:
        one.apply(record)
        one.check()
    return one


def test_a_request_as_it_goes() -> None:
    one = source(opened("r"), yielded("r", 0, 3), yielded("r", 1, 3), yielded("r", 2, 5), ended("r"), Complete())
    record = one.records[P, "r"]
    assert record.offset == 5 and [each.number for each in record.yields] == [0, 1, 2]
    assert record.ended is not None and one.complete and one.by_key == {(P, "key-r"): (P, "r")}
    one.apply(dropped("r"))
    one.check()
    assert not one.records and not one.by_key and one.bytes == 0


def test_two_clients_may_choose_one_id() -> None:
    one = source(opened("r"), opened("r", principal="q"), yielded("r", 0, 1, principal="q"))
    assert one.records[P, "r"].offset == 0 and one.records["q", "r"].offset == 1


@pytest.mark.parametrize(
    ("records", "why"),
    [
        ([opened("r"), opened("r", "other")], "opened twice"),
        ([opened("r"), opened("s", "key-r")], "opened twice"),
        ([yielded("r", 0, 1)], "not opened"),
        ([dropped("r")], "not opened"),
        ([alone("r")], "not opened"),
        ([opened("r"), dropped("r"), yielded("r", 0, 1)], "not opened"),
        ([opened("r"), yielded("r", 1, 1)], "output 1 .* came where 0"),
        ([opened("r"), yielded("r", 0, 1), yielded("r", 0, 2)], "output 0 .* came where 1"),
        ([opened("r"), yielded("r", 0, 5), yielded("r", 1, 4)], "back from 5 tokens to 4"),
        ([opened("r"), ended("r"), yielded("r", 0, 1)], "has ended"),
        ([opened("r"), ended("r"), ended("r")], "has ended"),
    ],
)
def test_what_cannot_follow_is_a_contradiction(records, why: str) -> None:
    with pytest.raises(Contradiction, match=why):
        source(*records)


def test_one_that_goes_on_alone_is_known_and_no_more() -> None:
    one = source(opened("r", body=b"x" * 10_000), yielded("r", 0, 3), alone("r"), ended("r"))
    record = one.records[P, "r"]
    assert record.lost == "it is a batch" and not record.yields and not record.opened.request.body
    assert one.bytes < 1000 and record.ended is not None


def test_a_new_session_says_everything_anew() -> None:
    one = source(opened("r"), yielded("r", 0, 1), Complete())
    one.begin()
    one.check()
    assert not one.records and not one.complete
    one.apply(opened("r"))


def test_without_memory_the_largest_are_given_up_whoever_has_them() -> None:
    first, second = Source("a", "a1"), Source("b", "b1")
    for one, rid, size in ((first, "small", 100), (first, "large", 5_000), (second, "larger", 6_000)):
        one.apply(opened(rid))
        one.apply(yielded(rid, 0, 1, b"x" * size))
    make_room([first, second], 8_000)
    lost = {name[1] for one in (first, second) for name, record in one.records.items() if record.lost}
    assert lost == {"larger"} and first.bytes + second.bytes <= 8_000
    # What still comes of it is not kept, and is no contradiction.
    second.apply(yielded("larger", 1, 2, b"x" * 6_000))
    make_room([first, second], 8_000)
    assert first.records[P, "large"].lost is None
    first.check()
    second.check()
    make_room([first, second], 1)  # nothing is left to be given up
    assert all(record.lost for one in (first, second) for record in one.records.values())


def test_it_is_told_as_it_is() -> None:
    records = [opened("r", before=[("t", 3)]), yielded("r", 0, 1), alone("r"), ended("r", (503, "no", "no_group", 1))]
    assert decoder.decode(encode([*records, dropped("r"), Complete()])) == [*records, dropped("r"), Complete()]


@pytest.mark.parametrize(
    "request_",
    [
        http(path="/" + "x" * MAX_PATH),
        http(root_path="/" + "x" * MAX_PATH),
        http(query=b"x" * (MAX_QUERY + 1)),
        http(headers=[(b"x", b"y")] * (MAX_HEADERS + 1)),
        http(b"x" * (MAX_RECORD + 1)),
    ],
    ids=["path", "root path", "query", "headers", "body"],
)
def test_what_peers_would_not_take_is_known_before(request_) -> None:
    whole = opened("r")
    whole = type(whole)(rid="r", principal=P, key="k", request=request_)
    assert why_not_recorded(request_, size_of(whole)) is not None
    decoder.decode(encode([without_content(whole)]))


def test_what_peers_take_is_not_held_back() -> None:
    largest = http(
        path="/" * MAX_PATH, query=b"q" * MAX_QUERY, headers=[(b"x", b"y")] * MAX_HEADERS, root_path="/" * MAX_PATH
    )
    whole = type(opened("r"))(rid="r", principal=P, key="k", request=largest)
    assert why_not_recorded(largest, size_of(whole)) is None
    decoder.decode(encode([whole]))


def test_the_next_by_name_is_the_heir() -> None:
    assert heir("b", "abc") == "c" and heir("c", "abc") == "a" and heir("b", "a") == "a"
    assert heir("a", "a") is None and heir("a", "") is None
    for _ in range(20):
        names = random.sample("abcdefgh", 5)
        assert heir(names[0], names) == heir(names[0], sorted(names))
