"""The real `control.directory`, `records`, `replication` and `lineage` in the simulated frontends of `frontends_world`.

Replay one run with ``python test/sim/campaign.py --world frontends --seed N``.
"""

from __future__ import annotations

import re
import secrets
from collections import Counter
from collections.abc import Iterator

import frontends_world
import pytest
from frontends_world import World, simulate

from sglang_kevlar.control.directory import Directory
from sglang_kevlar.control.lineage import Lineage

SEEDS = 24
FRESH = 8


def test_clients_get_one_answer_each_whoever_dies() -> None:
    ends: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for seed in range(SEEDS):
        world = simulate(seed)
        ends += world.ends
        counts += world.faults.counts
        if world.gentle:
            # A kill while the others have everything is no reason to refuse anybody.
            assert set(world.ends) == {"done"}
    assert {"kill", "partition", "pause", "connection", "reconnect", "taken up", "abandoned"} <= set(counts)
    assert ends["done"] > 4 * ends["refused"]


def test_a_seed_replays() -> None:
    first, second = simulate(3), simulate(3)
    assert first.faults.happened == second.faults.happened and first.ends == second.ends


def test_fresh_seeds() -> None:
    first = secrets.randbelow(10**9)
    print(f"seeds {first} to {first + FRESH - 1}")
    for seed in range(first, first + FRESH):
        simulate(seed)


# What the invariants are worth: each of these is broken in one place, and must be found out.


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield
    for seed in range(40):
        try:
            simulate(seed)
        except AssertionError as error:
            assert re.search("continued behind|unknown|went on with it before|had sent more|without an end", str(error))
            return
    pytest.fail("not noticed")


def test_an_output_that_is_told_before_its_peers_have_it(caught: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontends_world.SimFrontend, "is_safe", lambda self, position: True)


def test_a_client_continued_behind_whatever_it_has(caught: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Lineage, "shares", lambda self, tag, point: True)


def test_a_frontend_that_starts_and_does_not_ask_what_others_have(
    caught: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Directory.__init__

    def without_expectations(self: Directory, name, tag, expected, now, patience) -> None:
        init(self, name, tag, (), now, patience)

    monkeypatch.setattr(Directory, "__init__", without_expectations)


def test_nobody_who_goes_on_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests of a lost frontend run on before their clients are back."""
    taken = [world.faults.counts["taken up"] for world in map(simulate, range(4))]
    assert all(taken)
    monkeypatch.setattr(Directory, "lost", _lost_and_leave_it(Directory.lost))
    assert not any(world.faults.counts["taken up"] for world in map(simulate, range(4)))


def _lost_and_leave_it(lost):
    def lose(self: Directory, name: str, now: float) -> list:
        lost(self, name, now)
        return []

    return lose


def test_the_world_has_both_sizes_and_both_weathers() -> None:
    worlds = [World(seed) for seed in range(4)]
    assert {(world.size, world.gentle) for world in worlds} == {(2, True), (3, True), (2, False), (3, False)}
