"""Which group gets a request."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_kevlar.control import routing
from sglang_kevlar.control.routing import BLOCK, IMBALANCE_REQUESTS, Router, block_hashes


def router(groups: int = 2, capacity: int = 1000) -> Router:
    made = Router()
    for group in range(groups):
        made.add(group, epoch=1, capacity_tokens=capacity)
    return made


def tokens(blocks: int, seed: int = 0) -> list[int]:
    return [seed * 1000 + i for i in range(blocks * BLOCK)]


def prompt(blocks: int, seed: int = 0, namespace: str = "") -> array[int]:
    return block_hashes(tokens(blocks, seed), namespace)


def test_no_group_no_choice():
    assert Router().choose([]) is None
    assert not Router().has_room(0)


def test_least_busy_by_tokens_then_requests():
    r = router(3)
    r.started(0, 50, [])
    r.started(1, 20, [])
    r.started(2, 10, [])
    r.started(2, 10, [])
    assert r.choose([]) == 1
    r.finished(2, 1, 10)
    assert r.choose([]) == 2


def test_a_cached_prefix_is_followed():
    r = router()
    r.started(1, 10, prompt(3))
    assert r.choose(prompt(3)) == 1
    assert r.choose(prompt(5)) == 1
    assert r.choose(prompt(2)) == 1
    assert r.choose(prompt(3, seed=1)) == 0
    assert r.choose(block_hashes(tokens(1)[:-1])) == 0  # less than a block is not remembered


def test_the_longest_prefix_wins():
    r = router(3)
    r.started(1, 10, prompt(1))
    r.started(2, 10, prompt(4))
    assert r.choose(prompt(4)) == 2


def test_a_later_block_alone_is_no_prefix():
    assert block_hashes(tokens(2)[BLOCK:]) != block_hashes(tokens(2))[1:]


def test_namespaces_are_kept_apart():
    r = router()
    r.started(1, 10, prompt(3, namespace="lora"))
    assert r.choose(prompt(3, namespace="lora")) == 1
    assert r.choose(prompt(3)) == 0


def test_a_full_group_is_not_followed_while_another_has_room():
    r = router(capacity=100)
    r.started(1, 80, prompt(1))
    assert r.choose(prompt(1), tokens=20) == 1
    assert r.choose(prompt(1), tokens=21) == 0
    r.started(0, 79, [])
    assert r.choose(prompt(1), tokens=30) == 1  # it would have to wait there, too


def test_a_much_busier_group_is_not_followed():
    r = router()
    for _ in range(IMBALANCE_REQUESTS):
        r.started(1, 1, prompt(1))
    assert r.choose(prompt(1)) == 1
    r.started(1, 1, prompt(1))
    assert r.choose(prompt(1)) == 0
    for _ in range(3 * IMBALANCE_REQUESTS):  # the same difference between two busy groups is little
        r.started(0, 1, [])
        r.started(1, 1, [])
    assert r.choose(prompt(1)) == 1


def test_spread_ignores_prefixes():
    r = router()
    r.started(1, 10, prompt(3))
    assert r.choose(prompt(3), spread=True) == 0


def test_finished_of_another_epoch_or_a_gone_group_changes_nothing():
    r = router()
    r.started(0, 10, [])
    r.remove(0)
    r.finished(0, 1, 10)
    r.add(0, epoch=2, capacity_tokens=1000)
    r.finished(0, 1, 10)
    assert (r.groups[0].requests, r.groups[0].tokens) == (0, 0)
    r.remove(5)
    with pytest.raises(AssertionError):
        r.add(0, 3, 1000)
    with pytest.raises(AssertionError):
        r.finished(0, 2, 10)


def test_room_is_in_one_group_not_in_the_sum():
    r = router(2, capacity=100)
    r.started(0, 60, [])
    r.started(1, 60, [])
    assert r.has_room(40)
    assert not r.has_room(41)


def test_only_groups_with_the_weights_of_a_request_are_asked():
    r = router()
    r.started(0, 10, [])
    r.set_weights(0, "new")
    assert r.choose([]) == 1 and r.choose([], weights="new") == 0 and r.choose([], weights="gone") is None
    assert set(r.having("new")) == {0} and 0 not in r.having("")
    assert not r.has_room(0, "gone") and r.has_room(0, "new")
    r.add(9, 1, 5, "new")
    assert r.has_room(1 << 40, "new"), "an idle one takes any"
    r.started(9, 5, [])
    assert not r.has_room(1 << 40, "new")


def test_an_heir_with_other_weights_has_nothing_of_it():
    r = router()
    r.started(1, 10, prompt(3))
    r.set_weights(0, "new")
    r.remove(1, heir=0)
    assert not r.groups[0].blocks


def test_what_was_cached_of_other_weights_is_forgotten():
    r = router()
    r.started(1, 10, prompt(3))
    for group in list(r.groups):
        r.set_weights(group, "new")
    assert r.choose(prompt(3), weights="new") == 0


def test_memory_is_bounded_and_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(routing, "BLOCKS_PER_GROUP", 4)
    r = router()
    r.started(1, 1, prompt(2, seed=1))
    r.started(1, 1, prompt(2, seed=2))
    r.started(1, 1, prompt(2, seed=1))  # used again: now the youngest
    r.started(1, 1, prompt(2, seed=3))
    assert len(r.groups[1].blocks) == 4
    assert r.choose(prompt(2, seed=1)) == 1
    assert r.choose(prompt(2, seed=2)) == 0


calls = st.one_of(
    st.tuples(st.just("start"), st.integers(0, 3), st.integers(1, 50), st.integers(0, 2)),
    st.tuples(st.just("finish"), st.integers(0, 30)),
    st.tuples(st.just("add"), st.integers(0, 3)),
    st.tuples(st.just("remove"), st.integers(0, 3)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(calls, max_size=50), st.booleans(), st.integers(0, 2))
def test_loads_are_those_of_what_runs(script, spread, seed):
    r = Router()
    epochs = dict.fromkeys(range(4), 0)
    work: list[tuple[int, int, int]] = []
    for kind, *rest in script:
        if kind == "start" and rest[0] in r.groups:
            r.started(rest[0], rest[1], prompt(2, rest[2]))
            work.append((rest[0], r.groups[rest[0]].epoch, rest[1]))
        elif kind == "finish" and work:
            r.finished(*work.pop(rest[0] % len(work)))
        elif kind == "add" and rest[0] not in r.groups:
            epochs[rest[0]] += 1
            r.add(rest[0], epochs[rest[0]], 100)
        elif kind == "remove":
            r.remove(rest[0])
        for group, load in r.groups.items():
            mine = [tokens for g, epoch, tokens in work if (g, epoch) == (group, load.epoch)]
            assert (load.requests, load.tokens) == (len(mine), sum(mine))
        chosen = r.choose(prompt(2, seed), spread=spread)
        assert (chosen in r.groups) if r.groups else (chosen is None)
        if chosen is not None and spread:
            assert r.groups[chosen].tokens == min(load.tokens for load in r.groups.values())
