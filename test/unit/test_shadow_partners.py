"""Who keeps whose shadow: over every small fleet, and the cases that operators think in."""

from __future__ import annotations

from itertools import chain, combinations

import pytest

from sglang_kevlar.control.shadow_partners import partners


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
        targets = partners(up, draining, active)
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
            targets = partners(up, draining, active)
            assert sorted(targets.values()) == sorted(up)


def test_load_is_spread_over_standbys():
    for active in range(1, 6):
        for standbys in range(1, 4):
            targets = partners(range(active + standbys), [], active)
            kept = [[targets[source] for source in range(active)].count(active + n) for n in range(standbys)]
            assert max(kept) - min(kept) <= 1


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
        ([1, 2, 3], [], 2, {1: 3, 2: 3, 3: 2}),
        ([1, 2], [], 2, {1: 2, 2: 1}),
        # who drains keeps nobody's, if there is another
        ([0, 1, 2], [1], 3, {0: 2, 1: 2, 2: 0}),
        ([0, 1, 2], [2], 2, {0: 1, 1: 0, 2: 0}),
        ([0, 1], [1], 2, {0: 1, 1: 0}),
        ([0, 1], [0, 1], 2, {0: 1, 1: 0}),
    ],
)
def test_examples(up, draining, active, expected):
    assert partners(up, draining, active) == expected
