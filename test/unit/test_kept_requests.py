"""The log of one kept request, and which requests are kept: pure decisions, time passed in."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control.event_delta import decode, encode
from sglang_kevlar.control.event_log import EVENT_OVERHEAD, Discarded, EventLog, Position
from sglang_kevlar.control.kept_requests import REQUEST_OVERHEAD, Gone, Kept, KeptRequests, NoRoom, RidTaken
from sglang_kevlar.frontend.kept.events import BadId, Splitter, event_id, parse_id, parse_position, tag_of, with_id

# ---- the log


def log_of(*events: bytes) -> EventLog:
    log = EventLog()
    for number, event in enumerate(events):
        log.append(event, Position(number // 2, number % 2))
    return log


def test_a_log_is_read_in_pieces() -> None:
    log = log_of(b"a" * 10, b"b" * 10, b"c" * 100)
    assert log.read(0, 5) == (b"a" * 10, 1)
    assert log.read(0, 20) == (b"a" * 10 + b"b" * 10, 2)
    assert log.read(1, 1000) == (b"b" * 10 + b"c" * 100, 3)
    assert log.read(3, 1000) == (b"", 3)
    assert log.size == 120 + 3 * EVENT_OVERHEAD


def test_positions() -> None:
    log = log_of(b"a", b"b", b"c")
    assert [log.behind(Position(*p)) for p in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2))] == [1, 2, 3, None, None]
    assert [log.from_position(Position(*p)) for p in ((0, 0), (0, 1), (0, 9), (1, 0), (2, 0))] == [0, 1, 2, 2, 3]
    assert log.last == (1, 0) and EventLog().last is None


def test_what_is_discarded_cannot_be_read() -> None:
    log = log_of(b"a", b"b", b"c")
    assert log.discard(2) == 2 * (1 + EVENT_OVERHEAD)
    assert log.discard(1) == 0
    assert log.read(2, 9) == (b"c", 3)
    with pytest.raises(Discarded):
        log.read(1, 9)
    assert log.behind(Position(1, 0)) == 3 and log.end == 3 and log.size == 1 + EVENT_OVERHEAD


EVENTS = st.binary(max_size=9).filter(lambda event: b"\n\n" not in event and not event.endswith(b"\n"))


@settings(deadline=None)
@given(st.lists(EVENTS, max_size=6), st.data())
def test_events_are_whole_however_they_are_sent(events: list[bytes], data: Any) -> None:
    stream = b"".join(event + b"\n\n" for event in events)
    splitter, got, start = Splitter(), [], 0
    while start < len(stream):
        end = data.draw(st.integers(start + 1, len(stream)))
        got += splitter.feed(stream[start:end])
        start = end
    assert b"".join(got) == stream and splitter.rest() == b""
    assert all(event.endswith(b"\n\n") for event in got)


def test_ids() -> None:
    assert with_id(b"data: x\n\n", event_id("a:b", Position(7, 2))) == b"id: a:b:7.2\ndata: x\n\n"
    assert event_id("a:b", Position(7, 2), "t0") == "a:b:7.2~t0" and tag_of("a:b:7.2~t0") == ("a:b:7.2", "t0")
    assert parse_id("a:b:7.2", "a:b") == parse_id("a:b:7.2~t0", "a:b") == (7, 2)
    # An id may have what separates a tag.
    assert parse_id("a~b:7.2", "a~b") == parse_id("a~b:7.2~t0", "a~b") == (7, 2)
    assert parse_position("7") == (7, 0)
    for bad in ("b:7.2", "a:b:", "a:b", "a:b:7.", "a:b:7.2.1", "a:b:-7", "a:b:\u0667", ""):
        with pytest.raises(BadId):
            parse_id(bad, "a:b")


# ---- long events


def cumulative(tokens: int, chance: random.Random) -> bytes:
    """As SGLang's native streams are: everything so far, in every event."""
    text = "".join(f"w{i * 7919 % 1000} " for i in range(tokens))
    meta = {"id": "r", "prompt_tokens": 3, "completion_tokens": tokens, "e2e_latency": chance.random()}
    meta["output_token_logprobs"] = [(-0.001 * i, i, None) for i in range(tokens)]
    body = {"text": text, "output_ids": [i * 31 for i in range(tokens)], "meta_info": meta}
    return f"id: r:{tokens}.0\ndata: {json.dumps(body)}\n\n".encode()


@settings(deadline=None)
@given(st.binary(max_size=300), st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40), st.binary(max_size=40))))
def test_a_delta_is_what_it_was_made_of(old: bytes, edits: list[tuple[int, int, bytes]]) -> None:
    old, new = old * 5, old * 5
    for at, cut, put in edits:
        new = new[:at] + put + new[at + cut :]
    delta = encode(old, new)
    assert delta is None or (decode(old, delta) == new and 2 * len(delta) <= len(new))


def test_streams_that_repeat_themselves_take_memory_by_their_length() -> None:
    chance = random.Random(1)
    events = [cumulative(tokens, chance) for tokens in range(1, 1000)]
    log = EventLog()
    for number, event in enumerate(events):
        log.append(event, Position(number, 0))
    assert log.size < sum(map(len, events)) / 15
    assert log.read(0, 1 << 40) == (b"".join(events), 999)
    for index in (0, 1, 31, 32, 33, 500, 997, 998):
        assert log.read(index, 1) == (events[index], index + 1)
        assert log.read(index, 200_000)[0] == b"".join(events[index : log.read(index, 200_000)[1]])
    size = log.size
    for index in (1, 30, 64, 100, 998, 999):
        size -= log.discard(index)
        assert log.size == size
        assert log.read(index, 1 << 40) == (b"".join(events[index:]), 999)
    assert log.size == 0
    log.append(events[3], Position(1000, 0))
    assert log.read(999, 1) == (events[3], 1000)


# ---- the requests


def kept(requests: KeptRequests, name: str, now: float = 0.0, body: int = 0) -> Kept:
    return requests.add("", name, name, b"", body, now)


def test_expiry() -> None:
    requests = KeptRequests(retention=10, memory=1 << 20)
    one = kept(requests, "one")
    requests.attach(one)
    assert requests.expires(one) is None and requests.expire(1000) == []
    requests.detach(one, 1000)
    assert requests.expire(1009) == [] and requests.expires(one) == 1010
    requests.attach(one)
    assert requests.expire(1011) == []
    requests.end(one, 1012)
    # Also with a client that has stopped reading.
    assert requests.expire(1021) == [] and requests.expire(1022) == [one]
    found = requests.find("", "one")
    assert isinstance(found, Gone) and found == requests.find_rid("", "one") and "10 s" in found.reason
    assert len(requests) == 0 and requests.used == 0
    requests.detach(one, 1023)


def test_principals_do_not_see_each_other() -> None:
    requests = KeptRequests(retention=10, memory=1 << 20)
    one = requests.add("a", "key", "rid", b"", 0, 0)
    assert requests.find("b", "key") is None and requests.find_rid("b", "rid") is None
    other = requests.add("b", "key", "rid", b"", 0, 0)
    assert requests.find("a", "key") is one and requests.find_rid("b", "rid") is other
    with pytest.raises(RidTaken):
        requests.add("a", "another", "rid", b"", 0, 0)


def test_what_is_forgotten_may_come_again_and_what_is_dropped_is_known() -> None:
    requests = KeptRequests(retention=10, memory=1 << 20)
    requests.forget(kept(requests, "one"), "refused")
    assert requests.find("", "one") is None and requests.find_rid("", "one") is None
    requests.drop(kept(requests, "one"), "why")
    assert requests.find("", "one") == Gone("one", "why")


def test_memory_goes_to_the_newest_and_not_from_those_being_read() -> None:
    requests = KeptRequests(retention=10, memory=4 * REQUEST_OVERHEAD)
    first, second, third = (kept(requests, name) for name in ("first", "second", "third"))
    requests.attach(first)
    for one in (first, third, second):
        requests.end(one, 1)
    kept(requests, "fourth")
    fifth = kept(requests, "fifth")
    assert isinstance(requests.find("", "third"), Gone) and requests.find("", "second") is second
    kept(requests, "sixth")
    assert isinstance(requests.find("", "second"), Gone)
    with pytest.raises(NoRoom, match="--stream-memory"):
        kept(requests, "seventh")
    assert requests.find("", "first") is first
    assert not requests.reserve(1)
    # A running one that grows is closed; it keeps what it has.
    requests.append(fifth, b"event", Position(1, 0))
    assert fifth.closed is not None and fifth.log.read(0, 9) == (b"event", 1)
    requests.detach(first, 2)
    assert requests.reserve(REQUEST_OVERHEAD - 10 - 2 * EVENT_OVERHEAD)
    assert isinstance(requests.find("", "first"), Gone)


def test_number_is_bounded_also_of_those_that_are_gone() -> None:
    requests = KeptRequests(retention=10, memory=1 << 30, most=3)
    for number in range(3):
        kept(requests, str(number))
    with pytest.raises(NoRoom, match="3 requests"):
        kept(requests, "3")
    for number in range(3, 9):
        one = requests.find("", str(number - 3))
        assert isinstance(one, Kept)
        requests.end(one, 0)
        kept(requests, str(number))
    assert len(requests) == 3
    gone = [number for number in range(9) if isinstance(requests.find("", str(number)), Gone)]
    assert gone == [3, 4, 5]


OPERATIONS = ("add", "event", "attach", "detach", "end", "forget", "drop", "expire", "discard", "body", "reserve")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 9), st.integers(0, 3000)), max_size=80))
def test_what_is_counted_is_what_is_there(steps: list[tuple[str, int, int]]) -> None:
    requests = KeptRequests(retention=5, memory=60_000, most=6)
    known: dict[int, Kept] = {}
    for now, (operation, number, size) in enumerate(steps):
        one = known.get(number)
        if operation == "add" and requests.find("", str(number)) is None:
            try:
                known[number] = kept(requests, str(number), now, size)
            except NoRoom:
                pass
        elif operation == "expire":
            requests.expire(now)
        elif operation == "reserve" and requests.reserve(size):
            requests.release(size)
        elif one is None:
            continue
        elif operation == "event" and not one.ended:
            requests.append(one, b"x" * size, Position(now, 0))
        elif operation == "attach":
            requests.attach(one)
        elif operation == "detach" and one.clients:
            requests.detach(one, now)
        elif operation == "end" and not one.ended:
            requests.end(one, now)
        elif operation == "forget":
            requests.forget(one, "test")
        elif operation == "drop":
            requests.drop(one, "test")
        elif operation == "discard":
            requests.discard(one, min(one.log.end, size % 10))
        elif operation == "body":
            requests.body_taken(one)
        live = [one for one in known.values() if one.gone is None]
        assert requests.used == sum(REQUEST_OVERHEAD + one.body + one.log.size for one in live)
        assert len(requests) == len(live) <= 6
        assert requests.used <= 60_000 or any(one.closed for one in live)
        assert requests.ended == sum(one.ended for one in live)
