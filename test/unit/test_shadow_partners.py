"""Who keeps whose shadow: over every small fleet, over random ones on several hosts, and as operators think of it."""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control.shadow_partners import Place, partners


def places(up, active: int, hosts: dict[int, str] | None = None) -> dict[int, Place]:
    hosts = hosts or {}
    return {group: Place(str(group), hosts.get(group, ""), standby=group >= active) for group in up}


def plan(up, draining, active: int, before: dict[int, int] | None = None) -> dict[int, int]:
    return partners(places(up, active), draining, before or {})


def subsets(groups):
    groups = list(groups)
    return chain.from_iterable(combinations(groups, size) for size in range(len(groups) + 1))


def fleets(largest: int):
    for total in range(1, largest + 1):
        for active in range(1, total + 1):
            for up in subsets(range(total)):
                for draining in subsets(up):
                    yield set(up), set(draining), active


def test_every_small_fleet():
    for up, draining, active in fleets(5):
        targets = plan(up, draining, active)
        case = (up, draining, active, targets)
        assert set(targets) == (up if len(up) > 1 else set()), case
        for source, target in targets.items():
            assert target in up and target != source, case
            lasting = up - draining - {source}
            assert target in lasting or not lasting, case
            # A standby has room to spare: whoever can have one has one.
            standbys = {group for group in lasting or up - {source} if group >= active}
            assert target in standbys or not standbys, case


def test_without_standbys_nobody_keeps_more_than_one():
    for up, draining, active in fleets(6):
        if len(up) > 1 and not draining and max(up) < active:
            assert sorted(plan(up, draining, active).values()) == sorted(up)


def test_load_is_spread_over_standbys():
    for active in range(1, 6):
        for standbys in range(2, 4):
            kept = Counter(plan(range(active + standbys), [], active).values())
            counts = [kept[active + n] for n in range(standbys)]
            assert max(counts) - min(counts) <= 1 and sum(counts) == active + standbys


@pytest.mark.parametrize(
    ("up", "draining", "active", "expected"),
    [
        # all active: a ring, closed around whoever is down
        ([0, 1], [], 2, {0: 1, 1: 0}),
        ([0, 1, 2], [], 3, {0: 1, 1: 2, 2: 0}),
        ([0, 2, 3], [], 4, {0: 2, 2: 3, 3: 0}),
        ([1], [], 2, {}),
        ([], [], 2, {}),
        # a dedicated standby, and one for several
        ([0, 1], [], 1, {0: 1, 1: 0}),
        ([0, 1, 2, 3], [], 3, {0: 3, 1: 3, 2: 3, 3: 0}),
        # one that serves in place of group 0 has a shadow too: at the other standby while there is one
        ([1, 2, 3], [], 2, {1: 2, 2: 3, 3: 2}),
        ([1, 2], [], 2, {1: 2, 2: 1}),
        # who drains keeps nobody's, if there is another
        ([0, 1, 2], [1], 3, {0: 2, 1: 0, 2: 0}),
        ([0, 1, 2], [2], 2, {0: 1, 1: 0, 2: 0}),
        ([0, 1], [1], 2, {0: 1, 1: 0}),
        ([0, 1], [0, 1], 2, {0: 1, 1: 0}),
    ],
)
def test_examples(up, draining, active, expected):
    assert plan(up, draining, active) == expected


@pytest.mark.parametrize(
    ("hosts", "standbys", "expected"),
    [
        ("ab", "", {0: 1, 1: 0}),
        ("aabb", "", {0: 2, 1: 3, 2: 0, 3: 1}),
        ("aaab", "", {0: 3, 1: 3, 2: 3, 3: 0}),
        ("abc", "", {0: 1, 1: 2, 2: 0}),
        # another host before a standby beside it; on another host a standby before one that serves
        ("aab", "1", {0: 2, 1: 2, 2: 1}),
        ("aabb", "13", {0: 3, 1: 3, 2: 1, 3: 1}),
    ],
)
def test_examples_on_several_hosts(hosts, standbys, expected):
    up = {i: Place(str(i), host, standby=str(i) in standbys) for i, host in enumerate(hosts)}
    assert partners(up, [], {}) == expected


def test_who_cannot_be_reached_keeps_nobodys():
    here = {0: Place("0"), 1: Place("1")}
    there = {2: Place("b", "b", local=False), 3: Place("c", "c", local=False, endpoints=("tcp://c:1",))}
    assert partners({**here, **there}, [], {}) == {0: 3, 1: 3, 2: 3}, "of files, others do not know"
    open_here = {0: Place("0", endpoints=("tcp://a:1",)), 1: Place("1")}
    assert partners({**open_here, **there}, [], {}) == {0: 3, 1: 3, 2: 0, 3: 0}
    assert partners(here, [], {}) == {0: 1, 1: 0}


FLEETS = st.dictionaries(st.integers(0, 9), st.tuples(st.sampled_from("abc"), st.booleans(), st.booleans()), max_size=8)


def fleet(drawn) -> tuple[dict[int, Place], set[int]]:
    up = {group: Place(str(group), host, standby=standby) for group, (host, standby, _) in drawn.items()}
    return up, {group for group, (*_, draining) in drawn.items() if draining}


@given(FLEETS, st.dictionaries(st.integers(0, 9), st.integers(0, 9)))
@settings(max_examples=500, deadline=None)
def test_everybody_has_the_best_there_is_for_him_whatever_was_before(drawn, before):
    up, draining = fleet(drawn)
    targets = partners(up, draining, before)
    assert set(targets) == (set(up) if len(up) > 1 else set())
    for source, target in targets.items():
        others = [group for group in up if group != source]
        lasting = [group for group in others if group not in draining] or others
        elsewhere = [group for group in lasting if up[group].host != up[source].host] or lasting
        best = [group for group in elsewhere if up[group].standby] or elsewhere
        assert target in best, (source, targets)
    # With the same groups up it stays.
    assert partners(up, draining, targets) == targets


@given(st.dictionaries(st.integers(0, 5), st.tuples(st.sampled_from("abc"), st.booleans(), st.just(False)), max_size=6))
@settings(max_examples=150, deadline=None)
def test_the_load_is_as_even_as_it_can_be(drawn):
    up, _ = fleet(drawn)
    targets = partners(up, [], {})

    def burden(values) -> int:
        return sum(count**2 for count in Counter(values).values())

    def best(source: int) -> list[int]:
        others = [group for group in up if group != source]
        elsewhere = [group for group in others if up[group].host != up[source].host] or others
        return [group for group in elsewhere if up[group].standby] or elsewhere

    if len(up) > 1:
        assert burden(targets.values()) == min(map(burden, product(*(best(source) for source in targets))))


@given(FLEETS, st.integers(0, 9))
@settings(max_examples=500, deadline=None)
def test_a_group_that_goes_or_comes_moves_few_links(drawn, who):
    """Of groups that are all alike but for their hosts."""
    whole = {group: Place(str(group), host) for group, (host, *_) in drawn.items()}
    some = {group: place for group, place in whole.items() if group != who}
    if who not in whole or len({place.host for place in whole.values()}) != len({p.host for p in some.values()}):
        return  # a host more or less is another matter
    before = partners(whole, [], {})
    after = partners(some, [], before)
    again = partners(whole, [], after)
    kept = Counter(before.values())[who]
    moved = [source for source in after if after[source] != before[source]]
    # Those that it kept, and as many that make room, where they do not find any.
    assert len(moved) <= 2 * kept + 1
    returned = [source for source in after if again[source] != after[source]]
    assert len(returned) <= 2 * Counter(again.values())[who] + 1


def test_no_kv_goes_from_one_version_of_the_software_to_another() -> None:
    up = {number: Place(str(number), version=version) for number, version in enumerate(("1", "1", "2", "2", "3"))}
    assert partners(up, (), {}) == {0: 1, 1: 0, 2: 3, 3: 2}
    assert partners(up, (), {0: 2, 2: 0, 4: 1}) == {0: 1, 1: 0, 2: 3, 3: 2}
